"""Checks of free memory before memory is populated, so that the kernel need not kill a process.

mmap succeeds even if there is no memory for the mapping; when a page fault finds none, the kernel kills a process of
the host or of the charged memory cgroup. Memory that does not fit is therefore refused before it is populated. Pages
are charged to the cgroup of the process through whose mapping they are first touched, even if another process touches
them there (process_vm_readv(2), ptrace(2)).
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd._internal.lazy_property import LazyProperty
from iobmd.errors import NamedError, NoMemoryError, NoResourcesError
from iobmd.host import cgroup, pages
from iobmd.host.fact import read_int, read_text
from iobmd.printable import printable
from iobmd.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHECK_FROM = 1 << 20
"""Sum of smaller requests, in bytes, after which one is checked."""

SPARE = 8
"""The inverse of the part of memory, or of a limit, that must remain free."""

_OVERHEAD = 64
"""Page tables and lists of pinned pages each use up to 1/128 of the memory that they describe (4 KiB pages)."""

_EACH = 4 << 10
"""Bytes charged for a request in addition to its pages: for a buffer's Python objects, its area and its ring slot.

Measured: 4.0 KiB for a wired buffer and 1.7 KiB for a shared one, which for a small buffer is as much as its pages.
"""

_VALID = 0.02
"""Seconds for which a check covers further requests, up to 1/`SPARE` of the memory that it left free."""

_reliefs: list[Callable[[int], object]] = []


def on_shortage(relief: Callable[[int], object]) -> None:
    """Register `relief`, which is called with the number of missing bytes before memory is refused."""
    _reliefs.append(relief)


def require(size: int, *, swappable: bool, pid: int | None = None, absent: Callable[[], int] | None = None) -> None:
    """Check that memory can be populated now.

    The check leaves free twice `CHECK_FROM` of each limit, and the kernel's overhead. It is not exact: other
    processes allocate memory too, and small requests are checked together.

    Parameters
    ----------
    size : int
        Bytes to make resident.
    swappable : bool
        Whether they may be swapped out, so that free swap space counts too.
    pid : int, optional
        The process that is charged, by default this one.
    absent : callable, optional
        Returns how many of the bytes are not resident yet; called only if `size` does not fit.

    Raises
    ------
    IOReturnError
        `kIOReturnNoMemory`: with the limit, its value, the free part of it and its owner.
    """
    if pid is None and _recent.covers(size, swappable=swappable):
        return
    for relief in (*_reliefs, None):
        look = _Look(pid, _needed(size), swappable=swappable)
        if look.fits:
            if pid is None:
                _recent.renew(look.least.left - size, look.member, swappable=swappable)
            return
        if absent:
            size, absent = absent(), None
            look = _Look(pid, _needed(size), swappable=swappable)
            if not size or look.fits:
                return
        if relief and look.concerns_this_process:
            relief(look.size - look.least.left)
    raise look.least.refusal(NoMemoryError, f"{format_size(size)} of memory", pid)


def _needed(size: int) -> int:
    """Return the free memory that `size` bytes require, with the kernel's overhead and unchecked requests.

    The latter count twice, because processors charge pages in batches and cgroup counters lag behind.
    """
    return size + size // _OVERHEAD + 2 * CHECK_FROM


def require_pages(size: int, page_size: int, *, pid: int | None = None) -> None:
    """Check that the kernel has free hugetlb pages for a mapping without a reservation.

    Parameters
    ----------
    size : int
        Bytes to make resident.
    page_size : int
        Page size of the pool in bytes.
    pid : int, optional
        The process that is charged, by default this one.

    Raises
    ------
    IOReturnError
        `kIOReturnNoResources`: the pool has too few free, unreserved pages, with the command that enlarges it; or the
        limit of a hugetlb cgroup, with its value, the free part of it and its owner.
    """
    wanted = -(-size // page_size)
    what = f"{wanted} hugetlb pages of {format_size(page_size)}"
    pool = next((pool for pool in pages.hugetlb_pools() if pool.size == page_size), None)
    if pool is not None and wanted > pool.available:
        remedy, *_others = pages.pool_remedy(pool, wanted - pool.available).splitlines()
        message = (
            f"{what} do not fit: of the {pool.total} in the host's pool, {pool.free} are free, and others have "
            f"reserved {pool.reserved} of these; enlarge it: {remedy}"
        )
        raise NoResourcesError(message)
    name = f"hugetlb.{_short(page_size)}"
    for group in cgroup.around("hugetlb", pid):
        limit, usage = ("max", "current") if group.unified else ("limit_in_bytes", "usage_in_bytes")
        room = _room(group, "hugetlb", f"{name}.{limit}", f"{name}.{usage}")
        if room and wanted * page_size > room.left:
            raise room.refusal(NoResourcesError, what, pid)


def tightest() -> Room:
    """Return the limit with the least free memory for this process, including reclaimable memory; takes 0.2 ms."""
    host_room, *others = _Look(None, sys.maxsize, swappable=False).rooms()
    if host_room.limit == sys.maxsize:  # no /proc, or only of processes: free memory is a lower bound
        free, total = (os.sysconf(f"SC_{name}_PAGES") * PAGE_SIZE for name in ("AVPHYS", "PHYS"))
        host_room = Room(free, total)
    return min((host_room, *others), key=lambda room: room.left)


def shortage() -> int:
    """Return how many bytes must be freed so that an eighth of the host's memory and of each cgroup's limit is free.

    Negative if more is free. Swap does not count, because swapping is a consequence of the shortage.
    """
    look = _Look(None, sys.maxsize, swappable=False)
    look.swap = 0
    return max(room.limit // SPARE - room.left for room in look.rooms())


class Room(NamedTuple):
    """The free memory of the host or of a limit, in bytes."""

    left: int
    limit: int
    group: cgroup.Cgroup | None = None
    """The group with the limit; None: the host."""
    controller: str = ""
    file: str = ""
    """The file with the limit."""

    def refusal(self, kind: type[NamedError], what: str, pid: int | None) -> NamedError:
        """Return the error for memory that does not fit here; `pid` is the process that would be charged."""
        remedy = f"free some there, raise {printable(self.file)}" if self.group else "free some, add swap space"
        return kind(f"{what} do not fit: {self.report(pid)}; {remedy}, or request less")

    def report(self, pid: int | None = None) -> str:
        """Return a text with the free memory, the limit and its owner; `pid` as above."""
        left, limit = format_size(max(self.left, 0)), format_size(self.limit)
        if not self.group:
            return f"this host has {left} free of {limit}"
        whose = "this process" if pid is None else f"task {pid}"
        name = printable(self.group.name)
        return f"the {self.controller} cgroup {name} of {whose} has {left} free of its limit of {limit}"


class _Look:
    """A snapshot of the free memory of the host and of the memory cgroups that contain a process, for `size` bytes.

    Reclaimable memory, which takes longer to read, is read only if less than `size` is free without it.
    """

    def __init__(self, pid: int | None, size: int, *, swappable: bool) -> None:
        self.size = size
        self.member = cgroup.membership(pid)
        self._pid = pid
        self._swappable = swappable

    @LazyProperty
    def least(self) -> Room:
        """The limit with the least free memory."""
        return min(self.rooms(), key=lambda room: room.left)

    @property
    def fits(self) -> bool:
        """Whether enough memory is free everywhere."""
        return self.size <= self.least.left

    @property
    def concerns_this_process(self) -> bool:
        """Whether memory that this process frees would also be free under the tightest limit."""
        group = self.least.group
        return self._pid is None or group is None or group in cgroup.around("memory")

    def rooms(self) -> Iterator[Room]:
        """Iterate over the free memory of the host and then of each cgroup; unlimited if /proc cannot be read."""
        yield self._of_host()
        for group in self._groups:
            yield from self._of_unified(group) if group.unified else self._of_legacy(group)

    @LazyProperty
    def _groups(self) -> list[cgroup.Cgroup]:
        return cgroup.around("memory", self._pid, self.member)

    @LazyProperty
    def _memory(self) -> dict[str, int]:
        try:
            return procfs.meminfo()
        except OSError:  # no file descriptor is free, or /proc does not show it
            return dict.fromkeys(("MemAvailable", "MemTotal"), sys.maxsize) | dict.fromkeys(_SWAPPABLE, 0)

    @LazyProperty
    def swap(self) -> int:
        """Bytes that can be swapped out, given the free swap of the host and of each version 2 cgroup."""
        unified = (group for group in self._groups if group.unified)
        rooms = (_room(group, "memory", "memory.swap.max", "memory.swap.current") for group in unified)
        return max(0, min(self._memory["SwapFree"], *(room.left for room in rooms if room), sys.maxsize))

    @LazyProperty
    def _pinned(self) -> int:
        """Bytes that this process has pinned, which are counted as anonymous memory and cannot be swapped out."""
        if self._pid is not None:  # they may be charged to other groups than the memory in question
            return 0
        try:
            return procfs.status_bytes("VmPin")
        except OSError:
            return 0

    def _reclaimable(self, files: int, anonymous: int) -> int:
        """Return the bytes that can be dropped or swapped out, including swappable memory itself."""
        return files + (self.swap if self._swappable else min(self.swap, max(0, anonymous - self._pinned)))

    def _of_host(self) -> Room:
        free = os.sysconf("SC_AVPHYS_PAGES") * PAGE_SIZE // 2  # 0.5 µs, /proc/meminfo 75; part is reserved
        if free >= self.size:
            return Room(free, free)
        memory = self._memory
        anonymous = sum(memory[name] for name in _SWAPPABLE[1:])
        return Room(self._reclaimable(memory["MemAvailable"], anonymous), memory["MemTotal"])

    def _of_unified(self, group: cgroup.Cgroup) -> Iterator[Room]:
        if room := _room(group, "memory", "memory.max", "memory.current"):
            yield self._with_reclaimable(room, "")

    def _of_legacy(self, group: cgroup.Cgroup) -> Iterator[Room]:
        room = _room(group, "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        if not room:
            return
        yield self._with_reclaimable(room, "total_")
        if room.left < self.size and self.swap:
            # Swapping moves pages between the two counters and frees nothing here.
            both = _room(group, "memory", "memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes")
            if both:
                yield both._replace(left=both.left + _counted(group, "total_")[0])

    def _with_reclaimable(self, room: Room, prefix: str) -> Room:
        if room.group is None or room.left >= self.size:
            return room
        return room._replace(left=room.left + self._reclaimable(*_counted(room.group, prefix)))


_SWAPPABLE = "SwapFree", "Active(anon)", "Inactive(anon)"


def _room(group: cgroup.Cgroup, controller: str, limit: str, usage: str) -> Room | None:
    """Return the free part of a limit; None if a group has no limit."""
    most, used = read_int(group.file(limit)), read_int(group.file(usage))  # version 2 writes "max" for no limit
    if most is None or used is None or most >= _UNLIMITED:
        return None
    return Room(most - used, most, group, controller, group.file(limit))


_UNLIMITED = sys.maxsize - PAGE_SIZE
"""The value of an unset limit in version 1: the largest number of whole pages that fits a long."""


def _counted(group: cgroup.Cgroup, prefix: str) -> tuple[int, int]:
    """Return the droppable bytes of a group's page cache and kernel memory, and the bytes of its anonymous pages."""
    text = read_text(group.file("memory.stat")) or ""  # the group may be deleted
    counters = dict(line.split() for line in text.splitlines())

    def total(*names: str) -> int:
        return sum(int(counters.get(f"{prefix}{name}", 0)) for name in names)

    return total("active_file", "inactive_file", "slab_reclaimable"), total("active_anon", "inactive_anon")


def _short(page_size: int) -> str:
    """Return a page size as in the names of the hugetlb controller's files, such as "2MB"."""
    scale, unit = next(pair for pair in ((30, "GB"), (20, "MB"), (10, "KB")) if page_size >> pair[0])
    return f"{page_size >> scale}{unit}"


class _Recent:
    """The coverage of this process's last check. Races between threads only change how often a check is made.

    A check takes 60 to 90 µs (measured, three levels of cgroups), as long as populating 1 MiB. A covered request
    takes 5 µs, mostly to verify that the process was not moved to another cgroup.
    """

    def __init__(self) -> None:
        self._small = 0
        self._left = 0
        self._until = 0.0
        self._member = ""
        self._swappable = False

    def covers(self, size: int, *, swappable: bool) -> bool:
        """Count a request, and return whether it needs no check."""
        self._small += size + _EACH
        if self._small < CHECK_FROM:
            return True
        self._left -= self._small
        self._small = 0
        if self._left < 0 or time.monotonic() > self._until or (self._swappable and not swappable):
            return False
        return cgroup.membership() == self._member

    def renew(self, left: int, member: str, *, swappable: bool) -> None:
        """Record that `left` bytes were free after a request."""
        self._left, self._until = left // SPARE, time.monotonic() + _VALID
        self._member, self._swappable = member, swappable


_recent = _Recent()
