"""Where pages really lie: the entries of /proc/PID/pagemap, decoded (proc_pid_pagemap(5)).

The kernel shows physical frame numbers to holders of CAP_SYS_ADMIN only; for everybody else they read 0, which is
reported here as hidden, never as an address.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from iobmd import own, procfs, refusals
from iobmd._native import pagemap as native
from iobmd._native import runs as native_runs
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError, NoResourcesError
from iobmd.task import Task, as_task, check_range, kernel_task
from iobmd.units import PAGE_SIZE, round_down, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil

_ENTRY = 8
_STEP = 16 << 20  # bytes of address space a step: a scan holds up the task's own mmap for that long
_READ = 64 << 10  # bytes of entries a read; larger reads are no faster (measured)


class Page(NamedTuple):
    """One page of a task's address space."""

    address: int
    """Virtual address in bytes."""
    present: bool
    """Mapped to a frame now."""
    swapped: bool
    """Kept in swap."""
    pfn: int | None
    """Physical frame number; None when not present, or when the kernel hides it."""
    file_or_shared: bool
    """A page of a file, or of shared memory; False: anonymous."""
    exclusive: bool
    """Mapped by this task alone."""
    soft_dirty: bool
    """Written since the soft-dirty bits were cleared, on kernels that track it."""
    guard: bool
    """A guard page (MADV_GUARD_INSTALL, Linux 6.13)."""

    @property
    def pfn_hidden(self) -> bool:
        """Present in a frame whose number the kernel hides (no CAP_SYS_ADMIN)."""
        return self.present and self.pfn is None

    @property
    def physical_address(self) -> int | None:
        """Physical address in bytes, None like `pfn`."""
        return None if self.pfn is None else self.pfn * PAGE_SIZE


class PageCounts(NamedTuple):
    """How many pages of a range are in which state."""

    present: int
    swapped: int
    hidden: int
    """Present, but with a frame number that the kernel hides."""
    exclusive: int


def pages(task: Task | int | psutil.Process, address: int, size: int) -> Iterator[Page]:
    """Iterate over the pages that hold `size` bytes from `address` of `task`, ascending.

    Parameters
    ----------
    task
        Whose address space.
    address, size
        In bytes; rounded outwards to whole pages.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound`, `kIOReturnBadArgument` (also: an address that no process
        can have), `kIOReturnUnsupported` (a kernel thread).
    """
    for start, raw in _entries(as_task(task), address, size):
        for index, fields in enumerate(native.decode(raw)):
            yield Page(start + index * PAGE_SIZE, *fields)


def counts(task: Task | int | psutil.Process, address: int, size: int) -> PageCounts:
    """Count the pages of a range by state, without an object a page. Parameters and errors as `pages`."""
    present = swapped = hidden = exclusive = 0
    for _start, raw in _entries(as_task(task), address, size):
        more = native.tally(raw)
        present, swapped = present + more[0], swapped + more[1]
        hidden, exclusive = hidden + more[2], exclusive + more[3]
    return PageCounts(present, swapped, hidden, exclusive)


def resident_and_dirty(task: Task, address: int, size: int) -> tuple[int, int]:
    """Count the pages of private anonymous memory that are resident, and those of them ever written to.

    What a read of untouched memory maps (the kernel's zero page) is resident and not dirty.
    """
    resident = counts(task, address, size)
    try:
        with _open(task) as descriptor:
            written = native.scan(
                descriptor.fd, address, address + size, native.PAGE_IS_PRESENT, native.PAGE_IS_PFNZERO
            )
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        # Before Linux 6.7: the zero page counts as mapped by many, a page of one's own does not.
        return resident.present, resident.exclusive
    return resident.present, sum(end - start for start, end in written) // PAGE_SIZE


def own_ranges(address: int, size: int, *, protect: bool) -> list[tuple[int, int]]:
    """Return the ranges of this process's memory, whole pages, that are resident and were ever written to.

    With `protect` the writes to them are tracked from the same moment on, where `own.track_writes` was asked to
    (PAGEMAP_SCAN, Linux 6.7).
    """
    try:
        found = native.scan(
            own.pagemap(), address, address + size, native.PAGE_IS_PRESENT, native.PAGE_IS_PFNZERO, protect
        )
    except OSError as error:
        if isinstance(error, IOReturnError) or protect:
            raise
        # Before Linux 6.7: the zero page counts as mapped by many, a page of one's own does not.
        written = (page.address for page in pages(kernel_task, address, size) if page.present and page.exclusive)
        found = [(start, start + PAGE_SIZE) for start in written]
    joined = found[:1]
    for start, end in found[1:]:
        if joined[-1][1] == start:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


def has_content(address: int, size: int) -> bool:
    """Say whether any of this process's pages was written to and is there still, in memory or in swap."""
    if own_ranges(address, size, protect=False):
        return True
    return counts(kernel_task, address, size).swapped > 0


def huge_bytes(address: int, size: int) -> int:
    """Count the bytes of a range of this process that huge pages map; needs no privilege.

    By PAGEMAP_SCAN (Linux 6.7); before that by `certain_bytes`.
    """
    end = address + size
    try:
        with _open(kernel_task) as descriptor:
            found = native.scan(descriptor.fd, address, end, native.PAGE_IS_PRESENT | native.PAGE_IS_HUGE, 0)
        return sum(until - start for start, until in found)
    except NoResourcesError:
        raise
    except OSError:
        return certain_bytes(address, size, "AnonHugePages", "Private_Hugetlb")


def certain_bytes(address: int, size: int, *counters: str) -> int:
    """Count the bytes of a range of this process by counters of smaps, as far as those tell for sure.

    They count whole areas; what may lie outside of the range does not count.
    """
    certain, end = 0, address + size
    for area, found in procfs.smaps():
        inside = min(area.end, end) - max(area.start, address)
        if inside > 0:
            outside = area.end - area.start - inside
            certain += max(0, sum(found.get(name, 0) for name in counters) - outside)
    return certain


def is_huge(address: int, size: int) -> bool:
    """Say whether a range of this process is mapped by huge pages throughout, as `huge_bytes` counts."""
    return huge_bytes(address, size) == size


class Run(NamedTuple):
    """Pages that lie behind each other both virtually and physically; all in bytes."""

    virtual: int
    physical: int
    length: int


def runs(task: Task | int | psutil.Process, address: int, size: int) -> Iterator[Run]:
    """Iterate over the physically contiguous runs of a range, ascending by virtual address.

    Absent pages, and pages whose frame is hidden, are in no run. Read in steps, with few objects at a time.
    Parameters and errors as `pages`.
    """
    task = as_task(task)
    check_range(address, size)
    start, end = round_down(address, PAGE_SIZE), round_up(address + size, PAGE_SIZE)
    pending: Run | None = None
    with _open(task) as descriptor:
        for step in range(start, end, _STEP):
            try:
                table = native_runs.read(descriptor.fd, step, min(_STEP, end - step), PAGE_SIZE)
            except OSError:
                raise _no_entries(task, step) from None
            for index in range(table.count):
                run = Run(*table[index])
                if pending and _follows(pending, run):
                    pending = pending._replace(length=pending.length + run.length)
                    continue
                if pending:
                    yield pending
                pending = run
    if pending:
        yield pending


def _follows(first: Run, second: Run) -> bool:
    return first.virtual + first.length == second.virtual and first.physical + first.length == second.physical


class _open:  # noqa: N801 (used as a function)
    """The open pagemap of a task."""

    def __init__(self, task: Task) -> None:
        try:
            self.fd = os.open(f"/proc/{task.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                raise refusals.without_memory(task.pid) from None
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise refusals.own(error, f"cannot read the pagemap of task {task.pid}") from None
            raise refusals.refused(task.pid, error.errno or errno.EACCES, "pagemap") from None

    def __enter__(self) -> _open:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self.fd)


def _entries(task: Task, address: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield raw entries: the address of the first page of each read, and its bytes."""
    check_range(address, size)
    start, end = round_down(address, PAGE_SIZE), round_up(address + size, PAGE_SIZE)
    with _open(task) as descriptor:
        while start < end:
            wanted = min(_READ, (end - start) // PAGE_SIZE * _ENTRY)
            raw = os.pread(descriptor.fd, wanted, start // PAGE_SIZE * _ENTRY)
            if not raw:
                raise _no_entries(task, start)
            yield start, raw
            start += len(raw) // _ENTRY * PAGE_SIZE
    if not task.alive:
        raise refusals.gone(f"task {task.pid} is gone: it exited while its pagemap was read")


def _no_entries(task: Task, address: int) -> IOReturnError:
    if not task.alive:
        return refusals.without_memory(task.pid)
    return IOReturnError(
        IOReturn.kIOReturnBadArgument, f"address {address:#x} is past the end of the user address space"
    )
