"""`iobmd bench allocator`: small wired buffers, which share pinned pages."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from iobmd.api import allocate
from iobmd.descriptors.usage import trim
from iobmd.units import PAGE_SIZE

from . import floors
from .result import Result, at_most, medians, seconds

SMALL = 256
MANY = 200
ALIVE = 100_000


def run(_size: int, rounds: int) -> list[Result]:
    """Measure; the sizes are those of the goals."""
    return [*_made_and_freed(rounds), *_alive()]


def _made_and_freed(rounds: int) -> list[Result]:
    bare, small = medians(rounds * 10, _bare, _small)
    floor = f"mmap, mlock, munmap of a page in C: {bare * 1e6:.1f} µs"
    what = f"wired {SMALL} B buffer, allocated and freed"
    return [at_most(what, f"{small * 1e6:.2f} µs", floor, small / bare, 0.3)]


def _bare() -> float:
    return sum(floors.map_and_lock(PAGE_SIZE) for _ in range(MANY)) / MANY


def _small() -> float:
    return seconds(partial(_repeat, MANY)) / MANY


def _repeat(times: int) -> None:
    for _ in range(times):
        allocate(SMALL).free()


def _alive() -> list[Result]:
    """Measure what many small buffers occupy at a time, according to the kernel."""
    trim()
    locked, resident = _status("VmLck"), _status("VmRSS")
    buffers = [allocate(SMALL) for _ in range(ALIVE)]
    locked, resident = _status("VmLck") - locked, _status("VmRSS") - resident
    for buffer in buffers:
        buffer.free()
    trim()
    size = SMALL * ALIVE
    objects = (resident - locked) / ALIVE
    what, theirs = f"{ALIVE:,} wired buffers of {SMALL} B", f"their bytes: {size / 1e6:.1f} MB"
    of_each = f"{what}: Python objects of each"
    return [
        at_most(f"{what}: locked memory", f"{locked / 1e6:.1f} MB", theirs, locked / size, 1.3),
        at_most(of_each, f"{objects:.0f} B", f"its size: {SMALL} B", objects / SMALL, 200 / SMALL),
    ]


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0
