"""`IOMemoryMap`: a descriptor's memory at further addresses, of this process or another."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn, Self, SupportsIndex

from iobmd._internal import process_local
from iobmd._native.mapping import Exporter
from iobmd.constants import IOMapOptions, IOReturn
from iobmd.descriptors.mapping_cache import Descriptor, Place, Window
from iobmd.errors import IOReturnError

if TYPE_CHECKING:
    from iobmd._native.mapping import Mapping
    from iobmd.task.task import Task

_changes = process_local.Guard()  # of who uses which window
_abandoned: deque[tuple[Window, int]] = deque()  # uses that a garbage collection ended in the middle of a change


def open_map(descriptor: Descriptor, task: Task, place: Place) -> IOMemoryMap:
    """Map a part of a descriptor, with its guard held: by a window that there is already, or a new one."""
    with _changes:
        _end_abandoned()
        known = [window for window in list(descriptor._windows) if window.serves(task, place)]
        window = known[0] if known else Window.open(descriptor, task, place)
        descriptor._windows.add(window)
        window.prefault(place)
        return IOMemoryMap(window, place)


def uses(descriptor: Descriptor) -> int:
    """Return how many maps show memory of a descriptor."""
    with _changes:
        _end_abandoned()
        return sum(len(window.users) for window in list(descriptor._windows))


def windows(descriptor: Descriptor) -> list[Window]:
    """Return where a descriptor's memory is mapped besides its own addresses."""
    with _changes:
        return [window for window in list(descriptor._windows) if window.own]


def _end_abandoned() -> None:
    later = []
    while _abandoned:
        window, user = _abandoned.popleft()
        try:
            window.let_go(user)
        except IOReturnError as error:  # in another task, which cannot be stopped now, or not any more
            if error.code == IOReturn.kIOReturnBusy:
                later.append((window, user))
        except BufferError:  # a view is garbage of the same cycle: the mapping goes with it
            window.users.discard(user)
    _abandoned.extend(later)


class IOMemoryMap(Exporter):
    """A descriptor's memory, or a part of it, mapped in a task, until `unmap` or the end of `with`.

    Made by `IOMemoryDescriptor.map` and `createMappingInTask`. It keeps its descriptor alive, which cannot be freed
    before it is unmapped. In this process it has the buffer protocol over its bytes, read-only if asked for so.

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
        return self._open().address + self._within

    getVirtualAddress = getAddress

    def getLength(self) -> int:
        """Return its length in bytes."""
        self._open()
        return self._length

    getSize = getLength

    def getAddressTask(self) -> Task:
        """Return the task it is mapped in."""
        return self._open().task

    @property
    def task_stopped_ns(self) -> int:
        """For how many nanoseconds, at the most, a thread of its task stood still for the mapping; 0 in this one."""
        return self._open().stopped_ns

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
        if offset < 0 or offset + self._length > newBackingMemory.getLength():
            raise _bad(f"the new memory has not {self._length} bytes from offset {offset} on")
        with newBackingMemory._guard, _changes:
            window.show(newBackingMemory, offset - window.first - self._within)

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
            if window := self._window:  # again: another thread may have unmapped it
                window.let_go(id(self))
                self._window = None

    def _open(self) -> Window:
        window = self._window  # once, as above
        if window is None:
            raise IOReturnError(IOReturn.kIOReturnNotOpen, "this IOMemoryMap is unmapped")
        return window

    def _exported(self) -> tuple[Mapping, int, int, bool]:
        mapping, first = self._open().mapping
        return mapping, first + self._within, self._length, self._writable

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
        window = self._window
        if window is None:
            return "<IOMemoryMap unmapped>"
        how = "read-write" if self._writable else "read-only"
        address = window.address + self._within
        return f"<IOMemoryMap at {address:#x}, length {self._length}, {how}, of {window.descriptor!r}>"


def _bad(message: str) -> IOReturnError:
    return IOReturnError(IOReturn.kIOReturnBadArgument, message)
