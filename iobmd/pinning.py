"""Pinning: long-term page pins by io_uring registered buffers, the only ones userspace can take without a device.

mlock keeps pages resident and lets the kernel move them to other frames; registered buffers do not move (compaction,
collapse, fork: measured). Pins are slots in the sparse table of a ring; when it is full a further ring with a larger
table is made, of 256, 1,024, 4,096 and then 16,384 slots. Kernels before 5.19 have no sparse tables: there each piece
takes a ring of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from typing import TYPE_CHECKING

from iobmd import host
from iobmd._native import runs, uring
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from iobmd._native.runs import RunTable

SLOTS = 1 << 14  # the most that one table takes (IORING_MAX_REG_BUFFERS)
FIRST_SLOTS = 1 << 8  # the kernel looks through the whole table for each huge page it pins: tables begin small
LARGEST = 1 << 30  # the most that one slot takes
_LATE = 0.2  # seconds after which a closed ring is surely uncharged: a kernel worker does it, up to 25 ms later


class _Ring:
    """A ring, and which slots of its table are free. `slots` 1 and no table: a ring for one pin."""

    def __init__(self, slots: int) -> None:
        self.fd = uring.setup(1)
        self.sparse = slots > 1
        self._fresh = iter(range(slots))
        self._used: list[int] = []
        if self.sparse:
            try:
                uring.register_sparse(self.fd, slots)
            except BaseException:
                self.close()
                raise

    def take(self) -> int | None:
        """Return a free slot, None when there is none."""
        return self._used.pop() if self._used else next(self._fresh, None)

    def pin(self, slot: int, address: int, size: int) -> None:
        if self.sparse:
            uring.update(self.fd, slot, address, size)
        else:
            uring.register_buffer(self.fd, address, size)

    def give_back(self, slot: int) -> None:
        self._used.append(slot)

    def unpin(self, slot: int) -> None:
        if self.fd < 0:  # a ring of the process that this one was forked from
            return
        if self.sparse:
            uring.update(self.fd, slot, 0, 0)
            self._used.append(slot)
        else:
            self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Pins:
    """The rings of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._rings: list[_Ring] = []
        self._single: list[_Ring] = []
        self._no_tables = False
        self._closed_at = 0.0

    def pin(self, address: int, size: int) -> list[tuple[_Ring, int]]:
        """Pin a range; returns the slots. Raises OSError with nothing pinned."""
        held: list[tuple[_Ring, int]] = []
        try:
            for start in range(0, size, LARGEST):
                ring, slot = self._take()
                try:
                    self._patiently(ring, slot, address + start, min(LARGEST, size - start))
                except BaseException:
                    self._give_back(ring, slot)
                    raise
                held.append((ring, slot))
        except BaseException:
            self.unpin(held)
            raise
        return held

    def unpin(self, held: list[tuple[_Ring, int]]) -> None:
        for ring, slot in held:
            ring.unpin(slot)
            if not ring.sparse:
                self._closed_at = time.monotonic()
                with contextlib.suppress(ValueError):
                    self._single.remove(ring)

    def _take(self) -> tuple[_Ring, int]:
        for ring in reversed(self._rings):
            if (slot := ring.take()) is not None:
                return ring, slot
        if not self._no_tables:
            try:
                self._rings.append(_Ring(min(SLOTS, FIRST_SLOTS << 2 * len(self._rings))))
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._no_tables = True
            else:
                return self._take()
        self._single.append(_Ring(1))
        return self._single[-1], 0

    def _give_back(self, ring: _Ring, slot: int) -> None:
        if ring.sparse:
            ring.give_back(slot)
        else:
            self.unpin([(ring, slot)])

    def _patiently(self, ring: _Ring, slot: int, address: int, size: int) -> None:
        while True:
            try:
                return ring.pin(slot, address, size)
            except OSError as error:
                if error.errno != errno.ENOMEM or time.monotonic() - self._closed_at > _LATE:
                    raise
            time.sleep(0.01)

    def forget(self) -> None:
        """Close the rings without unpinning: in a forked child, whose parent goes on using them."""
        for ring in (*self._rings, *self._single):
            ring.close()


class _Process:
    """What belongs to this process and not to one forked from it: its rings, and its open pagemap."""

    def __init__(self) -> None:
        self.pins = _Pins()
        self._pagemap = -1

    def runs(self, address: int, size: int) -> RunTable:
        if self._pagemap < 0:
            self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        return runs.read(self._pagemap, address, size, PAGE_SIZE)

    def forget(self) -> None:
        self.pins.forget()
        if self._pagemap >= 0:
            os.close(self._pagemap)
        self.__init__()  # type: ignore[misc]


_process = _Process()
os.register_at_fork(after_in_child=_process.forget)


def own_runs(address: int, size: int) -> RunTable:
    """Return the physical runs of whole pages of this process; raises OSError where pagemap cannot be read."""
    return _process.runs(address, size)


class Pin:
    """A long-term pin of whole pages of this process, until `release`.

    Raises
    ------
    IOReturnError
        `kIOReturnCannotWire`: pinning is not possible, or a limit is reached; the message says which.

    Notes
    -----
    Registered buffers pin with FOLL_LONGTERM (io_uring_register(2), Linux 5.1). A pin may move a page once, out of
    a movable zone: addresses are read afterwards. It lasts until `release`, until this process exits, and as long
    as any copy of the ring's descriptor is open: a child forked in C, without exec, keeps it alive.
    """

    def __init__(self, address: int, size: int) -> None:
        try:
            with _process.pins.lock:
                self._held = _process.pins.pin(address, size)
        except OSError as error:
            raise _cannot_pin(size, error) from None

    def release(self) -> None:
        """Unpin; idempotent."""
        with _process.pins.lock:
            held, self._held = self._held, []
            _process.pins.unpin(held)


def _cannot_pin(size: int, error: OSError) -> IOReturnError:
    why, remedy = host.why_not_pinned(error)
    first_remedy = remedy.partition("\n")[0].partition("  #")[0]
    message = f"cannot pin {format_size(size)}: {why}; to turn it on: {first_remedy}"
    return IOReturnError(IOReturn.kIOReturnCannotWire, message, error.errno or 0)


def visible_runs(address: int, size: int) -> RunTable | None:
    """Return the runs of pinned pages of this process; None where the kernel hides their frames."""
    try:
        table = own_runs(address, size)
    except OSError:
        return None
    return None if table.hidden else table
