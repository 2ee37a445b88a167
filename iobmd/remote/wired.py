"""Memory of another task, held where it is: pinned through an io_uring made there, or else locked there (mlock).

The ring's descriptor comes here (pidfd_getfd(2), Linux 5.6) and is closed there at once: the pins end when we close
it, without stopping the task again, and also when we die.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from typing import TYPE_CHECKING

from iobmd import host, procfs
from iobmd._native import crosstask
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError, NotFoundError
from iobmd.units import PAGE_SIZE, format_size, round_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd.remote.stop import Stop
    from iobmd.task import Task

_LARGEST = 1 << 30  # the most that one registered buffer takes
_PARAMETERS = 128  # bytes for struct io_uring_params; behind them, in the same mapping, the struct iovec
_REGISTER_BUFFERS = 0
_PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS = 0x3, 0x22


class RemotePin:
    """Whole pages of another task, held until `release`.

    Raises
    ------
    IOReturnError
        As `session.with_stopped`; `kIOReturnCannotWire`: they can be neither pinned nor locked, and why.
    """

    def __init__(self, task: Task, address: int, size: int) -> None:
        self._task = task
        self._ring = -1
        self._locked: list[tuple[int, int]] = []
        self._owner = os.getpid()
        try:
            _with_stopped(task, lambda stop: self._pin(stop, address, size))
        except OSError as error:
            with contextlib.suppress(IOReturnError):
                self.release()
            if isinstance(error, IOReturnError):
                raise
            self._ring_refused(task, address, size, error)

    @property
    def holds_frames(self) -> bool:
        """Whether they stay in their frames; else they stay in memory."""
        return self._ring >= 0

    def _pin(self, stop: Stop, address: int, size: int) -> None:
        ends = [*range(address, address + size, _LARGEST), address + size]
        vectors = b"".join(struct.pack("=QQ", start, end - start) for start, end in itertools.pairwise(ends))
        room = round_up(_PARAMETERS + len(vectors), PAGE_SIZE)
        scratch = stop.call("mmap", 0, room, _PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS, -1, 0)
        try:
            stop.task.write(scratch + _PARAMETERS, vectors)
            ring = stop.call("io_uring_setup", 1, scratch)
            try:
                stop.call("io_uring_register", ring, _REGISTER_BUFFERS, scratch + _PARAMETERS, len(ends) - 1)
                self._ring = crosstask.fetch_descriptor(stop.task.pidfd, ring)
            finally:
                stop.call("close", ring)
        finally:
            stop.call("munmap", scratch, room)

    def _ring_refused(self, task: Task, address: int, size: int, pinning: OSError) -> None:
        """Lock it instead."""
        try:
            unlocked = _not_locked(task, address, address + size)
            _with_stopped(task, lambda stop: self._lock(stop, unlocked))
        except IOReturnError:
            raise
        except OSError as error:
            why = host.why_not_pinned(pinning)[0]
            message = (
                f"cannot hold {format_size(size)} of task {task.pid}: pinning there: {why}; locking there: "
                f"{error.strerror} (its RLIMIT_MEMLOCK, or pages that are not accessible)"
            )
            raise IOReturnError(IOReturn.kIOReturnCannotWire, message, error.errno or 0) from None

    def _lock(self, stop: Stop, ranges: list[tuple[int, int]]) -> None:
        try:
            for start, end in ranges:
                self._locked.append((start, end))  # first: where it fails for a page, the area is locked all the same
                stop.call("mlock", start, end - start)
        except BaseException:
            self._unlock(stop)
            raise

    def _unlock(self, stop: Stop) -> None:
        while self._locked:
            start, end = self._locked.pop()
            with contextlib.suppress(OSError):  # it unmapped it meanwhile
                stop.call("munlock", start, end - start)

    def release(self) -> None:
        """Let them go; idempotent, and nothing where the task is gone, or in a forked child.

        Raises
        ------
        IOReturnError
            As `session.with_stopped`, where they were locked; they are then still.
        """
        ring, self._ring = self._ring, -1
        if ring >= 0:
            os.close(ring)
        if self._locked and self._owner == os.getpid():
            with contextlib.suppress(NotFoundError):
                if self._task.alive:
                    _with_stopped(self._task, self._unlock)
        self._locked = []

    def __del__(self) -> None:
        with contextlib.suppress(IOReturnError, AttributeError):
            self.release()


def _not_locked(task: Task, address: int, end: int) -> list[tuple[int, int]]:
    """Return what of a range its task has not locked itself, and would find unlocked when we let go."""
    flagged = procfs.vm_flags(task.pid)
    inside = [(max(area.start, address), min(area.end, end), flags) for area, flags in flagged]
    return [(start, stop) for start, stop, flags in inside if start < stop and "lo" not in flags]


def _with_stopped(task: Task, work: Callable[[Stop], None]) -> None:
    from iobmd.remote import session  # noqa: PLC0415 (with ctypes: half of what `import iobmd` takes)

    session.with_stopped(task, work)
