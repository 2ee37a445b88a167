"""Checks whether memory within a mask can be obtained.

The kernel allocates from the highest zone first (Normal, then DMA32 below 4 GiB, then DMA below 16 MiB), so that low
pages can be obtained only while holding the free memory above them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd.host import zoneinfo
from iobmd.physical import ballast
from iobmd.physical.ballast import Ballast
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd.host.zoneinfo import Zone
    from iobmd.physical.policy import Budget

ALL_ADDRESSES = (1 << 64) - 1
_ATTEMPTS = 8  # other processes free memory above at the same time
_SHOWN = 8  # ranges of RAM in a message


@contextlib.contextmanager
def held_above(allowed: int, budget: Budget) -> Iterator[None]:
    """Hold the free huge pages of the zones above the mask `allowed`, so that the next ones come from lower zones."""
    above = {(zone.node, zone.name) for zone in _zones() if zone.start > allowed} if allowed < ALL_ADDRESSES else None
    if not above:
        yield
        return
    with Ballast() as held:
        hold_free(held, above, budget)
        budget.measure(held.size)
        yield


def preferred_to(end: int) -> set[tuple[int, str]] | None:
    """Return the zones from which page faults are served before memory below `end`: those that begin above it.

    None if that depends on the processor, because the host has several nodes, or if the zones are hidden.
    """
    found = _zones()
    if len({zone.node for zone in found}) != 1:
        return None
    return {(zone.node, zone.name) for zone in found if zone.start >= end}


def free_around(address: int) -> int:
    """Return the free memory, in bytes, of the zone that contains an address; 0 if it is hidden."""
    return sum(zone.free + zone.listed for zone in _zones() if zone.start <= address < zone.end)


def hold_free(held: Ballast, zones: set[tuple[int, str]], budget: Budget) -> None:
    """Hold the free huge pages of some zones as well."""
    if not zones:  # memory that is not initialized yet counts for any zones
        return
    for _attempt in range(_ATTEMPTS):
        budget.measure(held.size)
        amount = min(zoneinfo.free_in_blocks(HUGE_PAGE_SIZE, zones=zones), budget.untouched - held.size)
        if not held.hold(amount):
            break


def out_of_reach(allowed: int, budget: Budget) -> str:
    """Return why a budget does not suffice to hold the free memory above the mask `allowed`, or ""."""
    zones = _zones()
    if all(zone.end <= allowed + 1 for zone in zones):
        return ""
    under = [max(0, zone.free - zone.high) for zone in zones if zone.start <= allowed]
    # Not the sum of the zones above: a kernel that initializes memory lazily counts only initialized memory.
    above = max(0, procfs.meminfo()["MemFree"] - sum(under))
    if not any(under):
        return "no free page of this host is there"
    limit = max(budget.bytes, budget.untouched if ballast.is_available() else 0)
    if above <= limit:
        return ""
    held = f"{format_size(above)} of free memory above it would have to be held to reach it"
    if remedy := budget.remedy(above):
        return f"{held}, but the budget is {format_size(limit)}; {remedy}, or reserve the pages at boot"
    return f"{held}, and {budget.why_no_more()}; reserve the pages at boot"


def _zones() -> list[Zone]:
    try:
        return zoneinfo.zones()
    except OSError:  # hidden in this container
        return []


def without_memory(allowed: int, size: int, alignment: int) -> str:
    """Return why no policy can find `size` bytes, the first aligned, within a mask: too little RAM there; or ""."""
    ranges = zoneinfo.ram()
    if not ranges:
        return ""
    there = f"this host's RAM is at {', '.join(f'{start:#x}-{end - 1:#x}' for start, end in ranges[:_SHOWN])}"
    begins = allowed & -alignment if alignment > PAGE_SIZE else allowed | PAGE_SIZE - 1
    if not any(_first(begins, start) < end for start, end in ranges):
        return f"this host has no memory there; {there}"
    if allowed & allowed + 1 == 0:  # the mask allows all addresses below a limit
        below = sum(max(0, min(end, allowed + 1) - start) for start, end in ranges)
        if below < size:
            return f"this host has {format_size(below)} of memory there; {there}"
    return ""


def _first(allowed: int, address: int) -> int:
    """Return the lowest address from `address` on with only bits of `allowed`; 1 << 64 if there is none."""
    while wrong := address & ~allowed:
        # Forbidden bits can only be cleared by setting a higher bit: the lowest that is allowed and clear.
        bit = wrong.bit_length()
        while bit < 64 and not (allowed >> bit & 1 and not address >> bit & 1):
            bit += 1
        if bit == 64:
            return 1 << 64
        address = (address >> bit | 1) << bit
    return address


def end_of_memory() -> int:
    """Return the end of physical memory; raise OSError if /proc/zoneinfo is hidden."""
    return max(zone.end for zone in zoneinfo.zones())
