"""`nonvolatile` blocks of several processes that share purgeable memory."""

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
from support.child import forked
from support.errors import code_of
from support.purging import EMPTY, KEEP_CURRENT, NON_VOLATILE, OBSOLETE, VOLATILE, purgeable, reads_zero

import iobmd
from iobmd import IOReturn

SIZE = 64 << 10
FAULTS = iobmd.IOPurgeable.kIOMemoryPurgeableFaultOnAccess


class Peer(NamedTuple):
    """A forked child that uses a buffer when it is asked to."""

    pid: int
    ask: Callable[[Any], Any]

    def kill(self) -> None:
        """Kill it and wait until it has exited; the end of its `with` block then raises AssertionError."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)


@contextlib.contextmanager
def started(buffer: iobmd.IOBufferMemoryDescriptor) -> Iterator[Peer]:
    """Start a peer, which ends with the `with` block. Raises AssertionError if it ended before."""
    here, there = multiprocessing.Pipe()
    block = buffer.nonvolatile()

    def answer(request: Any) -> Any:
        match request:
            case "enter":
                return block.__enter__()
            case "leave":
                return block.__exit__(None, None, None)
            case "fail":
                return block.__exit__(KeyError, KeyError("refill"), None)
            case "fill":
                return buffer.writeBytes(0, b"filled" * 100)
            case "read":
                return bytes(buffer)
            case _:
                return code_of(lambda: buffer.setPurgeable(request))

    def body() -> None:
        there.send(answer(there.recv()))

    def ask(request: Any) -> Any:
        here.send(request)
        assert here.poll(30), f"no answer to {request!r}"
        return here.recv()

    with here, there, forked(body) as pid:
        yield Peer(pid, ask)


def lose(buffer: iobmd.IOBufferMemoryDescriptor) -> None:
    """Make the buffer volatile, and purge it."""
    buffer.setPurgeable(VOLATILE)
    assert iobmd.purge() == SIZE


def state_of(buffer: iobmd.IOBufferMemoryDescriptor) -> iobmd.IOPurgeable:
    """Return the state."""
    return buffer.setPurgeable(KEEP_CURRENT)


def test_the_last_process_makes_it_volatile() -> None:
    """The memory of a process inside a block survives the end of another's block."""
    buffer, content = purgeable(SIZE, shared=True)
    with buffer, started(buffer) as peer:
        buffer.setPurgeable(VOLATILE)
        assert peer.ask("enter")
        with buffer.nonvolatile() as intact:
            assert intact
        assert state_of(buffer) == NON_VOLATILE
        assert iobmd.purge() == 0
        assert peer.ask("read") == content
        peer.ask("leave")
        assert state_of(buffer) == VOLATILE
        with buffer.nonvolatile():  # the same in the other order
            assert peer.ask("enter")
            peer.ask("leave")
            assert state_of(buffer) == NON_VOLATILE
            assert bytes(buffer) == content
        assert state_of(buffer) == VOLATILE
        assert iobmd.purge() == SIZE


def test_memory_that_was_not_volatile_remains_so() -> None:
    buffer, _ = purgeable(SIZE, shared=True)
    with buffer, started(buffer) as peer:
        assert peer.ask("enter")
        with buffer.nonvolatile():
            pass
        peer.ask("leave")
        assert state_of(buffer) == NON_VOLATILE


def test_descriptors_in_one_process() -> None:
    buffer, content = purgeable(SIZE, shared=True)
    with buffer, iobmd.share(buffer) as handle, iobmd.attach(handle) as attached:
        buffer.setPurgeable(VOLATILE)
        with buffer.nonvolatile():
            with attached.nonvolatile() as intact:
                assert intact
            assert state_of(attached) == NON_VOLATILE
            assert bytes(attached) == content
        assert state_of(attached) == VOLATILE


def test_all_processes_know_that_it_is_being_filled() -> None:
    buffer, _ = purgeable(SIZE, shared=True)
    with buffer, started(buffer) as peer:
        lose(buffer)
        assert peer.ask("enter") is False
        with buffer.nonvolatile() as intact:
            assert intact is False
            peer.ask("fill")
            peer.ask("leave")
            with buffer.nonvolatile() as now:
                assert now
        assert state_of(buffer) == VOLATILE
        assert buffer.readBytes(0, 6) == b"filled"


def test_the_end_of_the_last_block_empties_what_was_not_filled() -> None:
    buffer, _ = purgeable(SIZE, shared=True)
    with buffer, started(buffer) as peer:
        lose(buffer)
        assert peer.ask("enter") is False
        with buffer.nonvolatile():
            peer.ask("fill")
            peer.ask("fail")
            assert state_of(buffer) == NON_VOLATILE
        assert state_of(buffer) == EMPTY
        assert reads_zero(buffer)
        with buffer.nonvolatile() as intact:
            assert intact is False
        assert state_of(buffer) == VOLATILE


@pytest.mark.parametrize("prepared", [False, True])
def test_a_process_killed_inside_a_block(prepared: bool) -> None:
    """The kernel releases its lock; the memory is volatile for the next user, at the latest after complete()."""
    buffer, content = purgeable(SIZE, shared=True)
    with buffer, pytest.raises(AssertionError, match="the child ended"), started(buffer) as peer:
        buffer.setPurgeable(VOLATILE)
        assert peer.ask("enter")
        if prepared:
            buffer.prepare()
        peer.kill()
        if prepared:
            assert state_of(buffer) == NON_VOLATILE
            buffer.complete()
        assert state_of(buffer) == VOLATILE
        assert bytes(buffer) == content
        assert iobmd.purge() == SIZE


def test_a_process_killed_while_it_fills_the_memory() -> None:
    buffer, _ = purgeable(SIZE, shared=True)
    with buffer, pytest.raises(AssertionError, match="the child ended"), started(buffer) as peer:
        lose(buffer)
        assert peer.ask("enter") is False
        peer.ask("fill")
        peer.kill()
        with buffer.nonvolatile() as intact:
            assert intact is False
            assert reads_zero(buffer)
            buffer.writeBytes(0, b"again")
        assert state_of(buffer) == VOLATILE
        assert buffer.readBytes(0, 5) == b"again"


@pytest.mark.parametrize("state", [VOLATILE, EMPTY, VOLATILE | OBSOLETE], ids=["volatile", "empty", "obsolete"])
def test_other_processes_cannot_discard_it(state: iobmd.IOPurgeable) -> None:
    buffer, content = purgeable(SIZE, shared=True)
    with buffer, started(buffer) as peer:
        buffer.setPurgeable(VOLATILE)
        with buffer.nonvolatile():
            assert peer.ask(state) == IOReturn.kIOReturnBusy
            assert peer.ask("read") == bytes(buffer) == content
        assert state_of(buffer) == VOLATILE


def test_purged_memory_is_volatile_again_in_any_process() -> None:
    buffer, _ = purgeable(SIZE, shared=True)
    with buffer, started(buffer) as peer:  # which has never made it volatile itself
        lose(buffer)
        assert peer.ask("enter") is False
        peer.ask("fill")
        peer.ask("leave")
        assert state_of(buffer) == VOLATILE


def test_a_fork_inside_a_block() -> None:
    """The child is inside the same block, which the parent's end does not end."""
    buffer, content = purgeable(SIZE, shared=True)
    buffer.setPurgeable(VOLATILE)
    with buffer:
        block = buffer.nonvolatile()
        block.__enter__()
        with started(buffer) as peer:
            assert peer.ask("read") == content
            block.__exit__(None, None, None)
            assert state_of(buffer) == NON_VOLATILE
            assert iobmd.purge() == 0
            assert peer.ask("read") == content
        assert state_of(buffer) == VOLATILE  # the child was killed


def test_the_end_of_a_block_while_another_process_has_it_prepared() -> None:
    """It is refused, as setPurgeable is, and the memory remains non-volatile."""
    buffer, _ = purgeable(SIZE, shared=True)
    with buffer, iobmd.share(buffer) as handle, iobmd.attach(handle) as attached:
        buffer.setPurgeable(VOLATILE)
        block = buffer.nonvolatile()
        block.__enter__()
        attached.prepare()
        assert code_of(lambda: block.__exit__(None, None, None)) == IOReturn.kIOReturnBusy
        attached.complete()
        assert state_of(attached) == NON_VOLATILE
        with attached.nonvolatile():
            pass
        assert state_of(attached) == NON_VOLATILE


def test_faults_on_access_remain_with_the_process_that_asked_for_them() -> None:
    buffer, content = purgeable(SIZE, shared=True)
    with buffer, iobmd.share(buffer) as handle, iobmd.attach(handle) as attached:
        buffer.setPurgeable(VOLATILE | FAULTS)
        with attached.nonvolatile():
            pass
        assert state_of(attached) == VOLATILE
        assert attached.readBytes(0, SIZE) == content
        assert code_of(lambda: buffer.readBytes(0, 1)) == IOReturn.kIOReturnVMError


class Counts(ctypes.Structure):
    """The events in one process, in memory that it shares with the test."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("intact", "filled", "failed", "wrong")]


def use(buffer: iobmd.IOBufferMemoryDescriptor, content: bytes, counts: Counts) -> None:
    """Enter a block, fill the memory if necessary or fail to, and compare it while other processes leave blocks."""
    time.sleep(random.random() * 0.005)
    with contextlib.suppress(KeyError), buffer.nonvolatile() as intact:
        if intact:
            counts.intact += 1
        elif random.random() < 0.2:
            counts.failed += 1
            raise KeyError
        else:
            buffer.writeBytes(0, content)
            counts.filled += 1
        for _ in range(3):
            counts.wrong += bytes(buffer) != content
            time.sleep(random.random() * 0.001)


@pytest.mark.usefixtures("nothing_left")
def test_no_contents_are_lost_inside_a_block() -> None:
    """Four processes enter and leave blocks, and are killed inside, while the memory is purged whenever possible."""
    buffer, content = purgeable(SIZE, shared=True)
    every = mmap.mmap(-1, mmap.PAGESIZE)
    counts = [Counts.from_buffer(every, index * ctypes.sizeof(Counts)) for index in range(4)]
    chance, purges, kills = random.Random(1), 0, 0

    def work(mine: Counts) -> None:
        random.seed(os.getpid())
        while True:
            use(buffer, content, mine)

    def start(mine: Counts) -> contextlib.ExitStack:
        process = contextlib.ExitStack()
        process.enter_context(forked(partial(work, mine)))
        return process

    with buffer, contextlib.ExitStack() as ends:
        buffer.setPurgeable(VOLATILE)
        processes = [start(mine) for mine in counts]
        ends.callback(lambda: [process.__exit__(None, None, None) for process in processes])
        deadline = time.monotonic() + 60
        while purges < 100 or kills < 8:
            purges += bool(iobmd.purge())
            if chance.random() < 0.03:
                index = chance.randrange(4)
                processes[index].close()
                kills += 1
                processes[index] = start(counts[index])
            time.sleep(chance.random() * 0.001)
            assert time.monotonic() < deadline, (purges, kills)
        assert all(mine.intact and mine.filled and mine.failed for mine in counts)
        assert not any(mine.wrong for mine in counts)
