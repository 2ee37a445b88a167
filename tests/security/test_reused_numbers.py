"""Numbers of processes and threads that another process has got by the time they are used."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.child import in_child, sleeping
from support.namespaces import in_namespaces, mount_proc
from support.targets import Target, need_ptrace

import iobmd
from iobmd import Task
from iobmd.remote import gadget, session, threads
from iobmd.remote.snapshot import Snapshot

WALL = 0x40000000
REAPER = """
import ctypes, os, sys
memory = ctypes.create_string_buffer(b"x" * (64 << 10))
print("ready", ctypes.addressof(memory), sep="\\n", flush=True)
for line in sys.stdin:
    print(os.waitpid(int(line), 0x40000000)[0], flush=True)
"""


def state(pid: int) -> tuple[list[str], list[str]]:
    """What a program has mapped, and how often it has run, been stopped or is traced."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return (
        Path(f"/proc/{pid}/maps").read_text().splitlines(),
        [line for line in lines if line.startswith(("TracerPid", "State", "voluntary", "nonvoluntary"))],
    )


@pytest.fixture
def target() -> Iterator[Target]:
    need_ptrace()
    with Target([sys.executable, "-c", REAPER]) as program:
        yield program


USES: dict[str, Callable[[int, int], None]] = {
    "allocate": lambda pid, _address: iobmd.allocate(8192, task=pid, wired=False).free(),
    "freeze": lambda pid, address: iobmd.copy(pid, address, 4096, freeze=True, wired=False).free(),
}


@pytest.mark.parametrize("use", ["allocate", "freeze"])
def test_a_thread_of_another_process_is_not_stopped(
    target: Target, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of the task ends, and its number goes to another process before it is seized."""
    address = int(target.line())
    seized = []
    with sleeping() as stranger:
        before = state(stranger.pid)
        real_ids, real_activity = threads.thread_ids, threads.activity

        def thread_ids(pid: int) -> list[int]:
            if not seized:
                seized.append(stranger.pid)
                return [stranger.pid]
            return real_ids(pid)

        def activity(pid: int, tid: int) -> threads.Activity | None:
            return real_activity(tid if tid == stranger.pid else pid, tid)

        monkeypatch.setattr(threads, "thread_ids", thread_ids)
        monkeypatch.setattr(threads, "activity", activity)
        USES[use](target.pid, address)
        assert seized
        assert state(stranger.pid) == before


@pytest.mark.needs("root")
def test_the_next_owner_of_a_guests_number_is_not_killed() -> None:
    """A task ends the guest that was made in it, and waits for it; a thread of ours has waited for any child."""
    need_ptrace()
    assert in_namespaces(guest_replaced, proc=mount_proc)


def guest_replaced() -> bool:
    """Say whether the process that gets the number of a guest survives, where nothing else makes processes."""
    with Target([sys.executable, "-c", REAPER]) as target:
        target.line()
        return bool(in_child(lambda: victim_survives(target)))


def victim_survives(target: Target) -> bool:
    # With another thread, and no child to trace, the tracer is a thread too: any thread can reap what it traces.
    over = threading.Event()
    threading.Thread(target=over.wait).start()
    task = Task(target.pid)
    instruction = gadget.find(task)
    snapshot = Snapshot(task, 1 << 20, lambda work: session.stop_one(task, 0, instruction, work))
    with snapshot.held():
        number = snapshot._guest.pid
        os.kill(number, signal.SIGKILL)
        assert os.waitpid(number, WALL)[0] == number  # as a wait for any child may
        target.tell(str(number))
        assert int(target.line()) == number
        victim = fork_as(number)
    over.set()
    alive = os.waitpid(victim, os.WNOHANG) == (0, 0)
    if alive:
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
    return alive


def fork_as(number: int) -> int:
    """Return a sleeping child that has this number."""
    for _ in range(100):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
        pid = os.fork()
        if not pid:
            signal.pause()
        if pid == number:
            return pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    raise AssertionError(f"no child has got the number {number}")
