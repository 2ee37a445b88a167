"""Windows: pages of a descriptor's memory at addresses of a task, which several maps may share."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Protocol

from iobmd._native import memory
from iobmd._native.mapping import Mapping
from iobmd.constants import IOMapOptions, IOReturn
from iobmd.descriptors.options import unsupported
from iobmd.errors import CannotWireError, IOReturnError, UnsupportedError
from iobmd.memory import pinning, residency, shmem
from iobmd.memory.populate import populate
from iobmd.remote.sharing import RemoteMapping, touch
from iobmd.units import PAGE_SIZE, round_up

if TYPE_CHECKING:
    import weakref

    from iobmd._internal import process_local
    from iobmd.backing import Backing
    from iobmd.task.task import Task

ANYWHERE = int(IOMapOptions.kIOMapAnywhere)
_READ_ONLY = int(IOMapOptions.kIOMapReadOnly)
_UNIQUE = int(IOMapOptions.kIOMapUnique)
_PREFAULT = int(IOMapOptions.kIOMapPrefault)
_SMALL, _LARGE = int(IOMapOptions.kIOMapGuardedSmall), int(IOMapOptions.kIOMapGuardedLarge)
_CACHE_MASK = 0xF00
_GUARDS = {0: 0, _SMALL: PAGE_SIZE, _LARGE: round_up(64 << 10, PAGE_SIZE)}
_KNOWN = (
    ANYWHERE | _READ_ONLY | int(IOMapOptions.kIOMapReference) | _UNIQUE | _PREFAULT | _CACHE_MASK | _SMALL | _LARGE
)


class Descriptor(Protocol):
    """What a map needs of an `IOMemoryDescriptor`."""

    _windows: weakref.WeakSet[Window]
    _guard: process_local.Guard

    def _memory(self) -> Backing: ...

    def getLength(self) -> int:
        """Return the length in bytes."""

    def getPhysicalSegment(self, offset: int, options: int = 0) -> tuple[int, int]:
        """Return the physical address of a byte, and how many are contiguous from there on."""


class Place:
    """What part of a memory is to be mapped, where and how; checked.

    Offsets count from the memory's first byte, which need not be the first of a page: `first`, that of the first byte
    of the first page, may be negative. `in_page` is the place of the byte `offset` in its page.
    """

    def __init__(self, at_address: int, options: int, offset: int, length: int, in_page: int) -> None:
        self.options, self.offset, self.length = int(options), offset, length
        if self.options & ~_KNOWN:
            raise _bad(f"map options {self.options:#x} have unknown bits {self.options & ~_KNOWN:#x}")
        if self.options & _CACHE_MASK:
            raise unsupported("cache modes of mappings")
        if not length:
            raise _bad("a mapping of no bytes is asked for")
        guarded = self.options & (_SMALL | _LARGE)
        if guarded not in _GUARDS or (guarded and not self.anywhere):
            raise _bad("a mapping is guarded small or large, not both, and anywhere")
        self.guard = _GUARDS[guarded]
        self.first = offset - in_page
        self.size = round_up(in_page + length, PAGE_SIZE)
        self.at = 0 if self.anywhere else at_address - in_page
        if not self.anywhere and (self.at <= 0 or self.at % PAGE_SIZE or self.at + self.size > 1 << 63):
            raise _bad(
                f"offset {offset:#x} cannot be at {at_address:#x}, another place in a page; use kIOMapAnywhere"
            )

    @property
    def anywhere(self) -> bool:
        """Whether any addresses will do."""
        return bool(self.options & ANYWHERE)

    @property
    def unique(self) -> bool:
        """Whether it must have addresses of its own."""
        return bool(self.options & _UNIQUE) or self.guard > 0

    @property
    def writable(self) -> bool:
        """Whether it may be written to there."""
        return not self.options & _READ_ONLY


class Window:
    """Pages of a memory at addresses of a task: those of the descriptor itself, or a mapping of its own."""

    def __init__(
        self, descriptor: Descriptor, task: Task, place: Place, own_mapping: Mapping | RemoteMapping | None
    ) -> None:
        self.descriptor = descriptor
        self.task = task
        self.place = place
        self.offset = place.offset
        self.own = own_mapping
        self.users: set[int] = set()
        self.first = place.first if own_mapping else 0
        """Offset in the memory of what `address` shows, as `Place.first`."""

    @classmethod
    def open(cls, descriptor: Descriptor, task: Task, place: Place) -> Window:
        """Map pages of a memory, or take the addresses it has, where those will do: IOKit's static mapping."""
        backing = descriptor._memory()
        if place.anywhere and not place.unique and backing.task == task:
            return cls(descriptor, task, place, None)
        stretches = backing.stretches(place.offset, place.length)
        if task.is_current:
            here = shmem.show(stretches, place.at, writable=place.writable, guard=place.guard)
            return cls(descriptor, task, place, here)
        there = RemoteMapping(task, stretches, at=place.at, writable=place.writable, guard=place.guard)
        return cls(descriptor, task, place, there)

    @property
    def address(self) -> int:
        """Where it begins, in its task."""
        return self.own.address if self.own else self.descriptor._memory().address

    @property
    def stopped_ns(self) -> int:
        """For how long, at the most, a thread of another task stood still for it."""
        return self.own.stopped_ns if isinstance(self.own, RemoteMapping) else 0

    @property
    def mapping(self) -> tuple[Mapping, int]:
        """The mapping that shows it here, and where in that `first` is.

        Raises `kIOReturnUnsupported` when it is in another task.
        """
        if isinstance(self.own, RemoteMapping):
            message = (
                f"this map is in task {self.task.pid}, and cannot be viewed here: map() gives a view of the memory"
            )
            raise IOReturnError(IOReturn.kIOReturnUnsupported, message)
        return (self.own, 0) if self.own else self.descriptor._memory().exported()

    def serves(self, task: Task, place: Place) -> bool:
        """Say whether what is asked for is here already, as IOKit has it."""
        if self.own is None or not self.users or self.place.unique or place.unique or self.task != task:
            return False
        if self.place.writable != place.writable:
            return False
        if not self.first <= place.first or place.first + place.size > self.first + self.own.size:
            return False
        return place.anywhere or place.at == self.own.address + place.first - self.first

    def let_go(self, user: int) -> None:
        """End one use; the last one unmaps it. Raises BufferError while a view or a copy of it is alive."""
        if self.own and self.users <= {user}:
            self.own.close()
        self.users.discard(user)

    def show(self, descriptor: Descriptor, further: int) -> None:
        """Show other memory, each byte at an offset that is so much larger than it was."""
        assert self.own
        offset, length = self.offset + further, self.place.length
        backing = descriptor._memory()
        if offset < 0 or offset + length > descriptor.getLength():
            raise _bad(f"the new memory has not {length} bytes from offset {offset} on")
        if backing.in_page(offset) != self.offset - self.first:
            raise _bad(f"offset {offset} has another place in a page than what is mapped")
        stretches = backing.stretches(offset, length)
        if isinstance(self.own, RemoteMapping):
            self.own.redirect(stretches)
        else:
            shmem.show_in(self.own, stretches)
        self.descriptor._windows.discard(self)
        descriptor._windows.add(self)
        self.descriptor, self.offset, self.first = descriptor, offset, self.first + further

    def prefault(self, place: Place) -> None:
        """Have every page in place, if that is asked for."""
        if not place.options & _PREFAULT:
            return
        address = self.address + place.first - self.first
        if not self.task.is_current:
            self._populate_here(address, place)
            touch(self.task, address, place.size)
            return
        residency.require(address, place.size, swappable=True, written=place.writable)
        advice = memory.MADV_POPULATE_WRITE if place.writable else memory.MADV_POPULATE_READ
        try:
            memory.advise(address, place.size, advice)
        except OSError as error:
            if error.errno == errno.EINVAL:  # before Linux 5.14
                self._touch(address, place)
                return
            message = f"cannot fault {place.size} bytes in ahead of time ({error}); leave kIOMapPrefault out"
            raise IOReturnError(IOReturn.kIOReturnNoMemory, message, error.errno or 0) from None

    def _populate_here(self, address: int, place: Place) -> None:
        """Have the pages made on this process's account, so that the other task has only to map them."""
        try:
            stretches = self.descriptor._memory().stretches(place.offset, place.length)
        except UnsupportedError:  # the task's own memory
            residency.require(address, place.size, swappable=True, task=self.task, written=False)
            return
        here = shmem.show(stretches)
        try:
            residency.require(here.address, here.size, swappable=True)
            populate(here.address, here.size)
        finally:
            here.close()

    def _touch(self, address: int, place: Place) -> None:
        """Have every page in place as far as it goes, with nothing written that another thread could miss."""
        if place.writable and self.own is None:
            # It may be private: a pin has each page made, where a look maps the kernel's page of zeroes.
            with contextlib.suppress(CannotWireError):
                pinning.Pin(address, place.size).release()
        touch(self.task, address, place.size)


def _bad(message: str) -> IOReturnError:
    return IOReturnError(IOReturn.kIOReturnBadArgument, message)
