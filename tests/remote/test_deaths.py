"""Processes that are killed at any moment: the task into which memory is mapped, and the one that maps it."""

import gc
import os
import random
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.child import forked, sleeping
from support.kernel import Footprint
from support.targets import (
    ProgramResources,
    Stopping,
    Target,
    build,
    check_unchanged,
    children,
    until,
    until_at_rest,
    until_blocked,
)
from support.tracer_killer import before_call

import iobmd
from iobmd import IOMapOptions, IOMemoryDescriptor, IOReturn, IOReturnError, Task, host, procfs
from iobmd.remote.guest import Call, Guest
from iobmd.remote.session import Session, guard_of, with_guest
from iobmd.remote.threads import state, thread_ids
from iobmd.units import PAGE_SIZE

ANYWHERE = IOMapOptions.kIOMapAnywhere
MIB = 1 << 20
ECHO = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, 16 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = b"x" * len(memory)
print("ready", ctypes.addressof(ctypes.c_char.from_buffer(memory)), sep="\\n", flush=True)
for line in sys.stdin: print(line, end="", flush=True)
"""


@pytest.mark.parametrize("freeze", [False, True], ids=["map", "freeze"])
@pytest.mark.usefixtures("nothing_left")
def test_the_task_is_killed(freeze: bool) -> None:
    """If the task dies, the current call raises soon, and nothing remains in this process. Repeated many times."""
    raised = 0
    with iobmd.allocate(64 << 10, shared=True, wired=False) as buffer:
        before = Footprint.now()
        for number in range(30 if freeze else 80):
            with sleeping() as target:
                stack = next(
                    line for line in Path(f"/proc/{target.pid}/maps").read_text().splitlines() if "[stack]" in line
                )
                address = int(stack.split("-")[0], 16)
                killer = threading.Timer(random.uniform(0, 0.006), os.kill, (target.pid, signal.SIGKILL))
                killer.start()
                begin = time.monotonic()
                try:
                    while time.monotonic() - begin < 5:
                        if freeze:
                            iobmd.copy(target.pid, address, PAGE_SIZE, freeze=True, wired=False).free()
                        elif number % 2:
                            iobmd.allocate(8192, task=target.pid).free()
                        else:
                            buffer.createMappingInTask(target.pid, 0, ANYWHERE).unmap()
                except IOReturnError as error:
                    assert error.code == IOReturn.kIOReturnNotFound, error
                    raised += 1
                killer.join()
                assert target.wait(10) == -signal.SIGKILL
        gc.collect()
        after = Footprint.now()
    assert raised == number + 1
    assert after.descriptors == before.descriptors
    assert "iobmd (deleted)" not in Path("/proc/self/maps").read_text()


@pytest.fixture(params=["process", "thread"])
def tracer_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Trace by a process, or by a thread of this process as Yama's scope 1 requires without CAP_SYS_PTRACE."""
    if request.param == "thread":
        monkeypatch.setattr(host, "yama_scope", lambda: 1)
        monkeypatch.setattr(host, "has_capability", lambda name: name != "CAP_SYS_PTRACE")
    return str(request.param)


@pytest.mark.needs("compiler")
@pytest.mark.usefixtures("may_trace")
@pytest.mark.parametrize("others", [0, 3])
def test_a_task_that_is_killed_while_frozen_exits(tracer_kind: str, others: int) -> None:
    """Its parent learns of it at once, although its threads are traced."""
    with Target([build("busy"), "threads", str(others)]) as target:
        task = Task(target.pid)
        with guard_of(task):
            session = Session(task)
            try:
                session.freeze()
                assert {state(target.pid, tid) for tid in thread_ids(target.pid)} == {"t"}
                tracer = procfs.status(target.pid)["TracerPid"]
                assert Path(f"/proc/self/task/{tracer}").exists() == (tracer_kind == "thread"), "the control"
                os.kill(target.pid, signal.SIGKILL)
                assert target.process.wait(5) == -signal.SIGKILL
            finally:
                session.end(failed=False)


@pytest.mark.needs("compiler")
@pytest.mark.usefixtures("may_trace", "tracer_kind")
def test_a_task_of_several_threads_exits_while_it_is_stopped() -> None:
    """The call that stops it reports that it is gone, not that it does not stop. Repeated many times."""
    for _ in range(60):
        with Target([build("busy"), "threads", "8"]) as target, Stopping(target.pid) as stopping:
            assert until(lambda: stopping.count)
            time.sleep(random.uniform(0, 0.01))
            target.tell()
            assert target.end()[0] == 5


@pytest.mark.needs("compiler")
@pytest.mark.usefixtures("may_trace", "tracer_kind")
def test_a_thread_executes_a_program_while_others_are_stopped() -> None:
    """The kernel waits until the other threads, which it kills, are reaped by their tracer."""
    for _ in range(2):
        with Target([build("busy"), "executes", "100"]) as target:
            task = Task(target.pid)
            while task.alive:
                try:
                    iobmd.snapshot(task).close()
                except IOReturnError as error:
                    # kIOReturnError: the program was replaced during a system call that was made in it
                    assert error.code in (IOReturn.kIOReturnNotFound, IOReturn.kIOReturnError), error
            assert target.end() == (9, "")


@pytest.mark.needs("compiler", "root")  # otherwise Yama may require the tracer to be an ancestor
@pytest.mark.usefixtures("may_trace", "tracer_kind")
def test_a_thread_is_killed_after_it_has_created_the_guest() -> None:
    """The kernel does not report the process: it is found, killed and reaped."""
    with Target([build("busy"), "executes_then", "1"]) as target:
        until_at_rest(target.pid)
        task = Task(target.pid)

        def execute(_tracer: int) -> None:
            target.tell()  # another thread executes a program
            assert until(lambda: target.line() == "ready")

        get_event_message = 0x4201
        assert before_call(
            lambda: with_guest(task, lambda _guest: None),
            lambda request: request == get_event_message,
            execute,
        )
        assert until(lambda: is_left_alone(target.pid), 5), children(target.pid)
        target.tell()
        assert target.end() == (5, "woken\n")


def use_allocate(pid: int, _address: int) -> None:
    iobmd.allocate(8192, task=pid).free()


def use_prepare(pid: int, address: int) -> None:
    with IOMemoryDescriptor.withAddressRange(address, MIB, 3, pid) as memory:
        memory.prepare()
        memory.complete()


def use_freeze(pid: int, address: int) -> None:
    """A page is copied while the task is stopped."""
    iobmd.copy(pid, address, PAGE_SIZE, freeze=True, wired=False).free()


def use_snapshot(pid: int, address: int) -> None:
    """Most of the task is copied from a child of the task."""
    iobmd.copy(pid, address, 16 * MIB, freeze=True, wired=False).free()


@pytest.mark.parametrize(("others", "times"), [(0, 30), (3, 10), (15, 3)])
@pytest.mark.parametrize("use", [use_allocate, use_prepare, use_freeze, use_snapshot])
def test_we_are_killed(use: Callable[[int, int], None], others: int, times: int) -> None:
    """The process is killed while it maps repeatedly: the tracer soon completes the operation.

    `others` is the number of threads that compute and may hold the GIL at that moment.
    """
    with Target([sys.executable, "-c", ECHO]) as target:
        address = int(target.line())
        until_blocked(target.pid)
        before, blocked = ProgramResources.of(target.pid), procfs.status(target.pid)["SigBlk"]
        for _ in range(times):
            kill_in_the_middle(lambda: use(target.pid, address), others)
            assert until(lambda: is_left_alone(target.pid), 20), target.state()
            assert procfs.status(target.pid)["SigBlk"] == blocked
            target.tell("hello")
            assert target.line() == "hello"
            after = ProgramResources.of(target.pid)
            assert after.descriptors == before.descriptors
            # Memory that was allocated there remains if the process is killed before it is freed; nothing else does.
            added = set(after.maps) - set(before.maps)
            assert not [line for line in added if "memfd:iobmd" not in line and "/dev/zero" not in line]


def kill_in_the_middle(use: Callable[[], None], others: int) -> None:
    """Kill a child that does this repeatedly, some time after its first operation."""
    reading, writing = os.pipe()
    started: list[threading.Thread] = []

    def compute() -> None:
        while True:
            sum(range(1000))

    def report() -> None:
        sys.setswitchinterval(1e-4)  # each system call waits for the GIL, with 15 other threads 75 ms by default
        while len(started) < others:
            started.append(threading.Thread(target=compute, daemon=True))
            started[-1].start()
        use()
        os.write(writing, b".")

    try:
        with forked(report):
            assert select.select([reading], [], [], 60)[0]
            time.sleep(random.uniform(0, 0.1 if others else 0.02))
    finally:
        os.close(writing)
        os.close(reading)


def is_left_alone(pid: int) -> bool:
    """Return whether no thread of a program is traced, and it has no children."""
    threads = list(Path(f"/proc/{pid}/task").iterdir())
    traced = any("TracerPid:\t0\n" not in (thread / "status").read_text() for thread in threads)
    return not traced and not any((thread / "children").read_text() for thread in threads)


def test_we_are_killed_while_a_guest_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tracer remains, and makes the target reap the guest."""
    with Target([sys.executable, "-c", ECHO]) as target:
        target.line()
        until_blocked(target.pid)
        before = ProgramResources.of(target.pid)
        real = Guest.run

        def run(guest: Guest, *calls: Call, deadline: float | None = None) -> list[int]:
            real(guest, *calls, deadline=deadline)
            assert not is_left_alone(target.pid), "the control"
            os.kill(caller, signal.SIGKILL)
            raise AssertionError

        monkeypatch.setattr(Guest, "run", run)
        for _ in range(5):
            if not (caller := os.fork()):
                try:
                    caller = os.getpid()
                    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                    use_allocate(target.pid, 0)
                finally:
                    os._exit(1)
            assert os.WTERMSIG(os.waitpid(caller, 0)[1]) == signal.SIGKILL
            assert until(lambda: is_left_alone(target.pid)), target.state()
            target.tell("hello")
            assert target.line() == "hello"
            check_unchanged(target.pid, before)


@pytest.mark.usefixtures("may_trace")
def test_the_task_runs_on_for_a_while_after_we_are_killed() -> None:
    """Programs that kill this process often kill its tracer next, with which its command line and memory are shared.

    In the middle of a call in the task, that would crash the task.
    """
    with Target([sys.executable, "-c", ECHO]) as target:
        target.line()
        until_blocked(target.pid)
        reading, writing = os.pipe()

        def hold() -> None:
            with iobmd.snapshot(target.pid):
                os.write(writing, b".")
                signal.pause()

        with forked(hold):  # and killed
            assert os.read(reading, 1) == b"."
            before, begin = switches(target.pid), time.monotonic()
        assert until(lambda: switches(target.pid) > before), "the control: it is stopped"
        assert time.monotonic() - begin >= 0.2
        os.close(reading)
        os.close(writing)
        assert until(lambda: is_left_alone(target.pid), 20), target.state()


def switches(pid: int) -> int:
    """Return how often a thread has slept or been stopped."""
    return int(procfs.status(pid)["voluntary_ctxt_switches"])
