"""Memory of another task, pinned by an io_uring that is created there, or locked there (mlock) if that fails.

Both fault the pages in, and a page fault may have to wait for the task itself. A guest therefore makes the calls
while the task runs (`remote.guest`), and is killed if they do not return. This process fetches the ring's descriptor
(pidfd_getfd(2), Linux 5.6). The task never has that descriptor, so it cannot unregister the buffers. The pins end
when this process closes the ring or exits, without another stop of the task.
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
from iobmd._internal import log
from iobmd._native import uring
from iobmd.errors import CannotWireError, IOReturnError, NotFoundError, TaskTimeoutError, is_of_system_call
from iobmd.memory import pinning
from iobmd.remote import areas, fd_passing, session
from iobmd.remote.guest import Result, call
from iobmd.task import diagnosis
from iobmd.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iobmd.remote.guest import Guest
    from iobmd.task.task import Task

_LARGEST = 1 << 30  # bytes, the maximum of one registered buffer
_PARAMETERS = 128  # bytes for struct io_uring_params, which an array of struct iovec follows
_VECTOR = struct.Struct("=QQ")  # struct iovec
_REGISTER_BUFFERS = 0
_READS = 20  # of the fdinfo of a ring that is busy
_LATE = 0.1  # seconds until the rings of a killed process no longer count towards its user's RLIMIT_MEMLOCK
_PATIENCE = 5.0  # seconds to fault in pages, to which the size divided by this rate is added:
_SLOWEST = 64 << 20  # bytes per second


class RemotePin:
    """Whole pages of another task, pinned or locked until `release`.

    Parameters
    ----------
    task : Task
        The other task.
    address, size : int
        The pages, in bytes.
    channel : fd_passing.Channel, optional
        One of a guest of the task, with `room(size)`: the guest pins them, and does not lock them instead.

    Raises
    ------
    IOReturnError
        As `session.with_guest`. `kIOReturnCannotWire`: they can be neither pinned nor locked, with the reasons.
    OSError
        With `channel`: why they cannot be pinned.
    """

    def __init__(self, task: Task, address: int, size: int, channel: fd_passing.Channel | None = None) -> None:
        self._task = task
        self._range = address, address + size
        self._ring: uring.Ring | None = None
        self.refusal = ""
        """Why they are locked and not pinned; empty if they are pinned."""
        self.stopped_ns = 0
        """The total time in nanoseconds for which a thread of the task was stopped, at most."""
        self._locked: list[tuple[int, int]] = []
        self._owner = os.getpid()
        try:
            if channel:
                self._pin(channel)
            else:
                self._pin_or_lock()
        except BaseException:
            with contextlib.suppress(IOReturnError):
                self.release()
            raise

    def _pin_or_lock(self) -> None:
        deadline = time.monotonic() + _LATE
        while True:
            try:
                return self._with_guest(self._pin_by_guest)
            except OSError as error:
                if not is_of_system_call(error):
                    raise
                if error.errno != errno.ENOMEM or time.monotonic() > deadline:
                    return self._lock_instead(error)
            time.sleep(0.01)

    @property
    def holds_frames(self) -> bool:
        """Whether the ring reports all of them as pinned, so that they stay in their page frames."""
        ring = self._ring  # once: another thread may release it
        return ring is not None and _registered(ring) == self._buffers()

    @property
    def holds_pages(self) -> bool:
        """Whether they stay in memory; a process that may trace the task could have copied the ring's descriptor."""
        return bool(self._locked) or self.holds_frames

    def _buffers(self) -> list[tuple[int, int]]:
        """Return the addresses and sizes of the buffers to register."""
        address, end = self._range
        return [(start, min(_LARGEST, end - start)) for start in range(address, end, _LARGEST)]

    @staticmethod
    def room(size: int) -> int:
        """Return the bytes that a channel must have for the arguments of a pin."""
        return _PARAMETERS + _VECTOR.size * -(-size // _LARGEST)

    def _pin_by_guest(self, guest: Guest) -> None:
        address, end = self._range
        self._pin(fd_passing.Channel(guest, self.room(end - address)))

    def _pin(self, channel: fd_passing.Channel) -> None:
        guest, buffers = channel.guest, self._buffers()
        placed = channel.placing(bytes(_PARAMETERS) + b"".join(_VECTOR.pack(*buffer) for buffer in buffers))
        vectors = channel.data + _PARAMETERS
        with self._faulting():
            ring = guest.run(
                placed,
                call("io_uring_setup", 1, channel.data),
                call("io_uring_register", Result(1), _REGISTER_BUFFERS, vectors, len(buffers)),
                deadline=self._deadline(*self._range),
            )[1]
        self._ring = uring.Ring(guest.fetch(ring))
        if not self.holds_frames:  # the task can write to the memory of these arguments
            message = f"cannot pin memory of task {self._task.pid}: it overwrote the arguments of io_uring_register"
            raise CannotWireError(message)

    def _deadline(self, start: int, end: int) -> float:
        return time.monotonic() + _PATIENCE + (end - start) / _SLOWEST

    @contextlib.contextmanager
    def _faulting(self) -> Iterator[None]:
        """Add to the error of a call that did not return which page faults it was waiting for."""
        try:
            yield
        except TaskTimeoutError as error:
            address, end = self._range
            message = f"{error.strerror}: the page faults from {address:#x} to {end:#x} were not served"
            with contextlib.suppress(OSError):
                if found := areas.userfault_area(self._task, address, end):
                    message += f"; those of {found} are reported to a userfaultfd whose handler does not answer"
            raise IOReturnError(error.code, message) from None

    def _lock_instead(self, pinning: OSError) -> None:
        address, end = self._range
        why = _why(pinning)
        self.refusal = f"cannot pin memory of task {self._task.pid}: {why}"
        log.debug("%s; locking it there (mlock)", self.refusal)
        try:
            unlocked = _not_locked(self._task, address, end)
            self._with_guest(lambda guest: self._lock(guest, unlocked))
        except OSError as error:
            if not is_of_system_call(error):
                raise
            message = (
                f"cannot pin or lock {format_size(end - address)} of task {self._task.pid}: pinning: {why}; locking: "
                f"{error.strerror} (its RLIMIT_MEMLOCK, or inaccessible pages)"
            )
            raise CannotWireError(message, error.errno or 0) from None

    def _lock(self, guest: Guest, ranges: list[tuple[int, int]]) -> None:
        for start, end in ranges:
            self._locked.append((start, end))  # first: if mlock fails for a page, the area is locked nevertheless
            with self._faulting():
                guest.call("mlock", start, end - start, deadline=self._deadline(start, end))

    def _with_guest(self, work: Callable[[Guest], None], *, inside: bool = False) -> None:
        self.stopped_ns += session.with_guest(self._task, work, inside=inside)

    def _unlock(self, guest: Guest) -> None:
        while self._locked:
            start, end = self._locked[-1]
            try:
                guest.call("munlock", start, end - start)
            except OSError as error:
                if not is_of_system_call(error):
                    raise
                # The task has unmapped it in the meantime.
            self._locked.pop()

    def release(self, *, wait: bool = True) -> None:
        """Unpin or unlock them; idempotent. If the task has exited, or in a forked child, nothing happens.

        Without `wait`, for destructors, locked pages are unlocked as soon as no other thread stops the task.

        Raises
        ------
        IOReturnError
            As `session.with_guest`, for pages that were locked and then stay locked.
        """
        ring, self._ring = self._ring, None
        if ring:
            ring.close()
            pinning.expect_uncharging()
        if not self._locked:
            return
        if wait:
            self._unlock_all()
        else:
            session.guard_of(self._task).when_free(self._unlock_dropped)

    def unmapped(self) -> None:
        """Forget which pages are locked: unmapping them unlocks them, and the task may map others there."""
        self._locked = []

    def _unlock_all(self, *, inside: bool = False) -> None:
        if self._owner == os.getpid():
            with contextlib.suppress(NotFoundError):
                if self._task.alive:
                    session.insist(lambda: self._with_guest(self._unlock, inside=inside))
        self._locked = []

    def _unlock_dropped(self) -> None:
        with contextlib.suppress(OSError):  # also of a system call in the task, which may lack memory
            self._unlock_all(inside=True)

    def __del__(self) -> None:
        with contextlib.suppress(IOReturnError, AttributeError):  # the constructor was interrupted
            self.release(wait=False)


def _why(error: OSError) -> str:
    """Return why memory could not be pinned: io_uring, or another call, failed."""
    return host.why_not_pinned(error)[0] if "io_uring" in str(error) else str(error.strerror)


def _registered(ring: uring.Ring) -> list[tuple[int, int]]:
    """Return the addresses and sizes of a ring's registered buffers; none if the ring stays busy.

    The ring's fdinfo lists them unless another thread is using the ring (fs/proc/fd.c, io_uring/fdinfo.c).
    """
    for _ in range(_READS):
        try:
            text = Path(f"/proc/thread-self/fdinfo/{ring.number}").read_text()
        except OSError as error:
            diagnosis.unless_exhausted(error, "cannot read whether memory is pinned")
            break
        count, *lines = text.partition("\nUserBufs:\t")[2].split("\n")
        matches = [re.fullmatch(r" *\d+: 0x([0-9a-f]+)/(\d+)", line) for line in lines[: int(count or 0)]]
        if count and all(matches):
            return [(int(match[1], 16), int(match[2])) for match in matches if match]
        time.sleep(0.001)
    return []


def _not_locked(task: Task, address: int, end: int) -> list[tuple[int, int]]:
    """Return the parts of a range that its task has not locked itself; only these may be unlocked later."""
    flagged = procfs.vm_flags(task.pid)
    inside = [(max(area.start, address), min(area.end, end), flags) for area, flags in flagged]
    return [(start, stop) for start, stop, flags in inside if start < stop and "lo" not in flags]
