"""Where the bytes of a task's absent pages are, so that reading them creates no page in the task.

A page without a page table entry may be zero (private anonymous memory), a page of an object that is read through a
descriptor of it (tmpfs, hugetlbfs, files), or one that another program has to deliver (userfaultfd, FUSE). A fault
would answer in each case, but at the task's expense: the kernel charges a page of shared memory to the cgroup of the
process whose page table it was faulted into, takes pages of hugetlb from the pool, and grows page tables.
"""

from __future__ import annotations

import enum
import os
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd._internal import pidns
from iobmd._native import crosstask
from iobmd.errors import NO_DESCRIPTOR, IOReturnError
from iobmd.host import headroom
from iobmd.task import attempt
from iobmd.units import PAGE_SIZE, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from iobmd._native.crosstask import Ranges
    from iobmd.procfs import VMA
    from iobmd.task.attempt import File

SMALL = 64 << 10
"""Bytes of private memory below which nothing is asked about userfaultfd.

/proc/PID/smaps answers that, and walks the page tables of every area before the one in question (27 ms for 4 GiB in
small pages, under the lock that the task's mmap waits for). A fault costs the task a page table at most.
"""

_TMPFS, _RAMFS, _HUGETLBFS = 0x01021994, 0x858458F6, 0x958458F6  # linux/magic.h
_MEMORY = {_TMPFS, _RAMFS, _HUGETLBFS}
_USERFAULT = {"um", "uw", "ui"}  # VmFlags: registered for missing, write-protected, minor faults
_PRIVATE_HUGETLB = "/anon_hugepage"


class Origin(enum.Enum):
    """Where the bytes of absent pages come from."""

    ZERO = enum.auto()
    """They are zero."""
    OBJECT = enum.auto()
    """A file of a memory file system, a read of which allocates nothing and never waits."""
    FILE = enum.auto()
    """Another file; its server may keep a reader waiting."""
    FAULT = enum.auto()
    """Whatever answers a page fault: a device, the kernel, a handler of userfaultfd."""
    SILENT = enum.auto()
    """A file whose server does not answer."""
    NOWHERE = enum.auto()
    """Nothing is mapped that permits it."""


class Absent(NamedTuple):
    """Absent pages of one area."""

    ranges: Ranges
    origin: Origin
    waits: bool = False
    """A fault there waits for another program, possibly for this task itself."""
    file: File | None = None
    shift: int = 0
    """What an address there is more than its offset in `file`."""
    page: int = PAGE_SIZE
    """Bytes of a page of that file."""


class Files:
    """The files that a task has mapped.

    Parameters
    ----------
    pid
        The task.
    timeout
        Seconds for which a file's server may be silent.
    may_wait
        False: the task stands still, and may itself be the server.
    """

    def __init__(self, pid: int, timeout: float, *, may_wait: bool = True) -> None:
        self._pid = pid
        self._timeout = timeout
        self._may_wait = may_wait
        self._found: dict[tuple[str, int], File | Origin | None] = {}
        self._fuse: set[str] | None = None

    def find(self, area: VMA) -> File | Origin | None:
        """Return the file that an area maps; None where it cannot be opened, and the origin of one that would wait.

        By /proc/PID/map_files, for holders of CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN; else by the path of the file,
        or by a descriptor that the task still has open.
        """
        key = area.device, area.inode
        if key not in self._found:
            self._found[key] = self._look(area)
        return self._found[key]

    def _look(self, area: VMA) -> File | Origin | None:
        if not self._may_wait and area.device in self._fuse_devices():
            return Origin.FILE
        if _is_leased(area):
            return None
        try:
            return find_file(self._pid, area, self._timeout)
        except TimeoutError:
            return Origin.SILENT

    def _fuse_devices(self) -> set[str]:
        if self._fuse is None:
            served = (mount.device for mount in procfs.mounts(self._pid) if mount.kind.startswith("fuse"))
            self._fuse = {f"{major:02x}:{minor:02x}" for major, minor in served}
        return self._fuse


def find_file(pid: int, area: VMA, timeout: float, *, opened: bool = True) -> File | None:
    """Return the file that an area of a task maps; None where it cannot be found, or, if `opened`, not be opened.

    Raises OSError as `attempt.find`, whose parameters these are, and where the task is gone.
    """
    # Children have another /proc/self.
    own = pid == os.getpid() and not pidns.is_foreign()
    root = f"/proc/{pid}" if own else pidns.directory(pid)
    mapped = f"{root}/map_files/{area.start:x}-{area.end:x}"
    # Some file systems show another device in maps than stat(2) does (btrfs, overlayfs).
    found = attempt.find([mapped], area.inode, 0, timeout, opened=opened)
    if found:
        return found
    major, minor = (int(number, 16) for number in area.device.split(":"))
    paths = list(_named(root, area))
    return attempt.find(paths, area.inode, os.makedev(major, minor), timeout, opened=opened) if paths else None


def _is_leased(area: VMA) -> bool:
    try:
        return procfs.is_leased(area)
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise
        return False


def _named(root: str, area: VMA) -> Iterator[str]:
    """Iterate over where else the file of an area may be found."""
    if area.name.startswith("/") and not area.name.endswith(" (deleted)"):
        yield f"{root}/root{area.name}"
    try:
        numbers = os.listdir(f"{root}/fd")
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise
        return
    yield from (f"{root}/fd/{number}" for number in numbers)


def absent(pid: int, ranges: Ranges, files: Files, *, small: bool, permission: str = "r") -> Iterator[Absent]:
    """Iterate over what ascending `ranges` of absent pages of a task hold, ascending.

    Parameters
    ----------
    pid
        The task.
    ranges
        What pagemap shows as absent.
    files
        Finds the files that it maps.
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
    asked = not small or any(_may_have_handler(area, files) for area in areas)
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
            continue
        userfault = bool(flags[area.start] & _USERFAULT) if asked else not area.inode
        if userfault:
            yield Absent(inside, Origin.FAULT, waits=True)
        else:
            page = sizes.get(area.start, PAGE_SIZE)
            yield from _of_area(pid, area, inside, files, page=page, write=permission == "w")


def _may_have_handler(area: VMA, files: Files) -> bool:
    """Say whether smaps has to be read about an area that maps a file: userfaultfd serves memory file systems alone.

    smaps walks through all pages below, for a page of a library as well.
    """
    if not area.inode:
        return False
    file = files.find(area)
    return not isinstance(file, attempt.File) or file.kind in _MEMORY


def unmapped(pid: int, address: int, size: int) -> Ranges | tuple[()]:
    """Return where this process has nothing mapped, before a copy of a range of its own is allocated.

    Afterwards it could not be told: memory may come to lie at the very addresses that it is to be a copy of. Of other
    tasks nothing is returned.
    """
    end = min(address + size, (1 << 64) - 1)  # the end of all addresses is no 64-bit number
    if not size or pid != os.getpid() or crosstask.is_mapped(address, end - address, PAGE_SIZE):
        return ()
    try:
        areas = [(area.start, area.end) for area in procfs.areas(pid, address, end)]
    except OSError:
        areas = []
    return crosstask.Ranges(areas).outside(address, end)


def outline(pid: int, address: int, size: int) -> Ranges | None:
    """Return what of a range of a task is absent; None where the kernel does not say."""
    try:
        pagemap = os.open(f"{pidns.directory(pid)}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return crosstask.absent(pagemap, address, size, PAGE_SIZE)
    finally:
        os.close(pagemap)


def existing(pid: int, ranges: Ranges, timeout: float) -> int:
    """Return how many bytes of absent pages of a task exist in the object that it maps there.

    All of them where the kernel does not say. Raises IOReturnError as `absent`.
    """
    found = 0
    files = Files(pid, timeout)
    try:
        for part in absent(pid, ranges, files, small=False) if ranges else ():
            if part.file and part.origin is Origin.OBJECT and part.page == PAGE_SIZE:
                inside = [(start - part.shift, end - part.shift) for start, end in part.ranges]
                found += attempt.count(part.file, inside, timeout)
            elif part.origin not in (Origin.ZERO, Origin.NOWHERE):
                found += part.ranges.size
    except IOReturnError:
        raise
    except OSError:
        return ranges.size
    return found


def _of_area(pid: int, area: VMA, inside: Ranges, files: Files, *, page: int, write: bool) -> Iterator[Absent]:
    if not area.inode:
        # The kernel's own areas, such as [vdso], have pages that it maps on a fault.
        anonymous = not area.name or area.name.startswith(("[heap]", "[stack", "[anon:"))
        yield Absent(inside, Origin.ZERO if anonymous else Origin.FAULT)
        return
    if area.name.startswith(_PRIVATE_HUGETLB) and area.perms[3] == "p" and page > PAGE_SIZE:
        yield Absent(inside, Origin.ZERO)  # the object behind it has no other user, and is empty
        return
    file = files.find(area)
    if file is None:
        _require_room(pid, area, inside, page)
        yield Absent(inside, Origin.FAULT)
    elif isinstance(file, Origin):
        yield Absent(inside, file, waits=True)
    else:
        shift = area.start - area.offset
        origin = Origin.OBJECT if file.kind in _MEMORY else Origin.FILE
        whole = Absent(inside, origin, file.has_server, file, shift, page)
        yield from [whole] if write else _cut_at_end(whole, file)


def _cut_at_end(whole: Absent, file: File) -> Iterator[Absent]:
    """Behind the last byte of a file its page is zero, and behind that there is none."""
    end, last = whole.shift + file.length, whole.shift + round_up(file.length, whole.page)
    yield from (whole._replace(ranges=inside) for inside in _cut(whole.ranges, whole.ranges[0][0], end))
    yield from (Absent(inside, Origin.ZERO) for inside in _cut(whole.ranges, end, last))
    behind = max(last, whole.ranges[0][0])
    yield from (Absent(inside, Origin.NOWHERE) for inside in _cut(whole.ranges, behind, whole.ranges[-1][1]))


def _require_room(pid: int, area: VMA, inside: Ranges, page: int) -> None:
    """Raise where faults on all of it could exceed what the task may have. Files of a disk are not charged to it."""
    if not area.device.startswith("00:"):
        return
    if page > PAGE_SIZE:
        headroom.require_pages(inside.size, page, pid=pid)
    else:
        headroom.require(inside.size, swappable=True, pid=pid)


def _by_area(areas: Sequence[VMA], ranges: Ranges) -> Iterator[tuple[VMA | None, Ranges]]:
    """Group ranges by the area that holds them, cut at its bounds; None: they are not mapped."""
    at = ranges[0][0]
    for area in areas:
        if area.start > at:
            yield from ((None, between) for between in _cut(ranges, at, area.start))
        yield from ((area, inside) for inside in _cut(ranges, area.start, area.end))
        at = area.end
    yield from ((None, behind) for behind in _cut(ranges, at, ranges[-1][1]))


def _cut(ranges: Ranges, start: int, end: int) -> Iterator[Ranges]:
    """Yield what of the ranges lies between two addresses, if anything does."""
    if inside := ranges.between(start, end):
        yield inside
