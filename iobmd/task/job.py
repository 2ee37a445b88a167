"""The parameters and the result of a transfer between this process and another."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iobmd._internal import chunked
    from iobmd._native.crosstask import Ranges
    from iobmd.task.ranges import Range

TIMEOUT = 10.0
"""Seconds for which a transfer waits for another program, if its caller sets no limit."""

WOULD_WAIT = errno.EDEADLK
"""The error number of a transfer that would have to wait for another program and may not."""


class Transfer(NamedTuple):
    """The parameters of a transfer.

    Attributes
    ----------
    pid, pidfd
        The task, and its pidfd or -1. The pidfd is checked directly before each call, so that no bytes are
        transferred to another task that has reused the pid.
    theirs, ours, size
        The address in the task, the address in this process, and the size in bytes.
    write
        Whether bytes are written to the task; False: read from it.
    huge
        Size of the huge pages of the destination; 0 if it is not newly mapped.
    fresh
        The destination is zero, and is not touched where the source is absent and zero.
    sparse
        Whether the destination is to be as sparse as the source: MADV_HUGEPAGE is only applied to ranges that are
        copied completely.
    skip
        Whether to zero unreadable bytes and continue after them.
    resident_only
        Do not wait for other programs: the task is stopped, and may itself be the one to wait for.
    timeout
        Seconds to wait for another program; None: `TIMEOUT` for a page that it supplies. With a limit, all calls that
        wait while the task holds the lock of its address space are also made by children
        (`attempt.require_unlocked`).
    progress
        Called repeatedly in this thread with the number of bytes transferred so far.
    outline
        The parts that were absent earlier, if known; only used to divide the work.
    by_file
        Read all pages through /proc/PID/mem, as those that tasks share since a fork (`iobmd.task.shared_pages`):
        most pages of a snapshot are shared with its source, and for the others the call is slower, because the kernel
        must first determine that they no longer are.
    """

    pid: int
    pidfd: int
    theirs: int
    ours: int
    size: int
    write: bool = False
    huge: int = 0
    fresh: bool = False
    sparse: bool = False
    skip: bool = False
    resident_only: bool = False
    timeout: float | None = None
    progress: chunked.Progress | None = None
    outline: Ranges | None = None
    by_file: bool = False

    @property
    def end(self) -> int:
        """The end address in the task."""
        return self.theirs + self.size

    @property
    def patience(self) -> float:
        """Seconds to wait for another program."""
        return patience(self.timeout)

    def here(self, address: int) -> int:
        """Return the address in this process that corresponds to one in the task."""
        return self.ours + address - self.theirs


def patience(timeout: float | None) -> float:
    """Return the seconds to wait for another program."""
    return TIMEOUT if timeout is None else timeout


class Outcome(NamedTuple):
    """The result of a transfer."""

    done: int
    """Bytes transferred from the start, without a gap."""
    error: int
    """The error number that ended the transfer, 0 if it is complete.

    `ESRCH` also means that the memory disappeared during the transfer, by exit or exec; `ETIMEDOUT` that another
    program supplied nothing; or `WOULD_WAIT`.
    """
    unread: Sequence[Range] = ()
    """Addresses in the task that could not be read, ascending (`Transfer.skip`)."""
    left_zero: bool = False
    """Whether part of a new destination was not touched."""
