"""Whether memory under a mask can be reached at all.

The kernel hands out the highest zone first (Normal, then DMA32 below 4 GiB, then DMA below 16 MiB), so that low
pages are to be had only by holding what is free above them.
"""

import re
from pathlib import Path

from iobmd import procfs
from iobmd.units import PAGE_SIZE, format_size

_ZONE = re.compile(r"^Node \d+, zone +(\w+)\n", re.MULTILINE)


def out_of_reach(allowed: int, budget: int) -> str:
    """Return why no page under the mask `allowed` can be had with `budget` bytes, "" when one may be."""
    try:
        zones = [(name, *_zone(text)) for name, text in _zones()]
    except OSError:  # hidden in this container
        return ""
    if all(end <= allowed + 1 for _name, _start, end, _free in zones):
        return ""
    under = [free for _name, start, _end, free in zones if start <= allowed]
    # Not the sum of the zones above: a kernel that initialises memory lazily counts in a zone only what is ready.
    above = max(0, procfs.meminfo()["MemFree"] - sum(under))
    if not any(under):
        return "no free page of this host lies there"
    if above > budget:
        return (
            f"{format_size(above)} of free memory above it would have to be held to reach it, the budget is "
            f"{format_size(budget)}; allow more (iobmd.policy(memory_budget=…)), or take the pages at boot"
        )
    return ""


def end_of_memory() -> int:
    """Return the physical address behind the memory of this host. Raises OSError: /proc/zoneinfo is hidden."""
    return max(end for _start, end, _free in (_zone(text) for _name, text in _zones()))


def _zones() -> list[tuple[str, str]]:
    parts = _ZONE.split(Path("/proc/zoneinfo").read_text())
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _zone(text: str) -> tuple[int, int, int]:
    """Return where a zone starts and ends physically, and how many bytes of it are free for ordinary use."""
    free, high, spanned, start = (
        int(found[1]) if (found := re.search(pattern, text, re.MULTILINE)) else 0
        for pattern in (r"^ +pages free +(\d+)", r"^ +high +(\d+)", r"^ +spanned +(\d+)", r"^ +start_pfn: +(\d+)")
    )
    return start * PAGE_SIZE, (start + spanned) * PAGE_SIZE, max(0, free - high) * PAGE_SIZE
