"""`IOSubMemoryDescriptor` and `IOMultiMemoryDescriptor`: a part, or a concatenation, of other descriptors' memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from iobmd.descriptors.composite_memory import CompositeBacking
from iobmd.descriptors.descriptor import IOMemoryDescriptor
from iobmd.descriptors.options import check_descriptor, check_existing, check_within
from iobmd.descriptors.ownership import Part

if TYPE_CHECKING:
    from collections.abc import Iterable


class Derived(IOMemoryDescriptor):
    """Memory of other descriptors, which it retains until the last dependent is released.

    Operations apply to those descriptors: each `prepare` and `complete` is passed on, `setPurgeable` sets the state
    of all their memory, and `getPageCounts` counts all of it. It need not be freed: garbage collection releases them.
    """

    def _join(self, parts: list[Part], options: int, tag: int) -> None:
        """Initialize it with parts of other memory, instead of the present ones."""
        self._hold(CompositeBacking(parts), check_existing(options), sum(part.length for part in parts))
        self._tag = tag


class IOSubMemoryDescriptor(Derived):
    """A part of another descriptor's memory.

    Source: IOKit's IOSubMemoryDescriptor.h.
    """

    _initializer = "initSubRange"

    @classmethod
    def withSubRange(cls, of: IOMemoryDescriptor, offset: int, length: int, options: int) -> Self:
        """Describe `length` bytes of a descriptor's memory, starting at `offset`, as `initSubRange`."""
        self = cls()
        self.initSubRange(of, offset, length, options)
        return self

    def initSubRange(self, parent: IOMemoryDescriptor, offset: int, length: int, withDirection: int) -> bool:
        """Describe `length` bytes of a descriptor's memory, starting at `offset`. Returns True.

        It may be called again, as in IOKit; the previous memory is released as by `free`.

        Parameters
        ----------
        parent : IOMemoryDescriptor
            Any descriptor, including parts and concatenations.
        offset, length : int
            In bytes.
        withDirection : int
            The direction of transfers, and options of existing memory.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: past the end, or options that apply only to newly allocated memory.
            `kIOReturnBusy`: the previous memory is prepared or mapped.
        """
        check_descriptor(of=parent)
        check_within(offset, length, parent.getLength(), parent)
        self._join([Part(parent._memory(), offset, length)], withDirection, parent.getTag())
        return True


class IOMultiMemoryDescriptor(Derived):
    """The concatenated memory of several descriptors.

    It can be mapped as one range of addresses if all of it is shared and its parts meet at page boundaries.

    Source: IOKit's IOMultiMemoryDescriptor.h. Wider than IOKit: the directions of the descriptors may differ from its
    own, and some may be pageable and others not.
    """

    _initializer = "initWithDescriptors"

    @classmethod
    def withDescriptors(
        cls, descriptors: Iterable[IOMemoryDescriptor], withDirection: int, asReference: bool = False
    ) -> Self:
        """Describe the memory of `descriptors`, with their present lengths, as `initWithDescriptors`."""
        self = cls()
        self.initWithDescriptors(descriptors, withDirection, asReference)
        return self

    def initWithDescriptors(
        self,
        descriptors: Iterable[IOMemoryDescriptor],
        withDirection: int,
        asReference: bool = False,  # noqa: ARG002 (IOKit's: whether it may keep the caller's array)
    ) -> bool:
        """Describe the memory of `descriptors`, with their present lengths. Returns True.

        It may be called again; the previous memory is released as by `free`.

        Parameters
        ----------
        descriptors : iterable of IOMemoryDescriptor
            Any descriptors; the same one may occur repeatedly.
        withDirection : int
            The direction of transfers, and options of existing memory.
        asReference : bool
            Ignored; accepted for ports.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument` for options that apply only to newly allocated memory. `kIOReturnBusy`: the
            previous memory is prepared or mapped.
        """
        found = list(descriptors)
        for descriptor in found:
            check_descriptor(descriptors=descriptor)
        parts = [Part(owner := one._usable_memory(), 0, owner.length) for one in found]
        self._join(parts, withDirection, next((tag for one in found if (tag := one.getTag())), 0))
        return True
