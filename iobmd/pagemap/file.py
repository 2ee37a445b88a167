"""Single pages: the decoded entries of /proc/PID/pagemap (proc_pid_pagemap(5))."""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import NamedTuple, Self

from iobmd import procfs
from iobmd._native import pagemap as native
from iobmd.errors import NO_DESCRIPTOR, IOReturnError
from iobmd.host import limits
from iobmd.pagemap.range import Target, Where, past_the_end, resolve
from iobmd.task import attempt, diagnosis
from iobmd.task.job import TIMEOUT
from iobmd.task.task import Task, kernel_task
from iobmd.units import PAGE_SIZE, round_down, round_up

_READ = 8 << 10  # pages a read; larger reads are no faster (measured)


class Page(NamedTuple):
    """One page of a task's address space."""

    address: int
    """Virtual address in bytes."""
    present: bool
    """Whether it is mapped to a page frame."""
    swapped: bool
    """Whether it is in swap."""
    pfn: int | None
    """Physical frame number; None if the page is absent, or the kernel hides it."""
    file_or_shared: bool
    """Whether it belongs to a file or to shared memory; False: anonymous."""
    exclusive: bool
    """Whether it is mapped by this task only."""
    soft_dirty: bool
    """Whether it was written to since the soft-dirty bits were cleared, on kernels that track this."""
    guard: bool
    """Whether it is a guard page (MADV_GUARD_INSTALL, Linux 6.13)."""

    @property
    def pfn_hidden(self) -> bool:
        """Whether it is present in a frame whose number the kernel hides (no CAP_SYS_ADMIN)."""
        return self.present and self.pfn is None

    @property
    def physical_address(self) -> int | None:
        """Physical address in bytes; None if `pfn` is None."""
        return None if self.pfn is None else self.pfn * PAGE_SIZE


class PageCounts(NamedTuple):
    """Numbers of pages of a range by state."""

    present: int
    """Pages mapped to a page frame."""
    swapped: int
    """Pages in swap."""
    hidden: int
    """Present pages whose frame number the kernel hides."""
    exclusive: int
    """Present pages that only this task maps."""


def pages(target: Target, address: int | None = None, size: int | None = None) -> Iterator[Page]:
    """Iterate over the pages of an address space, ascending, absent ones included.

    Parameters
    ----------
    target : Task, int, psutil.Process, a buffer or a map of iobmd, or anything with the buffer protocol
        The task, or the buffer, whose pages are reported.
    address, size : int, optional
        A range of the task in bytes, extended to whole pages; by default all mappings of the task.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound`, `kIOReturnBadArgument` (also for an address outside the user
        address space), `kIOReturnUnsupported` (a kernel thread, a buffer mapped in no task, or /proc is not mounted),
        `kIOReturnTimeout` (the task has held the lock of its address space for 10 s).
    """
    where = resolve(target, address, size)
    for fd, start, end in _ranges(where):
        at = start
        while at < end:
            entries = native.read_entries(fd, at // PAGE_SIZE, min(_READ, (end - at) // PAGE_SIZE))
            if not entries:
                raise no_entries(where.task, at, end)
            for fields in entries:
                yield Page(at, *fields)
                at += PAGE_SIZE


def counts(target: Target, address: int | None = None, size: int | None = None) -> PageCounts:
    """Count the pages of a range by state, without an object for each page. Parameters and errors as `pages`."""
    where = resolve(target, address, size)
    sums = [0, 0, 0, 0]
    walk = None
    for fd, start, end in _ranges(where):
        walk = native.Walk(fd, PAGE_SIZE, 0, 0, 0, False, False) if walk is None else walk
        try:
            tally = walk.total(start, end)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
            raise no_entries(where.task, start, end) from None
        more = tally.present, tally.swapped, tally.hidden, tally.exclusive
        sums = [before + size // PAGE_SIZE for before, size in zip(sums, more, strict=True)]
    return PageCounts(*sums)


class PagemapFile:
    """The open pagemap of a task, closed at the end of a `with` block."""

    def __init__(self, task: Task) -> None:
        attempt.require_unlocked(task.pid, TIMEOUT)
        try:
            self.fd = os.open(procfs.memory_file(task.pid, "pagemap"), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                raise diagnosis.without_memory(task.pid) from None
            if error.errno in NO_DESCRIPTOR:
                raise limits.from_oserror(error, f"cannot read the pagemap of task {task.pid}") from None
            raise diagnosis.refused(task.pid, error.errno or errno.EACCES, "pagemap") from None
        if not task.alive:  # the pagemap may belong to another process that reuses the pid
            os.close(self.fd)
            raise diagnosis.without_memory(task.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:  # a second close could close another file with this number
            os.close(fd)


def _ranges(where: Where) -> Iterator[tuple[int, int, int]]:
    """Yield the open pagemap of the task, with each range to read, in whole pages: its start and its end."""
    task = where.task
    with PagemapFile(task) as descriptor:
        for first, last in where.ranges():
            yield descriptor.fd, round_down(first, PAGE_SIZE), round_up(last, PAGE_SIZE)
    if not task.alive:
        raise diagnosis.gone(f"task {task.pid} no longer exists: it exited while its pagemap was read")


def no_entries(task: Task, start: int, end: int) -> IOReturnError:
    """Return the error for a pagemap that lacks entries between two addresses (at least one)."""
    if not task.alive:
        return diagnosis.without_memory(task.pid)
    if not _has_entry(kernel_task, end - 1):
        return past_the_end(end - 1)
    if _has_entry(task, start):
        return diagnosis.gone(f"the memory of task {task.pid} no longer exists: it executed another program")
    return diagnosis.gone(f"the memory of task {task.pid} no longer exists: it is exiting")


def _has_entry(task: Task, address: int) -> bool:
    with contextlib.suppress(OSError), PagemapFile(task) as fresh:
        return bool(native.read_entries(fresh.fd, address // PAGE_SIZE, 1))
    return False
