"""Parts and concatenations of other descriptors' memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from iobmd._internal.arguments import check_integers
from iobmd.descriptors import memory_map, registrations
from iobmd.descriptors.composite_memory import CompositeBacking
from iobmd.descriptors.descriptor import IOMemoryDescriptor
from iobmd.descriptors.options import (
    DIRECTION_MASK,
    check_descriptor,
    check_direction,
    check_existing,
    check_within,
)
from iobmd.descriptors.ownership import Part
from iobmd.errors import BadArgumentError, BusyError, NoResourcesError

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
        offset, length = check_within(offset, length, parent.getLength(), parent)
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
        asReference: bool = False,
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
            Without effect: IOKit's, whether it may keep the caller's array.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument` for options that apply only to newly allocated memory. `kIOReturnBusy`: the
            previous memory is prepared or mapped.
        """
        if asReference not in (False, True):
            message = f"asReference must be a bool, not {asReference!r}; the number of descriptors is not an argument"
            raise TypeError(message)
        found = list(descriptors)
        for descriptor in found:
            check_descriptor(descriptors=descriptor)
        parts = [Part(owner := one._usable_memory(), 0, owner.length) for one in found]
        self._join(parts, withDirection, next((tag for one in found if (tag := one.getTag())), 0))
        return True


class IOInterleavedMemoryDescriptor(Derived):
    """Portions of several descriptors' memory, which are added one by one and seen as one.

    It is a concatenation, like `IOMultiMemoryDescriptor`, that can be cleared and filled again for each transfer, by
    one thread at a time.

    Source: IOKit's IOInterleavedMemoryDescriptor.h. Wider than IOKit: it can be mapped and read.
    """

    _initializer = "initWithCapacity"
    _capacity = 0
    _count = 0

    @classmethod
    def withCapacity(cls, capacity: int, direction: int) -> Self:
        """Create an empty descriptor for at most `capacity` portions, as `initWithCapacity`."""
        self = cls()
        self.initWithCapacity(capacity, direction)
        return self

    def initWithCapacity(self, capacity: int, direction: int) -> bool:
        """Make it an empty descriptor for at most `capacity` portions. Returns True.

        It may be called again; the previous memory is released as by `free`.

        Parameters
        ----------
        capacity : int
            The maximum number of portions.
        direction : int
            The direction of transfers, and options of existing memory.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: no capacity, or options that apply only to newly allocated memory.
            `kIOReturnBusy`: the previous memory is prepared or mapped.
        """
        check_integers(capacity=capacity)
        if capacity <= 0:
            raise BadArgumentError(f"a capacity of {capacity} portions: there must be at least one")
        self._join([], direction, 0)
        self._capacity, self._count = int(capacity), 0
        return True

    def setMemoryDescriptor(self, descriptor: IOMemoryDescriptor, offset: int, length: int) -> bool:
        """Add a portion of a descriptor's memory at the end. Returns True.

        Parameters
        ----------
        descriptor : IOMemoryDescriptor
            Any descriptor. It may be added repeatedly, and released afterwards.
        offset, length : int
            The portion, in bytes.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while this descriptor is prepared or mapped; `kIOReturnNoResources`: it has as many
            portions as its capacity; `kIOReturnBadArgument`: past the end of the descriptor. After an error, nothing
            is added.
        """
        check_descriptor(descriptor=descriptor)
        parts = self._portions()
        offset, length = check_within(offset, length, descriptor.getLength(), descriptor)
        if self._count == self._capacity:
            raise NoResourcesError(f"{self!r} has {self._count} portions, which is its capacity: clear it first")
        self._join([*parts, Part(descriptor._usable_memory(), offset, length)], self._options, self._tag)
        self._count += 1
        return True

    def clearMemoryDescriptors(self, direction: int = 0) -> None:
        """Complete the memory, if it is prepared, and remove all portions.

        Parameters
        ----------
        direction : int
            The direction of later transfers; 0: as before.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while it is mapped or viewed, or prepared by descriptors of parts of it: nothing changes.
            `kIOReturnBadArgument`.
        """
        direction = check_direction(direction) or self._options & DIRECTION_MASK
        self._portions()
        owner = self._memory()
        registrations.require_none(owner)
        if mapped := memory_map.uses(owner):
            raise BusyError(f"{self!r} is still mapped (map count {mapped}): call unmap() first")
        if owner.pins > self._prepared:
            raise BusyError(f"{self!r} is prepared by descriptors of parts of it: call their complete() first")
        with owner.guard:
            owner.require_unused()  # before the memory is unpinned
        while self._prepared:
            self.complete()
        self._join([], self._options & ~DIRECTION_MASK | direction, 0)
        self._count = 0

    def _portions(self) -> tuple[Part, ...]:
        """Return its parts, adjacent ones joined."""
        backing = self._usable_memory().require_backing()
        assert isinstance(backing, CompositeBacking)
        return backing.parts
