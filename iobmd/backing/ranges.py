"""Existing memory of a task that is not shared: a range of its addresses, with any offset in a page."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from iobmd import pagemap, procfs
from iobmd._native.mapping import FaultError, Mapping
from iobmd.backing.contents import CopyOf, FrozenCopyOf, copied
from iobmd.backing.mapped import private, span
from iobmd.backing.pinned import Pinned
from iobmd.errors import CannotWireError, IOReturnError, UnsupportedError
from iobmd.memory import pinning, residency
from iobmd.memory.mlock import Wiring
from iobmd.pagemap.self import resident_and_dirty, visible_runs
from iobmd.remote import areas
from iobmd.remote.pin import RemotePin
from iobmd.task import diagnosis, obstacles
from iobmd.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from typing_extensions import Buffer

    from iobmd._native.pagemap import RunTable
    from iobmd.backing.pinned import Pin
    from iobmd.memory.shmem import FileExtent, SharedObject
    from iobmd.purgeable import Purgeable
    from iobmd.task.task import Task


class RangeBacking(Pinned):
    """`length` bytes at `address` of a task, which maps and unmaps them itself.

    Parameters
    ----------
    task, address, length
        The task, the address, and the number of bytes.
    writable : bool
        Whether the memory must be writable.

    Raises
    ------
    IOReturnError
        `kIOReturnVMError`: a byte is not mapped, or not accessible. `kIOReturnNotPermitted`, `kIOReturnNotFound`.
    """

    composite = False
    purgeable: Purgeable | None = None
    shared: SharedObject | None = None
    stopped_ns = 0

    def __init__(self, task: Task, address: int, length: int, *, writable: bool) -> None:
        self.task = task
        self.address = address
        self.length = length
        self.size = span(address % PAGE_SIZE, length)
        self._first = address - address % PAGE_SIZE
        self._seen: Mapping | None = None
        self._require(writable=writable)

    def _require(self, *, writable: bool) -> None:
        """Check that all of it is mapped and readable, and with `writable` also writable."""
        end = self.address + self.length
        found = areas.overlapping(self.task, self.address, end)
        for permission in "rw" if writable else "r":
            bad = procfs.uncovered(found, self.address, end, permission)
            if bad < end:
                raise diagnosis.unreadable(self.task.pid, max(bad, self.address), write=permission == "w")

    def pin(self) -> None:
        """Pin its pages, or lock them if those of another task cannot be pinned.

        Raises
        ------
        IOReturnError
            As `pinning.Pin` and `pin.RemotePin`; `.address` is the first byte that cannot be pinned;
            `kIOReturnNoMemory`: the task's memory cgroup has no room for the absent pages.
        """
        residency.require(self._first, self.size, swappable=False, task=self.task)
        if self.task.is_current:
            try:
                pin: Pin = pinning.Pin(self._first, self.size)
            except IOReturnError as error:
                if error.address is not None:  # it may precede the first byte, in the same page
                    error.address = max(error.address, self.address)
                raise
            self._hold_pin(pin)
            return
        try:
            pin = RemotePin(self.task, self._first, self.size)
        except CannotWireError:
            self._require_wirable()
            raise
        try:
            if not pin.holds_frames:
                self._require_locked()
        except BaseException:
            pin.release()
            raise
        self._hold_pin(pin)

    def _require_wirable(self, *, pin: bool = True) -> None:
        found = None
        with contextlib.suppress(OSError):  # the task has exited or is hidden: the first error is more informative
            found = obstacles.find(self.task.pid, self.address, self.address + self.length, pin=pin)
        if found:
            what = f"cannot {'pin' if pin else 'lock'} {format_size(self.size)} of task {self.task.pid}"
            raise found.kind(f"{what}: {found}", 0, found.address) from None

    def _require_locked(self) -> None:
        """Check that locked pages are in memory: mlock(2) skips devices, and memory that is locked on fault."""
        self._require_wirable(pin=False)
        resident = self.page_counts()[0] * PAGE_SIZE
        if resident < self.size:
            message = f"cannot keep {format_size(self.size)} of task {self.task.pid}: {resident} bytes are resident"
            raise CannotWireError(message)

    def lost(self) -> int | None:
        """Return the first address that its task no longer maps, or None. Raises as `RangeBacking`."""
        end = self.address + self.length
        bad = procfs.uncovered(areas.overlapping(self.task, self.address, end), self.address, end, "r")
        return bad if bad < end else None

    def read_runs(self, *, gaps: bool = False) -> RunTable | None:
        """Read the present physical runs of its pages; None if the kernel hides them."""
        if self.task.is_current:
            return pinning.visible_runs(self._first, self.size, gaps=gaps)
        return visible_runs(self.task, self._first, self.size)

    @property
    def wiring(self) -> Wiring:
        """The wiring by this descriptor; its task may have wired it as well."""
        pin = self._pin  # read once: another thread may release it
        if pin and pin.holds_frames:
            return Wiring.PINNED
        return Wiring.RESIDENT if pin and pin.holds_pages else Wiring.PAGEABLE

    def huge_bytes(self) -> int:
        """Count the bytes of its pages that are mapped by huge pages."""
        return pagemap.huge_bytes(self._first, self.size, self.task)

    def page_counts(self) -> tuple[int, int]:
        """Count the pages that are resident, and those of them that were written to."""
        return resident_and_dirty(self.task, self._first, self.size)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes, starting at `offset`. Raises as `Task.read`."""
        return self.task.read(self.address + offset, length)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes at `offset`. Raises as `Task.read`."""
        self.task.readinto(self.address + offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`. Raises as `Task.write`."""
        self.task.write(self.address + offset, data)

    def copy_to(self, offset: int, length: int, destination: int) -> int:
        """Copy bytes to zeroed memory of this process, as of one moment if they are in another task."""
        kind = CopyOf if self.task.is_current else FrozenCopyOf
        return copied(kind(self.task, self.address + offset, length), destination)

    def here(self, *, populated: bool = False) -> AbstractContextManager[Mapping]:  # noqa: ARG002 (the protocol's)
        """Return a context with its pages, if its task is this process."""
        self._require_here("is not mapped here")
        return contextlib.nullcontext(Mapping.borrow(self._first, self.size, False))

    def write_back(self, offset: int, length: int, *, drop: bool) -> None:
        """Write the cache lines of a range back to memory, which requires addresses of this process."""
        self._require_here("its cache lines cannot be flushed from here")
        try:
            Mapping.borrow(self.address, self.length, False).write_back(offset, length, drop)
        except FaultError as error:
            raise diagnosis.unreachable(error) from None

    def _require_here(self, else_: str) -> None:
        if not self.task.is_current:
            message = f"this memory is in task {self.task.pid}, and {else_}"
            raise UnsupportedError(message)

    def exported(self) -> tuple[Mapping, int]:
        """Return its mapping, if its task is this process."""
        self._require_here("cannot be viewed here")
        if self._seen is None:
            end = self.address + self.length
            here = procfs.areas("self", self.address, end)
            writable = procfs.uncovered(here, self.address, end, "w") == end
            self._seen = Mapping.borrow(self.address, self.length, writable)
        return self._seen, 0

    def in_page(self, offset: int) -> int:
        """Return the offset of a byte in its page."""
        return (self.address + offset) % PAGE_SIZE

    def span(self, offset: int, length: int) -> int:
        """Return the total size of the pages that contain a range."""
        return span(self.in_page(offset), length)

    def file_extents(self, _offset: int, _length: int) -> list[FileExtent]:
        """Raise: it is not shared."""
        raise private()

    def seal(self) -> None:
        """Prevent further views; raise BufferError while one exists."""
        if self._seen:
            self._seen.seal()

    def unseal(self) -> None:
        """Undo `seal`."""
        if self._seen:
            self._seen.unseal()

    def drop(self) -> None:
        """Unpin it, for a destructor, which must not wait. Views do not prevent that: its task maps the memory."""
        self.unpin(wait=False)

    def close(self) -> None:
        """Seal and release it; idempotent."""
        self.seal()
        self.unpin()
