"""Long-term page pins by registered buffers of io_uring, the only such pins available without a device.

mlocked pages remain resident, but the kernel may move them to other frames; registered buffers do not move
(compaction, collapse, fork: measured). Pins are slots in the sparse table of a ring. When it is full, another ring
with a larger table is created, of 256, 1,024, 4,096 and then 16,384 slots. Kernels before 5.19 have no sparse tables
and need a ring for each piece.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING

from iobmd import host
from iobmd._native import uring
from iobmd.errors import CannotWireError, IOReturnError, NotPrivilegedError, UnsupportedError
from iobmd.memory import mlock
from iobmd.pagemap.self import own_runs
from iobmd.task import obstacles
from iobmd.units import format_size

if TYPE_CHECKING:
    from iobmd._native.pagemap import RunTable

SLOTS = 1 << 14  # maximum for a table (IORING_MAX_REG_BUFFERS)
FIRST_SLOTS = 1 << 8  # tables start small, because the kernel searches all of it for each huge page
LARGEST = 1 << 30  # maximum for a slot
_LATE = 0.2  # seconds after which a closed ring is uncharged: a kernel worker takes up to 25 ms
_LATEST = 1.5  # seconds after which an ended pin is uncharged: the worker of Linux 6.1 begins after a second


class _Pins:
    """The rings of this process."""

    def __init__(self) -> None:
        self._tables: list[uring.Table] = []
        self._single: list[uring.Table] = []
        self._no_tables = False
        self._closed_at = self._unpinned_at = 0.0

    def pin(self, address: int, size: int) -> uring.Slot:
        """Pin up to 1 GiB. Raises OSError."""
        for table in reversed(self._tables):
            if slot := self._patiently(table, address, size):
                return slot
        if not self._no_tables:
            try:
                table = uring.Table(min(SLOTS, FIRST_SLOTS << 2 * len(self._tables)))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._no_tables = True
            else:
                self._tables.append(table)  # two threads may each create one: both are used
                return self.pin(address, size)
        self._single.append(table := uring.Table(1))
        slot = self._patiently(table, address, size)
        assert slot, "a new table has room"
        return slot

    def _patiently(self, table: uring.Table, address: int, size: int) -> uring.Slot | None:
        until = 0.0
        while True:
            try:
                return table.pin(address, size)
            except OSError as error:
                until = until or self._closed_at + _LATE  # once: other threads may close rings endlessly
                if error.errno != errno.ENOMEM or time.monotonic() > until:
                    raise
            time.sleep(0.01)

    def unpin(self, slots: list[uring.Slot]) -> None:
        """Release the slots."""
        for slot in slots:
            slot.release()
        self._unpinned_at = time.monotonic()
        if self._no_tables:
            self.expect_uncharging()
            self._single = [table for table in self._single if table.ring >= 0]

    def expect_uncharging(self) -> None:
        """Note that a ring was closed, which temporarily still counts towards the RLIMIT_MEMLOCK of this user."""
        self._closed_at = time.monotonic()

    def uncharged_at(self) -> float:
        """Return when pins that have ended so far no longer count towards RLIMIT_MEMLOCK (`time.monotonic`)."""
        return max(self._closed_at, self._unpinned_at) + _LATEST

    def forget(self) -> None:
        """Drop the rings in a forked child, which has closed its copies; the parent continues to use them."""
        self.__init__()  # type: ignore[misc]


_pins = _Pins()
expect_uncharging, uncharged_at = _pins.expect_uncharging, _pins.uncharged_at
os.register_at_fork(after_in_child=_pins.forget)


class Pin:
    """A long-term pin of whole pages of this process, until `release`.

    Raises
    ------
    IOReturnError
        `kIOReturnCannotWire`: pinning is not possible, or a limit is reached, which the message names.
        `kIOReturnVMError`: not mapped, past the end of a file, or a guard page; `kIOReturnUnsupported`: device memory
        or memfd_secret(2); `kIOReturnNoResources`: a hugetlb pool is exhausted. `.address` is the first such byte.

    Notes
    -----
    Registered buffers pin with FOLL_LONGTERM (io_uring_register(2), Linux 5.1). Pinning may move a page once, out of
    a movable zone: addresses must be read afterwards. A pin lasts until `release` or the exit of this process, and as
    long as any copy of the ring's descriptor is open; a child that is forked, in Python or in C, closes its copies.
    """

    holds_frames = holds_pages = True

    def __init__(self, address: int, size: int) -> None:
        self._slots: list[uring.Slot] = []
        try:
            for start in range(0, size, LARGEST):
                part = min(LARGEST, size - start)
                self._slots.append(mlock.within_limits(_pins.pin, address + start, part))
        except OSError as error:
            self.release()
            raise _cannot_pin(address, size, error) from None

    def release(self, *, wait: bool = True) -> None:  # noqa: ARG002 (it never waits for another thread)
        """Unpin; idempotent."""
        slots, self._slots = self._slots, []
        _pins.unpin(slots)


def _cannot_pin(address: int, size: int, error: OSError) -> IOReturnError:
    what, number = f"cannot pin {format_size(size)}", error.errno or 0
    if number in (errno.EFAULT, errno.EOPNOTSUPP):  # caused by the memory, not by io_uring
        with contextlib.suppress(OSError):
            if found := obstacles.find(os.getpid(), address, address + size, pin=True):
                return found.kind(f"{what}: {found}", number, found.address)
    why, remedy = host.why_not_pinned(error)
    if remedy:
        why += f"; to enable it: {remedy.partition(chr(10))[0].partition('  #')[0]}"
    return CannotWireError(f"{what}: {why}", number)


def visible_runs(address: int, size: int, *, gaps: bool = False) -> RunTable | None:
    """Return the runs of pinned pages of this process; None if their frames are hidden, or /proc is missing.

    With `gaps`, pages that the program has unmapped are omitted; otherwise they are an error.
    """
    try:
        table = own_runs(address, size, pinned=True, gaps=gaps)
    except (NotPrivilegedError, UnsupportedError):
        return None
    return None if table.hidden else table
