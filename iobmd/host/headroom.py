"""How much memory can be filled before the kernel kills a process for it.

An mmap succeeds long before there is memory for it, and the kernel's answer to the page fault that finds none is to
kill a process of the host, or of the memory cgroup that is charged. Filling is therefore refused beforehand when it
cannot fit. Pages are charged to the cgroup of the process through whose mapping they are first touched, also when
another process touches them there (process_vm_readv(2), ptrace(2)).
"""

from __future__ import annotations

import os
import sys
import time
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError, NoResourcesError
from iobmd.host import cgroup, pages
from iobmd.host.fact import read_int, read_text
from iobmd.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHECK_FROM = 1 << 20
"""Bytes that smaller requests may sum up to before one of them is checked."""

SPARE = 8
"""The part of memory, or of a limit, that is to stay free: one in so many."""

_OVERHEAD = 64
"""Page tables, and lists of pinned pages, take up to one byte in 128 of the memory they are for (4 KiB pages)."""

_EACH = 4 << 10
"""Bytes that are charged for a request beside its pages: the objects of a buffer, its area, its slot of a ring.

Measured 4.0 KiB for a wired buffer, 1.7 for a shared one: of small buffers as much as the pages themselves.
"""

_VALID = 0.02
"""Seconds for which a check covers further requests, up to one part in `SPARE` of what it left."""

_reliefs: list[Callable[[int], None]] = []


def on_shortage(relief: Callable[[int], None]) -> None:
    """Have `relief` called with the bytes that are missing, before memory is refused."""
    _reliefs.append(relief)


def require(size: int, *, swappable: bool, pid: int | None = None, absent: Callable[[], int] | None = None) -> None:
    """Check that memory can be filled now.

    Of each limit it leaves twice `CHECK_FROM` free, and what the kernel adds to the pages. It may let too much
    through: other processes take memory as well, and small requests are checked together.

    Parameters
    ----------
    size : int
        Bytes to make resident.
    swappable : bool
        They may be swapped out, so that what is free of the swap space counts too.
    pid : int, optional
        The process that is charged, by default this one.
    absent : callable, optional
        Counts the bytes among them that are not resident yet; called only if `size` does not fit.

    Raises
    ------
    IOReturnError
        `kIOReturnNoMemory`: the limit that is too low, its value, what is left of it and whose it is.
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
    raise look.least.refusal(IOReturn.kIOReturnNoMemory, f"{format_size(size)} of memory", pid)


def _needed(size: int) -> int:
    """Return what has to be left for `size` bytes: with what the kernel adds, and requests not checked yet.

    Twice those: each processor charges pages in batches, which the counters of the cgroup lag behind.
    """
    return size + size // _OVERHEAD + 2 * CHECK_FROM


def require_pages(size: int, page_size: int, *, pid: int | None = None) -> None:
    """Check that the kernel has hugetlb pages to fault in for which the mapping holds no reservation.

    Parameters
    ----------
    size : int
        Bytes to make resident.
    page_size : int
        Of the pool, in bytes.
    pid : int, optional
        The process that is charged, by default this one.

    Raises
    ------
    IOReturnError
        `kIOReturnNoResources`: the pool has too few pages that are neither used nor reserved, with the command that
        raises it; or the limit of a hugetlb cgroup, its value, what is left of it and whose it is.
    """
    wanted = -(-size // page_size)
    what = f"{wanted} hugetlb pages of {format_size(page_size)}"
    pool = next((pool for pool in pages.hugetlb_pools() if pool.size == page_size), None)
    if pool is not None and wanted > pool.available:
        remedy, *_others = pages.pool_remedy(pool, wanted - pool.available).splitlines()
        message = (
            f"{what} do not fit: of the {pool.total} in the host's pool {pool.free} are free, {pool.reserved} of "
            f"them reserved by others; raise it: {remedy}"
        )
        raise NoResourcesError(message)
    name = f"hugetlb.{_short(page_size)}"
    for group in cgroup.around("hugetlb", pid):
        limit, usage = ("max", "current") if group.unified else ("limit_in_bytes", "usage_in_bytes")
        room = _room(group, "hugetlb", f"{name}.{limit}", f"{name}.{usage}")
        if room and wanted * page_size > room.left:
            raise room.refusal(IOReturn.kIOReturnNoResources, what, pid)


def tightest() -> Room:
    """Return where least memory is left for this process, with what the kernel could reclaim; takes 0.2 ms."""
    host_room, *others = _Look(None, sys.maxsize, swappable=False).rooms()
    if host_room.limit == sys.maxsize:  # no /proc, or of processes only: what is free is the least that is available
        free, total = (os.sysconf(f"SC_{name}_PAGES") * PAGE_SIZE for name in ("AVPHYS", "PHYS"))
        host_room = Room(free, total)
    return min((host_room, *others), key=lambda room: room.left)


def shortage() -> int:
    """Return how many bytes are missing for an eighth to be left, of the host's memory and of each cgroup's limit.

    Negative: how many more are left. Swap does not count: it is what running short leads to.
    """
    look = _Look(None, sys.maxsize, swappable=False)
    look.swap = 0
    return max(room.limit // SPARE - room.left for room in look.rooms())


class Room(NamedTuple):
    """What is left somewhere, in bytes."""

    left: int
    limit: int
    group: cgroup.Cgroup | None = None
    """Whose limit it is; None: the host's memory."""
    controller: str = ""
    file: str = ""
    """The path of the limit."""

    def refusal(self, code: IOReturn, what: str, pid: int | None) -> IOReturnError:
        """Return the error for memory that does not fit here; `pid` is the process that would be charged."""
        remedy = f"free some there, raise {self.file}" if self.group else "free some, add swap space"
        return IOReturnError(code, f"{what} do not fit: {self.report(pid)}; {remedy}, or ask for less")

    def report(self, pid: int | None = None) -> str:
        """Say what is left here, of which limit, and whose it is; `pid` as above."""
        left, limit = format_size(max(self.left, 0)), format_size(self.limit)
        if not self.group:
            return f"this host has {left} left of {limit}"
        whose = "this process" if pid is None else f"task {pid}"
        return f"the {self.controller} cgroup {self.group.name} of {whose} has {left} left of its limit of {limit}"


class _Look:
    """One look at the host's memory and the memory cgroups around a process, for `size` bytes.

    What takes longer to read is read only where less than `size` is left without it: what the kernel could reclaim.
    """

    def __init__(self, pid: int | None, size: int, *, swappable: bool) -> None:
        self.size = size
        self.member = cgroup.membership(pid)
        self._pid = pid
        self._swappable = swappable

    @cached_property
    def least(self) -> Room:
        """Where least is left."""
        return min(self.rooms(), key=lambda room: room.left)

    @property
    def fits(self) -> bool:
        """Whether so much is left everywhere."""
        return self.size <= self.least.left

    @property
    def concerns_this_process(self) -> bool:
        """Whether memory that this process frees would be left where least is."""
        group = self.least.group
        return self._pid is None or group is None or group in cgroup.around("memory")

    def rooms(self) -> Iterator[Room]:
        """Iterate over what is left everywhere, of the host first; no limit where /proc cannot be read."""
        yield self._of_host()
        for group in self._groups:
            yield from self._of_unified(group) if group.unified else self._of_legacy(group)

    @cached_property
    def _groups(self) -> list[cgroup.Cgroup]:
        return cgroup.around("memory", self._pid, self.member)

    @cached_property
    def _memory(self) -> dict[str, int]:
        try:
            return procfs.meminfo()
        except OSError:  # no descriptor is free, or /proc does not show it
            return dict.fromkeys(("MemAvailable", "MemTotal"), sys.maxsize) | dict.fromkeys(_SWAPPABLE, 0)

    @cached_property
    def swap(self) -> int:
        """What can be swapped out, by what the host and each cgroup of version 2 has left."""
        unified = (group for group in self._groups if group.unified)
        rooms = (_room(group, "memory", "memory.swap.max", "memory.swap.current") for group in unified)
        return max(0, min(self._memory["SwapFree"], *(room.left for room in rooms if room), sys.maxsize))

    def _reclaimable(self, files: int, anonymous: int) -> int:
        """Return what can be dropped or swapped out; swappable memory itself can be too."""
        return files + (self.swap if self._swappable else min(self.swap, anonymous))

    def _of_host(self) -> Room:
        free = os.sysconf("SC_AVPHYS_PAGES") * PAGE_SIZE // 2  # 0.5 µs, /proc/meminfo 75; the kernel reserves some
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
            # Swapping out moves pages from one to the other and makes no room here.
            both = _room(group, "memory", "memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes")
            if both:
                yield both._replace(left=both.left + _counted(group, "total_")[0])

    def _with_reclaimable(self, room: Room, prefix: str) -> Room:
        if room.group is None or room.left >= self.size:
            return room
        return room._replace(left=room.left + self._reclaimable(*_counted(room.group, prefix)))


_SWAPPABLE = "SwapFree", "Active(anon)", "Inactive(anon)"


def _room(group: cgroup.Cgroup, controller: str, limit: str, usage: str) -> Room | None:
    """Return what is left of a limit; None where a group has none."""
    most, used = read_int(group.file(limit)), read_int(group.file(usage))  # version 2 writes "max" for no limit
    if most is None or used is None or most >= _UNLIMITED:
        return None
    return Room(most - used, most, group, controller, group.file(limit))


_UNLIMITED = sys.maxsize - PAGE_SIZE
"""A limit of version 1 that was never set: the largest number of whole pages that a long holds."""


def _counted(group: cgroup.Cgroup, prefix: str) -> tuple[int, int]:
    """Return the bytes of a group's page cache and kernel memory that can be dropped, and of its anonymous pages."""
    text = read_text(group.file("memory.stat")) or ""  # the group may be gone
    counters = dict(line.split() for line in text.splitlines())

    def total(*names: str) -> int:
        return sum(int(counters.get(f"{prefix}{name}", 0)) for name in names)

    return total("active_file", "inactive_file", "slab_reclaimable"), total("active_anon", "inactive_anon")


def _short(page_size: int) -> str:
    """Return a page size as the hugetlb controller's files are named, such as "2MB"."""
    scale, unit = next(pair for pair in ((30, "GB"), (20, "MB"), (10, "KB")) if page_size >> pair[0])
    return f"{page_size >> scale}{unit}"


class _Recent:
    """What the last check of this process covers. Races between threads only make it check more, or less, often.

    A check takes 60 to 110 µs (measured, three levels of cgroups), as long as populating 1 MiB; being covered takes
    9 µs, most of them to see that the process was not moved to another cgroup.
    """

    def __init__(self) -> None:
        self._small = 0
        self._left = 0
        self._until = 0.0
        self._member = ""
        self._swappable = False

    def covers(self, size: int, *, swappable: bool) -> bool:
        """Count a request, and say whether it needs no check."""
        self._small += size + _EACH
        if self._small < CHECK_FROM:
            return True
        self._left -= self._small
        self._small = 0
        if self._left < 0 or time.monotonic() > self._until or (self._swappable and not swappable):
            return False
        return cgroup.membership() == self._member

    def renew(self, left: int, member: str, *, swappable: bool) -> None:
        """Note that `left` bytes were left after a request."""
        self._left, self._until = left // SPARE, time.monotonic() + _VALID
        self._member, self._swappable = member, swappable


_recent = _Recent()
