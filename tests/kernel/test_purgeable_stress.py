"""Thousands of cycles with losses: Volatile means that no byte has changed, Empty that none remains."""

import gc
import os
import random
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support import kernel
from support.child import NOBODY, forked, in_child
from support.purging import EMPTY, KEEP_CURRENT, NON_VOLATILE, VOLATILE, page_out
from support.threads import run_all

import iobmd
from iobmd import IOBufferMemoryDescriptor as Buffer
from iobmd import IOPurgeable
from iobmd._native import mman

MIB = 1 << 20
THREADS = 4
CYCLES = 4_000


def in_threads(work: Callable[[int], None]) -> None:
    """Run `work` in threads, with the number of each."""
    run_all(*(partial(work, number) for number in range(THREADS)))


def both(outcomes: Counter[str]) -> int:
    """Return the count of the rarer of the two outcomes."""
    return min(outcomes[state.name or ""] for state in (VOLATILE, EMPTY))


def contents(size: int) -> tuple[bytearray, ...]:
    """Three contents of buffers of this size, and zeros.

    A bytearray is compared with a view by memcmp(3); a view is compared element by element, which takes six times as
    long.
    """
    return tuple(bytearray([value]) * size for value in (1, 0xA5, 0xFF, 0))


class Filled:
    """A buffer and its expected contents, compared page by page through views."""

    def __init__(self, choice: tuple[bytearray, ...], chance: random.Random, *, huge: bool) -> None:
        *self._contents, self._zero = choice
        size = len(self._zero)
        self.buffer = iobmd.allocate(size, wired=False, purgeable=True)
        advice = mman.MADV_HUGEPAGE if huge else mman.MADV_NOHUGEPAGE
        mman.advise(self.buffer.getBytesNoCopy(), size, advice)
        self._chance = chance
        self.content = bytearray()

    def fill(self) -> None:
        self.content = self._chance.choice(self._contents)
        self.buffer.writeBytes(0, self.content)

    def is_right(self, state: IOPurgeable) -> bool:
        """Return whether the bytes are those that `state`, the old state of a change to NonVolatile, promises."""
        with memoryview(self.buffer) as view:
            return (self._zero if state is EMPTY else self.content) == view


def cycle_with_loss(size: int, huge: bool, cycles: int) -> Counter[str]:
    """Reclaim one page, half, all or none of volatile memory, and compare the reported state with pagemap."""
    outcomes: Counter[str] = Counter()
    choice = contents(size)

    def work(number: int) -> None:
        chance = random.Random(number)
        filled = Filled(choice, chance, huge=huge)
        with filled.buffer as buffer:
            address, pages = buffer.getBytesNoCopy(), size // kernel.PAGE
            filled.fill()
            for _ in range(cycles // THREADS):
                buffer.setPurgeable(VOLATILE)
                length = chance.choice((0, 0, 1, pages // 2, pages)) * kernel.PAGE
                if length:
                    page_out(buffer, chance.randrange(0, size - length + 1, kernel.PAGE), length)
                gone = kernel.present(address, size) < pages
                if chance.random() < 0.2:
                    buffer.setPurgeable(KEEP_CURRENT)
                state = buffer.setPurgeable(NON_VOLATILE)
                assert state is (EMPTY if gone else VOLATILE), f"{length} bytes reclaimed"
                assert filled.is_right(state)
                outcomes[state.name or ""] += 1
                if length:
                    page_out(buffer, 0, size)
                    assert filled.is_right(state), "lost after the change to NonVolatile"
                if state is EMPTY or chance.random() < 0.1:
                    filled.fill()

    in_threads(work)
    return outcomes


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("huge", [False, True], ids=["4 KiB", "THP"])
def test_random_loss(huge: bool) -> None:
    size, cycles = (4 * MIB, CYCLES // 8) if huge else (64 << 10, CYCLES)
    outcomes = cycle_with_loss(size, huge, cycles)
    assert outcomes.total() == cycles
    assert both(outcomes) > cycles // 10, outcomes


def test_random_loss_with_64_kib_to_lock() -> None:
    """Four threads of a user who may lock 64 KiB, which a single buffer needs."""
    outcomes = in_child(lambda: cycle_with_loss(64 << 10, False, CYCLES // 4), uid=NOBODY, memlock=64 << 10)
    assert outcomes.total() == CYCLES // 4
    assert both(outcomes) > CYCLES // 40, outcomes


@pytest.mark.needs("swap")
@pytest.mark.usefixtures("swap", "nothing_left")
def test_random_loss_beside_swap() -> None:
    """With swap, Empty may be reported for intact memory, but never Volatile for lost memory."""
    outcomes: Counter[str] = Counter()

    def work(number: int) -> None:
        chance = random.Random(number)
        filled = Filled(contents(256 << 10), chance, huge=False)
        with filled.buffer as buffer:
            filled.fill()
            for _ in range(500):
                if chance.random() < 0.3:
                    page_out(buffer, 0, 128 << 10)  # non-volatile: into swap
                buffer.setPurgeable(VOLATILE)
                if chance.random() < 0.5:
                    page_out(buffer, chance.randrange(0, 256 << 10, kernel.PAGE), kernel.PAGE)
                state = buffer.setPurgeable(NON_VOLATILE)
                assert filled.is_right(state)
                outcomes[state.name or ""] += 1
                if state is EMPTY:
                    filled.fill()

    in_threads(work)
    assert both(outcomes) > 100, outcomes


def fill_and_free(size: int, content: bytearray) -> None:
    """Allocate memory of the cgroup, and free it."""
    with iobmd.allocate(size, wired=False) as filled:
        for offset in range(0, size - len(content), len(content)):
            filled.writeBytes(offset, content)


@pytest.mark.needs("memory_cgroup")
@pytest.mark.parametrize("size", [256 << 10, 4 * MIB], ids=["4 KiB", "THP"])
def test_real_pressure(size: int, memory_cgroup: Callable[[int], Path]) -> None:
    """Cycles in a cgroup of 96 MiB, in which another program repeatedly fills a half.

    At least 1,000, and until memory was often lost and often kept: the other program may start late.
    """
    procs = memory_cgroup(96 * MIB)
    choice = contents(size)  # created outside the cgroup, which would be charged for it
    content = choice[0][:MIB]

    def squeezed() -> Counter[str]:
        procs.write_text(str(os.getpid()))
        outcomes: Counter[str] = Counter()
        many = 48 * MIB // size
        end = time.monotonic() + 60

        def work(number: int) -> None:
            chance = random.Random(number)
            all_filled = [Filled(choice, chance, huge=size >= 2 * MIB) for _ in range(many // THREADS)]
            for filled in all_filled:
                filled.fill()
                filled.buffer.setPurgeable(VOLATILE)
            done = 0
            while done < 1000 // THREADS or (both(outcomes) <= 20 and time.monotonic() < end):
                done += 1
                filled = chance.choice(all_filled)
                state = filled.buffer.setPurgeable(NON_VOLATILE)
                assert filled.is_right(state)
                time.sleep(0.001)  # the other program continues
                assert filled.is_right(state), "lost after the change to NonVolatile"
                outcomes[state.name or ""] += 1
                filled.fill()
                filled.buffer.setPurgeable(VOLATILE)
            for filled in all_filled:
                filled.buffer.free()

        with forked(lambda: fill_and_free(60 * MIB, content)):
            in_threads(work)
        return outcomes

    outcomes = in_child(squeezed)
    assert outcomes.total() >= 1000
    assert both(outcomes) > 20, outcomes


@pytest.mark.usefixtures("nothing_left")
def test_readers_while_memory_comes_and_goes() -> None:
    """Views that read while contents become volatile, are reclaimed, dropped or filled see the bytes or zeros."""
    filled = Filled(contents(MIB), random.Random(1), huge=False)
    stop = threading.Event()
    with filled.buffer as buffer:
        filled.fill()

        def read() -> None:
            with memoryview(buffer) as view:
                while not stop.is_set():
                    assert set(bytes(view[:: kernel.PAGE])) <= {0, 1, 0xA5, 0xFF}

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        outcomes: Counter[str] = Counter()
        for turn in range(100):
            buffer.setPurgeable(VOLATILE)
            if turn % 2:
                page_out(buffer, 0, MIB)
            if turn % 7 == 0:
                iobmd.purge()
            state = buffer.setPurgeable(NON_VOLATILE)
            outcomes[state.name or ""] += 1
            assert filled.is_right(state)
            filled.fill()
        stop.set()
        for reader in readers:
            reader.join()
        assert both(outcomes)


def test_interrupts_leave_the_truth() -> None:
    """A signal handler raises at any moment of a round trip: the state reported afterwards is correct."""
    import signal

    def loop() -> tuple[int, int]:
        nonlocal inside, hit
        warnings.simplefilter("ignore", ResourceWarning)
        signal.signal(signal.SIGALRM, interrupt)
        chance = random.Random(3)
        filled = Filled(contents(64 << 10), chance, huge=False)
        filled.fill()
        for _ in range(2000):
            try:
                inside = True
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 2e-4))
                for _ in range(20):
                    filled.buffer.setPurgeable(VOLATILE)
                    assert filled.is_right(filled.buffer.setPurgeable(NON_VOLATILE))
                inside = False
            except KeyboardInterrupt:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            # The result of an interrupted change is unknown; the bytes are complete, or all zero.
            filled.buffer.setPurgeable(NON_VOLATILE)
            state = VOLATILE if filled.is_right(VOLATILE) else EMPTY
            assert filled.is_right(state)
            if state is EMPTY:
                filled.fill()
        gc.collect()
        return hit, kernel.status("VmLck")

    def interrupt(*_arguments: object) -> None:
        nonlocal hit
        if inside:
            hit += 1
            raise KeyboardInterrupt

    hit, inside = 0, False
    hit, locked = in_child(loop)
    assert hit > 500
    assert locked == 0


def test_ten_thousand_purgeable_buffers() -> None:
    def cycle(rounds: int) -> None:
        for number in range(rounds):
            with Buffer.withOptions(iobmd.kIOMemoryPageable | iobmd.kIOMemoryPurgeable, 1 + number % 9000) as buffer:
                buffer.writeBytes(0, b"x")
                buffer.setPurgeable(VOLATILE)

    cycle(100)
    with kernel.no_growth(MIB):
        cycle(10_000)
