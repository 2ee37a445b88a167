"""Transfers that may wait for another program, made by child processes that can be killed (`crosstask.Attempt`)."""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd._native import crosstask
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iobmd.extents import Range

_SIZE = 1 << 20  # bytes that one child moves, which is to say of its own memory
_LOOK_MS = 20  # between two looks at it, for Ctrl-C


class Ends(NamedTuple):
    """The two ends of a transfer."""

    pid: int
    theirs: int
    ours: int
    write: bool
    """From here into the task, instead of from the task to here."""
    file: int = -1
    """In place of the task's memory: its own /proc/PID/mem, or a file that it maps."""
    shift: int = 0
    """What an address in the task is more than its offset in `file`."""

    def here(self, address: int) -> int:
        """Return the address here that stands for one in the task."""
        return self.ours + address - self.theirs


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
        batch, left = _batch(left, most=crosstask.MOST_RANGES if ends.file < 0 else 1)
        moved, error = _attempt(ends, batch, timeout)
        total += moved
        if error:
            return total, error
    return total, 0


def touch(pid: int, address: int, size: int, timeout: float) -> int:
    """Have whole pages of a task faulted in there for reading, a byte of each.

    Parameters
    ----------
    pid, address, size
        The task, and its pages.
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
        attempt = crosstask.Attempt(pid, -1, False, [(page, 1) for page in range(start, end, PAGE_SIZE)])
        try:
            attempt.start()
        except OSError:  # no process can be made: this thread waits, for as long as it takes
            error = crosstask.touch(pid, start, end - start, PAGE_SIZE)
        else:
            error = _watch(attempt, timeout)
        finally:
            attempt.end()
        if error:
            return error
    return 0


def behind(ranges: Sequence[Range], size: int) -> list[Range]:
    """Return what of the ranges lies behind their first `size` bytes."""
    for index, (start, end) in enumerate(ranges):
        if size < end - start:
            return [(start + size, end), *ranges[index + 1 :]]
        size -= end - start
    return []


def _batch(ranges: list[Range], *, most: int) -> tuple[list[Range], list[Range]]:
    """Split off what one child moves."""
    batch: list[Range] = []
    room = _SIZE
    for start, end in ranges[:most]:
        batch.append((start, min(end, start + room)))
        room -= batch[-1][1] - start
        if not room:
            break
    return batch, behind(ranges, sum(end - start for start, end in batch))


def _attempt(ends: Ends, batch: Sequence[Range], timeout: float) -> tuple[int, int]:
    there = [(start - ends.shift, end - start) for start, end in batch]
    attempt = crosstask.Attempt(ends.pid, ends.file, ends.write, there)
    try:
        if ends.write:
            _copy_here(ends, batch, attempt.bytes, sum(length for _at, length in there))
        try:
            attempt.start()
        except OSError:
            # No process can be made (a seccomp filter, RLIMIT_NPROC): this thread waits, for as long as it takes.
            return _wait_here(ends, batch)
        error = _watch(attempt, timeout)
        if not ends.write:
            _copy_here(ends, batch, attempt.bytes, attempt.moved)
        return attempt.moved, error
    finally:
        attempt.end()


def _watch(attempt: crosstask.Attempt, timeout: float) -> int:
    """Wait until an attempt is over; returns its error number, `ETIMEDOUT` where it delivers nothing for too long."""
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


def _wait_here(ends: Ends, batch: Sequence[Range]) -> tuple[int, int]:
    total = 0
    for start, end in batch:
        if ends.shift:
            moved, error = crosstask.read_object(
                ends.file, start - ends.shift, ends.here(start), end - start, PAGE_SIZE, False, False
            )
        else:
            reached, error, *_ = crosstask.transfer(
                ends.pid, ends.file, -1, -1, ends.write, False, start, ends.here(start), end - start, PAGE_SIZE
            )
            moved = reached - start
        total += moved
        if error:
            return total, error
    return total, 0
