"""Questions about this process's own memory: what is resident, was written to, or is mapped by huge pages."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from iobmd import own, procfs, refusals
from iobmd._native import pagemap as native
from iobmd._native import runs
from iobmd.errors import IOReturnError, NoResourcesError
from iobmd.pagemap.entries import counts, opened, pages
from iobmd.task import Task, kernel_task
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from iobmd._native.runs import RunTable


def resident_and_dirty(task: Task, address: int, size: int) -> tuple[int, int]:
    """Count the pages of private anonymous memory that are resident, and those of them ever written to.

    What a read of untouched memory maps (the kernel's zero page) is resident and not dirty.
    """
    resident = counts(task, address, size)
    try:
        with opened(task) as descriptor:
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


def visible_runs(task: Task, address: int, size: int) -> RunTable | None:
    """Return the runs of whole pages of another task; None where the kernel hides their frames."""
    try:
        with opened(task) as descriptor:
            table = runs.read(descriptor.fd, address, size, PAGE_SIZE)
    except IOReturnError:
        raise
    except OSError as error:
        raise refusals.refused(task.pid, error.errno or 0, "pagemap") from None
    return None if table.hidden else table


def has_content(address: int, size: int) -> bool:
    """Say whether any of this process's pages was written to and is there still, in memory or in swap."""
    if own_ranges(address, size, protect=False):
        return True
    return counts(kernel_task, address, size).swapped > 0


def huge_bytes(address: int, size: int, task: Task = kernel_task) -> int:
    """Count the bytes of a range, of this process or of another, that huge pages map; needs no privilege.

    By PAGEMAP_SCAN (Linux 6.7); before that by `certain_bytes`.
    """
    end = address + size
    try:
        with opened(task) as descriptor:
            found = native.scan(descriptor.fd, address, end, native.PAGE_IS_PRESENT | native.PAGE_IS_HUGE, 0)
        return sum(until - start for start, until in found)
    except NoResourcesError:
        raise
    except OSError:
        return certain_bytes(address, size, *procfs.HUGE, task=task)


def certain_bytes(address: int, size: int, *counters: str, task: Task = kernel_task) -> int:
    """Count the bytes of a range, as `huge_bytes`, by counters of smaps, as far as those tell for sure.

    They count whole areas; what may lie outside of the range does not count.
    """
    certain, end = 0, address + size
    for area, found in procfs.smaps(task.pid):
        inside = min(area.end, end) - max(area.start, address)
        if inside > 0:
            outside = area.end - area.start - inside
            certain += max(0, sum(found.get(name, 0) for name in counters) - outside)
    return certain


def is_huge(address: int, size: int) -> bool:
    """Say whether a range of this process is mapped by huge pages throughout, as `huge_bytes` counts."""
    return huge_bytes(address, size) == size
