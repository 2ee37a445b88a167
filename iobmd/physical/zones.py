"""Checks whether memory within a mask can be obtained.

The kernel allocates from the highest zone first (Normal, then DMA32 below 4 GiB, then DMA below 16 MiB), so that low
pages can be obtained only while holding the free memory above them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd.host import zoneinfo
from iobmd.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    from iobmd.physical.policy import Budget

_SHOWN = 8  # ranges of RAM in a message


def out_of_reach(allowed: int, budget: Budget) -> str:
    """Return why a budget does not suffice to hold the free memory above the mask `allowed`, or ""."""
    try:
        zones = zoneinfo.zones()
    except OSError:  # hidden in this container
        return ""
    if all(zone.end <= allowed + 1 for zone in zones):
        return ""
    under = [max(0, zone.free - zone.high) for zone in zones if zone.start <= allowed]
    # Not the sum of the zones above: a kernel that initializes memory lazily counts only initialized memory.
    above = max(0, procfs.meminfo()["MemFree"] - sum(under))
    if not any(under):
        return "no free page of this host is there"
    if above <= budget.bytes:
        return ""
    held = f"{format_size(above)} of free memory above it would have to be held to reach it"
    if remedy := budget.remedy(above):
        return f"{held}, the budget is {format_size(budget.bytes)}; {remedy}, or reserve the pages at boot"
    return f"{held}, and {budget.why_no_more()}; reserve the pages at boot"


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
