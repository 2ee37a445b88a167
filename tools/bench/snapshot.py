"""Rows of `iobmd bench remote`: for how long a process is stopped by a snapshot, a core file, and by gcore.

`python -m iobmd.tools.bench.snapshot KIND SIZE` is the process. For each line that it reads, it writes to all of its
memory; if the line is "clone", it then creates a child that exits, and prints for how many nanoseconds clone(2) ran.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Self

from iobmd.api import snapshot
from iobmd.cli.child import python
from iobmd.errors import NoMemoryError
from iobmd.host import headroom
from iobmd.procfs import status
from iobmd.units import PAGE_SIZE, format_size, format_time

from .result import Result

MULTIPLES = 1, 8
"""Multiples of the size that are measured, if there is enough memory; the second only twice."""
_ALLOWANCE = 0.3e-3  # seconds for a snapshot beyond its clone(2)
_MOST_STOP = {"small": 1 / 15, "huge": 1 / 100}  # of gcore's
_PAGES = {"small": "4 KiB pages", "huge": "huge pages"}
_CLONE, _SIGCHLD = 56, 17


class Source:
    """The process, as a context manager."""

    def __init__(self, kind: str, size: int) -> None:
        command = python("-m", "iobmd.tools.bench.snapshot", kind, str(size))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self.do("touch")

    def do(self, line: str) -> int:
        """Send a line, and return the number that it prints."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def run(size: int, rounds: int) -> list[Result]:
    """Measure processes of `size` bytes and, if possible, of eight times as many."""
    found: list[Result] = []
    for kind in ("small", "huge"):
        for multiple in MULTIPLES:
            amount, times = size * multiple, min(rounds, 2) if multiple > 1 else rounds
            try:
                headroom.require(2 * amount, swappable=False)
            except NoMemoryError:
                continue
            with Source(kind, amount) as source:
                found += _measured(source, kind, amount, times)
    return found


def _measured(source: Source, kind: str, size: int, rounds: int) -> list[Result]:
    clones, stops = [], []
    gcore = shutil.which("gcore")
    makers = {"iobmd": _core} | ({"gcore": partial(_gcore, gcore)} if gcore else {})
    files: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
    _core(source.pid)  # the first use of memory for the page cache waits for the host of a virtual machine to back it
    for turn in range(rounds):
        clones.append(source.do("clone") / 1e9)
        source.do("touch")
        with snapshot(source.pid) as held:
            stops.append(held.stopped_ns / 1e9)
        for name in sorted(makers, reverse=turn % 2 == 0):  # the first one finds more free memory
            source.do("touch")
            files[name].append(makers[name](source.pid))
    what = f"{format_size(size)} in {_PAGES[kind]}"
    floor, stop = statistics.median(clones), statistics.median(stops)
    most = 1.25 * floor + _ALLOWANCE
    against = f"clone(2) of the same process: {format_time(floor)}"
    goal = f"≤ {format_time(most)}"
    found = [
        Result(f"snapshot of {what}: it is stopped", format_time(stop), against, stop / floor, goal, stop <= most)
    ]
    if gcore:
        (stop, whole), (peer, peer_whole) = (_medians(files[name]) for name in ("iobmd", "gcore"))
        limit = _MOST_STOP[kind]
        found.append(_against(f"core file of {what}: it is stopped", stop, peer, limit, f"≤ 1/{round(1 / limit)}"))
        found.append(_against(f"core file of {what}: total time", whole, peer_whole, 1, "≤ 1"))
    return found


def _medians(files: list[tuple[float, float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*files, strict=True)]


def _core(pid: int) -> tuple[float, float]:
    """Write a core file; return for how long the process was stopped, and the duration."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        with snapshot(pid) as held:
            stopped = held.core(Path(folder, "core")).stopped_ns / 1e9
        return stopped, time.perf_counter() - begin


def _against(what: str, took: float, peer: float, limit: float, goal: str) -> Result:
    return Result(what, format_time(took), f"gcore: {format_time(peer)}", took / peer, goal, took <= limit * peer)


def _gcore(gcore: str, pid: int) -> tuple[float, float]:
    """Run gcore; return for how long it traced, and therefore stopped, the process, and its duration."""
    over = threading.Event()
    seen: list[float] = []

    def watch() -> None:
        while not over.is_set():
            if status(pid)["TracerPid"] != "0":
                seen.append(time.perf_counter())
            time.sleep(0.001)

    with tempfile.TemporaryDirectory() as folder:
        watching = threading.Thread(target=watch)
        watching.start()
        begin = time.perf_counter()
        try:
            command = [gcore, "-o", str(Path(folder, "core")), str(pid)]
            subprocess.run(command, check=True, capture_output=True)
        finally:
            whole = time.perf_counter() - begin
            over.set()
            watching.join()
    return seen[-1] - seen[0] if seen else whole, whole


def _main(kind: str, size: int) -> None:
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if kind == "huge" else mmap.MADV_NOHUGEPAGE)
    call = ctypes.CDLL(None, use_errno=True).syscall
    data = b"\1" * PAGE_SIZE * 256
    for line in sys.stdin:
        for at in range(0, size, len(data)):
            memory[at : at + len(data)] = data
        took = 0
        if line.strip() == "clone":
            begin = time.perf_counter_ns()
            child = call(_CLONE, _SIGCHLD, 0, 0, 0, 0)
            took = time.perf_counter_ns() - begin
            if not child:
                os._exit(0)
            os.waitpid(child, 0)
        print(took, flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
