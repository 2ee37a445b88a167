"""Reasons why the kernel cannot access or pin memory of a task, from its maps, page tables and files."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd import host, procfs
from iobmd._native import pagemap
from iobmd.errors import CannotWireError, NamedError, NoResourcesError, UnsupportedError, VMError
from iobmd.task import attempt, extents
from iobmd.units import PAGE_SIZE, format_size, pages, round_up

if TYPE_CHECKING:
    from iobmd.procfs import VMA, Details

_DEVICE_FLAGS = frozenset({"io", "pf"})  # VM_IO, VM_PFNMAP: no pages that can be pinned or copied
_IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")
_PATIENCE = 1.0  # seconds to find all files of a range


class Obstacle(NamedTuple):
    """The first byte of a range that cannot be accessed or pinned."""

    address: int
    kind: type[NamedError]
    why: str
    remedy: str = ""
    """What the caller can do; empty if nothing can be done."""

    def __str__(self) -> str:
        return f"at {self.address:#x}: {self.why}" + (f"; {self.remedy}" if self.remedy else "")


def find(pid: int, start: int, end: int, *, write: bool = False, pin: bool = False) -> Obstacle | None:
    """Return the first obstacle in a range of addresses of a task.

    Parameters
    ----------
    pid : int
        The task.
    start, end : int
        The range.
    write : bool
        Whether it is to be written to.
    pin : bool
        Whether it is to be pinned by io_uring.

    Returns
    -------
    Obstacle or None
        None if the kernel shows no obstacle.

    Raises
    ------
    OSError
        The task has exited, its /proc files are not readable, or it holds the lock of its address space.

    Notes
    -----
    Nothing is faulted in. The result describes the present memory, which may have changed since a call failed.
    """
    place, unpinnable, lengths = start, None, _Lengths(pid)
    attempt.require_unlocked(pid, _PATIENCE)
    for area in procfs.areas(pid, start, end):
        if area.start > place:
            break
        stop = min(area.end, end)
        if found := _unreachable(pid, area, place, stop, lengths, write=write):
            return found
        if pin and not unpinnable:  # inaccessible bytes take precedence, whatever their addresses
            unpinnable = _unpinnable(pid, area, place)
        place = stop
    if place >= end:
        return unpinnable
    return Obstacle(place, VMError, "no memory is mapped there")


def _unreachable(pid: int, area: VMA, place: int, stop: int, lengths: _Lengths, *, write: bool) -> Obstacle | None:
    for wanted, letter, name in ((True, "r", "read"), (write, "w", "write")):
        if wanted and letter not in area.perms:
            why = f"it is in a mapping without {name} permission, {area}"
            return Obstacle(place, VMError, why)
    if area.name.startswith("/secretmem"):
        why = f"it is memory of memfd_secret(2), which no system call and no device can access, {area}"
        return Obstacle(place, UnsupportedError, why)
    details = _details(pid, area)
    flags = details.flags if details else frozenset()
    if flags & _DEVICE_FLAGS:
        why = f"it is a mapping of a device, which has no pages to pin or copy, {area}"
        return Obstacle(place, UnsupportedError, why)
    page = details.counters.get("KernelPageSize", PAGE_SIZE) if details else PAGE_SIZE
    found = [_past_the_end(lengths, area, place, stop, page), _guarded(pid, area, place, stop)]
    if "ht" in flags:
        found.append(_pool_exhausted(pid, area, place, stop, page, reserved="nr" not in flags))
    return min((one for one in found if one), key=lambda one: one.address, default=None)


def _details(pid: int, area: VMA) -> Details | None:
    return next((one for one in procfs.details(pid) if one.area.end > area.start), None)


def _unpinnable(pid: int, area: VMA, place: int) -> Obstacle | None:
    """Return why io_uring does not pin accessible memory; it pins for writing (FOLL_WRITE | FOLL_LONGTERM)."""
    copy = "make a copy (IOBufferMemoryDescriptor.withCopy)"
    if "w" not in area.perms:
        why = f"it is not writable, and io_uring pins only writable memory, {area}"
        details = _details(pid, area)
        if details and "mw" not in details.flags:  # VM_MAYWRITE
            why += ", whose file was opened for reading only or is sealed against writing"
            return Obstacle(place, CannotWireError, why, copy)
        return Obstacle(place, CannotWireError, why, f"{copy}, or allow writing (mprotect)")
    if "s" in area.perms and _is_on_disk(pid, area):
        why = f"it is a shared mapping of a file, whose pages must be written back and are not pinned, {area}"
        return Obstacle(place, CannotWireError, why, copy)
    return None


def _is_on_disk(pid: int, area: VMA) -> bool:
    """Return whether an area maps a file of a mounted file system that is not an in-memory one."""
    device = tuple(int(number, 16) for number in area.device.split(":") if number)
    with contextlib.suppress(OSError):
        for mount in procfs.mounts(pid):
            if mount.device == device:
                return mount.kind not in _IN_MEMORY
    return False  # a memfd, whose mount is internal to the kernel


class _Lengths:
    """The lengths of the files that a task maps, as far as they can be determined quickly.

    A path to a file may lead through a directory whose server never answers (FUSE).
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._until = time.monotonic() + _PATIENCE

    def find(self, area: VMA) -> int | None:
        """Return the length of the regular file that an area maps; None if it maps none or it cannot be found."""
        left = self._until - time.monotonic()
        if not area.inode or left <= 0:
            return None
        with contextlib.suppress(OSError):
            if found := extents.find_file(self._pid, area, left, opened=False):
                return found.length
        return None


def _past_the_end(lengths: _Lengths, area: VMA, place: int, stop: int, page: int) -> Obstacle | None:
    length = lengths.find(area)
    if length is None:
        return None
    # The rest of the file's last page can be accessed.
    end = area.start + round_up(length, page) - area.offset
    if end >= stop:
        return None
    why = f"it is past the end of its file, of {length} bytes, {area}"
    return Obstacle(max(place, end), VMError, why)


def _guarded(pid: int, area: VMA, place: int, stop: int) -> Obstacle | None:
    at = _first(pid, place, stop, pagemap.GUARDED)
    if at is None:
        return None
    return Obstacle(at, VMError, f"it is a guard page (MADV_GUARD_INSTALL), in {area}")


def _first(pid: int, place: int, stop: int, wanted: tuple[int, int]) -> int | None:
    """Return the first address of a range whose pagemap entry is wanted; None if no entry is, or all are hidden."""
    with contextlib.suppress(OSError), open(procfs.memory_file(pid, "pagemap"), "rb", buffering=0) as opened:
        page = pagemap.first_entry(opened.fileno(), place // PAGE_SIZE, pages(stop), *wanted)
        if page is not None:
            return max(place, page * PAGE_SIZE)
    return None


def _pool_exhausted(pid: int, area: VMA, place: int, stop: int, page: int, *, reserved: bool) -> Obstacle | None:
    """Return the first hugetlb page that does not exist and cannot be allocated; `reserved`: the area has some."""
    pool = next((pool for pool in host.hugetlb_pools() if pool.size == page), None)
    if pool is None or (pool.free if reserved else pool.available):
        return None
    missing = _first(pid, place, stop, pagemap.ABSENT)
    if missing is None:
        return None
    why = (
        f"its page does not exist yet, and the hugetlb pool of {format_size(page)} pages has no page for it (total "
        f"{pool.total}, free {pool.free}, reserved {pool.reserved}), in {area}"
    )
    return Obstacle(missing, NoResourcesError, why, host.pool_remedy(pool, 1).partition("  #")[0])
