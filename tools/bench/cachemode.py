"""`iobmd bench cachemode`: non-temporal and cached writes, and the latency of the first load afterwards."""

from __future__ import annotations

import contextlib
import random
from array import array
from functools import partial
from typing import TYPE_CHECKING

from iobmd._native import mapping
from iobmd.api import allocate
from iobmd.constants import kIOMemoryIncoherentIOFlush
from iobmd.units import format_size

from . import floors
from .result import Result, at_least, medians, seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd.api import Cache
    from iobmd.descriptors.buffer import IOBufferMemoryDescriptor

PIECE = 64 << 10
SMALL = 256 << 10
"""Size of the memory that is loaded, which fits the second-level cache."""
MANY = 20


def run(size: int, rounds: int) -> list[Result]:
    """Measure; `size` of the buffers should exceed the last-level cache."""
    return [*_bandwidth(size, rounds), *_latency(rounds * MANY)]


def _bandwidth(size: int, rounds: int) -> list[Result]:
    with (
        allocate(size, wired=False) as source,
        allocate(size, wired=False) as cached,
        allocate(size, wired=False, cache="writecombine") as combining,
        memoryview(source) as data,
    ):
        source.writeBytes(0, bytes([1]) * size)
        results = []
        for name, write, goal in (
            (f"pieces of {format_size(PIECE)}, always the same source", _again, 1.2),
            (f"pieces of {format_size(PIECE)} from a source of the same size", _in_pieces, 1.2),
            ("one writeBytes of all (libc itself bypasses the caches)", _at_once, 0.0),
        ):
            plain, past = medians(
                rounds,
                partial(seconds, partial(write, cached, data)),
                partial(seconds, partial(write, combining, data)),
            )
            what = f"write-combine, {format_size(size)} in {name}" if goal else f"write-combine, {name}"
            figure, floor = f"{size / past / 1e9:.1f} GB/s", f"default: {size / plain / 1e9:.1f} GB/s"
            result = at_least(what, figure, floor, plain / past, goal)
            results.append(result if goal else result._replace(goal="reported"))
        return results


def _again(buffer: IOBufferMemoryDescriptor, data: memoryview) -> None:
    with data[:PIECE] as piece:
        for offset in range(0, len(data) - len(piece) + 1, PIECE):
            buffer.writeBytes(offset, piece)


def _in_pieces(buffer: IOBufferMemoryDescriptor, data: memoryview) -> None:
    for offset in range(0, len(data), PIECE):
        buffer.writeBytes(offset, data[offset : offset + PIECE])


def _at_once(buffer: IOBufferMemoryDescriptor, data: memoryview) -> None:
    buffer.writeBytes(0, data)


def _latency(rounds: int) -> list[Result]:
    """Measure one load of each line, in an order that no prefetcher predicts, after the whole buffer was written."""
    chain = _chain()
    ways: dict[str, tuple[Cache, bool, float]] = {
        "write-combine": ("writecombine", False, 3.0),
        "inhibit": ("inhibit", False, 3.0),
        "default and performOperation(Flush)": ("default", True, 3.0),
        "write-through": ("writethru", False, 0.0),
    }
    with contextlib.ExitStack() as stack:
        plain = _first_loads(stack.enter_context(allocate(SMALL)), chain, flush=False)
        actions = [
            _first_loads(stack.enter_context(allocate(SMALL, cache=cache)), chain, flush=flush)
            for cache, flush, _ in ways.values()
        ]
        cached, *found = medians(rounds, plain, *actions)
    floor = f"default: {cached * 1e9:.1f} ns"
    results = []
    for (name, (_, _, goal)), took in zip(ways.items(), found, strict=True):
        result = at_least(f"first load after a write, {name}", f"{took * 1e9:.1f} ns", floor, took / cached, goal)
        results.append(result if goal else result._replace(goal="reported"))
    return results


def _first_loads(buffer: IOBufferMemoryDescriptor, chain: bytes, *, flush: bool) -> Callable[[], float]:
    def measure() -> float:
        buffer.writeBytes(0, chain)
        if flush:
            buffer.performOperation(kIOMemoryIncoherentIOFlush, 0, SMALL)
        return floors.chase(buffer.getBytesNoCopy(), SMALL // mapping.LINE_SIZE)

    return measure


def _chain() -> bytes:
    """Return a chain through all lines in random order: the first bytes of each contain the offset of the next."""
    line = mapping.LINE_SIZE
    order = list(range(0, SMALL, line))
    random.Random(1).shuffle(order)
    words = array("Q", bytes(SMALL))
    for here, there in zip(order, [*order[1:], order[0]], strict=True):
        words[here // 8] = there
    return words.tobytes()
