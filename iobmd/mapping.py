"""`IOMemoryMap`: a descriptor's memory at further addresses, in this process."""

from __future__ import annotations

import errno
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self, SupportsIndex

from iobmd import own
from iobmd._native import memory
from iobmd._native.mapping import Exporter
from iobmd.constants import IOMapOptions, IOReturn
from iobmd.errors import IOReturnError
from iobmd.request import unsupported
from iobmd.units import PAGE_SIZE, round_down, round_up

if TYPE_CHECKING:
    import weakref

    from iobmd._native.mapping import Mapping
    from iobmd.backing import Backing
    from iobmd.task import Task

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
    _guard: own.Guard

    def _memory(self) -> Backing: ...

    def getLength(self) -> int:
        """Return the length in bytes."""

    def getPhysicalSegment(self, offset: int, options: int = 0) -> tuple[int, int]:
        """Return the physical address of a byte, and how many are contiguous from there on."""


class Place:
    """What part of a memory is to be mapped, where and how; checked."""

    def __init__(self, at_address: int, options: int, offset: int, length: int) -> None:
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
        self.first = round_down(offset, PAGE_SIZE)
        self.size = round_up(offset + length, PAGE_SIZE) - self.first
        self.at = 0 if self.anywhere else at_address - (offset - self.first)
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
    """Pages of a memory at addresses of this process: those of the descriptor itself, or a mapping of its own."""

    def __init__(self, descriptor: Descriptor, place: Place, own_mapping: Mapping | None) -> None:
        self.descriptor = descriptor
        self.place = place
        self.own = own_mapping
        self.users: set[int] = set()
        self.first = place.first if own_mapping else 0
        """Offset in the memory of the first byte that is mapped here."""

    @property
    def mapping(self) -> Mapping:
        """The mapping that shows it."""
        return self.own or self.descriptor._memory().mapping

    def serves(self, place: Place) -> bool:
        """Say whether what is asked for is here already, as IOKit has it."""
        if self.own is None or not self.users or self.place.unique or place.unique:
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


_changes = own.Guard()  # of who uses which window
_abandoned: deque[tuple[Window, int]] = deque()  # uses that a garbage collection ended in the middle of a change


def open_map(descriptor: Descriptor, place: Place) -> IOMemoryMap:
    """Map a part of a descriptor, with its guard held: by a window that there is already, or a new one."""
    with _changes:
        _end_abandoned()
        known = [window for window in list(descriptor._windows) if window.serves(place)]
        window = known[0] if known else _open_window(descriptor, descriptor._memory(), place)
        descriptor._windows.add(window)
        return IOMemoryMap(window, place)


def uses(descriptor: Descriptor) -> int:
    """Return how many maps show memory of a descriptor."""
    with _changes:
        _end_abandoned()
        return sum(len(window.users) for window in list(descriptor._windows))


def _end_abandoned() -> None:
    while _abandoned:
        window, user = _abandoned.popleft()
        window.let_go(user)


def _open_window(descriptor: Descriptor, backing: Backing, place: Place) -> Window:
    """Map pages of a memory, or take the addresses it has, where those will do: IOKit's static mapping."""
    if place.anywhere and not place.unique:
        window = Window(descriptor, place, None)
    else:
        mapped = backing.view(place.first, place.size, place.at, place.writable, place.guard)
        window = Window(descriptor, place, mapped)
    if place.options & _PREFAULT:
        _prefault(window.mapping.address + place.first - window.first, place)
    return window


def _prefault(address: int, place: Place) -> None:
    advice = memory.MADV_POPULATE_WRITE if place.writable else memory.MADV_POPULATE_READ
    try:
        memory.advise(address, place.size, advice)
    except OSError as error:
        if error.errno == errno.EINVAL:  # before Linux 5.14: the pages come when they are touched
            return
        message = f"cannot fault {place.size} bytes in ahead of time ({error}); leave kIOMapPrefault out"
        raise IOReturnError(IOReturn.kIOReturnNoMemory, message, error.errno or 0) from None


class IOMemoryMap(Exporter):
    """A descriptor's memory, or a part of it, mapped in this process, until `unmap` or the end of `with`.

    Made by `IOMemoryDescriptor.map` and `createMappingInTask`. It keeps its descriptor alive, which cannot be freed
    before it is unmapped. It has the buffer protocol over its bytes, read-only if it was asked for so.

    Source: IOKit's IOMemoryMap (IOMemoryDescriptor.h).
    """

    def __init__(self, window: Window, place: Place) -> None:
        self._window: Window | None = window
        self._options = place.options
        self._length = place.length
        self._writable = place.writable
        self._within = place.offset - window.first
        window.users.add(id(self))

    def getAddress(self) -> int:
        """Return the address of its first byte."""
        return self._open().mapping.address + self._within

    getVirtualAddress = getAddress

    def getLength(self) -> int:
        """Return its length in bytes."""
        self._open()
        return self._length

    getSize = getLength

    def getAddressTask(self) -> Task:
        """Return the task it is mapped in."""
        return self._open().descriptor._memory().task

    def getMemoryDescriptor(self) -> Any:
        """Return the `IOMemoryDescriptor` whose memory it shows."""
        return self._open().descriptor

    def getMapOptions(self) -> IOMapOptions:
        """Return the options it was made with."""
        return IOMapOptions(self._options)

    def getPhysicalSegment(self, offset: int) -> tuple[int, int]:
        """Return the physical address of its byte `offset`, and how many bytes from there on are contiguous.

        `(0, 0)` past its end. Raises as `IOMemoryDescriptor.segments`.
        """
        window = self._open()
        place = window.first + self._within + offset
        address, length = window.descriptor.getPhysicalSegment(place)
        if not 0 <= offset < self._length:
            return 0, 0
        return address, min(length, self._length - offset)

    def getPhysicalAddress(self) -> int:
        """Return the physical address of its first byte. Raises as `IOMemoryDescriptor.segments`."""
        return self.getPhysicalSegment(0)[0]

    def redirect(self, newBackingMemory: Descriptor, options: int = 0, offset: int = 0) -> None:
        """Show other memory at the same addresses, for everybody who has this mapping: in one step.

        Parameters
        ----------
        newBackingMemory : IOMemoryDescriptor
            Shared memory (`kIOMemoryKernelUserShared`); it cannot be freed before the map is unmapped, and the memory
            shown before can.
        options : int
            None are known.
        offset : int
            Of the byte to show at the map's first one, in bytes; both have the same place in a page.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`; `kIOReturnUnsupported`: private memory, or a map at the addresses of its own
            descriptor (ask for a unique one).
        """
        window = self._open()
        if options:
            raise _bad(f"redirect options {options:#x} are not known")
        if window.own is None:
            raise IOReturnError(
                IOReturn.kIOReturnUnsupported,
                "this map has the addresses of its descriptor, which keep their memory: map it with kIOMapUnique",
            )
        first = offset - self._within
        if first % PAGE_SIZE or first < 0:
            raise _bad(
                f"offset {offset} has another place in a page than the map, or other maps need what is before it"
            )
        backing = newBackingMemory._memory()
        if first + window.own.size > backing.size or offset + self._length > newBackingMemory.getLength():
            raise _bad(f"the new memory has not as many bytes from offset {offset} on")
        with newBackingMemory._guard, _changes:
            backing = newBackingMemory._memory()
            backing.show_in(window.own, first)
            window.descriptor._windows.discard(window)
            newBackingMemory._windows.add(window)
            window.descriptor, window.first = newBackingMemory, first

    def unmap(self) -> None:
        """End it; idempotent. The addresses go when nobody else has been given them.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while a view of it is alive.
        """
        if self._window is None:
            return
        if self.exports:
            message = f"{self!r} is in use ({self.exports} views): release its memoryviews and arrays first"
            raise IOReturnError(IOReturn.kIOReturnBusy, message)
        with _changes:
            _end_abandoned()
            self._window.let_go(id(self))
            self._window = None

    def _open(self) -> Window:
        if self._window is None:
            raise IOReturnError(IOReturn.kIOReturnNotOpen, "this IOMemoryMap is unmapped")
        return self._window

    def _exported(self) -> tuple[Mapping, int, int, bool]:
        return self._open().mapping, self._within, self._length, self._writable

    def __len__(self) -> int:
        return self.getLength()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *_error: object) -> None:
        self.unmap()

    def __del__(self) -> None:
        if (window := getattr(self, "_window", None)) is None:
            return
        # It may come in the middle of anything, and waits for nobody: whoever is at it ends this use too.
        _abandoned.append((window, id(self)))
        if _changes.mine:
            return
        try:
            if _changes.enter_if_free():
                _end_abandoned()
        finally:
            _changes.leave()

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError("an IOMemoryMap belongs to its process and cannot be copied or pickled")

    def __repr__(self) -> str:
        if self._window is None:
            return "<IOMemoryMap unmapped>"
        how = "read-write" if self._writable else "read-only"
        return (
            f"<IOMemoryMap at {self.getAddress():#x}, length {self._length}, {how}, of {self._window.descriptor!r}>"
        )


def _bad(message: str) -> IOReturnError:
    return IOReturnError(IOReturn.kIOReturnBadArgument, message)
