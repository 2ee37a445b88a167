"""`iobmd bench wired`: the cost of pins, segments and small buffers, compared with the bare calls."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import TYPE_CHECKING

from iobmd._native import mman, uring
from iobmd._native.mapping import Mapping
from iobmd.api import allocate
from iobmd.constants import IOOptionBits
from iobmd.descriptors.descriptor import IOMemoryDescriptor
from iobmd.memory import pinning
from iobmd.memory.populate import populate
from iobmd.task.task import kernel_task
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE

from . import floors
from .result import Result, at_most, medians, seconds

if TYPE_CHECKING:
    from iobmd.descriptors.buffer import IOBufferMemoryDescriptor

PINNED = 64 << 20
SPARSE = 1 << 30
MANY = 100
AREAS = 60_000  # below vm.max_map_count, 65,530 by default
PAGEABLE = IOOptionBits.kIOMemoryPageable


def run(_size: int, rounds: int) -> list[Result]:
    """Measure; the sizes are those of the goals."""
    return [*_pin(rounds), *_segments(rounds), *_small(rounds), *_existing(rounds)]


def _pin(rounds: int) -> list[Result]:
    results = []
    for name, advice in (("4 KiB pages", mman.MADV_NOHUGEPAGE), ("THP", mman.MADV_HUGEPAGE)):
        mapping = Mapping.anonymous(PINNED, HUGE_PAGE_SIZE)
        mman.advise(mapping.address, PINNED, advice)
        populate(mapping.address, PINNED)
        bare, ours = medians(rounds, partial(_register, mapping), partial(_pinned, mapping))
        floor = f"io_uring_register alone: {bare * 1e3:.2f} ms"
        results.append(at_most(f"pin 64 MiB, {name}", f"{ours * 1e3:.2f} ms", floor, ours / bare, 1.3))
        mapping.close()
    return results


def _register(mapping: Mapping) -> float:
    table = uring.Table(1)
    try:
        return seconds(lambda: table.pin(mapping.address, mapping.size))
    finally:
        table.close()
        time.sleep(0.03)  # a kernel worker releases a closed ring later, which would disturb the next measurement


def _pinned(mapping: Mapping) -> float:
    begin = time.perf_counter()
    pin = pinning.Pin(mapping.address, mapping.size)
    took = time.perf_counter() - begin
    pin.release()
    return took


def _segments(rounds: int) -> list[Result]:
    """Measure 1 GiB in 4 KiB pages: its segments, and verify(), which reads the frames again."""
    with allocate(SPARSE, wired=False) as buffer:
        mman.advise(buffer.getBytesNoCopy(), SPARSE, mman.MADV_NOHUGEPAGE)
        populate(buffer.getBytesNoCopy(), SPARSE)
        buffer.prepare()
        bare, cut, verified = medians(
            rounds, partial(_read_pagemap, buffer), lambda: seconds(buffer.segments), lambda: seconds(buffer.verify)
        )
        count = len(buffer.segments())
        buffer.complete()
    floor = f"raw pread of its pagemap: {bare * 1e3:.1f} ms"
    what = f"1 GiB in 4 KiB pages, {count:,} runs"
    return [
        at_most(f"segments() of {what}", f"{cut * 1e3:.1f} ms", floor, cut / bare, 1.3),
        at_most(f"verify() of {what}", f"{verified * 1e3:.1f} ms", floor, verified / bare, 1.3),
    ]


def _read_pagemap(buffer: IOBufferMemoryDescriptor) -> float:
    entries, first = SPARSE // PAGE_SIZE * 8, buffer.getBytesNoCopy() // PAGE_SIZE * 8
    room = bytearray(64 << 10)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return seconds(
            lambda: [os.preadv(pagemap, [room], first + offset) for offset in range(0, entries, len(room))]
        )
    finally:
        os.close(pagemap)


def _small(rounds: int) -> list[Result]:
    size = PAGE_SIZE
    with allocate(size, wired=False) as there:
        bare, wired, prepared = medians(
            rounds * MANY,
            partial(floors.map_and_lock, size),
            lambda: seconds(lambda: allocate(size).free()),
            partial(_prepare, there),
        )
    floor = f"mmap, mlock, munmap in C: {bare * 1e6:.1f} µs"
    return [
        at_most("wired 4 KiB buffer, allocated and freed", f"{wired * 1e6:.1f} µs", floor, wired / bare, 3),
        at_most(
            "prepare and complete of a 4 KiB buffer (the part that a slab would not save)",
            f"{prepared * 1e6:.1f} µs",
            floor,
            prepared / bare,
            3,
        ),
    ]


def _existing(rounds: int) -> list[Result]:
    """Describe, prepare and complete a page of existing memory, with few and with many areas in this process."""
    page = Mapping.anonymous(PAGE_SIZE, PAGE_SIZE)
    page.write(0, b"x")
    (bare,) = medians(rounds * MANY, partial(_described, page.address))
    many = Mapping.anonymous(AREAS * PAGE_SIZE, PAGE_SIZE)
    for start in range(0, many.size, 2 * PAGE_SIZE):
        mman.advise(many.address + start, PAGE_SIZE, mman.MADV_RANDOM)  # a different flag makes it a separate area
    (among,) = medians(rounds * MANY, partial(_described, many.address + many.size // 2))
    many.close()
    page.close()
    what = f"a page of existing memory, described and prepared, among {AREAS:,} areas"
    floor = f"the same, among few: {bare * 1e6:.1f} µs"
    return [at_most(what, f"{among * 1e6:.1f} µs", floor, among / bare, 2)]


def _described(address: int) -> float:
    begin = time.perf_counter()
    descriptor = IOMemoryDescriptor.withAddressRange(address, PAGE_SIZE, 3, kernel_task)
    descriptor.prepare()
    descriptor.complete()
    return time.perf_counter() - begin


def _prepare(buffer: IOBufferMemoryDescriptor) -> float:
    """Pin and unpin an existing buffer."""
    begin = time.perf_counter()
    buffer.prepare()
    buffer.complete()
    return time.perf_counter() - begin
