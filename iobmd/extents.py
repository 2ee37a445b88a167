"""Where the bytes of a task's absent pages are, so that reading them creates no page in the task.

A page without a page table entry may be zero (private anonymous memory), a page of an object that is read through a
descriptor of it (tmpfs, hugetlbfs, files), or one that another program has to deliver (userfaultfd, FUSE). A fault
would answer in each case, but at the task's expense: the kernel charges a page of shared memory to the cgroup of the
process whose page table it was faulted into, takes pages of hugetlb from the pool, and grows page tables.
"""

from __future__ import annotations

import enum
import os
import stat
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple

from iobmd import headroom, pidns, procfs
from iobmd._native import crosstask
from iobmd.errors import NO_DESCRIPTOR
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from iobmd.procfs import VMA

Range = tuple[int, int]
"""Start and end addresses."""

SMALL = 64 << 10
"""Bytes of private memory below which nothing is asked about userfaultfd.

/proc/PID/smaps answers that, and walks the page tables of every area before the one in question (27 ms for 4 GiB in
small pages, under the lock that the task's mmap waits for). A fault costs the task a page table at most.
"""

_TMPFS, _RAMFS, _HUGETLBFS, _FUSE = 0x01021994, 0x858458F6, 0x958458F6, 0x65735546  # linux/magic.h
_MEMORY = {_TMPFS, _RAMFS, _HUGETLBFS}
_USERFAULT = {"um", "uw", "ui"}  # VmFlags: registered for missing, write-protected, minor faults
_PRIVATE_HUGETLB = "/anon_hugepage"
_O_NOATIME = os.O_NOATIME


class Origin(enum.Enum):
    """Where the bytes of absent pages come from."""

    ZERO = enum.auto()
    """They are zero."""
    OBJECT = enum.auto()
    """A file of a memory file system, a read of which allocates nothing and waits for nobody."""
    FILE = enum.auto()
    """Another file; its server may keep a reader waiting."""
    FAULT = enum.auto()
    """Whatever answers a page fault: a device, the kernel, a handler of userfaultfd."""
    NOWHERE = enum.auto()
    """Nothing is mapped that permits it."""


class Absent(NamedTuple):
    """Absent pages of one area."""

    ranges: Sequence[Range]
    origin: Origin
    waits: bool = False
    """A fault there waits for another program, possibly for this task itself."""
    file: int = -1
    shift: int = 0
    """What an address there is more than its offset in `file`."""
    page: int = PAGE_SIZE
    """Bytes of a page of that file."""


class Objects:
    """Descriptors of what a task has mapped, to be closed by `close`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._found: dict[tuple[str, int], int] = {}

    def find(self, area: VMA) -> int:
        """Return a descriptor of what an area maps, with a file position of its own; -1 where there is none.

        By /proc/PID/map_files, for holders of CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN; else by the path of the file,
        or by a descriptor that the task still has open.
        """
        key = area.device, area.inode
        if key not in self._found:
            self._found[key] = next((fd for path in self._paths(area) if (fd := _open(path, area.inode)) >= 0), -1)
        return self._found[key]

    def _paths(self, area: VMA) -> Iterator[str]:
        root = pidns.directory(self._pid)
        yield f"{root}/map_files/{area.start:x}-{area.end:x}"
        if area.name.startswith("/") and not area.name.endswith(" (deleted)"):
            yield f"{root}/root{area.name}"
        try:
            numbers = os.listdir(f"{root}/fd")
        except OSError:
            return
        yield from (f"{root}/fd/{number}" for number in numbers)

    def close(self) -> None:
        """Close them."""
        for fd in self._found.values():
            if fd >= 0:
                os.close(fd)
        self._found.clear()


def _open(path: str, inode: int) -> int:
    """Open a regular file with that inode number; -1: it is another. No device is opened, which would notice it."""
    try:
        found = os.stat(path)
        if found.st_ino != inode or not stat.S_ISREG(found.st_mode):
            return -1
        fd = _open_quietly(path)
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise
        return -1
    opened = os.fstat(fd)
    if (opened.st_dev, opened.st_ino) == (found.st_dev, found.st_ino):
        return fd
    os.close(fd)  # another file took its place
    return -1


def _open_quietly(path: str) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | _O_NOATIME)  # for the owner of the file, and holders of CAP_FOWNER
    except PermissionError:
        return os.open(path, flags)


def absent(
    pid: int, ranges: Sequence[Range], objects: Objects, *, small: bool, permission: str = "r"
) -> Iterator[Absent]:
    """Iterate over what ascending `ranges` of absent pages of a task hold, ascending.

    Parameters
    ----------
    pid
        The task.
    ranges
        What pagemap shows as absent.
    objects
        Takes the descriptors.
    small
        It is at most `SMALL` bytes, and a fault may answer in private memory.
    permission
        "r" or "w": what the mapping has to permit.

    Raises
    ------
    OSError
        As the kernel refuses the task's memory map.
    IOReturnError
        `kIOReturnNoMemory`, `kIOReturnNoResources`: it cannot be determined which pages exist, and to create them all
        would exceed a limit of the task or empty a pool.
    """
    low, high = ranges[0][0], ranges[-1][1]
    areas = list(procfs.areas(pid, low, high))
    flags: dict[int, frozenset[str]] = {}
    sizes: dict[int, int] = {}
    asked = not small or any(area.inode for area in areas)
    if asked:
        areas = []
        for found in procfs.details(pid):
            if found.area.start >= high:
                break
            if found.area.end > low:
                areas.append(found.area)
                flags[found.area.start] = found.flags
                sizes[found.area.start] = found.counters.get("KernelPageSize", PAGE_SIZE)
    for area, inside in _by_area(areas, ranges):
        if area is None or permission not in area.perms:
            yield Absent(inside, Origin.NOWHERE)
        else:
            userfault = not asked or bool(flags[area.start] & _USERFAULT)
            yield _of_area(pid, area, inside, objects, userfault=userfault, page=sizes.get(area.start, PAGE_SIZE))


def resident(pid: int, address: int, size: int) -> int:
    """Return how many bytes of a range of a task are present or in swap, mapped there or in the object it maps.

    All of them where the kernel does not say. Raises as `absent`.
    """
    try:
        pagemap = os.open(f"{pidns.directory(pid)}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return size
    try:
        ranges = crosstask.absent(pagemap, address, size, PAGE_SIZE)
    finally:
        os.close(pagemap)
    found = size - sum(end - start for start, end in ranges)
    objects = Objects(pid)
    try:
        for part in absent(pid, ranges, objects, small=False) if ranges else ():
            if part.origin is Origin.OBJECT and part.page == PAGE_SIZE:
                found += sum(crosstask.data(part.file, start - part.shift, end - start) for start, end in part.ranges)
            elif part.origin not in (Origin.ZERO, Origin.NOWHERE):
                found += sum(end - start for start, end in part.ranges)
    finally:
        objects.close()
    return found


def _of_area(pid: int, area: VMA, inside: Sequence[Range], objects: Objects, *, userfault: bool, page: int) -> Absent:
    if userfault:
        return Absent(inside, Origin.FAULT, waits=True)
    if not area.inode:
        # The kernel's own areas, such as [vdso], have pages that it maps on a fault.
        anonymous = not area.name or area.name.startswith(("[heap]", "[stack", "[anon:"))
        return Absent(inside, Origin.ZERO if anonymous else Origin.FAULT)
    if area.name.startswith(_PRIVATE_HUGETLB) and area.perms[3] == "p":
        return Absent(inside, Origin.ZERO)  # the object behind it is nobody else's, and empty
    file = objects.find(area)
    if file < 0:
        _require_room(pid, area, inside, page)
        return Absent(inside, Origin.FAULT)
    kind = crosstask.filesystem(file)
    shift = area.start - area.offset
    if kind in _MEMORY:
        return Absent(inside, Origin.OBJECT, False, file, shift, page)
    return Absent(inside, Origin.FILE, kind == _FUSE, file, shift, page)


def _require_room(pid: int, area: VMA, inside: Sequence[Range], page: int) -> None:
    """Raise where faults on all of it could exceed what the task may have. Files of a disk are not charged to it."""
    if not area.device.startswith("00:"):
        return
    size = sum(end - start for start, end in inside)
    if page > PAGE_SIZE:
        headroom.require_pages(size, page, pid=pid)
    else:
        headroom.require(size, swappable=True, pid=pid)


def _by_area(areas: Sequence[VMA], ranges: Sequence[Range]) -> Iterator[tuple[VMA | None, Sequence[Range]]]:
    """Group ranges by the area that holds them, cut at its bounds; None: they are not mapped."""
    at = ranges[0][0]
    for area in areas:
        if area.start > at:
            yield from ((None, between) for between in _cut(ranges, at, area.start))
        yield from ((area, inside) for inside in _cut(ranges, area.start, area.end))
        at = area.end
    yield from ((None, behind) for behind in _cut(ranges, at, ranges[-1][1]))


def _cut(ranges: Sequence[Range], start: int, end: int) -> Iterator[Sequence[Range]]:
    """Yield what of the ranges lies between two addresses, if anything does."""
    first = bisect_right(ranges, start, key=lambda found: found[1])
    last = bisect_left(ranges, end, key=lambda found: found[0])
    if first < last:
        inside = list(ranges[first:last])
        inside[0] = max(inside[0][0], start), inside[0][1]
        inside[-1] = inside[-1][0], min(inside[-1][1], end)
        yield inside
