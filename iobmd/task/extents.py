"""Sources of a task's absent pages, from which they can be read without creating pages in the task.

A page without a page table entry may be zero (private anonymous memory), a page of an object that can be read through
a descriptor (tmpfs, hugetlbfs, files), or a page that another program must supply (userfaultfd, FUSE). A page fault
would work in each case, but would cost the task: the kernel charges a page of shared memory to the cgroup of the
process into which it is faulted, uses pages of the hugetlb pool, and allocates page tables.
"""

from __future__ import annotations

import enum
import functools
import os
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd._internal import pidns
from iobmd._native import crosstask
from iobmd.errors import NO_DESCRIPTOR, IOReturnError
from iobmd.host import headroom
from iobmd.task import attempt, userfault
from iobmd.units import PAGE_SIZE, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from iobmd._native.crosstask import Ranges
    from iobmd.procfs import VMA
    from iobmd.task.attempt import File

SMALL = 64 << 10
"""Size in bytes up to which private memory is read without checking for userfaultfd.

The check reads /proc/PID/smaps, which walks the page tables of all areas before the one in question (27 ms for 4 GiB
in small pages, under the lock that the task's mmap needs). A fault costs the task at most a page table.
"""

TMPFS, _RAMFS, _HUGETLBFS = 0x01021994, 0x858458F6, 0x958458F6  # linux/magic.h
IN_MEMORY = {TMPFS, _RAMFS, _HUGETLBFS}
"""File systems whose files can be read without waiting."""
_PRIVATE_HUGETLB = "/anon_hugepage"


class Origin(enum.Enum):
    """The sources of absent pages."""

    ZERO = enum.auto()
    """The bytes are zero."""
    OBJECT = enum.auto()
    """A file of an in-memory file system: reading it allocates nothing and never waits."""
    FILE = enum.auto()
    """Another file, whose server may make a reader wait."""
    FAULT = enum.auto()
    """A page fault: a device, the kernel, or a userfaultfd handler supplies the page."""
    SILENT = enum.auto()
    """A file whose server does not answer."""
    NOWHERE = enum.auto()
    """Nothing is mapped that permits the access."""


class Absent(NamedTuple):
    """Absent pages of one area."""

    ranges: Ranges
    origin: Origin
    waits: bool = False
    """Whether a fault waits for another program, possibly for this task itself."""
    file: File | None = None
    shift: int = 0
    """The difference between an address and its offset in `file`."""
    page: int = PAGE_SIZE
    """Page size of that file, in bytes."""


class Files:
    """The files that a task has mapped.

    Parameters
    ----------
    pid
        The task.
    timeout
        Seconds to wait for a file's server.
    may_wait
        False: the task is stopped, and may itself be the server.
    is_bounded
        Whether the limit also applies to waits for the lock of its address space.
    """

    def __init__(self, pid: int, timeout: float, *, may_wait: bool = True, is_bounded: bool = False) -> None:
        self._pid = pid
        self._is_bounded = is_bounded
        self._timeout = timeout
        self._may_wait = may_wait
        self._found: dict[tuple[str, int], File | Origin | None] = {}
        self._fuse: set[str] | None = None

    @property
    def read(self) -> procfs.Read | None:
        """The reader of the next file of /proc/PID; None: os.read, without a limit."""
        return attempt.read_file(self._timeout) if self._is_bounded else None

    def find(self, area: VMA) -> File | Origin | None:
        """Return the file that an area maps, None if it cannot be opened, or the origin if opening it would wait.

        The file is found through /proc/PID/map_files (CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN), its path, or a
        descriptor that the task still has open.
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
    """Return the file that an area of a task maps; None if it cannot be found or, with `opened`, not be opened.

    Parameters and errors are those of `attempt.find`; OSError is also raised if the task has exited.
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
    """Iterate over other paths of an area's file."""
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
    """Iterate over the sources of ascending `ranges` of absent pages of a task, in ascending order.

    Parameters
    ----------
    pid
        The task.
    ranges
        The ranges that pagemap shows as absent.
    files
        Finds the files that the task maps.
    small
        The ranges have at most `SMALL` bytes, so that private memory may be faulted in.
    permission
        "r" or "w": the required permission of the mapping.

    Raises
    ------
    OSError
        The kernel refused access to the task's memory map.
    IOReturnError
        `kIOReturnNoMemory`, `kIOReturnNoResources`: it cannot be determined which pages exist, and creating them all
        would exceed a limit of the task or exhaust a pool.
    """
    low, high = ranges[0][0], ranges[-1][1]
    areas = list(procfs.areas(pid, low, high, files.read))
    flags: dict[int, frozenset[str]] = {}
    sizes: dict[int, int] = {}
    asked = not small or any(_may_have_handler(area, files) for area in areas)
    if asked:
        areas = []
        for found in procfs.details(pid, files.read):
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
        waits = bool(flags[area.start] & userfault.FLAGS) if asked else not area.inode or _is_zeros(area)
        if waits:
            yield Absent(inside, Origin.FAULT, waits=True)
        else:
            page = sizes.get(area.start, PAGE_SIZE)
            yield from _of_area(pid, area, inside, files, page=page, write=permission == "w")


def _is_zeros(area: VMA) -> bool:
    """Return whether an area is a private mapping of /dev/zero: anonymous memory, although it shows an inode."""
    return area.perms[3] == "p" and (area.device, area.inode) == _zero_device()


@functools.cache
def _zero_device() -> tuple[str, int]:
    """Return the device and inode of /dev/zero as maps shows them."""
    try:
        status = os.stat("/dev/zero")
    except OSError:
        return "", -1
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", status.st_ino


def _may_have_handler(area: VMA, files: Files) -> bool:
    """Return whether smaps must be read for a file mapping: userfaultfd only serves in-memory file systems.

    smaps walks all pages below the area, even for one page of a library.
    """
    if not area.inode or _is_zeros(area):
        return False
    file = files.find(area)
    return not isinstance(file, attempt.File) or file.kind in IN_MEMORY


def unmapped(pid: int, address: int, size: int) -> Ranges | tuple[()]:
    """Return the unmapped parts of a range of this process, before a copy of it is allocated.

    Afterwards they could not be determined, because the new memory may be mapped at those addresses. For other tasks
    the result is empty.
    """
    end = min(address + size, (1 << 64) - 1)  # the end of the address space does not fit 64 bits
    if not size or pid != os.getpid() or crosstask.is_mapped(address, end - address, PAGE_SIZE):
        return ()
    try:
        areas = [(area.start, area.end) for area in procfs.areas(pid, address, end)]
    except OSError:
        areas = []
    return crosstask.Ranges(areas).outside(address, end)


def outline(pid: int, address: int, size: int, timeout: float) -> Ranges | None:
    """Return the absent parts of a range of a task; None if the kernel does not show them.

    Raises `kIOReturnTimeout` as `attempt.require_unlocked`.
    """
    attempt.require_unlocked(pid, timeout)
    try:
        pagemap = os.open(f"{pidns.directory(pid)}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return crosstask.absent(pagemap, address, size, PAGE_SIZE)
    finally:
        os.close(pagemap)


def existing(pid: int, ranges: Ranges, timeout: float) -> int:
    """Return how many bytes of absent pages of a task exist in the mapped object.

    All of them if the kernel does not show it. Raises IOReturnError as `absent`.
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
        # Special areas, such as [vdso], have pages that the kernel maps on a fault.
        anonymous = not area.name or area.name.startswith(("[heap]", "[stack", "[anon:"))
        yield Absent(inside, Origin.ZERO if anonymous else Origin.FAULT)
        return
    if _is_zeros(area):
        yield Absent(inside, Origin.ZERO)
        return
    if area.name.startswith(_PRIVATE_HUGETLB) and area.perms[3] == "p" and page > PAGE_SIZE:
        yield Absent(inside, Origin.ZERO)  # its object has no other user, and is empty
        return
    file = files.find(area)
    if file is None:
        _require_room(pid, area, inside, page)
        yield Absent(inside, Origin.FAULT)
    elif isinstance(file, Origin):
        yield Absent(inside, file, waits=True)
    else:
        shift = area.start - area.offset
        origin = Origin.OBJECT if file.kind in IN_MEMORY else Origin.FILE
        whole = Absent(inside, origin, file.has_server, file, shift, page)
        yield from [whole] if write else _cut_at_end(whole, file)


def _cut_at_end(whole: Absent, file: File) -> Iterator[Absent]:
    """Split a range at the end of its file: the rest of the last page is zero, and further pages do not exist."""
    end, last = whole.shift + file.length, whole.shift + round_up(file.length, whole.page)
    yield from (whole._replace(ranges=inside) for inside in _cut(whole.ranges, whole.ranges[0][0], end))
    yield from (Absent(inside, Origin.ZERO) for inside in _cut(whole.ranges, end, last))
    behind = max(last, whole.ranges[0][0])
    yield from (Absent(inside, Origin.NOWHERE) for inside in _cut(whole.ranges, behind, whole.ranges[-1][1]))


def _require_room(pid: int, area: VMA, inside: Ranges, page: int) -> None:
    """Raise if faulting in all of it could exceed a limit of the task. Files on a disk are not charged to it."""
    if not area.device.startswith("00:"):
        return
    if page > PAGE_SIZE:
        headroom.require_pages(inside.size, page, pid=pid)
    else:
        headroom.require(inside.size, swappable=True, pid=pid)


def _by_area(areas: Sequence[VMA], ranges: Ranges) -> Iterator[tuple[VMA | None, Ranges]]:
    """Group ranges by area, split at the bounds of the areas; None for unmapped ranges."""
    at = ranges[0][0]
    for area in areas:
        if area.start > at:
            yield from ((None, between) for between in _cut(ranges, at, area.start))
        yield from ((area, inside) for inside in _cut(ranges, area.start, area.end))
        at = area.end
    yield from ((None, behind) for behind in _cut(ranges, at, ranges[-1][1]))


def _cut(ranges: Ranges, start: int, end: int) -> Iterator[Ranges]:
    """Yield the parts of the ranges between two addresses, unless there are none."""
    if inside := ranges.between(start, end):
        yield inside
