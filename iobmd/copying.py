"""Moving bytes between this process and another: which call, in what pieces, on how many threads.

A copy is one `process_vm_readv` or `process_vm_writev` while it is small, and pieces (`iobmd.pieces`) handed to
several threads when it is large: faulting in and clearing the destination costs more than the copy itself and
runs on every processor. Where the call is refused or missing (a seccomp profile), `/proc/PID/mem` stands in.
"""

import errno
import os

from iobmd import pieces, procfs
from iobmd._native import crosstask
from iobmd.units import PAGE_SIZE


def copy(
    pid: int,
    theirs: int,
    ours: int,
    size: int,
    *,
    write: bool = False,
    huge: int = 0,
    progress: pieces.Progress | None = None,
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

    def through(fd: int) -> pieces.Work:
        """Move by the call, or through an open /proc/PID/mem where `fd` is not -1."""

        def move(offset: int, length: int) -> tuple[int, int]:
            if write:
                return crosstask.write(pid, fd, theirs + offset, ours + offset, length)
            return crosstask.read(pid, fd, theirs + offset, ours + offset, length, huge, PAGE_SIZE)

        return move

    if size <= pieces.PIECE:  # one call holds the task's memory: nothing can change hands under it
        done, error = through(-1)(0, size)
        if done or error not in (errno.EPERM, errno.ENOSYS):
            return done, error
    try:
        memory = os.open(f"/proc/{pid}/mem", (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as refusal:
        return 0, errno.ESRCH if refusal.errno == errno.ENOENT else refusal.errno or errno.EACCES
    try:
        done, error = pieces.run(through(-1), size, progress)
        if done == 0 and error in (errno.EPERM, errno.ENOSYS):
            # /proc/PID/mem passes over page protections, which the call does not: keep to what they allow.
            permitted = _permitted(pid, theirs, size, "w" if write else "r")
            done, error = pieces.run(through(memory), permitted, progress)
            error = error or (errno.EFAULT if permitted < size else 0)
        return done, error if _holds_memory(memory, theirs) else errno.ESRCH
    finally:
        os.close(memory)


def _permitted(pid: int, address: int, size: int, permission: str) -> int:
    """Return how many bytes from `address` on lie in mappings with `permission`."""
    try:
        return (
            procfs.uncovered(procfs.areas(pid, address, address + size), address, address + size, permission)
            - address
        )
    except OSError:  # the task exited: its memory, which the caller looks at next, is gone too
        return 0


def _holds_memory(memory: int, address: int) -> bool:
    """Say whether the address space behind an open /proc/PID/mem is still in use (reads of it end at 0 if not)."""
    try:
        return len(os.pread(memory, 1, address)) == 1
    except OSError:
        return True  # it exists, but that address is not mapped
