"""Absent pages of a range, and whether they can be faulted in without invoking the OOM killer."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from iobmd import pagemap, procfs
from iobmd._native import mman
from iobmd.host import headroom
from iobmd.task import attempt
from iobmd.task.task import kernel_task
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from iobmd.task.task import Task

_PATIENCE = 1.0  # seconds to wait for the server of a file
_STEP = 1 << 30  # bytes per mincore call
_UNCHARGED = {"ht", "io", "pf"}  # hugetlb pages, which come from pools, and devices (VmFlags)


def require(
    address: int,
    size: int,
    *,
    swappable: bool,
    task: Task = kernel_task,
    written: bool = True,
    shared: bool | None = None,
) -> None:
    """Check that a whole range can be faulted in, before doing so.

    Parameters
    ----------
    address, size : int
        Whole pages of `task`, in bytes.
    swappable : bool
        Whether they may be swapped out afterwards.
    task : Task
        The task that owns the memory, whose cgroups are charged.
    written : bool
        Whether it is faulted in for writing. Reading private memory maps existing pages, such as the kernel's zero
        page.
    shared : bool, optional
        Whether it is a single mapping of this process of shared memory (True) or private anonymous memory (False).
        None: unknown.

    Raises
    ------
    IOReturnError
        `kIOReturnNoMemory`, as `headroom.require`.
    """
    pid = None if task.is_current else task.pid

    def missing() -> int:
        if shared is None:
            return absent(address, size, task, written=written)
        return size - (_in_memory(address, size) if shared else _own_pages(task, address, size))

    headroom.require(size, swappable=swappable, pid=pid, absent=missing)


def absent(address: int, size: int, task: Task = kernel_task, *, written: bool = True) -> int:
    """Count the bytes that the kernel would allocate if each page of a range were touched. Parameters as `require`.

    In private memory, all pages count that the task does not have exclusively: writing copies zero pages, and pages
    that belong to a file or also to a forked child. If the kernel does not show it, all bytes count.
    """
    missing, end = 0, address + size
    try:
        for area, flags in procfs.vm_flags("self" if task.is_current else task.pid):
            start, stop = max(area.start, address), min(area.end, end)
            if start < stop and not flags & _UNCHARGED and (written or _is_shared(area)):
                missing += stop - start - _resident(task, area, start, stop)
    except OSError:
        return size
    return missing


def _resident(task: Task, area: procfs.VMA, start: int, end: int) -> int:
    if not _is_shared(area):
        if not area.inode:
            return _own_pages(task, start, end - start)
        copies = (page.exclusive and not page.file_or_shared for page in pagemap.pages(task, start, end - start))
        return sum(copies) * PAGE_SIZE
    if task.is_current:
        return _in_memory(start, end - start)
    mapped = pagemap.counts(task, start, end - start).present * PAGE_SIZE
    # Pages that the object has, but the task has not mapped, can be counted only if the object can be opened.
    with contextlib.suppress(OSError):
        if procfs.is_leased(area):
            return mapped
        # By a child: this process would lose its POSIX locks on the file when it closed it.
        path = procfs.memory_file(task.pid, f"map_files/{area.start:x}-{area.end:x}")
        file = attempt.find([path], area.inode, 0, _PATIENCE)
        if file and not file.has_server:  # which may never answer
            first = area.offset + start - area.start
            return max(mapped, attempt.resident(file, first, first + end - start, _PATIENCE))
    return mapped


def _own_pages(task: Task, address: int, size: int) -> int:
    """Count the bytes of private anonymous memory that the task has exclusively."""
    return pagemap.counts(task, address, size).exclusive * PAGE_SIZE


def _is_shared(area: procfs.VMA) -> bool:
    return area.perms.endswith("s")


def _in_memory(address: int, size: int) -> int:
    """Count the bytes of a shared mapping of this process whose pages are in memory, mapped or not (mincore(2))."""
    count = 0
    for offset in range(0, size, _STEP):
        vector = mman.incore(address + offset, min(_STEP, size - offset) // PAGE_SIZE, PAGE_SIZE)
        count += sum(vector.translate(_RESIDENT_BIT))
    return count * PAGE_SIZE


_RESIDENT_BIT = bytes(value & 1 for value in range(256))
