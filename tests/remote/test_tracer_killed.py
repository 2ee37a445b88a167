"""The tracer alone is killed (kill -9) at each point of a stop: the task is as before, and nothing remains in it.

Only with IOBMD_NIGHTLY=1: on a busy machine, processes that are resumed may take longer than these tests wait.
"""

import ctypes
import errno
import itertools
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.targets import ProgramResources, Target, build, check_unchanged, children, until, until_blocked
from support.tracer_killer import kill_tracer

import iobmd
from iobmd import procfs
from iobmd.remote import session, signal_return, threads
from iobmd.task.task import Task

pytestmark = [
    pytest.mark.needs("compiler", "root"),  # otherwise Yama may require the tracer to be a thread of an ancestor
    pytest.mark.usefixtures("may_trace"),
    pytest.mark.skipif("IOBMD_NIGHTLY" not in os.environ, reason="a minute on an idle machine, with IOBMD_NIGHTLY=1"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="threads are not protected on other processors"),
]


def use_guest(pid: int) -> None:
    """One stop to create a guest, and one to reap it."""
    session.with_guest(Task(pid), lambda _guest: None)


def use_snapshot(pid: int) -> None:
    """All threads are stopped."""
    iobmd.snapshot(pid).close()


def blocks_signals(pid: int) -> bool:
    """Return whether a thread of a program blocks signals, which these programs do only while they start."""
    found = [procfs.status(pid, tid) for tid in threads.thread_ids(pid)]
    return any(int(status["SigBlk"], 16) for status in found if not status["State"].startswith("Z"))


def living_children(pid: int, others: str) -> list[str]:
    """Return children of a program, except others, that are no zombies."""
    new = [child for child in children(pid).split() if child not in others.split()]
    return [child for child in new if threads.state(int(child), int(child)) not in ("Z", "")]


def kill_at_each_point(use: Callable[[int], None], pid: int, *, exact: bool = True) -> None:
    """Kill the tracer at each point of an operation; check each time that the task is as before.

    `exact`: the program itself maps no memory during this time. On a busy machine, the task may not stop in time to
    reap its guest; at most two may remain as zombies.
    """
    assert until(lambda: not blocks_signals(pid))
    before, others = ProgramResources.of(pid), children(pid)
    use(pid)
    for point in itertools.count():
        # Of a thread that runs, only the first stack pointer of the main thread is known.
        assert until(lambda: signal_return.stack(Task(pid), threads.candidates(pid)[0]) != (0, 0)), point
        if not kill_tracer(lambda: use(pid), point):
            break
        # The kernel has resumed the thread, which may not have run yet.
        assert until(lambda: not blocks_signals(pid)), point
        assert until(lambda: not living_children(pid, others)), point
    assert len(children(pid).split()) <= len(others.split()) + 2
    assert point > 20
    check_unchanged(pid, before, exact=exact)


@pytest.mark.parametrize(
    ("use", "kind"), [(use_guest, ["wait"]), (use_guest, ["leaderless"]), (use_snapshot, ["threads", "3"])]
)
def test_program_that_waits_for_input(use: Callable[[int], None], kind: list[str]) -> None:
    """A `leaderless` one has no main thread, and thus another kind of stack."""
    with Target([build("busy"), *kind]) as target:
        kill_at_each_point(use, target.pid, exact=kind == ["wait"])
        target.tell()
        assert target.end()[0] == 5


@pytest.mark.parametrize(("call", "result"), [("poll", 1), ("wait4", 7)])
def test_interrupted_call_starts_again(call: str, result: int) -> None:
    """Those that end with EINTR when a thread is stopped do so if the tracer is killed before it prevents that."""
    with Target([build("blocked"), call]) as target:
        until_blocked(target.pid)
        kill_at_each_point(use_guest, target.pid)
        target.tell()
        code, said = target.end()
    returned, number, _elapsed, handled = said.split()
    assert code == 0
    assert (int(returned), errno.errorcode.get(int(number), number), handled) == (result, "0", "0")


def test_vector_registers_are_kept(tmp_path: Path) -> None:
    go = tmp_path / "go"
    go.write_bytes(b"\0")
    with Target([build("vectors"), go, "widest"], ready="") as target:
        target.line()
        assert until(lambda: Path(f"/proc/{target.pid}/syscall").read_text() == "running\n")
        kill_at_each_point(use_guest, target.pid)
        with go.open("r+b") as file:
            file.write(b"\1")
        assert target.end()[1].startswith("kept")


def test_other_memory_is_no_stack() -> None:
    """A thread may run in memory of the program, which has other data below the stack pointer."""
    with mmap.mmap(-1, 64 << 10, flags=mmap.MAP_PRIVATE) as memory:
        view = ctypes.c_char.from_buffer(memory)
        pointer = ctypes.addressof(view) + (32 << 10)
        del view
        activity = threads.Activity(0, threading.get_native_id() + 1, 0, 0, pointer)
        assert signal_return.stack(Task(os.getpid()), activity) == (0, 0)
