"""`iobmd bench pools`: large wired memory, compared with the speed at which the kernel clears memory."""

from __future__ import annotations

import os
import threading
from functools import partial
from itertools import pairwise

from iobmd import procfs
from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.api import allocate
from iobmd.host import zoneinfo
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size, round_down

from ..fragmentation import fragmented
from .result import Result, at_least, medians, seconds

LARGEST = 8 << 30
"""The size of the goal; less on a host with less than twice as much available."""
FRAGMENTED = 4
"""The inverse of the part of that size that is allocated in fragmented memory."""


def run(_size: int, rounds: int) -> list[Result]:
    """Measure; the sizes are those of the goals."""
    size = round_down(min(LARGEST, procfs.meminfo()["MemAvailable"] // 2), 1 << 30)
    if not size:
        return []
    return [_plain(size, rounds), *_in_fragments(size // FRAGMENTED, rounds)]


def _plain(size: int, rounds: int) -> Result:
    cleared, pool = medians(rounds, partial(_cleared, size), partial(_pool, size))
    return _result(f"{format_size(size)} populated and pinned", size, pool, cleared, 0.9)


def _in_fragments(size: int, rounds: int) -> list[Result]:
    """Measure in memory without free huge pages: one page in each is pinned, and others are held."""
    free = zoneinfo.free_in_blocks(HUGE_PAGE_SIZE)
    (cleared,) = medians(rounds, partial(_cleared, size))
    # Another process holds the pins, and the memory that is not fragmented.
    with fragmented(size + size // 4, "--leave", "0"):
        (pool,) = medians(rounds, partial(_pool, size))
        (advised,) = medians(1, partial(_cleared, size))
    what = (
        f"{format_size(size)} populated and pinned in fragmented memory ({format_size(free)} were free in huge pages)"
    )
    against = f"MADV_HUGEPAGE and MADV_POPULATE_WRITE there: {advised:.2f} s"
    return [
        _result(what, size, pool, cleared, 0.5),
        Result(what, f"{pool:.2f} s", against, pool / advised, "reported", True),
    ]


def _result(what: str, size: int, ours: float, cleared: float, limit: float) -> Result:
    floor = f"cleared by the kernel on all processors: {size / cleared / 1e9:.1f} GB/s"
    return at_least(what, f"{size / ours / 1e9:.1f} GB/s", floor, cleared / ours, limit)


def _cleared(size: int) -> float:
    """Return the seconds for which all processors populate huge pages, each a part."""
    mapping = Mapping.anonymous(size, HUGE_PAGE_SIZE)
    try:
        mman.advise(mapping.address, size, mman.MADV_HUGEPAGE)
        processors = len(os.sched_getaffinity(0))
        cuts = [round_down(size * part // processors, HUGE_PAGE_SIZE) for part in range(processors + 1)]
        threads = [
            threading.Thread(target=mman.populate, args=(mapping.address + at, end - at, HUGE_PAGE_SIZE, PAGE_SIZE))
            for at, end in pairwise(cuts)
        ]
        return seconds(partial(_run, threads))
    finally:
        mapping.close()


def _run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _pool(size: int) -> float:
    """Return the seconds for which wired memory is allocated."""
    buffers = []
    took = seconds(lambda: buffers.append(allocate(size)))
    buffers[0].free()
    return took
