"""Queries about the memory of this process: which pages are resident, written to, or mapped by huge pages."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd._internal import process_local
from iobmd._native import mman
from iobmd._native import pagemap as native
from iobmd.errors import IOReturnError, NoResourcesError, NotPrivilegedError
from iobmd.pagemap.file import PagemapFile, counts, pages
from iobmd.task import diagnosis
from iobmd.task.task import Task, check_range, kernel_task
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from iobmd._native.pagemap import RunTable


_own_pagemap = process_local.LazyFd(
    lambda: os.open(procfs.memory_file("self", "pagemap"), os.O_RDONLY | os.O_CLOEXEC)
)
_tracker = process_local.LazyFd(mman.track_writes)


def own_pagemap() -> int:
    """Return a descriptor of this process's pagemap, which remains open.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPrivileged`: this process may not read its own pagemap. `kIOReturnUnsupported`: /proc is not
        mounted. `kIOReturnNoResources`: no descriptor.
    """
    try:
        return _own_pagemap.open()
    except PermissionError as error:
        message = (
            "this process may not read its own pagemap: it has changed its user and is not dumpable; call "
            "prctl(PR_SET_DUMPABLE, 1), or run with CAP_SYS_ADMIN"
        )
        raise NotPrivilegedError(message, error.errno or 0) from None
    except OSError as error:
        raise diagnosis.own_pagemap(error) from None


def track_writes(address: int, size: int) -> int:
    """Track writes to whole pages of this process, from the time at which PAGEMAP_SCAN protects them.

    Returns
    -------
    int
        The userfaultfd that tracks them; -1 if none is available (before Linux 6.7, behind a seccomp filter).
    """
    try:
        tracker = _tracker.open()
        mman.register_tracked(tracker, address, size)
    except OSError:
        return -1
    return tracker


def resident_and_dirty(task: Task, address: int, size: int) -> tuple[int, int]:
    """Count the resident pages of private anonymous memory, and those of them that were ever written to.

    The kernel's zero page, which a read of untouched memory maps, is resident and not dirty.
    """
    resident = counts(task, address, size)
    try:
        with PagemapFile(task) as descriptor:
            written = native.scan(
                descriptor.fd, address, address + size, native.PAGE_IS_PRESENT, native.PAGE_IS_PFNZERO
            )
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        # Before Linux 6.7, exclusive pages count as written to; the zero page counts as mapped by several tasks.
        return resident.present, resident.exclusive
    return resident.present, sum(end - start for start, end in written) // PAGE_SIZE


def own_ranges(address: int, size: int, *, protect: bool) -> list[tuple[int, int]]:
    """Return the ranges of whole pages of this process that are resident and were ever written to.

    With `protect`, writes to them are tracked from the same moment, after `track_writes` (PAGEMAP_SCAN, Linux 6.7).
    """
    try:
        found = native.scan(
            own_pagemap(), address, address + size, native.PAGE_IS_PRESENT, native.PAGE_IS_PFNZERO, protect
        )
    except OSError as error:
        if isinstance(error, IOReturnError) or protect:
            raise
        # Before Linux 6.7, exclusive pages count as written to; the zero page counts as mapped by several tasks.
        written = (page.address for page in pages(kernel_task, address, size) if page.present and page.exclusive)
        found = [(start, start + PAGE_SIZE) for start in written]
    joined = found[:1]
    for start, end in found[1:]:
        if joined[-1][1] == start:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


def own_runs(address: int, size: int, *, pinned: bool = False, gaps: bool = False) -> RunTable:
    """Return the physical runs of whole pages of this process. Raises as `own_pagemap`.

    With `pinned`, all pages must be present; with `gaps` as well, absent pages are omitted.
    """
    descriptor = own_pagemap()
    try:
        return native.read_runs(descriptor, address, size, PAGE_SIZE, pinned, gaps)
    except OSError as error:
        raise diagnosis.own_pagemap(error) from None


def visible_runs(task: Task, address: int, size: int) -> RunTable | None:
    """Return the runs of whole pages of another task; None if the kernel hides their frames."""
    try:
        with PagemapFile(task) as descriptor:
            table = native.read_runs(descriptor.fd, address, size, PAGE_SIZE)
    except IOReturnError:
        raise
    except OSError as error:
        raise diagnosis.refused(task.pid, error.errno or 0, "pagemap") from None
    return None if table.hidden else table


def has_content(address: int, size: int) -> bool:
    """Return whether any page of a range was written to and still exists, in memory or in swap."""
    if own_ranges(address, size, protect=False):
        return True
    return counts(kernel_task, address, size).swapped > 0


def huge_bytes(address: int, size: int, task: Task = kernel_task) -> int:
    """Count the bytes of a range of a task that are mapped by huge pages; requires no privilege.

    Uses PAGEMAP_SCAN (Linux 6.7), or else smaps, which counts whole areas: the result is then a lower bound.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: not a range of 64-bit addresses.
    """
    address, size = check_range(address, size)
    end = address + size
    try:
        with PagemapFile(task) as descriptor:
            found = native.scan(descriptor.fd, address, end, native.PAGE_IS_PRESENT | native.PAGE_IS_HUGE, 0)
        return sum(until - start for start, until in found)
    except NoResourcesError:
        raise
    except OSError:
        return certain_bytes(address, size, *procfs.HUGE, task=task)


def certain_bytes(address: int, size: int, *counters: str, task: Task = kernel_task) -> int:
    """Return a lower bound of the bytes of a range that counters of smaps count.

    The counters refer to whole areas; bytes that may be outside the range are subtracted.
    """
    certain, end = 0, address + size
    for area, found in procfs.smaps(task.pid):
        inside = min(area.end, end) - max(area.start, address)
        if inside > 0:
            outside = area.end - area.start - inside
            certain += max(0, sum(found.get(name, 0) for name in counters) - outside)
    return certain


def is_huge(address: int, size: int) -> bool:
    """Return whether a range of this process is completely mapped by huge pages, according to `huge_bytes`."""
    return huge_bytes(address, size) == size
