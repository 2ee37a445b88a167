"""How much memory can be filled before the kernel kills a process for it.

An mmap succeeds long before there is memory behind it, and the kernel answers the page fault that finds none by
killing somebody. A large buffer is therefore refused beforehand when it cannot fit.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from iobmd import procfs
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.units import format_size

ASK_FROM = 64 << 20
"""Bytes from which it is worth asking; the answer takes up to 0.5 ms, a tenth of what filling them does."""

SPARE = 8
"""The part of memory, or of a limit, that is to stay free: one in so many."""

_CGROUPS = Path("/sys/fs/cgroup")


_reliefs: list[Callable[[int], None]] = []


def on_shortage(relief: Callable[[int], None]) -> None:
    """Have `relief` called with the bytes that are missing, before memory is refused."""
    _reliefs.append(relief)


def require(size: int, *, swappable: bool) -> None:
    """Raise `kIOReturnNoMemory` when `size` bytes cannot be filled now; may let through, never refuses wrongly.

    `swappable` memory may also fill what is free of the swap space.
    """
    if size < ASK_FROM:
        return
    for relief in (*_reliefs, None):
        available, whose = _least(swappable)
        if size <= available:
            return
        if relief:
            relief(size - available)
    message = (
        f"{format_size(size)} do not fit into the {format_size(max(available, 0))} of memory that "
        f"{whose} has left; free some, raise the limit, or ask for less"
    )
    raise IOReturnError(IOReturn.kIOReturnNoMemory, message)


def _least(swappable: bool) -> tuple[int, str]:
    """Return what is left where least is, and where that is."""
    try:
        memory = procfs.meminfo()
    except OSError:  # no descriptor is free, or /proc is not there
        return sys.maxsize, ""
    host = memory["MemAvailable"] + (memory["SwapFree"] if swappable else 0)
    places = ((host, 0, "this host"), *_cgroup_headrooms(swappable))
    available, _limit, whose = min(places)
    return available, whose


def shortage() -> int:
    """Return how many bytes are missing for an eighth to be left, of the host's memory and of each cgroup's limit.

    Negative: how many more are left. Swap does not count: it is what running short leads to. Raises OSError.
    """
    memory = procfs.meminfo()
    places = ((memory["MemAvailable"], memory["MemTotal"], ""), *_cgroup_headrooms(swappable=False))
    return max(limit // SPARE - available for available, limit, _whose in places)


def _cgroup_headrooms(swappable: bool) -> list[tuple[int, int, str]]:
    """Return what each memory cgroup around this process has left of its limit, where it has one."""
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = _CGROUPS / controllers
        group = root / path.lstrip("/")
        for place in (group, *group.parents):
            if not place.is_relative_to(root):
                break
            headroom = _headroom_v1(place) if controllers else _headroom_v2(place, swappable)
            if headroom:
                found.append((*headroom, f"the memory cgroup {place}"))
    return found


def _headroom_v1(group: Path) -> tuple[int, int] | None:
    try:
        limit = int((group / "memory.limit_in_bytes").read_text())
        usage = int((group / "memory.usage_in_bytes").read_text())
        return limit - usage + _reclaimable(group, "total_"), limit
    except (OSError, ValueError):
        return None


def _headroom_v2(group: Path, swappable: bool) -> tuple[int, int] | None:
    try:
        limit = int((group / "memory.max").read_text())  # "max" is no limit: ValueError
        usage = int((group / "memory.current").read_text())
        swap = (group / "memory.swap.max").read_text().strip() if swappable else "0"
    except (OSError, ValueError):
        return None
    return limit - usage + _reclaimable(group) + (limit if swap == "max" else int(swap)), limit


def _reclaimable(group: Path, prefix: str = "") -> int:
    counters = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(counters.get(f"{prefix}active_file", 0)) + int(counters.get(f"{prefix}inactive_file", 0))
