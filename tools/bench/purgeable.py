"""`iobmd bench purgeable`: a round trip compared with its bare calls, and a cache under a memory limit."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from typing import TYPE_CHECKING

from iobmd._native import mman
from iobmd.api import allocate
from iobmd.cli.child import python
from iobmd.pagemap.self import own_pagemap, track_writes
from iobmd.purgeable import NON_VOLATILE, VOLATILE
from iobmd.units import PAGE_SIZE, format_size

from . import floors
from .limit import limited
from .result import Result, at_least, at_most, medians, seconds

if TYPE_CHECKING:
    from iobmd.descriptors.buffer import IOBufferMemoryDescriptor

SIZE = 64 << 20
LIMIT = 256 << 20
WORKING_SET = 1 << 30
REQUESTS = 8000
MANY = 20
"""The factor by which operations that take microseconds are measured more often than those that take seconds."""


def run(_size: int, rounds: int) -> list[Result]:
    """Measure; the sizes are those of the goals."""
    return [*_round_trips(rounds * MANY), _under_a_limit()]


def _round_trips(rounds: int) -> list[Result]:
    results = []
    for name, advice in (("4 KiB pages", mman.MADV_NOHUGEPAGE), ("THP", mman.MADV_HUGEPAGE)):
        with allocate(SIZE, wired=False, purgeable=True) as buffer:
            mman.advise(buffer.getBytesNoCopy(), SIZE, advice)
            buffer.writeBytes(0, b"\1" * SIZE)
            results += _round_trip(name, buffer, rounds)
    return results


def _round_trip(name: str, buffer: IOBufferMemoryDescriptor, rounds: int) -> list[Result]:
    address = buffer.getBytesNoCopy()
    tracker = track_writes(address, SIZE)
    bare, tracked, ours = medians(
        rounds,
        partial(floors.free_and_restore, -1, -1, address, SIZE, PAGE_SIZE),
        partial(floors.free_and_restore, tracker, own_pagemap(), address, SIZE, PAGE_SIZE),
        partial(seconds, partial(_make_volatile_and_back, buffer)),
    )
    what = f"Volatile and back, {format_size(SIZE)}, {name}"
    figure = f"{ours * 1e6:.0f} µs"
    untracked = f"madvise, mlock2, mincore, populate, munlock in C: {bare * 1e6:.0f} µs"
    floor = f"its calls in C, with writes tracked: {tracked * 1e6:.0f} µs"
    return [
        at_most(what, figure, floor, ours / tracked, 1.3),
        Result(what, figure, untracked, ours / bare, "reported", True),
    ]


def _make_volatile_and_back(buffer: IOBufferMemoryDescriptor) -> None:
    buffer.setPurgeable(VOLATILE)
    buffer.setPurgeable(NON_VOLATILE)


def _under_a_limit() -> Result:
    """Measure hits of a cache of four times the limit, and without a limit; run the same program with `bytes`."""
    free = _work("cache")
    what = f"PurgeableCache, {format_size(WORKING_SET)} in a cgroup of {format_size(LIMIT)}: hits in their time"
    try:
        with limited(LIMIT) as procs:
            tight, plain = _work("cache", str(procs)), _work("bytes", str(procs))
    except OSError as error:
        return Result(what, "none", f"a memory cgroup requires root: {error.strerror}", 0.0, "≥ 0.8", True)
    if not (free and tight):
        return Result(what, "killed", "without a limit: not killed", 0.0, "≥ 0.8", False)
    with_bytes = f"{plain['rate']:,.0f}/s" if plain else "killed"
    against = f"no limit: {_hits(free)}; with bytes in the limit: {with_bytes}"
    return at_least(what, _hits(tight), against, tight["rate"] / free["rate"], 0.8)


def _hits(found: dict[str, float]) -> str:
    return f"{found['rate']:,.0f}/s ({found['share']:.0%} hits)"


def _work(kind: str, procs: str = "") -> dict[str, float] | None:
    """Run the program; return None if it was killed."""
    command = python("-m", "iobmd.tools.bench.workload", kind, str(WORKING_SET), str(REQUESTS), procs)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return None
    done.check_returncode()
    found: dict[str, float] = json.loads(done.stdout)
    return found
