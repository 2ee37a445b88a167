"""`iobmd bench copy`: withCopy compared with hand-written calls, and with memcpy."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from iobmd import pagemap
from iobmd._internal.chunked import PIECE, threads
from iobmd._native import crosstask
from iobmd.cli.child import python
from iobmd.cli.demo.client import Client, Piece
from iobmd.constants import IOOptionBits
from iobmd.descriptors.buffer import IOBufferMemoryDescriptor
from iobmd.task.task import Task, kernel_task
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size, round_up

from . import floors, lazy
from .result import Result, at_least, at_most, launcher, medians, seconds, spawned
from .target import Target

SMALL = 64 << 10
WIRED, PAGEABLE = IOOptionBits(0), IOOptionBits.kIOMemoryPageable
RESERVED = 128
"""The ratio of the size of sparse memory (1 % resident) to that of the large copies."""
MANY = 40
"""The factor by which operations that take microseconds are measured more often than those that take tenths of a
second."""


def run(size: int, rounds: int) -> list[Result]:
    """Measure; `size` is that of the large copies, in bytes."""
    with Client(anonymous=size) as client:
        task, piece = Task(client.pid), client.pieces["anonymous"]
        return [
            *_large(task, piece, rounds),
            *_small(task, piece, rounds * MANY),
            _peak(piece, client.pid),
            *_sparse(size * RESERVED, rounds),
            *_shared(size, rounds),
            *lazy.run(round_up(size, HUGE_PAGE_SIZE), rounds),
            *_start(rounds),
        ]


def _with_copy(task: Task, options: IOOptionBits, address: int, size: int) -> float:
    """Return the seconds that a copy and its release take."""
    return seconds(lambda: IOBufferMemoryDescriptor.withCopy(kernel_task, options, task, address, size).free())


def _large(task: Task, piece: Piece, rounds: int) -> list[Result]:
    size, address = piece.size, piece.address
    by_hand = partial(floors.read_fresh, task.pid, address, size)
    copies = [partial(_with_copy, task, options, address, size) for options in (PAGEABLE, WIRED)]
    workers = threads(size)
    with (
        IOBufferMemoryDescriptor.withOptions(WIRED, size) as source,
        IOBufferMemoryDescriptor.withOptions(WIRED, size) as destination,
        ThreadPoolExecutor(workers) as pool,
    ):
        memcpy = partial(_memcpy, pool, workers, destination.getBytesNoCopy(), source.getBytesNoCopy(), size)
        hand, pageable, wired, warm_copy = medians(rounds, by_hand, *copies, memcpy)
    results = []
    for name, took in (("pageable", pageable), ("wired", wired)):
        what, figure = f"withCopy, {size >> 20} MiB, {name}", _rate(size, took)
        alone = f"one process_vm_readv into fresh memory: {_rate(size, hand)}"
        results.append(at_least(what, figure, alone, hand / took, 5))
        peer = f"memcpy of warm huge pages, {workers} threads: {_rate(size, warm_copy)}"
        results.append(at_least(what, figure, peer, warm_copy / took, 0.5))
    return results


def _rate(size: int, took: float) -> str:
    return f"{size / took / 1e9:.2f} GB/s"


def _memcpy(pool: ThreadPoolExecutor, workers: int, destination: int, source: int, size: int) -> float:
    """Return the seconds of a memcpy in the pieces and on the threads of withCopy."""
    share = size // workers

    def work(number: int) -> None:
        for offset in range(share * number, share * (number + 1), PIECE):
            floors.copy(destination + offset, source + offset, min(PIECE, size - offset))

    return seconds(lambda: list(pool.map(work, range(workers))))


def _small(task: Task, piece: Piece, rounds: int) -> list[Result]:
    by_hand = partial(floors.read_fresh, task.pid, piece.address, SMALL)
    copies = [partial(_with_copy, task, options, piece.address, SMALL) for options in (PAGEABLE, WIRED)]
    hand, *ours = medians(rounds, by_hand, *copies)
    floor = f"mmap, process_vm_readv, munmap in C: {hand * 1e6:.1f} µs"
    return [
        at_most(f"withCopy, 64 KiB, {name}", f"{took * 1e6:.1f} µs", floor, took / hand, 1.5)
        for name, took in zip(("pageable", "wired"), ours, strict=True)
    ]


def _sparse(size: int, rounds: int) -> list[Result]:
    """Copy long mappings with few pages, compared with the same amount of dense memory, and with the bare calls."""
    results = []
    with Client(anonymous=round_up(size // 100, PAGE_SIZE)) as client:
        piece = client.pieces["anonymous"]
        dense = partial(_with_copy, Task(client.pid), PAGEABLE, piece.address, piece.size)
        for kind in ("clustered", "scattered"):
            with Target(kind, size) as target:
                length = target.end - target.start
                sparse = partial(_with_copy, Task(target.pid), PAGEABLE, target.start, length)
                with Path(f"/proc/{target.pid}/pagemap").open("rb", buffering=0) as entries:
                    absent = crosstask.absent(entries.fileno(), target.start, length, PAGE_SIZE)
                pages = list(absent.outside(target.start, target.end))
                by_hand = partial(floors.read_fresh, target.pid, target.start, length, pages)
                alone, hand, took = medians(rounds, dense, by_hand, sparse)
            what = f"withCopy, {format_size(size)}, 1 % resident, {kind}"
            against = f"withCopy of {format_size(piece.size)} without holes: {alone * 1e3:.0f} ms"
            results.append(at_most(what, f"{took * 1e3:.0f} ms", against, took / alone, 2))
            against = f"mmap, process_vm_readv of those pages, munmap in C: {hand * 1e3:.0f} ms"
            results.append(at_most(what, f"{took * 1e3:.0f} ms", against, took / hand, 2))
    return results


def _shared(size: int, rounds: int) -> list[Result]:
    """Copy memory that a forked child shares with its parent, each time of another child."""
    grown: dict[str, int] = {}
    with IOBufferMemoryDescriptor.withOptions(PAGEABLE, size) as source:
        source.writeBytes(0, b"x" * size)
        address = source.getBytesNoCopy()

        def measured(name: str, copy: Callable[[int], float]) -> float:
            with _forked_child() as pid:
                took = copy(pid)
                grown[name] = pagemap.counts(Task(pid), address, size).exclusive * PAGE_SIZE
            return took

        by_hand = partial(measured, "hand", lambda pid: floors.read_fresh(pid, address, size))
        copies = partial(measured, "copy", lambda pid: _with_copy(Task(pid), PAGEABLE, address, size))
        hand, took = medians(rounds, by_hand, copies)
    what = f"withCopy, {size >> 20} MiB that a forked child shares"
    against = f"one process_vm_readv into fresh memory: {_rate(size, hand)}"
    added, by_call = format_size(grown["copy"]), format_size(grown["hand"])
    ratio = max(grown["copy"], PAGE_SIZE) / max(grown["hand"], PAGE_SIZE)
    return [
        at_least(what, _rate(size, took), against, hand / took, 2),
        at_most(f"{what}: memory added to it", added, f"by the call: {by_call}", ratio, 0.01),
    ]


@contextmanager
def _forked_child() -> Iterator[int]:
    """Fork a child that sleeps until the end of the block, or of this process."""
    reading, writing = os.pipe()
    if not (pid := os.fork()):
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        yield pid
    finally:
        os.close(writing)
        os.waitpid(pid, 0)
        os.close(reading)


def _peak(piece: Piece, pid: int) -> Result:
    """Measure, in a new interpreter, the maximum growth of its resident memory during a copy."""
    program = f"""
import iobmd, pathlib, re
def field(name):
    return int(re.search(name + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) << 10
task = iobmd.Task({pid})
task.read({piece.address}, 1)
before = field("VmRSS")
iobmd.copy(task, {piece.address}, {piece.size}).free()
print(field("VmHWM") - before)
"""
    grown = int(subprocess.run(python("-c", program), check=True, capture_output=True, text=True).stdout)
    figure, against = f"{grown >> 20} MiB", f"the size of the buffer: {piece.size >> 20} MiB"
    return at_most("peak memory of a wired withCopy", figure, against, grown / piece.size, 1.02)


def _start(rounds: int) -> list[Result]:
    bare, imported, version = medians(
        rounds * 3,
        partial(spawned, python("-c", "pass")),
        partial(spawned, python("-c", "import iobmd")),
        partial(spawned, [*launcher(), "--version"]),
    )
    more = (imported - bare) * 1e3
    floor = f"the bare interpreter: {bare * 1e3:.1f} ms"
    return [
        Result("import iobmd", f"+{more:.1f} ms", floor, imported / bare, "≤ 40 ms more", more <= 40),
        Result("iobmd --version", f"{version * 1e3:.1f} ms", floor, version / bare, "≤ 120 ms", version <= 0.120),
    ]
