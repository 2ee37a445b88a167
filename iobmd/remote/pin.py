"""Memory of another task, held where it is: pinned through an io_uring made there, or else locked there (mlock).

Both fault the pages in, and a fault may have to wait for the task itself: so a guest makes the calls while the task
runs (`remote.guest`), and is killed when they do not return. The ring's descriptor comes here (pidfd_getfd(2), Linux
5.6), and is never among those of the task, by which that could unregister what is pinned: the pins end when we close
it, without stopping the task again, also when we die.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd import host, procfs
from iobmd._native import uring
from iobmd.errors import CannotWireError, IOReturnError, NotFoundError, TaskTimeoutError
from iobmd.remote import areas, session
from iobmd.remote.guest import map_scratch
from iobmd.task import diagnosis
from iobmd.units import PAGE_SIZE, format_size, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iobmd.remote.guest import Guest
    from iobmd.task.task import Task

_LARGEST = 1 << 30  # the most that one registered buffer takes
_PARAMETERS = 128  # bytes for struct io_uring_params; behind them, in the same mapping, the struct iovec
_REGISTER_BUFFERS = 0
_LOOKS = 20  # at a ring that is busy
_LATE = 0.1  # seconds after which the rings of a process that was killed are uncharged from its user's RLIMIT_MEMLOCK
_PATIENCE = 5.0  # seconds for pages to be faulted in, and more for many of them:
_SLOWEST = 64 << 20  # bytes a second


class RemotePin:
    """Whole pages of another task, held until `release`.

    Raises
    ------
    IOReturnError
        As `session.with_stopped`; `kIOReturnCannotWire`: they can be neither pinned nor locked, and why.
    """

    def __init__(self, task: Task, address: int, size: int) -> None:
        self._task = task
        self._range = address, address + size
        self._ring: uring.Ring | None = None
        self._locked: list[tuple[int, int]] = []
        self._owner = os.getpid()
        try:
            self._pin_or_lock()
        except BaseException:
            with contextlib.suppress(IOReturnError):
                self.release()
            raise

    def _pin_or_lock(self) -> None:
        deadline = time.monotonic() + _LATE
        while True:
            try:
                return self._with_guest(self._pin)
            except OSError as error:
                if isinstance(error, IOReturnError):
                    raise
                if error.errno != errno.ENOMEM or time.monotonic() > deadline:
                    return self._lock_instead(error)
            time.sleep(0.01)

    @property
    def holds_frames(self) -> bool:
        """Whether they stay in their frames, as the ring shows at this moment."""
        ring = self._ring  # once: another thread may release it
        return ring is not None and _registered(ring) == self._pieces()

    @property
    def holds_pages(self) -> bool:
        """Whether they stay in memory: who may trace the task could have stolen the ring as it was made."""
        return bool(self._locked) or self.holds_frames

    def _pieces(self) -> list[tuple[int, int]]:
        """Return what the ring has to hold, as addresses and sizes."""
        address, end = self._range
        return [(start, min(_LARGEST, end - start)) for start in range(address, end, _LARGEST)]

    def _pin(self, guest: Guest) -> None:
        pieces = self._pieces()
        vectors = b"".join(struct.pack("=QQ", *piece) for piece in pieces)
        room = round_up(_PARAMETERS + len(vectors), PAGE_SIZE)
        scratch = guest.run(map_scratch(room))[-1]
        guest.write(scratch + _PARAMETERS, vectors)
        ring = guest.call("io_uring_setup", 1, scratch)
        where = scratch + _PARAMETERS
        with self._faulting():
            arguments = ring, _REGISTER_BUFFERS, where, len(pieces)
            guest.call("io_uring_register", *arguments, deadline=self._deadline(*self._range))
        self._ring = uring.Ring(guest.fetch(ring))
        if not self.holds_frames:  # the task can write to the memory that these calls use
            message = f"cannot pin memory of task {self._task.pid}: it has changed meanwhile what is to be pinned"
            raise CannotWireError(message)

    def _deadline(self, start: int, end: int) -> float:
        return time.monotonic() + _PATIENCE + (end - start) / _SLOWEST

    @contextlib.contextmanager
    def _faulting(self) -> Iterator[None]:
        """Say of a call that did not return what it was waiting for."""
        try:
            yield
        except TaskTimeoutError as error:
            address, end = self._range
            message = f"{error.strerror}: the page faults from {address:#x} to {end:#x} were not served"
            with contextlib.suppress(OSError):
                if found := areas.userfault_area(self._task, address, end):
                    message += f"; a userfaultfd answers for {found}, and its handler does not"
            raise IOReturnError(error.code, message) from None

    def _lock_instead(self, pinning: OSError) -> None:
        address, end = self._range
        try:
            unlocked = _not_locked(self._task, address, end)
            self._with_guest(lambda guest: self._lock(guest, unlocked))
        except IOReturnError:
            raise
        except OSError as error:
            why = host.why_not_pinned(pinning)[0]
            message = (
                f"cannot hold {format_size(end - address)} of task {self._task.pid}: pinning there: {why}; locking "
                f"there: {error.strerror} (its RLIMIT_MEMLOCK, or pages that are not accessible)"
            )
            raise CannotWireError(message, error.errno or 0) from None

    def _lock(self, guest: Guest, ranges: list[tuple[int, int]]) -> None:
        for start, end in ranges:
            self._locked.append((start, end))  # first: where it fails for a page, the area is locked all the same
            with self._faulting():
                guest.call("mlock", start, end - start, deadline=self._deadline(start, end))

    def _with_guest(self, work: Callable[[Guest], None]) -> None:
        session.with_guest(self._task, work)

    def _unlock(self, guest: Guest) -> None:
        while self._locked:
            start, end = self._locked[-1]
            try:
                guest.call("munlock", start, end - start)
            except OSError as error:
                if isinstance(error, IOReturnError):
                    raise
                # The task has unmapped it meanwhile.
            self._locked.pop()

    def release(self) -> None:
        """Let them go; idempotent, and nothing where the task is gone, or in a forked child.

        Raises
        ------
        IOReturnError
            As `session.with_stopped`, where they were locked; they are then still.
        """
        ring, self._ring = self._ring, None
        if ring:
            ring.close()
        if self._locked and self._owner == os.getpid():
            with contextlib.suppress(NotFoundError):
                if self._task.alive:
                    session.insist(lambda: self._with_guest(self._unlock))
        self._locked = []

    def __del__(self) -> None:
        with contextlib.suppress(IOReturnError, AttributeError):
            self.release()


def _registered(ring: uring.Ring) -> list[tuple[int, int]]:
    """Return the addresses and sizes that a ring has registered; none if that stays hidden because the ring is busy.

    A ring shows them in its fdinfo, unless it works at that moment (fs/proc/fd.c, io_uring/fdinfo.c).
    """
    for _ in range(_LOOKS):
        try:
            text = Path(f"/proc/thread-self/fdinfo/{ring.number}").read_text()
        except OSError as error:
            diagnosis.unless_exhausted(error, "cannot look whether memory is pinned")
            break
        count, *lines = text.partition("\nUserBufs:\t")[2].split("\n")
        matches = [re.fullmatch(r" *\d+: 0x([0-9a-f]+)/(\d+)", line) for line in lines[: int(count or 0)]]
        if count and all(matches):
            return [(int(match[1], 16), int(match[2])) for match in matches if match]
        time.sleep(0.001)
    return []


def _not_locked(task: Task, address: int, end: int) -> list[tuple[int, int]]:
    """Return what of a range its task has not locked itself, and would find unlocked when we let go."""
    flagged = procfs.vm_flags(task.pid)
    inside = [(max(area.start, address), min(area.end, end), flags) for area, flags in flagged]
    return [(start, stop) for start, stop, flags in inside if start < stop and "lo" not in flags]
