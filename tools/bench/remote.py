"""`iobmd bench remote`: the time for which another task is stopped, and the speed of memory shared with it."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.api import allocate, copy
from iobmd.cli.demo.client import Client
from iobmd.remote import session
from iobmd.task.task import Task
from iobmd.units import HUGE_PAGE_SIZE, format_size

from . import bgsave, floors, snapshot
from .result import Result, at_least, medians, seconds

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = 64 << 10
BUSY = 8
PER_ROUND = 150  # measurements of small buffers per round: about a thousand in seven rounds


def run(size: int, rounds: int) -> list[Result]:
    """Measure; `size` is that of the frozen copy."""
    program = subprocess.Popen(["sleep", "1000"])
    try:
        time.sleep(0.1)
        first = _allocated(Task(program.pid))
        return [
            *_stops(Task(program.pid), rounds * PER_ROUND, first),
            *_stops_while_busy(Task(program.pid), rounds),
            _first_write(program.pid, size * 2, rounds),
            _freeze(size, rounds),
            *snapshot.run(size, rounds),
            *bgsave.run(size * max(snapshot.MULTIPLES), min(rounds, 3)),
        ]
    finally:
        program.kill()
        program.wait()


def _allocated(task: Task) -> float:
    """Allocate memory in a task, and return the seconds for which a thread of it was stopped."""
    with allocate(SMALL, task=task, wired=False) as buffer:
        return buffer.task_stopped_ns / 1e9


def _stops(task: Task, count: int, first: float) -> list[Result]:
    stopped, bare, whole = [], [], []
    for _ in range(count):
        bare.append(session.stop(task) / 1e9)
        begin = time.perf_counter()
        buffer = allocate(SMALL, task=task, wired=False)
        whole.append(time.perf_counter() - begin)
        stopped.append(buffer.task_stopped_ns / 1e9)
        buffer.free()
    floor = statistics.median(bare)
    against = f"a stop without a call: {floor * 1e3:.2f} ms, {max(bare) * 1e3:.1f} ms at worst"
    what = f"{format_size(SMALL)} in another task"
    return [
        _within(f"{what}: one of its threads is stopped", statistics.median(stopped), against, floor, 0.12e-3),
        _within(f"{what}: the same, 99 of 100", _most(stopped), against, _most(bare), 0.5e-3),
        _within(f"{what}: the same, the worst of {count:,}", max(stopped), against, max(bare), 3e-3),
        _within(f"{what}: the same, the first", first, against, floor, 0.5e-3),
        _within(f"{what}: total time", statistics.median(whole), against, floor, 0.6e-3),
    ]


def _most(times: list[float]) -> float:
    return sorted(times)[len(times) * 99 // 100]


def _stops_while_busy(task: Task, count: int) -> list[Result]:
    """Measure it while other threads of this process compute and compete for the GIL."""
    over = threading.Event()

    def compute() -> None:
        while not over.is_set():
            sum(range(1000))

    computing = [threading.Thread(target=compute) for _ in range(BUSY)]
    for thread in computing:
        thread.start()
    try:
        bare, stopped = [], []
        for _ in range(count):
            bare.append(session.stop(task) / 1e9)
            stopped.append(_allocated(task))
    finally:
        over.set()
        for thread in computing:
            thread.join()
    floor = statistics.median(bare)
    against = f"a stop without a call: {floor * 1e3:.2f} ms, {max(bare) * 1e3:.1f} ms at worst"
    what = f"{format_size(SMALL)} in another task, while {BUSY} threads of this process compute"
    return [
        _within(what, statistics.median(stopped), against, floor, 0.12e-3),
        _within(f"{what}: the worst of {count:,}", max(stopped), against, max(bare), 3e-3),
    ]


def _within(what: str, took: float, against: str, floor: float, goal: float) -> Result:
    return Result(what, f"{took * 1e3:.2f} ms", against, took / floor, f"≤ {goal * 1e3:g} ms", took <= goal)


def _first_write(pid: int, size: int, rounds: int) -> Result:
    """Measure writing to fresh memory that another process maps too, and to fresh private memory in huge pages."""
    source = b"\1" * HUGE_PAGE_SIZE
    bare, ours = medians(rounds, partial(_write_private, size, source), partial(_write_shared, pid, size, source))
    rate = f"{size / ours / 1e9:.1f} GB/s"
    floor = f"private memory, THP: {size / bare / 1e9:.1f} GB/s"
    return at_least(f"first write of {format_size(size)} shared with another process", rate, floor, bare / ours, 0.8)


def _write_private(size: int, source: bytes) -> float:
    mapping = Mapping.anonymous(size, HUGE_PAGE_SIZE)
    mman.advise(mapping.address, size, mman.MADV_HUGEPAGE)
    try:
        return seconds(partial(_fill, mapping.write, size, source))
    finally:
        mapping.close()


def _write_shared(pid: int, size: int, source: bytes) -> float:
    with allocate(size, wired=False, shared=True) as buffer, buffer.createMappingInTask(pid, 0, 1):
        return seconds(partial(_fill, buffer.writeBytes, size, source))


def _fill(write: Callable[[int, bytes], object], size: int, source: bytes) -> None:
    for offset in range(0, size, len(source)):
        write(offset, source)


def _freeze(size: int, rounds: int) -> Result:
    with Client(anonymous=size) as client:
        piece = client.pieces["anonymous"]
        stopped, whole = [], []
        for _ in range(rounds):
            whole.append(floors.read_fresh(client.pid, piece.address, size))
            with copy(client.pid, piece.address, size, freeze=True, wired=False) as buffer:
                stopped.append(buffer.source_stopped_ns / 1e9)
    floor = statistics.median(whole)
    what = f"copy(freeze=True) of {format_size(size)} in 4 KiB pages: the source is stopped"
    against = f"one process_vm_readv into fresh memory: {floor * 1e3:.0f} ms"
    return _within(what, statistics.median(stopped), against, floor, 30e-3)
