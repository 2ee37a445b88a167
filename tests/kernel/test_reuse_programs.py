"""Random programs that allocate and free in threads and forked children, against a model of what each buffer holds.

`IOBMD_OPERATIONS` sets the number of operations; a million take 10 to 25 minutes on two processors.
"""

import bisect
import ctypes
import gc
import itertools
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import kernel
from support.child import in_child
from support.requirements import may_lock

import iobmd
from iobmd import Wiring
from iobmd._native import mman
from iobmd.units import PAGE_SIZE

OPERATIONS = int(os.environ.get("IOBMD_OPERATIONS", "12000"))
THREADS = 4
MOST_HELD = 60
KINDS: list[dict[str, Any]] = [
    *({"size": size} for size in (1, 64, 200, 256, 1000, 2048, 2049, PAGE_SIZE, 9000, 65536, 65537, 131072, 1 << 20)),
    *({"size": size, "wired": False} for size in (1, 2048, PAGE_SIZE, 12288, 65536, 1 << 20)),
    {"size": 65536, "contiguous": True},
    {"size": PAGE_SIZE, "physical_mask": (1 << 40) - 1},
    {"size": 65536, "alignment": 65536},
    {"size": 2 << 20},
]
ZERO = bytes(2 << 20)
PATTERN = 1 << 16  # bytes that are compared at each end of a large buffer

_numbers = itertools.count(1)


class Model:
    """The addresses of all live buffers, which must not overlap."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranges: list[tuple[int, int]] = []

    def add(self, start: int, end: int) -> None:
        with self._lock:
            at = bisect.bisect(self._ranges, (start, end))
            assert at == 0 or self._ranges[at - 1][1] <= start, "bytes with two owners"
            assert at == len(self._ranges) or end <= self._ranges[at][0], "bytes with two owners"
            self._ranges.insert(at, (start, end))

    def remove(self, start: int, end: int) -> None:
        with self._lock:
            self._ranges.remove((start, end))


class Program:
    """One thread's operations."""

    def __init__(self, model: Model, seed: int) -> None:
        self._model = model
        self._chance = random.Random(seed)
        self._held: list[tuple[iobmd.IOBufferMemoryDescriptor, bytes, int]] = []
        self._source = ctypes.create_string_buffer(os.urandom(1 << 20).replace(b"\0", b"\1"), 1 << 20)

    def run(self, operations: int) -> None:
        for turn in range(operations):
            if len(self._held) < MOST_HELD and self._chance.random() < 0.53:
                self._allocate()
            elif self._held:
                self._free(self._chance.randrange(len(self._held)))
            if turn % 500 == 250:
                self._disturb()
        while self._held:
            self._free(0)

    def _allocate(self) -> None:
        try:
            self._allocate_any()
        except iobmd.CannotWireError:
            if may_lock(1 << 30):  # otherwise the programs hold more than RLIMIT_MEMLOCK
                raise

    def _allocate_any(self) -> None:
        keywords = self._chance.choice(KINDS)
        with iobmd.policy(keep=self._chance.choice([None, None, None, 0, 1 << 20]), time_budget=60):
            if keywords["size"] > 1 << 16 and self._chance.random() < 0.3:
                self._copy(min(keywords["size"], 1 << 20), keywords.get("wired", True))
                return
            try:
                buffer = iobmd.allocate(**keywords)
            except (iobmd.NoResourcesError, iobmd.NotPrivilegedError):
                if len(keywords) == 1:
                    raise
                return  # another process has all huge pages, or has disabled them; frames are hidden
        size = len(buffer)
        assert buffer.readBytes(0, size) == ZERO[:size], "bytes of an earlier owner"
        pattern = next(_numbers).to_bytes(8, "little") * (min(size, PATTERN) // 8 + 1)
        start = buffer.getBytesNoCopy()
        for offset in range(0, size, PATTERN):
            ctypes.memmove(start + offset, pattern, min(PATTERN, size - offset))
        self._hold(buffer, pattern[: min(size, PATTERN)])

    def _copy(self, size: int, wired: bool) -> None:
        buffer = iobmd.copy(os.getpid(), ctypes.addressof(self._source), size, wired=wired)
        assert bytes(buffer) == self._source.raw[:size]
        self._hold(buffer, self._source.raw[:PATTERN])

    def _hold(self, buffer: iobmd.IOBufferMemoryDescriptor, pattern: bytes) -> None:
        start = buffer.getBytesNoCopy()
        self._model.add(start, start + len(buffer))
        if buffer.wiring is Wiring.PINNED and self._chance.random() < 0.2 and iobmd.host.pfns_visible():
            first = start // kernel.PAGE * kernel.PAGE
            frames = kernel.frames(first, start + len(buffer) - first)
            expected = [frame * kernel.PAGE for frame in frames]
            assert list(buffer.page_addresses()) == expected, "physical addresses"
        self._held.append((buffer, pattern, start))

    def _free(self, index: int) -> None:
        buffer, pattern, start = self._held.pop(index)
        size = len(buffer)
        assert buffer.readBytes(0, min(size, len(pattern))) == pattern[:size]
        self._model.remove(start, start + size)
        way = self._chance.random()
        if way < 0.7:
            buffer.free()
        elif way < 0.85:
            with buffer:
                view = memoryview(buffer)
            assert view[: len(pattern)] == pattern[: len(view)]
            view.release()
        else:
            with buffer:
                pass

    def _disturb(self) -> None:
        way = self._chance.random()
        if way < 0.3:
            iobmd.trim()
        elif way < 0.6:
            wrong = in_child(_allocate_in_child)
            assert not wrong, wrong
        else:
            # The kernel may reclaim cold pages first; only kept memory may be lost.
            for buffer, _pattern, start in self._held:
                if buffer.wiring is Wiring.PAGEABLE and len(buffer) >= kernel.PAGE:
                    mman.advise(start // kernel.PAGE * kernel.PAGE, kernel.PAGE, mman.MADV_COLD)


def _allocate_in_child() -> str:
    if iobmd.statistics().kept:
        return "the child inherits kept memory"
    for keywords in KINDS:
        if "contiguous" in keywords or "alignment" in keywords:
            continue
        if "physical_mask" in keywords and not iobmd.host.pfns_visible():
            continue
        for _ in range(2):
            with iobmd.allocate(**keywords) as buffer:
                size = len(buffer)
                if buffer.readBytes(0, size) != ZERO[:size]:
                    return f"bytes of an earlier owner: {keywords}"
                buffer.writeBytes(0, b"\xee" * size)
    return ""


@pytest.mark.timeout(60 + OPERATIONS // 100)
def test_random_programs() -> None:
    gc.collect()
    iobmd.trim()
    before = iobmd.statistics(), kernel.status("VmLck")
    pinned = kernel.status("VmPin")
    model = Model()
    programs = [Program(model, seed) for seed in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda program: program.run(OPERATIONS // THREADS), programs))
    now = iobmd.statistics()
    assert (now.pageable, now.resident, now.pinned) == before[0][:3]
    iobmd.trim()
    assert (iobmd.statistics(), kernel.status("VmLck")) == before
    assert kernel.pinned(pinned) == pinned


def test_counts_are_those_of_the_kernel() -> None:
    """Sizes are whole pages, because small buffers share them."""
    iobmd.trim()
    before, locked, pinned = iobmd.statistics(), kernel.status("VmLck"), kernel.status("VmPin")
    chance = random.Random(1)
    sizes = [PAGE_SIZE, 8192, 65536, 131072, 1 << 20]
    held: list[iobmd.IOBufferMemoryDescriptor] = []
    for turn in range(2000):
        if chance.random() < 0.55 and sum(map(len, held)) < 4 << 20:  # within the usual RLIMIT_MEMLOCK
            held.append(iobmd.allocate(chance.choice(sizes)))
        elif held:
            held.pop(chance.randrange(len(held))).free()
        if turn % 100 == 99:
            now = iobmd.statistics()
            iobmd.trim()
            trimmed = iobmd.statistics()
            assert trimmed.kept == 0
            assert now.pinned == trimmed.pinned
            wired = now.pinned.size + now.resident.size - before.pinned.size - before.resident.size
            assert wired == sum(map(len, held)) == kernel.status("VmLck") - locked
            if held and held[0].wiring is Wiring.PINNED:
                assert kernel.pinned(pinned + wired) == pinned + wired
    for buffer in held:
        buffer.free()
