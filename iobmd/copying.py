"""Moving bytes between this process and another: which call, in what pieces, on how many threads.

A copy is one `process_vm_readv` or `process_vm_writev` while it is small, and pieces of `PIECE` bytes handed to
several threads when it is large: faulting in and clearing the destination costs more than the copy itself and
runs on every processor. Where the call is refused or missing (a seccomp profile), `/proc/PID/mem` stands in.
"""

import errno
import os
import threading
from collections.abc import Callable

from iobmd import procfs
from iobmd._native import crosstask
from iobmd.units import PAGE_SIZE

PIECE = 4 << 20
"""Bytes of a piece: some huge pages, and short enough to see an interrupt or a dying task soon."""

THREADS_FROM = 16 << 20
"""Bytes from which a second thread pays: at 8 MiB two take as long as one, at 16 MiB two thirds (measured)."""

MOST_THREADS = 8

Move = Callable[[int, int], tuple[int, int]]
"""Moves the bytes `offset`, `size`; returns how many were moved, and the error number that ended it."""

Progress = Callable[[int], None]


def copy(
    pid: int,
    theirs: int,
    ours: int,
    size: int,
    *,
    write: bool = False,
    huge: int = 0,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Copy between the task `pid` (address `theirs`) and this process (address `ours`).

    Parameters
    ----------
    pid, theirs, ours, size
        The task, both addresses, and the size in bytes.
    write : bool
        From here into the task, instead of from the task to here.
    huge : int
        Size of the huge pages that fresh memory at `ours` may get; 0 when it is not fresh.
    progress : callable, optional
        Called in this thread, now and then, with the number of bytes copied so far.

    Returns
    -------
    tuple[int, int]
        How many bytes from the start are copied, and the error number that ended the copy; 0 when all are.
        `ESRCH` also stands for memory that went away midway, by exit or by exec.
    """

    def through(fd: int) -> Move:
        """Move by the call, or through an open /proc/PID/mem where `fd` is not -1."""

        def move(offset: int, length: int) -> tuple[int, int]:
            if write:
                return crosstask.write(pid, fd, theirs + offset, ours + offset, length)
            return crosstask.read(pid, fd, theirs + offset, ours + offset, length, huge, PAGE_SIZE)

        return move

    if size <= PIECE:  # one call holds the task's memory: nothing can change hands under it
        done, error = through(-1)(0, size)
        if done or error not in (errno.EPERM, errno.ENOSYS):
            return done, error
    try:
        memory = os.open(f"/proc/{pid}/mem", (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as refusal:
        return 0, errno.ESRCH if refusal.errno == errno.ENOENT else refusal.errno or errno.EACCES
    try:
        done, error = _run(through(-1), size, progress)
        if done == 0 and error in (errno.EPERM, errno.ENOSYS):
            # /proc/PID/mem passes over page protections, which the call does not: keep to what they allow.
            permitted = _permitted(pid, theirs, size, "w" if write else "r")
            done, error = _run(through(memory), permitted, progress)
            error = error or (errno.EFAULT if permitted < size else 0)
        return done, error if _holds_memory(memory, theirs) else errno.ESRCH
    finally:
        os.close(memory)


def _permitted(pid: int, address: int, size: int, permission: str) -> int:
    """Return how many bytes from `address` on lie in mappings with `permission`."""
    try:
        return procfs.uncovered(procfs.maps(pid), address, address + size, permission) - address
    except OSError:  # the task exited: its memory, which the caller looks at next, is gone too
        return 0


def _holds_memory(memory: int, address: int) -> bool:
    """Say whether the address space behind an open /proc/PID/mem is still in use (reads of it end at 0 if not)."""
    try:
        return len(os.pread(memory, 1, address)) == 1
    except OSError:
        return True  # it exists, but that address is not mapped


class _Run:
    """Pieces of one copy, handed out in ascending order, and the lowest place where one failed."""

    def __init__(self, move: Move, size: int) -> None:
        self._move = move
        self._size = size
        self._offsets = iter(range(0, size, PIECE))
        self.done = 0
        self.failure: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def work(self, progress: Progress | None = None) -> None:
        while (offset := self._next()) is not None:
            length = min(PIECE, self._size - offset)
            moved, error = self._move(offset, length)
            with self._lock:
                self.done += moved
                if moved < length:
                    # Pieces below this one are all handed out and will be finished, so the lowest wins.
                    failure = (offset + moved, error or errno.ESRCH)
                    self.failure = min(self.failure or failure, failure)
            if progress:
                progress(self.done)

    def _next(self) -> int | None:
        with self._lock:
            return None if self.failure else next(self._offsets, None)

    def stop(self) -> None:
        with self._lock:
            self._offsets = iter(range(0))


def _run(move: Move, size: int, progress: Progress | None) -> tuple[int, int]:
    """Move `size` bytes in pieces; return as `copy` does."""
    run = _Run(move, size)
    helpers = [threading.Thread(target=run.work, name="iobmd-copy") for _ in range(threads(size) - 1)]
    try:
        for helper in helpers:
            helper.start()
        run.work(progress)
    finally:
        # Also on KeyboardInterrupt: nobody may write to the destination once the caller has it back.
        run.stop()
        for helper in helpers:
            if helper.ident is not None:
                helper.join()
    return run.failure or (size, 0)


def threads(size: int) -> int:
    """Return on how many threads a copy of `size` bytes runs."""
    if size < THREADS_FROM:
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), MOST_THREADS))
