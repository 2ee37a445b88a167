"""Transfers by child processes, which can be killed and have their own file descriptors (`crosstask.Attempt`).

Such a transfer may wait for another program, or read a file that this process also has open and locked.
"""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd._internal import pidns
from iobmd._native import crosstask
from iobmd.errors import NO_DESCRIPTOR, TaskTimeoutError
from iobmd.host import limits
from iobmd.task.ranges import behind
from iobmd.units import PAGE_SIZE, pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iobmd import procfs
    from iobmd.task.ranges import Range

NO_CHILD = (errno.EAGAIN, errno.EPERM, errno.ENOSYS)
"""Error numbers if no process can be created: RLIMIT_NPROC, a pids cgroup, a seccomp filter."""

_FUSE = 0x65735546  # linux/magic.h
_UNKNOWN = 0  # if a server refuses statfs(2)
_SIZE = 16 << 20  # bytes that one child transfers at most, and the size of its buffer
_LOOK_MS = 20  # between two polls, to handle Ctrl-C


class File(NamedTuple):
    """A regular file that a task maps."""

    path: str
    inode: int
    device: int
    length: int
    kind: int
    """The type of its file system (fstatfs(2))."""

    @property
    def has_server(self) -> bool:
        """Whether another program serves it, so that open, read or stat may wait."""
        return self.kind in (_FUSE, _UNKNOWN)


class Ends(NamedTuple):
    """The two ends of a transfer."""

    theirs: int
    ours: int
    write: bool
    """Whether bytes are written to the task; False: read from it."""
    pid: int = 0
    """The task."""
    pidfd: int = -1
    memory: int = -1
    """The task's open /proc/PID/mem, used instead of its pid; it does not wait for a userfaultfd handler."""
    file: File | None = None
    """A file that the task maps, used instead of its pid."""
    shift: int = 0
    """The difference between an address in the task and its offset in `file`."""

    def here(self, address: int) -> int:
        """Return the address in this process that corresponds to one in the task."""
        return self.ours + address - self.theirs

    def there(self, batch: Sequence[Range]) -> list[tuple[int, int]]:
        """Return ranges of addresses in the task in the form that an attempt accepts."""
        return [(start - self.shift, end - start) for start, end in batch]

    def attempt(self, batch: Sequence[Range], room: int) -> crosstask.Attempt:
        """Return the attempt to transfer ranges of addresses in the task, and later others of `room` bytes."""
        there = self.there(batch)
        if self.file is None:
            task = self.pid if self.memory < 0 else 0
            return crosstask.Attempt(
                there, task=task, pidfd=self.pidfd, file=self.memory, write=self.write, room=room
            )
        return crosstask.Attempt(there, **_named(self.file), room=room)


def _named(file: File) -> crosstask.Named:
    return {"paths": [os.fsencode(file.path)], "inode": file.inode, "device": file.device}


def find(paths: Sequence[str], inode: int, device: int, timeout: float, *, opened: bool = True) -> File | None:
    """Return the first of some paths that leads to a regular file; None if no path does, or no child can be made.

    Parameters
    ----------
    paths
        Candidate paths.
    inode, device
        The inode number of the file, and its device unless 0.
    timeout
        Seconds to wait for its server.
    opened
        Whether to open the file, if this process may. If False, no file is opened and its server is not asked for its
        length, which is then the last value cached by the kernel, as for page faults.

    Raises
    ------
    OSError
        `ETIMEDOUT`: the server did not answer. `EMFILE`, `ENFILE`, `ENOMEM`.
    """
    encoded = [os.fsencode(path) for path in paths]
    attempt = crosstask.Attempt([], paths=encoded, inode=inode, device=device, opened=opened)
    try:
        error = _run(attempt, timeout)
        if error in (errno.ETIMEDOUT, errno.ENOMEM, *NO_DESCRIPTOR):
            raise OSError(error, os.strerror(error))
        if error:
            return None
        index, found, length, kind = attempt.opened
        return File(paths[index], inode, found, length, kind)
    finally:
        attempt.end()


def count(file: File, ranges: Sequence[Range], timeout: float) -> int:
    """Return how many bytes of ranges of a tmpfs file are not in holes; all of them if it no longer exists."""
    total = 0
    for index in range(0, len(ranges), crosstask.MOST_RANGES):
        batch = [(start, end - start) for start, end in ranges[index : index + crosstask.MOST_RANGES]]
        attempt = crosstask.Attempt(batch, count=True, **_named(file))
        try:
            error = _run(attempt, timeout)
            total += sum(length for _at, length in batch) if error else attempt.moved
        finally:
            attempt.end()
    return total


def resident(file: File, start: int, end: int, timeout: float) -> int:
    """Return how many bytes of a range of offsets in a file, whole pages, are in memory; 0 if that is unknown."""
    batch = [(start, end - start)]
    attempt = crosstask.Attempt(batch, resident=True, page=PAGE_SIZE, **_named(file))
    try:
        return 0 if _run(attempt, timeout) else attempt.moved
    finally:
        attempt.end()


def read(
    ends: Ends, file: File, ranges: Sequence[Range], timeout: float, *, fresh: bool, holes: bool
) -> tuple[int, int]:
    """Read at most `crosstask.MOST_RANGES` ranges of a task from a file of an in-memory file system, like `move`.

    Parameters
    ----------
    ends, ranges, timeout
        As for `move`.
    file
        The file.
    fresh
        The destination is zero, and is not touched where the file has holes.
    holes
        Whether its file system supports SEEK_DATA.
    """
    there = [(start - ends.shift, end - start) for start, end in ranges]
    attempt = crosstask.Attempt(
        there, ours=[ends.here(start) for start, _end in ranges], page=PAGE_SIZE, fresh=fresh, holes=holes,
        **_named(file),
    )  # fmt: skip
    try:
        error = _run(attempt, timeout)
        return attempt.moved, error
    finally:
        attempt.end()


def move(ends: Ends, ranges: Sequence[Range], timeout: float) -> tuple[int, int]:
    """Transfer ranges of a task one after another.

    Parameters
    ----------
    ends
        The source and the destination.
    ranges
        Addresses in the task, ascending.
    timeout
        Seconds to wait without progress.

    Returns
    -------
    tuple[int, int]
        The number of bytes transferred, and the error number that ended the transfer, 0 if it is complete.
        `ETIMEDOUT`: the other program supplies nothing. `EFAULT` also stands for the end of a file.
    """
    total = 0
    batch, left = _batch(list(ranges))
    attempt = ends.attempt(batch, min(_SIZE, sum(end - start for start, end in ranges)))
    try:
        while True:
            moved, error = _move(ends, batch, attempt, timeout)
            total += moved
            if error or not left:
                return total, error
            batch, left = _batch(left)
            attempt.again(ends.there(batch))
    finally:
        attempt.end()


def touch(pid: int, pidfd: int, address: int, size: int, timeout: float) -> int:
    """Fault in whole pages of a task by reading a byte of each.

    Parameters
    ----------
    pid, pidfd, address, size
        The task, its pidfd or -1, and its pages.
    timeout
        Seconds to wait without a new page.

    Returns
    -------
    int
        The error number that ended it, 0 for none; `ETIMEDOUT` as for `move`.
    """
    step = crosstask.MOST_RANGES * PAGE_SIZE
    for start in range(address, address + size, step):
        end = min(start + step, address + size)
        attempt = crosstask.Attempt([(page, 1) for page in range(start, end, PAGE_SIZE)], task=pid, pidfd=pidfd)
        try:
            number = _run(attempt, timeout)
        finally:
            attempt.end()
        if number in NO_CHILD:  # this thread waits instead, without a limit
            number = crosstask.touch(pid, pidfd, start, end - start, PAGE_SIZE)
        if number:
            return number
    return 0


def page_out(pidfd: int, ranges: Sequence[Range], timeout: float) -> None:
    """Return pages of a task to swap, as far as this process may (CAP_SYS_NICE)."""
    for index in range(0, len(ranges), crosstask.MOST_RANGES):
        batch = [(start, end - start) for start, end in ranges[index : index + crosstask.MOST_RANGES]]
        attempt = crosstask.Attempt(batch, pidfd=pidfd, page_out=True)
        try:
            _run(attempt, timeout)
        finally:
            attempt.end()


def entries(pagemap: int, start: int, end: int, timeout: float) -> tuple[bytes, int]:
    """Read the entries of pages from the open pagemap of a task.

    Parameters
    ----------
    pagemap, start, end
        The descriptor, and addresses, which are extended to whole pages.
    timeout
        Seconds to wait for the lock of the address space.

    Returns
    -------
    tuple[bytes, int]
        The entries, and the error number, 0 for none. `EFAULT`: the last of all entries was read, or the memory no
        longer exists.
    """
    first, last = start // PAGE_SIZE, pages(end)
    return _text(pagemap, first * 8, (last - first) * 8, timeout)


def read_file(timeout: float) -> procfs.Read:
    """Return a function that reads a file of /proc/PID as os.read(2) does, but with a time limit.

    Each is for one descriptor. It raises `kIOReturnTimeout` if the lock of the address space is not released.
    """
    at = 0

    def read(fd: int, size: int) -> bytes:
        nonlocal at
        text, number = _text(fd, at, size, timeout)
        if number == errno.ETIMEDOUT:
            raise locked("the task", timeout)
        if number not in (0, errno.EFAULT):
            raise OSError(number, os.strerror(number))
        at += len(text)
        return text

    return read


def require_unlocked(pid: int, timeout: float) -> None:
    """Wait until another task's memory can be read: it holds neither of two locks.

    While the lock of its address space (mmap_lock) is held, every reader of its page tables or memory sleeps until it
    is released; while it executes a program (exec_update_lock), everything that opens one of these files, or its
    /proc/PID/stat. Only SIGKILL ends the wait, and a wait of process_vm_readv(2) or process_madvise(2) for the first
    lock not even that (measured, Linux 6.18). A task can hold both for as long as it likes, by replacing a mapping of
    a file of its own FUSE server, which has to write the file back first. Does nothing if /proc hides the task.

    Parameters
    ----------
    pid, timeout
        The task, and the seconds to wait.

    Raises
    ------
    IOReturnError
        `kIOReturnTimeout`; `kIOReturnNoMemory`: this process can map nothing.
    """
    if pid == os.getpid():
        return
    try:
        path = f"{pidns.directory(pid)}/pagemap"
        inode = os.stat(path).st_ino
    except OSError:
        return
    try:
        attempt = crosstask.Attempt([(0, 8)], paths=[os.fsencode(path)], inode=inode)
    except OSError as error:
        raise limits.from_oserror(error, f"cannot examine task {pid}") from None
    try:
        number = _run(attempt, timeout)
    finally:
        attempt.end()
    if number == errno.ETIMEDOUT:
        raise locked(f"task {pid}", timeout)


def locked(whose: str, timeout: float) -> TaskTimeoutError:
    """Return the error for a task that does not release the lock of its address space."""
    message = (
        f"{whose} has held the lock of its address space for {timeout:g} s: it is changing its mappings, or "
        "executing a program, and waits for another one (perhaps the server of a FUSE file, which must write it back)"
    )
    return TaskTimeoutError(message, errno.ETIMEDOUT)


def _text(fd: int, at: int, size: int, timeout: float) -> tuple[bytes, int]:
    """Read from a file; return the bytes, and the error number that ended it: `EFAULT` at its end."""
    attempt = crosstask.Attempt([(at, size)], file=fd)
    try:
        number = _run(attempt, timeout)
        text = attempt.data
    finally:
        attempt.end()
    if number in NO_CHILD:  # this thread waits instead, without a limit
        text = os.pread(fd, size, at)
        number = 0 if len(text) == size else errno.EFAULT
    return text, number


def _batch(ranges: list[Range]) -> tuple[list[Range], list[Range]]:
    """Split off the ranges that one child transfers."""
    batch: list[Range] = []
    room = _SIZE
    for start, end in ranges[: crosstask.MOST_RANGES]:
        batch.append((start, min(end, start + room)))
        room -= batch[-1][1] - start
        if not room:
            break
    return batch, behind(ranges, sum(end - start for start, end in batch))


def _move(ends: Ends, batch: Sequence[Range], attempt: crosstask.Attempt, timeout: float) -> tuple[int, int]:
    if ends.write:
        _copy_here(ends, batch, attempt.address, sum(end - start for start, end in batch))
    error = _run(attempt, timeout)
    # An abandoned child may continue to transfer bytes: only those that are copied here count.
    moved = attempt.moved
    if not ends.write:
        _copy_here(ends, batch, attempt.address, moved)
    return moved, error


def _run(attempt: crosstask.Attempt, timeout: float) -> int:
    """Run an attempt and return its error number, `ETIMEDOUT` if nothing arrives."""
    try:
        attempt.start()
    except OSError as error:
        return error.errno or errno.EAGAIN
    moved, deadline = 0, time.monotonic() + timeout
    while not attempt.wait(_LOOK_MS):
        if attempt.moved != moved:
            moved, deadline = attempt.moved, time.monotonic() + timeout
        elif time.monotonic() >= deadline:
            return errno.ETIMEDOUT
    return attempt.error


def _copy_here(ends: Ends, batch: Sequence[Range], bounce: int, size: int) -> None:
    """Copy the first `size` bytes between the memory of an attempt and that of this process."""
    for start, end in batch:
        length = min(end - start, size)
        here = ends.here(start)
        crosstask.copy_here(*((bounce, here) if ends.write else (here, bounce)), length)
        bounce += length
        size -= length
