"""Ids of processes and threads that another process has reused before they are used."""

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.child import forked, sleeping
from support.namespaces import in_namespaces, mount_proc
from support.targets import Target, need_ptrace

import iobmd
from iobmd import IOMemoryDescriptor, IOReturn, IOReturnError, Task, procfs
from iobmd.remote import areas, task_snapshot, threads
from iobmd.remote.snapshot_child import SnapshotChild
from iobmd.task.job import Transfer
from iobmd.units import PAGE_SIZE

WALL = 0x40000000
WAITING = "import sys; print('ready', flush=True); sys.stdin.read()"


def state(pid: int) -> tuple[list[str], list[str]]:
    """Return the mappings of a program, how often it has run or been stopped, and its tracer."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return (
        Path(f"/proc/{pid}/maps").read_text().splitlines(),
        [line for line in lines if line.startswith(("TracerPid", "State", "voluntary", "nonvoluntary"))],
    )


@pytest.fixture
def target() -> Iterator[Target]:
    need_ptrace()
    with Target([sys.executable, "-c", WAITING]) as program:
        yield program


def test_a_thread_of_another_process_is_not_stopped(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of the task exits, and another process reuses its id before it is seized."""
    seized = []
    with sleeping() as unrelated:
        before = state(unrelated.pid)
        real_ids, real_activity = threads.thread_ids, threads.activity

        def thread_ids(pid: int) -> list[int]:
            if not seized:
                seized.append(unrelated.pid)
                return [unrelated.pid]
            return real_ids(pid)

        def activity(pid: int, tid: int) -> threads.Activity | None:
            return real_activity(tid if tid == unrelated.pid else pid, tid)

        monkeypatch.setattr(threads, "thread_ids", thread_ids)
        monkeypatch.setattr(threads, "activity", activity)
        iobmd.allocate(8192, task=target.pid, wired=False).free()
        assert seized
        assert state(unrelated.pid) == before


@pytest.mark.needs("root")
@pytest.mark.usefixtures("may_trace")
def test_the_next_child_with_the_number_of_a_guest_is_not_reaped() -> None:
    """The guest of a snapshot is killed, the task reaps it, and its next child gets the number and exits."""

    def body() -> int:
        ours, theirs = socket.socketpair()
        task = os.fork()
        if not task:
            number = int(ours.recv(64))
            os.waitpid(number, WALL)
            time.sleep(0.05)  # they are distinguished by when they began, in ticks of 10 ms
            successor = fork_as(number)
            os.kill(successor, signal.SIGTERM)
            ours.send(b"replaced")
            ours.recv(64)
            _, status = os.waitpid(number, 0)
            os._exit(os.WTERMSIG(status))
        snapshot = SnapshotChild(Task(task), 1 << 20)
        with snapshot:
            assert snapshot._session
            number = snapshot._session._tracer.guest
            os.kill(number, signal.SIGKILL)
            with pytest.raises(ChildProcessError):
                os.waitpid(number, WALL)
            theirs.send(str(number).encode())
            assert theirs.recv(64) == b"replaced"
        theirs.send(b"snapshot has ended")
        return os.waitstatus_to_exitcode(os.waitpid(task, 0)[1])

    assert in_namespaces(body, proc=mount_proc) == signal.SIGTERM


WRITES: dict[str, Callable[[Task, int], object]] = {
    "few bytes": lambda task, address: task.write(address, b"ours"),
    "many pages": lambda task, address: task.write(address, bytes(512 << 10)),
    "an absent page": lambda task, address: task.write(address + (1 << 20), b"ours"),
    "writeBytes": lambda task, address: memory_of(task, address).writeBytes(0, b"ours"),
}


def memory_of(task: Task, address: int) -> IOMemoryDescriptor:
    """Return a descriptor of memory of a task, as if the task had been alive when it was created."""
    everything = procfs.VMA(0, procfs.USER_END, "rw-p", 0, 0, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(areas, "overlapping", lambda *_arguments: [everything])
        return IOMemoryDescriptor.withAddressRange(address, PAGE_SIZE, 3, task)


@pytest.mark.needs("root")
@pytest.mark.parametrize("write", WRITES)
def test_bytes_for_a_task_that_is_gone_reach_nobody(write: str) -> None:
    """The next process with its pid has memory at the same address."""

    def body() -> tuple[IOReturn | None, bool]:
        memory = mmap.mmap(-1, 2 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[: 1 << 20] = b"v" * (1 << 20)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        with replaced() as (task, successor):
            memory[: 1 << 20] = bytes(1 << 20)
            code = None
            try:
                WRITES[write](task, address)
            except IOReturnError as error:
                code = error.code
            there = Task(successor)
            return code, there.read(address, 1 << 20) == b"v" * (1 << 20) and not any(
                there.read(address + (1 << 20), 4)
            )

    code, intact = in_namespaces(body, proc=mount_proc)
    assert intact
    assert code == IOReturn.kIOReturnNotFound


def test_bytes_for_a_thread_that_is_gone_reach_nobody() -> None:
    """A task without its main thread is accessed by the id of another thread, which exits before the task."""
    memory = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:4] = b"mine"
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with forked(signal.pause) as number, forked(signal.pause) as unrelated:
        task = Task(number)
        job = Transfer(number, task.pidfd, address, address, PAGE_SIZE, write=True)
        memory[:4] = b"ours"
        assert task._moved_of_thread(job, unrelated).error == errno.ESRCH
        assert Task(unrelated).read(address, 4) == b"mine"
        assert not task._moved_of_thread(job, number).error, "the control"
        assert task.read(address, 4) == b"ours"


@pytest.mark.needs("root")
@pytest.mark.parametrize("size", [16, 1 << 20], ids=str)
def test_bytes_of_the_next_owner_are_not_returned(size: int) -> None:
    def body() -> tuple[IOReturn | None, bytes]:
        memory = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory[:] = b"v" * len(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        buffer = bytearray(size)
        with replaced() as (task, _victim):
            try:
                task.readinto(address, buffer)
            except IOReturnError as error:
                return error.code, bytes(buffer)
        return None, bytes(buffer)

    code, data = in_namespaces(body, proc=mount_proc)
    assert code == IOReturn.kIOReturnNotFound
    assert not any(data)


@pytest.mark.needs("root")
def test_another_process_does_not_become_the_victim_of_the_oom_killer() -> None:
    """The process of a snapshot is killed, reaped and replaced before its oom_score_adj is set."""

    def body() -> list[str]:
        with replaced() as (task, successor):
            task_snapshot.prefer_as_victim(task)
            return [Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in ("self", successor)]

    own, other = in_namespaces(body, proc=mount_proc)
    assert other == own


@contextlib.contextmanager
def replaced() -> Iterator[tuple[Task, int]]:
    """Return the task of a child that has exited, and the pid of another with the same pid and memory."""
    pid = os.fork()
    if not pid:
        signal.pause()
    task = Task(pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    successor = fork_as(pid)
    try:
        yield task, successor
    finally:
        os.kill(successor, signal.SIGKILL)
        os.waitpid(successor, 0)


def fork_as(number: int) -> int:
    """Return a sleeping child that has this pid."""
    for _ in range(100):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
        pid = os.fork()
        if not pid:
            signal.pause()
        if pid == number:
            return pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    raise AssertionError(f"no child has got the pid {number}")
