"""Lazy copies of memory of this process, compared with fork(2) and with copies that are complete when they return."""

from __future__ import annotations

import os
import random
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import iobmd
from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size

from . import floors
from .result import Result, at_most, medians, seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

_ALLOWANCE = 3e-3  # seconds for a lazy copy beyond its clone(2)


def run(size: int, rounds: int) -> list[Result]:
    """Measure copies of `size` bytes, in small and in huge pages."""
    results = []
    for unit, advice in (PAGE_SIZE, mman.MADV_NOHUGEPAGE), (HUGE_PAGE_SIZE, mman.MADV_HUGEPAGE):
        with _memory(size, advice) as source:
            fork, made, eager, touched, served, in_order, eager_in_order = medians(
                rounds,
                _fork,
                partial(_make, source),
                partial(_read, source, lazy=False, order=False),
                partial(_touch, source, unit),
                partial(floors.served_faults, size, 100 * unit),
                partial(_read, source, lazy=True, order=True),
                partial(_read, source, lazy=False, order=True),
            )
        what = f"lazy withCopy, {format_size(size)} in pages of {format_size(unit)}"
        limit = 1.25 * fork + _ALLOWANCE
        results.append(
            Result(
                what,
                f"returns after {made * 1e3:.1f} ms",
                f"fork(2): {fork * 1e3:.1f} ms",
                made / fork,
                "≤ 1.25 + 3 ms",
                made <= limit,
            )
        )
        against = f"an eager copy: {eager * 1e3:.0f} ms"
        ratio = touched / eager
        results.append(at_most(f"{what}: 1 % of the pages", f"{touched * 1e3:.1f} ms", against, ratio, 0.03))
        if unit == PAGE_SIZE:
            against = f"a C thread that serves as many faults by a constant page: {served * 1e3:.1f} ms"
            ratio = touched / served
            results.append(at_most(f"{what}: the same", f"{touched * 1e3:.1f} ms", against, ratio, 1.5))
        against = f"the same with an eager copy: {eager_in_order * 1e3:.0f} ms"
        ratio = in_order / eager_in_order
        results.append(at_most(f"{what}: all in order", f"{in_order * 1e3:.0f} ms", against, ratio, 1.3))
    return results


@contextmanager
def _memory(size: int, advice: int) -> Iterator[Mapping]:
    memory = Mapping.anonymous(size, HUGE_PAGE_SIZE)
    mman.advise(memory.address, size, advice)
    block = os.urandom(HUGE_PAGE_SIZE)
    for offset in range(0, size, HUGE_PAGE_SIZE):
        memory.write(offset, block)
    yield memory
    memory.close()


def _fork() -> float:
    begin = time.perf_counter()
    if not (pid := os.fork()):
        os._exit(0)
    took = time.perf_counter() - begin
    os.waitpid(pid, 0)
    return took


def _copy(source: Mapping, *, lazy: bool) -> iobmd.IOBufferMemoryDescriptor:
    return iobmd.copy(os.getpid(), source.address, source.size, wired=False, lazy=lazy)


def _make(source: Mapping) -> float:
    """Return the seconds after which a lazy copy is returned."""
    begin = time.perf_counter()
    with _copy(source, lazy=True):
        return time.perf_counter() - begin


def _read(source: Mapping, *, lazy: bool, order: bool) -> float:
    """Return the seconds that a copy takes, and in `order` also the access to each of its pages."""
    begin = time.perf_counter()
    with _copy(source, lazy=lazy) as copy:
        if order:
            block = bytearray(HUGE_PAGE_SIZE)
            with memoryview(copy) as view:
                for offset in range(0, source.size, HUGE_PAGE_SIZE):
                    block[:] = view[offset : offset + HUGE_PAGE_SIZE]
        return time.perf_counter() - begin


def _touch(source: Mapping, unit: int) -> float:
    """Return the seconds that the access to 1 % of the pages of a lazy copy takes."""
    pages = source.size // unit
    chosen = random.sample(range(pages), max(1, pages // 100))
    with _copy(source, lazy=True) as copy, memoryview(copy) as view:
        return seconds(lambda: [view[page * unit] for page in chosen])
