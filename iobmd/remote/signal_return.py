"""Code and stack by which a thread restores its registers if its tracer is killed during an injected system call.

Before such a call, the tracer writes the registers to the unused part of the thread's stack, as the kernel does
before a signal handler runs, and arranges that the thread next makes the call by which handlers end (rt_sigreturn(2);
`iobmd_protect` in `cython_ext/tracer_x86_64.h`). This module finds both.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd._native.tracer import CALLING, RETURNING
from iobmd.errors import IOReturnError
from iobmd.task import attempt, job
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from iobmd.remote import threads
    from iobmd.task.task import Task

_LIBRARIES = ("libc.so", "libc-", "ld-musl")
_AREAS = 4  # areas of code that are searched
_CODE = 16 << 20  # bytes of each

_Object = tuple[str, int, int]
"""The device, inode number and offset of a mapped file."""

_offsets: dict[tuple[_Object, bytes], int] = {}  # of code in executable areas of files; -1: it is not in there
_addresses: dict[tuple[int, int], tuple[int, int]] = {}
"""By pid and the address of a system call instruction, which changes when the task executes another program."""


def code(task: Task, instruction: int) -> tuple[int, int]:
    """Return the addresses of `RETURNING` and `CALLING` in a task; zeros if it does not have both.

    Parameters
    ----------
    task : Task
        The task.
    instruction : int
        The address of a system call instruction in it.
    """
    if not RETURNING:  # aarch64
        return 0, 0
    key = task.pid, instruction
    try:
        known = _addresses.get(key)
        if known is not None and (not all(known) or _are_at(task, *known)):
            return known
        if len(_addresses) > 1000:
            _addresses.clear()
        found = _addresses[key] = _search(task, RETURNING), _search(task, CALLING)
        if not all(found):
            return 0, 0
        for address in found:  # the tracer must not wait for a page of the file
            attempt.touch(task.pid, task.pidfd, address & -PAGE_SIZE, PAGE_SIZE, job.TIMEOUT)
    except (OSError, IOReturnError):  # it exits, or its memory cannot be read
        return 0, 0
    return found


def _are_at(task: Task, returning: int, calling: int) -> bool:
    return task.read(returning, len(RETURNING)) == RETURNING and task.read(calling, len(CALLING)) == CALLING


def _search(task: Task, wanted: bytes) -> int:
    """Search the C library and the program."""
    areas = [area for area in procfs.maps(task.pid) if area.perms.startswith("r-x")]
    for area in sorted(areas, key=_rank)[:_AREAS]:
        if (offset := _in(task, area, wanted)) >= 0:
            return area.start + offset
    return 0


def _rank(area: procfs.VMA) -> int:
    return 0 if Path(area.name).name.startswith(_LIBRARIES) else 1


def _in(task: Task, area: procfs.VMA, wanted: bytes) -> int:
    """Return the offset of code in an area, or -1. It must be in one page."""
    key = (area.device, area.inode, area.offset), wanted
    if area.inode and key in _offsets:
        return _offsets[key]
    text = task.read(area.start, min(area.end - area.start, _CODE))
    found = text.find(wanted)
    while found >= 0 and found % PAGE_SIZE > PAGE_SIZE - len(wanted):
        found = text.find(wanted, found + 1)
    if area.inode:
        _offsets[key] = found
    return found


def stack(task: Task, activity: threads.Activity) -> tuple[int, int]:
    """Return the addresses between which a thread has its stack; (0, 0) if unknown.

    Memory below the stack pointer is unused only on a stack that the kernel or the C library has allocated. Programs
    that run on other memory (goroutines of Go, for example) may have other data there. The stack of the main thread
    has a name; others end at a guard.
    """
    pointer = activity.stack_pointer
    try:
        if not pointer and activity.tid == task.pid:  # it runs
            pointer = int(procfs.stat(task.pid)[25])
        if not pointer or not (area := procfs.find_vma(task.pid, pointer)) or not area.perms.startswith("rw-p"):
            return 0, 0
        if area.name != "[stack]" and (area.inode or not _has_guard(task, area)):
            return 0, 0
    except (OSError, IOReturnError, LookupError, ValueError):
        return 0, 0
    return area.start, area.end


def _has_guard(task: Task, area: procfs.VMA) -> bool:
    guard = procfs.find_vma(task.pid, area.start - 1)
    return guard is not None and guard.perms.startswith("---") and not guard.inode
