"""`iobmd bench pagemap`: walking the pages of a process, compared with raw reads of its pagemap in C."""

from __future__ import annotations

import subprocess
import time
from functools import partial
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd.cli.child import python
from iobmd.pagemap import areas
from iobmd.pagemap.area import MOST
from iobmd.pagemap.file import PagemapFile
from iobmd.pagemap.reader import Reader
from iobmd.task.task import Task
from iobmd.units import PAGE_SIZE, format_size, format_time

from . import floors
from .result import Result, at_most, launcher, medians, seconds, spawned
from .target import SMALL_AREA, Target

if TYPE_CHECKING:
    from collections.abc import Callable

BROWSER = 734
"""Areas of a process of Chromium."""
SCANNED = 0.5  # seconds during which the worst stall is measured


def run(size: int, rounds: int) -> list[Result]:
    """Measure; the large target is eight times `size`, the reserved memory 128 times."""
    large, reserved = size * 8, size * 128
    results = [*_large("small", large, 1.2, rounds)]
    for kind in ("THP", "hugetlb"):
        try:
            results += _walk(kind, large, f"{format_size(large)}, {kind}", 0.8, rounds)
        except OSError:
            continue  # no huge page available, or none in the pool
    results += _walk(
        "clustered", reserved, f"{format_size(reserved)} reserved, 1 % resident, clustered", 0.25, rounds
    )
    results += _walk("scattered", reserved, f"{format_size(reserved)} reserved, 1 % resident, scattered", 1.4, rounds)
    return [*results, *_small_areas(rounds), *_start(rounds)]


def _walk(kind: str, size: int, what: str, goal: float, rounds: int) -> list[Result]:
    with Target(kind, size) as target:
        return [_row(target, what, goal, rounds)]


def _row(target: Target, what: str, goal: float, rounds: int) -> Result:
    ours = partial(seconds, partial(_areas, target))
    raw, took = _against_raw(target, ours, rounds)
    return at_most(what, format_time(took), f"raw pread, 64 KiB each: {format_time(raw)}", took / raw, goal)


def _against_raw(target: Target, ours: Callable[[], float], rounds: int) -> list[float]:
    with PagemapFile(Task(target.pid)) as descriptor:
        return medians(rounds, partial(floors.read_pagemap, descriptor.fd, target.ranges, PAGE_SIZE), ours)


def _areas(target: Target) -> None:
    for _area in areas(Task(target.pid), target.start, target.end - target.start, details=False):
        pass


def _large(kind: str, size: int, goal: float, rounds: int) -> list[Result]:
    with Target(kind, size) as target:
        what = f"{format_size(size)}, 4 KiB pages, with runs"
        return [_row(target, what, goal, rounds), _stall(target, rounds), _memory(target)]


def _stall(target: Target, rounds: int) -> Result:
    """Compare the longest mmap in the target while iobmd, or a raw read, walks its pages."""
    with PagemapFile(Task(target.pid)) as descriptor:
        raw = partial(floors.read_pagemap, descriptor.fd, target.ranges, PAGE_SIZE)
        bare, ours = medians(rounds, *(partial(_worst, target, scan) for scan in (raw, partial(_areas, target))))
    floor = f"while raw pread reads 64 KiB each: {format_time(bare)}"
    return at_most("the longest mmap in the target during the walk", format_time(ours), floor, ours / bare, 1.5)


def _worst(target: Target, scan: Callable[[], object]) -> float:
    target.begin_mapping(SCANNED)
    end = time.monotonic() + SCANNED
    while time.monotonic() < end:
        scan()
    return target.worst()


_PEAK = """
import sys
import iobmd.tools
from iobmd import procfs
from iobmd.cli import main
main(sys.argv[1:])
print(procfs.status_bytes("VmHWM"), file=sys.stderr)
"""


def _memory(target: Target) -> Result:
    with Reader(Task(target.pid)) as reader:
        options = ["--runs"] if reader.visible else []
    command = python("-c", _PEAK, "pagemap", str(target.pid), *options)
    done = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak, limit = int(done.stderr), 32 << 20
    asked = " ".join(["iobmd pagemap PID", *options])
    what = f"peak resident memory of `{asked}` for {format_size(target.end - target.start)}"
    return Result(what, format_size(peak), "32 MiB", peak / limit, "≤ 32 MiB", peak <= limit)


def _small_areas(rounds: int) -> list[Result]:
    """Measure many small areas: the walk alone, and with the list of areas, which is read from maps."""
    with Target("areas", SMALL_AREA * 1024) as target, Reader(Task(target.pid)) as reader:
        groups = [target.ranges[first : first + MOST] for first in range(0, 1024, MOST)]
        walk = partial(seconds, lambda: [reader.totals(group) for group in groups])
        raw, bare = _against_raw(target, walk, rounds)
        listed, whole = medians(
            rounds,
            partial(seconds, lambda: sum(1 for _area in procfs.maps(target.pid))),
            partial(seconds, partial(_areas, target)),
        )
    floor = f"raw pread of each: {format_time(raw)}"
    with_maps = f"the same, and reading /proc/PID/maps: {format_time(raw + listed)}"
    what = "1,024 areas of 64 KiB"
    return [
        at_most(f"{what}, the walk", format_time(bare), floor, bare / raw, 1.6),
        at_most(f"{what}, `areas`", format_time(whole), with_maps, whole / (raw + listed), 1.6),
    ]


def _start(rounds: int) -> list[Result]:
    """Run the command for a small idle process, and for one with as many areas as a browser has."""
    with Target("areas", SMALL_AREA) as target:
        results = [_started(target, "a small process", 60, rounds)]
    with Target("areas", SMALL_AREA * BROWSER) as target:
        return [*results, _started(target, f"a process of {BROWSER} areas more", 180, rounds)]


def _started(target: Target, what: str, limit: int, rounds: int) -> Result:
    bare, took = medians(rounds * 3, *(partial(spawned, command) for command in _commands(target.pid)))
    more = (took - bare) * 1e3
    floor = f"the bare interpreter: {bare * 1e3:.1f} ms"
    goal = f"≤ {limit} ms more"
    return Result(f"`iobmd pagemap PID` of {what}", f"+{more:.1f} ms", floor, took / bare, goal, more <= limit)


def _commands(pid: int) -> list[list[str]]:
    return [python("-c", "pass"), [*launcher(), "pagemap", str(pid)]]
