"""Memory of a shared object: the same pages in a forked child, and a common purgeable state."""

import ctypes
import gc
import itertools
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support import kernel
from support.child import NOBODY, forked, in_child
from support.errors import code_of
from support.purging import EMPTY, KEEP_CURRENT, NON_VOLATILE, VOLATILE, purgeable, reads_zero
from support.targets import until
from support.threads import run_all

import iobmd
from iobmd import IOPurgeable, IOReturn, IOReturnError, Wiring
from iobmd._native import mman
from iobmd.units import PAGE_SIZE

MIB = 1 << 20


# --- shared memory that is not purgeable


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("wired", [False, True], ids=["pageable", "wired"])
def test_memory_of_a_shared_object(wired: bool) -> None:
    locked = kernel.status("VmLck")
    with iobmd.allocate(3 * MIB + 5, wired=wired, shared=True) as buffer:
        address = buffer.getBytesNoCopy()
        assert not any(bytes(buffer))
        mapping = next(line for line in Path("/proc/self/maps").read_text().splitlines() if f"{address:x}-" in line)
        assert "rw-s" in mapping
        assert "iobmd" in mapping
        assert buffer.wiring is (Wiring.PINNED if wired else Wiring.PAGEABLE)
        if wired:
            assert kernel.present(address, 3 * MIB + 5) == 769
            assert kernel.status("VmLck") - locked == 769 * kernel.PAGE
            assert buffer.getPageCounts() == (769, 769)
        buffer.writeBytes(3 * MIB, b"12345")
        assert bytes(memoryview(buffer)[-5:]) == b"12345"


def test_counts_of_memory_that_was_unmapped() -> None:
    with iobmd.allocate(4 * PAGE_SIZE, wired=False, shared=True) as buffer:
        buffer.writeBytes(0, bytes(4 * PAGE_SIZE))
        assert buffer.getPageCounts() == (4, 4)
        assert ctypes.CDLL(None).munmap(ctypes.c_void_p(buffer.getBytesNoCopy() + PAGE_SIZE), PAGE_SIZE) == 0
        assert code_of(buffer.getPageCounts) == IOReturn.kIOReturnVMError


@pytest.mark.needs("frames")
def test_prepared_shared_memory_has_addresses_that_hold() -> None:
    with iobmd.allocate(64 << 10, wired=False, shared=True) as buffer:
        buffer.prepare()
        assert sum(segment.length for segment in buffer.segments()) == 64 << 10
        buffer.verify()
        buffer.complete()


def test_child_sees_and_changes_the_same_bytes() -> None:
    with iobmd.allocate(64 << 10, wired=False, shared=True) as buffer:
        buffer.writeBytes(0, b"parent")

        def look() -> bytes:
            seen = buffer.readBytes(0, 6)
            buffer.writeBytes(60_000, b"child")
            buffer.free()
            return seen

        assert in_child(look) == b"parent"
        assert buffer.readBytes(60_000, 5) == b"child"


def test_wired_shared_memory_refuses_in_a_child() -> None:
    with iobmd.allocate(PAGE_SIZE, shared=True) as buffer:

        def look() -> IOReturn:
            with pytest.raises(IOReturnError) as caught:
                buffer.readBytes(0, 1)
            return caught.value.code

        assert in_child(look) == IOReturn.kIOReturnNotOpen


@pytest.mark.usefixtures("nothing_left")
def test_copy_into_shared_memory() -> None:
    data = os.urandom(5 * MIB)
    with iobmd.allocate(len(data), wired=False) as source:
        source.writeBytes(0, data)
        with iobmd.copy(os.getpid(), source.getBytesNoCopy(), len(data), shared=True, wired=False) as copied:
            assert bytes(copied) == data
        with pytest.raises(IOReturnError):
            iobmd.copy(os.getpid(), 0, PAGE_SIZE, shared=True, wired=False)


def test_nobody_can_cut_the_memory_away() -> None:
    with iobmd.allocate(64 << 10, wired=False, shared=True) as buffer:
        descriptor = buffer._memory().backing.shared.fd.fileno()
        for size in (0, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)


# --- purgeable


def test_child_and_parent_agree() -> None:
    """Each process sees the state that the other set; contents are lost for both, and retained for both."""
    buffer, data = purgeable(64 * kernel.PAGE, shared=True)
    with buffer:

        def make_volatile() -> IOPurgeable:
            return buffer.setPurgeable(VOLATILE)

        def purge() -> int:
            return iobmd.purge()

        assert in_child(make_volatile) is NON_VOLATILE
        assert buffer.setPurgeable(KEEP_CURRENT) is VOLATILE
        assert buffer.setPurgeable(NON_VOLATILE) is VOLATILE
        assert bytes(buffer) == data
        buffer.setPurgeable(VOLATILE)
        assert in_child(purge) == 64 * kernel.PAGE, "the child itself never changed the state"
        assert buffer.setPurgeable(KEEP_CURRENT) is EMPTY
        assert reads_zero(buffer)
        assert in_child(lambda: buffer.setPurgeable(NON_VOLATILE)) is EMPTY
        assert buffer.setPurgeable(KEEP_CURRENT) is NON_VOLATILE


def test_purged_while_another_process_maps_and_reads_it() -> None:
    buffer, data = purgeable(4 * MIB, shared=True)
    reading, writing = os.pipe()
    with buffer:

        def read() -> None:
            with memoryview(buffer) as view:
                seen = bytes(view[:8]), bytes(view[-8:])
            assert set(seen) <= {data[:8], data[-8:], bytes(8)}
            os.write(writing, b"z" if set(seen) == {bytes(8)} else b"r")

        with forked(read):  # fails if the reader crashes, or sees anything else
            assert os.read(reading, 1) == b"r"
            buffer.setPurgeable(VOLATILE)
            # The reader faults in its two pages again, empty, as soon as they are purged: they may count as not
            # freed.
            assert 4 * MIB - 2 * kernel.PAGE <= iobmd.purge() <= 4 * MIB
            while os.read(reading, 1) != b"z":
                pass
        assert buffer.setPurgeable(NON_VOLATILE) is EMPTY
    os.close(reading)
    os.close(writing)


@pytest.mark.usefixtures("nothing_left")
def test_prepared_in_another_process() -> None:
    """Memory that the other process has prepared cannot become volatile until that completes it or exits."""
    buffer, data = purgeable(16 * kernel.PAGE, shared=True)
    with buffer:
        ready_read, ready_write = os.pipe()

        def hold() -> None:
            buffer.prepare()
            os.write(ready_write, b"x")
            signal.pause()

        with forked(hold):
            os.read(ready_read, 1)
            for word in (VOLATILE, EMPTY):
                with pytest.raises(IOReturnError, match="another process") as caught:
                    buffer.setPurgeable(word)
                assert caught.value.code == IOReturn.kIOReturnBusy
            buffer.prepare()  # both at the same time
            buffer.complete()
        os.close(ready_read)
        os.close(ready_write)
        assert buffer.setPurgeable(VOLATILE) is NON_VOLATILE
        assert buffer.setPurgeable(NON_VOLATILE) is VOLATILE
        assert bytes(buffer) == data


@pytest.mark.parametrize("moment", ["holding the lock", "before the punch", "after the punch"])
def test_sharer_killed_between_states(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 during a purge: the next process finds the mark and completes the purge, without waiting."""
    from iobmd.purgeable import shared

    buffer, data = purgeable(16 * kernel.PAGE, shared=True)
    with buffer:
        buffer.setPurgeable(VOLATILE)
        punch = mman.punch

        def die(fd: int, offset: int, size: int) -> None:
            if moment == "after the punch":
                punch(fd, offset, size)
            os.kill(os.getpid(), signal.SIGKILL)

        if not (pid := os.fork()):
            if moment == "holding the lock":
                with buffer._memory().backing.purgeable._exclusively():
                    os.kill(os.getpid(), signal.SIGKILL)
            monkeypatch.setattr(mman, "punch", die)
            buffer.setPurgeable(EMPTY)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        begin = time.monotonic()
        state = buffer.setPurgeable(NON_VOLATILE)
        assert time.monotonic() - begin < shared._PATIENCE
        if moment == "holding the lock":
            assert (state, bytes(buffer)) == (VOLATILE, data)
        else:
            assert state is EMPTY
            assert reads_zero(buffer)
        buffer.writeBytes(0, data)
        assert buffer.setPurgeable(VOLATILE) is NON_VOLATILE
        assert buffer.setPurgeable(NON_VOLATILE) is VOLATILE
        assert bytes(buffer) == data


def test_sharers_killed_at_random_moments() -> None:
    """200 children that change the state and purge are killed at any moment: the state and the bytes always agree."""
    buffer, data = purgeable(16 * kernel.PAGE, shared=True)
    with buffer:
        for turn in range(200):

            def flip(last: IOPurgeable = EMPTY if turn % 3 else NON_VOLATILE) -> None:
                buffer.setPurgeable(VOLATILE)
                buffer.setPurgeable(last)

            with forked(flip):
                time.sleep(turn % 20 / 10_000)
            state = buffer.setPurgeable(NON_VOLATILE)
            assert bytes(buffer) == (bytes(len(data)) if state is EMPTY else data), f"turn {turn}, {state!r}"
            buffer.writeBytes(0, data)


def test_processes_race() -> None:
    """Two processes fill memory and change its state: Volatile means that the bytes are those last written."""
    buffer, _ = purgeable(64 * kernel.PAGE, shared=True)
    with buffer, forked(iobmd.purge):
        outcomes = {VOLATILE: 0, EMPTY: 0}
        for turn in itertools.count():
            content = bytes([1 + turn % 255]) * (64 * kernel.PAGE)
            buffer.writeBytes(0, content)
            buffer.setPurgeable(VOLATILE)
            if turn % 2:
                time.sleep(0.0002)
            state = buffer.setPurgeable(NON_VOLATILE)
            outcomes[state] += 1
            assert bytes(buffer) == (content if state is VOLATILE else bytes(len(content)))
            if turn >= 1000 and min(outcomes.values()) > 10:  # how many turns it takes depends on the scheduler
                break


def test_many_threads_of_two_processes_and_two_buffers() -> None:
    """Record locks belong to processes: the kernel would mistake threads that wait for each other for a deadlock."""
    buffers = [purgeable(kernel.PAGE, shared=True)[0] for _ in range(2)]

    def work(buffer: iobmd.IOBufferMemoryDescriptor) -> None:
        for _ in range(300):
            buffer.setPurgeable(VOLATILE)
            buffer.setPurgeable(NON_VOLATILE)

    def both() -> None:
        run_all(*(partial(work, buffer) for buffer in buffers))

    with forked(both):
        both()
    for buffer in buffers:
        buffer.free()


def test_sharer_that_is_stopped_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process still holds its lock: others receive an error after a time, and purge skips the memory."""
    from iobmd.purgeable import shared

    monkeypatch.setattr(shared, "_PATIENCE", 0.2)
    buffer, data = purgeable(kernel.PAGE, shared=True)
    with buffer:
        buffer.setPurgeable(VOLATILE)
        reading, writing = os.pipe()

        def stop() -> None:
            with buffer._memory().backing.purgeable._exclusively():
                os.write(writing, b"x")
                signal.pause()

        with forked(stop) as pid:
            os.read(reading, 1)
            os.kill(pid, signal.SIGSTOP)
            assert iobmd.purge() == 0
            with pytest.raises(IOReturnError, match="is it stopped") as caught:
                buffer.setPurgeable(NON_VOLATILE)
            assert caught.value.code == IOReturn.kIOReturnBusy
        assert buffer.setPurgeable(NON_VOLATILE) is VOLATILE
        assert bytes(buffer) == data
        os.close(reading)
        os.close(writing)


def test_interrupts_leave_no_record_lock() -> None:
    """A signal handler raises at any moment: the other process is never locked out."""

    def answer(asked: int, answers: int) -> None:
        # The purger of this process may hold the lock briefly. A lock that is not released would be held forever.
        if os.read(asked, 1):
            with buffer._memory().backing.purgeable._exclusively():
                os.write(answers, b"x")

    def loop() -> int:
        hit, inside = 0, False

        def interrupt(*_arguments: object) -> None:
            nonlocal hit
            if inside:
                hit += 1
                raise KeyboardInterrupt

        signal.signal(signal.SIGALRM, interrupt)
        other, _ = purgeable(kernel.PAGE, shared=True)
        for turn in range(10_000):
            try:
                inside = True
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + turn % 50 * 2e-6)
                for _ in range(20):
                    with buffer.nonvolatile():
                        pass
                    buffer.setPurgeable(VOLATILE)
                inside = False
            except KeyboardInterrupt:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert not buffer._memory().guard.mine
            os.write(ask, b"x")
            assert select.select([answers], [], [], 30)[0], f"locked out after turn {turn}"
            assert os.read(answers, 1)
            if turn >= 150 and hit > 50:
                break
        assert buffer._memory().purge_control.memory._entered == 0
        other.free()
        return hit

    buffer, _ = purgeable(kernel.PAGE, shared=True)
    asked, ask = os.pipe()
    answers, answering = os.pipe()
    # In another process, because a record lock only excludes other open file descriptions.
    with buffer, forked(lambda: answer(asked, answering)):
        assert in_child(loop) > 50
    for end in (asked, ask, answers, answering):
        os.close(end)


@pytest.mark.needs("memory_cgroup")
def test_memory_that_is_asked_for_is_made_room_for(memory_cgroup: Callable[[int], Path]) -> None:
    """Memory that does not fit is refused only after volatile shared memory was purged."""
    procs = memory_cgroup(160 * MIB)
    content = os.urandom(MIB)

    def live() -> tuple[IOPurgeable, int]:
        procs.write_text(str(os.getpid()))
        buffer = iobmd.allocate(96 * MIB, wired=False, purgeable=True, shared=True)
        for offset in range(0, 96 * MIB, MIB):
            buffer.writeBytes(offset, content)
        buffer.setPurgeable(VOLATILE)
        with iobmd.allocate(100 * MIB) as wired, buffer:
            return buffer.setPurgeable(KEEP_CURRENT), len(wired)

    assert in_child(live) == (EMPTY, 100 * MIB)


# --- the purger


def purged_within(buffer: iobmd.IOBufferMemoryDescriptor, seconds: float) -> bool:
    """Inspect its pages instead of its state: the purger skips a buffer whose state another thread is reading."""
    if not until(lambda: not kernel.present(buffer.getBytesNoCopy(), buffer.getLength()), seconds):
        return False
    assert buffer.setPurgeable(KEEP_CURRENT) is EMPTY
    return True


@pytest.mark.needs("own_footprint")
@pytest.mark.needs("memory_cgroup")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("uid", [0, NOBODY], ids=["root", "nobody"])
def test_pressure_takes_shared_memory(memory_cgroup: Callable[[int], Path], uid: int) -> None:
    """A process with a limit of 128 MiB, 96 of them volatile, fills 64 more and survives; the last in order remain.

    As root, events of the cgroup start the purge, without polling.
    """
    procs = memory_cgroup(128 * MIB)
    content = os.urandom(MIB)

    def live() -> tuple[list[IOPurgeable], bool]:
        gc.disable()  # a garbage collection would immediately copy most of the heap that it shares with its parent
        buffers = []
        for group in (0, 1, 2, 7, 7, 7):
            buffer = iobmd.allocate(16 * MIB, wired=False, purgeable=True, shared=True)
            for offset in range(0, 16 * MIB, MIB):
                buffer.writeBytes(offset, content)
            buffer.setPurgeable(VOLATILE | group << 8)
            buffers.append(buffer)
        filler = iobmd.allocate(64 * MIB, wired=False)
        for offset in range(0, 64 * MIB, MIB):
            filler.writeBytes(offset, content)
            time.sleep(0.01)
        states, right = [], True
        for buffer in buffers:
            states.append(state := buffer.setPurgeable(NON_VOLATILE))
            with memoryview(buffer) as view:
                parts = [view[offset : offset + MIB] for offset in range(0, 16 * MIB, MIB)]
                right &= all(part == (content if state is VOLATILE else bytes(MIB)) for part in parts)
                for part in parts:
                    part.release()
            buffer.free()
        filler.free()
        return states, right

    def inside() -> tuple[list[IOPurgeable], bool]:
        procs.write_text(str(os.getpid()))
        result: tuple[list[IOPurgeable], bool] = in_child(live, uid=uid or None)
        return result

    states, right = in_child(inside)
    assert right
    assert states[:2] == [EMPTY] * 2, "lower groups are purged first"
    assert states[-1] is VOLATILE
    assert states == sorted(states, key=lambda state: state is VOLATILE), "in order, and no more than necessary"


@pytest.mark.usefixtures("nothing_left")
def test_purger_runs_while_there_is_shared_memory() -> None:
    def running() -> bool:
        return any(thread.name == "iobmd-purger" for thread in threading.enumerate())

    for _ in range(2):
        assert not running()
        buffer, _ = purgeable(kernel.PAGE, shared=True)
        assert running()
        time.sleep(0.6)
        assert running(), "another process may make it volatile at any time"
        buffer.free()
        end = time.monotonic() + 5
        while running() and time.monotonic() < end:
            time.sleep(0.05)


def test_purger_of_a_child() -> None:
    """A forked child has the memory but not the thread, and starts its own."""
    buffer, _ = purgeable(kernel.PAGE, shared=True)
    with buffer:

        def look() -> list[str]:
            return [thread.name for thread in threading.enumerate()]

        assert in_child(look) == ["MainThread", "iobmd-purger"]


@pytest.mark.needs("memory_cgroup")
def test_memory_of_a_sharer_that_died_is_taken(memory_cgroup: Callable[[int], Path]) -> None:
    """A child makes the memory volatile and exits; its parent, which never did, reaches its limit and survives."""
    procs = memory_cgroup(128 * MIB)

    def live() -> IOPurgeable:
        procs.write_text(str(os.getpid()))
        buffer = iobmd.allocate(80 * MIB, wired=False, purgeable=True, shared=True)
        content = b"x" * MIB
        for offset in range(0, 80 * MIB, MIB):
            buffer.writeBytes(offset, content)
        if not (pid := os.fork()):
            buffer.setPurgeable(VOLATILE)
            os._exit(0)
        os.waitpid(pid, 0)
        with iobmd.allocate(60 * MIB, wired=False) as filler, buffer:
            for offset in range(0, 60 * MIB, MIB):
                filler.writeBytes(offset, content)
                time.sleep(0.005)
            return buffer.setPurgeable(KEEP_CURRENT)

    assert in_child(live) is EMPTY


@pytest.mark.usefixtures("nothing_left")
def test_tasks_that_wait_for_memory_are_pressure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PSI: a quarter of the volatile memory is purged while tasks wait much of the time, and nothing otherwise."""
    from iobmd.purgeable import monitor

    file = tmp_path / "memory.pressure"
    file.write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=1000\nfull avg10=0.00 total=0\n")
    monkeypatch.setattr(monitor.host, "psi_files", lambda: [file])
    monkeypatch.setattr(monitor.host, "pressure_level", lambda: None)
    buffers = [purgeable(MIB, shared=True)[0] for _ in range(4)]
    for buffer in buffers:
        buffer.setPurgeable(VOLATILE)
    assert not purged_within(buffers[0], 0.6)
    file.write_text("some avg10=9.00 avg60=0.00 avg300=0.00 total=9000000\nfull avg10=0.00 total=0\n")
    assert purged_within(buffers[0], 10)
    assert not purged_within(buffers[1], 0.6)
    assert [buffer.setPurgeable(NON_VOLATILE) for buffer in buffers[1:]] == [VOLATILE] * 3
    file.unlink()  # the cgroup was removed
    buffers[1].setPurgeable(VOLATILE)
    assert not purged_within(buffers[1], 0.6)
    for buffer in buffers:
        buffer.free()


@pytest.mark.needs("own_footprint")
@pytest.mark.needs("memory_cgroup")
@pytest.mark.usefixtures("nothing_left")
def test_little_left_is_a_shortage(memory_cgroup: Callable[[int], Path]) -> None:
    """The missing free memory is determined from files that every user can read, without events."""
    from iobmd.host import headroom

    procs = memory_cgroup(64 * MIB)

    def look() -> list[int]:
        procs.write_text(str(os.getpid()))
        found = [headroom.shortage()]
        with iobmd.allocate(57 * MIB, wired=False) as filled:
            content = b"x" * MIB
            for offset in range(0, 57 * MIB, MIB):
                filled.writeBytes(offset, content)
                if offset == 40 * MIB:
                    found.append(headroom.shortage())
            found.append(headroom.shortage())
        return found

    none, half, short = in_child(look)
    assert none < half < 0
    assert 0 < short < 8 * MIB
