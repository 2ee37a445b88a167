"""Transfers made by child processes that can be killed, and that have their own descriptors (`crosstask.Attempt`).

They may wait for another program, or read from a file that this process may have open, and locked, as well.
"""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd._native import crosstask
from iobmd.errors import NO_DESCRIPTOR
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

Range = tuple[int, int]
"""Start and end addresses, or offsets."""

NO_CHILD = (errno.EAGAIN, errno.EPERM, errno.ENOSYS)
"""Error numbers where no process can be made: RLIMIT_NPROC, a pids cgroup, a seccomp filter."""

_FUSE = 0x65735546  # linux/magic.h
_UNKNOWN = 0  # where a server refuses statfs(2)
_SIZE = 1 << 20  # bytes that one child moves, which is to say of its own memory
_LOOK_MS = 20  # between two looks at it, for Ctrl-C


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
        """Whether another program serves it, which may keep those waiting that open, read or stat it."""
        return self.kind in (_FUSE, _UNKNOWN)


class Ends(NamedTuple):
    """The two ends of a transfer."""

    theirs: int
    ours: int
    write: bool
    """From here into the task, instead of from the task to here."""
    pid: int = 0
    """The task."""
    pidfd: int = -1
    memory: int = -1
    """In place of the task its open /proc/PID/mem, which does not wait for a handler of userfaultfd."""
    file: File | None = None
    """In place of the task a file that it maps."""
    shift: int = 0
    """What an address in the task is more than its offset in `file`."""

    def here(self, address: int) -> int:
        """Return the address here that stands for one in the task."""
        return self.ours + address - self.theirs

    def attempt(self, batch: Sequence[Range]) -> crosstask.Attempt:
        """Return what is to move ranges of addresses in the task."""
        there = [(start - self.shift, end - start) for start, end in batch]
        if self.file is None:
            task = self.pid if self.memory < 0 else 0
            return crosstask.Attempt(there, task=task, pidfd=self.pidfd, file=self.memory, write=self.write)
        return crosstask.Attempt(there, **_named(self.file))


def _named(file: File) -> crosstask.Named:
    return {"paths": [os.fsencode(file.path)], "inode": file.inode, "device": file.device}


def find(paths: Sequence[str], inode: int, device: int, timeout: float, *, opened: bool = True) -> File | None:
    """Return the first of some paths that leads to a regular file; None if no path does, or no child can be made.

    Parameters
    ----------
    paths
        Where it may be.
    inode, device
        Its inode number, and its device if that is not 0.
    timeout
        Seconds for which its server may be silent.
    opened
        Only a file that this process may open. False: no file is opened, and its server is not asked for its length,
        which is then what the kernel last knew of, as its page faults do.

    Raises
    ------
    OSError
        `ETIMEDOUT`: it is. `EMFILE`, `ENFILE`, `ENOMEM`.
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
    """Return how many bytes of ranges of offsets in a file of tmpfs are not in holes; all of them if it is gone."""
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
    """Return how many bytes of a range of offsets in a file, whole pages, are in memory; 0 if that stays unknown."""
    batch = [(start, end - start)]
    attempt = crosstask.Attempt(batch, resident=True, page=PAGE_SIZE, **_named(file))
    try:
        return 0 if _run(attempt, timeout) else attempt.moved
    finally:
        attempt.end()


def read(
    ends: Ends, file: File, ranges: Sequence[Range], timeout: float, *, fresh: bool, holes: bool
) -> tuple[int, int]:
    """Read ranges of a task from a file of a memory file system, at most `crosstask.MOST_RANGES`; as `move`.

    Parameters
    ----------
    ends, ranges, timeout
        As for `move`.
    file
        The file.
    fresh
        The destination is zero, and stays untouched where the file has holes.
    holes
        It answers SEEK_DATA.
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
    """Move ranges of a task one after the other.

    Parameters
    ----------
    ends
        From where to where.
    ranges
        Addresses in the task, ascending.
    timeout
        Seconds for which nothing may arrive.

    Returns
    -------
    tuple[int, int]
        How many of their bytes were moved, and the error number that ended it, 0 when all were. `ETIMEDOUT`: the
        other program delivers nothing. `EFAULT` also stands for the end of a file.
    """
    total = 0
    left = list(ranges)
    while left:
        batch, left = _batch(left)
        moved, error = _move(ends, batch, timeout)
        total += moved
        if error:
            return total, error
    return total, 0


def touch(pid: int, pidfd: int, address: int, size: int, timeout: float) -> int:
    """Fault in whole pages of a task for reading, a byte of each.

    Parameters
    ----------
    pid, pidfd, address, size
        The task, its pidfd or -1, and its pages.
    timeout
        Seconds for which no page may arrive.

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
        if number in NO_CHILD:  # this thread waits, for as long as it takes
            number = crosstask.touch(pid, pidfd, start, end - start, PAGE_SIZE)
        if number:
            return number
    return 0


def behind(ranges: Sequence[Range], size: int) -> list[Range]:
    """Return what of the ranges lies behind their first `size` bytes."""
    for index, (start, end) in enumerate(ranges):
        if size < end - start:
            return [(start + size, end), *ranges[index + 1 :]]
        size -= end - start
    return []


def _batch(ranges: list[Range]) -> tuple[list[Range], list[Range]]:
    """Split off what one child moves."""
    batch: list[Range] = []
    room = _SIZE
    for start, end in ranges[: crosstask.MOST_RANGES]:
        batch.append((start, min(end, start + room)))
        room -= batch[-1][1] - start
        if not room:
            break
    return batch, behind(ranges, sum(end - start for start, end in batch))


def _move(ends: Ends, batch: Sequence[Range], timeout: float) -> tuple[int, int]:
    attempt = ends.attempt(batch)
    try:
        if ends.write:
            _copy_here(ends, batch, attempt.address, sum(end - start for start, end in batch))
        error = _run(attempt, timeout)
        # A child that was given up may still move some: what counts is what is copied here.
        moved = attempt.moved
        if not ends.write:
            _copy_here(ends, batch, attempt.address, moved)
        return moved, error
    finally:
        attempt.end()


def _run(attempt: crosstask.Attempt, timeout: float) -> int:
    """Start an attempt and wait until it is over; returns its error number, `ETIMEDOUT` if nothing arrives."""
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
    """Copy between the memory of an attempt and this process's, the first `size` bytes."""
    for start, end in batch:
        length = min(end - start, size)
        here = ends.here(start)
        crosstask.copy_here(*((bounce, here) if ends.write else (here, bounce)), length)
        bounce += length
        size -= length
