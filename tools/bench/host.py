"""`iobmd bench host`: the memory of the host, of its processes, and the page cache of files.

The peers are a reader of /proc/kpageflags in C, numastat, smem and vmtouch; those that are not installed have no row.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd.cli.child import python
from iobmd.host import zoneinfo
from iobmd.pagemap.census import host_memory
from iobmd.units import PAGE_SIZE, format_size, format_time

from . import floors
from .result import Result, at_most, launcher, medians, seconds, spawned

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

FILES = sysconfig.get_path("stdlib")
"""The directory whose cached part is measured."""
PROCESSES = 500
"""Idle processes that are added to those of the host."""
_CLOSE = 0.05
"""The difference between two totals that were measured one after the other, as a part of memory."""


def run(_size: int, rounds: int) -> list[Result]:
    """Measure; the sizes are those of the host's memory, and of Python's standard library."""
    return [*_frames(rounds), *_counters(rounds), *_processes(rounds), *_files(rounds)]


def _frames(rounds: int) -> Iterable[Result]:
    ranges = [(start // PAGE_SIZE, end // PAGE_SIZE) for start, end in zoneinfo.ram()]
    found = []

    def ours() -> float:
        return seconds(lambda: found.append(host_memory()))

    try:
        fd = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:  # root
        return
    try:
        bare, took = medians(rounds, lambda: floors.read_flags(fd, ranges)[0], ours)
        _took, free = floors.read_flags(fd, ranges)
    finally:
        os.close(fd)
    memory = host_memory()
    size = format_size(sum(memory.kinds.values()))
    yield at_most(
        f"`host_memory` of {size}",
        format_time(took),
        f"reading kpageflags in C: {format_time(bare)}",
        took / bare,
        1.2,
    )
    counters = procfs.meminfo()
    kinds = memory.kinds
    yield _agreement("free memory", kinds["free"], "the reader in C", free * PAGE_SIZE)
    kinds["free"] += kinds["uninitialized"]  # as MemFree does
    for kind, name in (("free", "MemFree"), ("anonymous", "AnonPages"), ("slab", "Slab")):
        yield _agreement(f"{kind} memory", kinds[kind], f"{name} of /proc/meminfo", counters[name])
    yield _memory()


def _agreement(what: str, ours: int, whose: str, theirs: int, whole: int = 0) -> Result:
    """Compare two totals; `whole` is the amount of memory that they are parts of, by default that of the host."""
    off = abs(ours - theirs) / (whole or procfs.meminfo()["MemTotal"])
    ratio = ours / theirs if theirs else 1.0
    goal = f"± {_CLOSE:.0%} of {format_size(whole) if whole else 'memory'}"
    return Result(f"total: {what}", format_size(ours), f"{whose}: {format_size(theirs)}", ratio, goal, off < _CLOSE)


def _memory() -> Result:
    program = (
        "import sys, iobmd.tools; from iobmd import procfs; from iobmd.cli import main; main(sys.argv[1:]); "
        'print(procfs.status_bytes("VmHWM"), file=sys.stderr)'
    )
    command = python("-c", program, "pagemap", "--host")
    done = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak, limit = int(done.stderr.splitlines()[-1]), 32 << 20
    return Result(
        "peak of `iobmd pagemap --host`", format_size(peak), "32 MiB", peak / limit, "≤ 32 MiB", peak <= limit
    )


def _counters(rounds: int) -> Iterable[Result]:
    """Compare the free memory by node with numastat, which reads the counters that every user may read."""
    if not shutil.which("numastat"):
        return
    (took,) = medians(rounds, partial(spawned, ["numastat", "-m"]))
    text = _printed(["numastat", "-m"])
    theirs = int(float(re.findall(r"^MemFree\s.*?([\d.]+)\s*$", text, re.MULTILINE)[0]) * (1 << 20))
    ours = sum(zone.counters["nr_free_pages"] for zone in zoneinfo.zones()) * PAGE_SIZE
    yield _agreement(
        f"free memory by zoneinfo ({format_time(seconds(zoneinfo.zones))})",
        ours,
        f"`numastat -m` ({format_time(took)})",
        theirs,
    )


def _processes(rounds: int) -> Iterable[Result]:
    """Compare the sum of PSS of all processes with smem, which reads the smaps of each."""
    if not shutil.which("smem"):
        return
    theirs, ours = ["smem", "-t", "-H", "-c", "pss"], [*launcher(), "pagemap", "--processes"]
    with _idle(PROCESSES):
        try:
            bare, took = medians(rounds, partial(spawned, theirs), partial(spawned, ours))
            before = _printed(theirs)
            summary = json.loads(_printed([*ours, "--json"]))["summary"]
            after = _printed(theirs)
        except subprocess.CalledProcessError:  # smem fails if the name of a process is not UTF-8
            return
    what = f"`iobmd pagemap --processes` of {summary['processes']:,} processes"
    yield at_most(what, format_time(took), f"smem: {format_time(bare)}", took / bare, 2)
    # Other processes start and exit, so that the mean of smem's sums before and after is compared.
    pss = sum(int(text.split()[-1]) << 10 for text in (before, after)) // 2
    yield _agreement("PSS of them", summary["pss_bytes"], "smem", pss, pss)


def _printed(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def _idle(many: int) -> Iterator[None]:
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.extend(subprocess.Popen(["sleep", "1000"]) for _ in range(many))
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _files(rounds: int) -> Iterable[Result]:
    """Compare with vmtouch, on the files of Python's standard library."""
    if not shutil.which("vmtouch"):
        return
    path = FILES
    theirs = ["vmtouch", "-q", path]
    bare, took = medians(rounds, partial(spawned, theirs), partial(spawned, [*launcher(), "pagemap", "--file", path]))
    text = _printed(theirs[:1] + theirs[2:])
    number = int(re.findall(r"Files: (\d+)", text)[0])
    pages = int(re.findall(r"Resident Pages: (\d+)/", text)[0])
    summary = json.loads(_printed([*launcher(), "pagemap", "--file", path, "--json"]))["summary"]
    cached, files = summary["cached_bytes"], summary["files"]
    what = f"`iobmd pagemap --file` of {files:,} files"
    yield at_most(what, format_time(took), f"vmtouch, {number:,} files: {format_time(bare)}", took / bare, 5)
    yield _agreement("cached memory of them", cached, "vmtouch", pages * PAGE_SIZE, pages * PAGE_SIZE)
