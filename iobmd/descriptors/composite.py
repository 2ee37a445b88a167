"""`IOSubMemoryDescriptor`, `IOMultiMemoryDescriptor`: memory of other descriptors, part of one or all of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from iobmd.descriptors.composite_memory import CompositeBacking
from iobmd.descriptors.descriptor import IOMemoryDescriptor
from iobmd.descriptors.options import check_existing, check_within
from iobmd.descriptors.ownership import Part

if TYPE_CHECKING:
    from collections.abc import Iterable


class Derived(IOMemoryDescriptor):
    """Memory of other descriptors, which it keeps: freed, those go with the last that is made of them.

    What is done to it is done to them: `prepare` and `complete` are passed on, each time; `setPurgeable` sets the
    state of all of their memory, and `getPageCounts` counts all of it. It need not be freed: it releases them when
    it is collected.
    """

    @classmethod
    def _of(cls, parts: list[Part], options: int, tag: int) -> Self:
        self = cls()._hold(CompositeBacking(parts), check_existing(options), sum(part.length for part in parts))
        self._tag = tag
        return self


class IOSubMemoryDescriptor(Derived):
    """A part of another descriptor's memory.

    Source: IOKit's IOSubMemoryDescriptor.h.
    """

    @classmethod
    def withSubRange(cls, of: IOMemoryDescriptor, offset: int, length: int, options: int) -> Self:
        """Describe `length` bytes of a descriptor's memory from `offset` on.

        Parameters
        ----------
        of : IOMemoryDescriptor
            Any: also a part itself, or several.
        offset, length : int
            In bytes, any.
        options : int
            The direction of transfers.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: past the end, or options that only new memory can have.
        """
        check_within(offset, length, of.getLength(), of)
        return cls._of([Part(of._memory(), offset, length)], options, of.getTag())


class IOMultiMemoryDescriptor(Derived):
    """All of several descriptors' memory, one behind the other.

    It can be mapped as one range of addresses when all of it is shared, and each but the first begins, and each but
    the last ends, with a page.

    Source: IOKit's IOMultiMemoryDescriptor.h. Wider than IOKit: the directions of the descriptors may differ from its
    own, and some may be pageable and others not.
    """

    @classmethod
    def withDescriptors(
        cls,
        descriptors: Iterable[IOMemoryDescriptor],
        withDirection: int,
        asReference: bool = False,  # noqa: ARG003 (IOKit's: whether it may keep the caller's array)
    ) -> Self:
        """Describe the memory of `descriptors` as it is now: with the lengths they have now.

        Parameters
        ----------
        descriptors : iterable of IOMemoryDescriptor
            Any, also the same one repeatedly.
        withDirection : int
            The direction of transfers.
        asReference : bool
            Of no effect, kept for ports.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument` for options that only new memory can have.
        """
        found = list(descriptors)
        parts = [Part(owner := one._memory(), 0, owner.length) for one in found]
        return cls._of(parts, withDirection, next((tag for one in found if (tag := one.getTag())), 0))
