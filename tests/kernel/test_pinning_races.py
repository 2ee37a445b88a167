"""Pins in any order and from many threads: frames are never shared, and nothing leaks."""

import contextlib
import gc
import random
import signal
import threading
import warnings
from functools import partial

import pytest
from support import kernel
from support.child import CAP_IPC_LOCK, NOBODY, in_child
from support.errors import code_of
from support.kernel import frames
from support.threads import run_all

import iobmd
from iobmd import IOReturn, IOReturnError, Wiring
from iobmd.memory import pinning
from iobmd.units import PAGE_SIZE

MIB = 1 << 20


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_thousand_random_sequences() -> None:
    live: dict[int, set[int]] = {}
    lock = threading.Lock()
    wrong: list[str] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for turn in range(250):
            wired = chance.random() < 0.5
            size = chance.choice([PAGE_SIZE, 5000, 70_000, 3 * MIB])  # whole pages, unlike small wired buffers
            buffer = iobmd.allocate(size, wired=wired, contiguous=wired and chance.random() < 0.3)
            if not wired:
                buffer.prepare()
            mine = set(frames(buffer.getBytesNoCopy(), size))
            with lock:
                for other in live.values():
                    if mine & other:
                        wrong.append(f"seed {seed} turn {turn}")
                live[seed] = mine
            if 0 in mine:
                wrong.append("a page without a frame")
            buffer.prepare()
            buffer.verify()
            buffer.complete()
            with lock:
                del live[seed]
            if not wired:
                buffer.complete()
            buffer.free()

    run_all(*(partial(work, seed) for seed in range(4)))
    assert not wrong
    assert kernel.nothing_is_pinned()


def test_limit_reached_in_a_loop_leaks_nothing() -> None:
    def loop() -> tuple[int, int]:
        for _ in range(300):
            with iobmd.allocate(MIB) as fits, iobmd.allocate(3 * MIB, wired=False) as too_large:
                assert fits.wiring is Wiring.PINNED
                with pytest.raises(IOReturnError) as caught:
                    too_large.prepare()
                assert caught.value.code == IOReturn.kIOReturnCannotWire
        return kernel.pinned(), kernel.status("VmLck")

    assert in_child(loop, uid=NOBODY - 2, drop=CAP_IPC_LOCK, memlock=2 * MIB) == (0, 0)


@pytest.mark.usefixtures("nothing_left")
def test_free_races_prepare() -> None:
    """If memory is prepared, free() is refused, and the other way round: no pin remains without an owner."""
    outcomes = set()

    def prepare(buffer: iobmd.IOBufferMemoryDescriptor, start: threading.Barrier) -> None:
        start.wait()
        try:
            buffer.prepare()
        except IOReturnError as error:
            outcomes.add(error.code)
        else:
            buffer.complete()

    for turn in range(300):
        buffer = iobmd.allocate(MIB, wired=False)
        memoryview(buffer)[::PAGE_SIZE] = bytes(256)
        start = threading.Barrier(2)
        thread = threading.Thread(target=prepare, args=(buffer, start))
        thread.start()
        start.wait()
        threading.Event().wait((turn % 10) / 100_000)
        with contextlib.suppress(BufferError):
            buffer.free()
            outcomes.add("freed")
        thread.join()
        buffer.free()
        assert kernel.pinned() == 0, f"turn {turn}"
    assert outcomes == {"freed", IOReturn.kIOReturnNotOpen}


@pytest.mark.usefixtures("nothing_left")
def test_the_garbage_collector_frees_one_buffer_while_another_is_pinned() -> None:
    def collect() -> tuple[int, int]:
        warnings.simplefilter("ignore", ResourceWarning)
        gc.set_threshold(1, 1, 1)
        for _ in range(500):
            lost = iobmd.allocate(PAGE_SIZE)
            lost.itself = lost  # type: ignore[attr-defined]
            del lost
            with iobmd.allocate(PAGE_SIZE) as buffer:
                assert buffer.wiring is Wiring.PINNED
        gc.collect()
        iobmd.trim()
        return kernel.pinned(), kernel.status("VmLck")

    assert in_child(collect) == (0, 0)


def test_a_refused_pin_does_not_wait_for_other_threads() -> None:
    """A closed ring still counts briefly, and a pin is tried again: not for as long as other threads close rings."""

    def refused() -> IOReturn:
        over = threading.Event()

        def close_rings() -> None:
            while not over.wait(0.001):
                pinning.expect_uncharging()

        closing = threading.Thread(target=close_rings)
        closing.start()
        try:
            with iobmd.allocate(4 * 64 << 10, wired=False) as buffer:
                return code_of(buffer.prepare)
        finally:
            over.set()
            closing.join()

    assert in_child(refused, memlock=64 << 10, drop=CAP_IPC_LOCK) == IOReturn.kIOReturnCannotWire


@pytest.mark.usefixtures("nothing_left")
def test_interrupts_at_any_point_leave_no_pin() -> None:
    """A signal handler raises at any moment of allocating and freeing, with and without reuse."""

    def interrupt(*_arguments: object) -> None:
        nonlocal hit
        if inside:
            hit += 1
            raise KeyboardInterrupt

    def loop() -> tuple[int, int, int]:
        nonlocal inside
        warnings.simplefilter("ignore", ResourceWarning)
        signal.signal(signal.SIGALRM, interrupt)
        chance = random.Random(5)
        for turn in range(2000):
            with iobmd.policy(keep=0 if turn % 2 else None), contextlib.suppress(KeyboardInterrupt):
                inside = True
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-5, 4e-4))
                for _ in range(20 if turn % 2 else 400):
                    iobmd.allocate(8192).free()
                inside = False  # a later alarm would raise outside the `try` statement
            signal.setitimer(signal.ITIMER_REAL, 0)
        gc.collect()
        iobmd.trim()
        return hit, kernel.pinned(), kernel.status("VmLck")

    hit, inside = 0, False
    hit, pinned, locked = in_child(loop)
    assert hit > 1000
    assert (pinned, locked) == (0, 0)
