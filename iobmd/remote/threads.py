"""Threads of a task, and which of them a stop disturbs least, according to /proc."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from iobmd._internal import pidns
from iobmd._native import tracer as native
from iobmd.errors import NO_DESCRIPTOR
from iobmd.task import diagnosis

_PARTIAL = {"write", "writev", "sendto", "recvfrom", "sendmsg", "recvmsg", "recvmmsg", "sendmmsg", "io_uring_enter"}
"""Calls that may have transferred some bytes, and would return early."""
_RANKS = {
    number: 1 if name in ("read", "readv") else 4 if name in _PARTIAL else 3
    for name, number in native.CALLS_ENDED_BY_A_STOP.items()
}
"""By the numbers of calls that end with a stop. Reads do so only on sockets with a timeout."""
_EXAMINED = 16  # threads at most; one of them can be stopped


class Activity(NamedTuple):
    """The state of a thread; a lower `rank` is disturbed less by a stop."""

    rank: int
    tid: int
    cpu: int
    """The processor on which it last ran; -1: unknown, or not usable by this process."""
    call: int
    """The system call in which it sleeps; -1: it does not sleep."""
    stack_pointer: int = 0
    """Its stack pointer if it sleeps; 0: unknown."""


def candidates(pid: int) -> list[Activity]:
    """Return threads of a task to stop, those first that a stop disturbs least.

    A thread that sleeps in a call which the kernel resumes by itself is best. A running thread must first reach a
    point where it can stop. A thread in a call that ends with a stop must have that call restarted.
    """
    found: list[Activity] = []
    for tid in thread_ids(pid):
        one = activity(pid, tid)
        if one:
            found.append(one)
            if not one.rank or len(found) >= _EXAMINED:
                break
    return sorted(found)


def thread_ids(pid: int) -> list[int]:
    """Return the ids of a task's threads; none if it has exited.

    Raises `kIOReturnNoResources`: no file descriptor is free.
    """
    try:
        return sorted(int(entry) for entry in os.listdir(f"{pidns.directory(pid)}/task"))  # noqa: PTH208 (one call less)
    except OSError as error:
        diagnosis.unless_exhausted(error, f"cannot list the threads of task {pid}")
        return []


def state(pid: int, tid: int) -> str:
    """Return the state of a thread as ps(1) prints it; "" if it has ended, "?" if no file descriptor is free."""
    return _stat(pid, tid)[0]


def _stat(pid: int, tid: int) -> tuple[str, int]:
    """Return the state of a thread and its processor; -1 under a real-time policy, where this thread would not run.

    These are the third, 39th and 41st fields of its stat (proc_pid_stat(5)).
    """
    try:
        fields = (
            Path(f"{pidns.directory(pid)}/task/{tid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        )
        real_time = int(fields[38]) not in (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)
        return fields[0], -1 if real_time else int(fields[36])
    except (OSError, IndexError, ValueError) as error:
        # If it counted as ended, it would be abandoned during a call that is injected into it.
        return "?" if getattr(error, "errno", None) in NO_DESCRIPTOR else "", -1


def activity(pid: int, tid: int) -> Activity | None:
    """Return the state of a thread; None if it has ended."""
    now, cpu = _stat(pid, tid)
    if now in ("", "Z", "X", "x"):
        return None
    sleep = _sleep(pid, tid)
    if sleep is None:  # unknown: no thread is better than another
        return Activity(2, tid, cpu, -1)
    number, stack_pointer = sleep
    if now == "D":
        return Activity(9, tid, cpu, -1)
    if number < 0:
        return Activity(1, tid, cpu, -1, stack_pointer)
    return Activity(_RANKS.get(number, 0), tid, cpu, number, stack_pointer)


def call(pid: int, tid: int) -> int | None:
    """Return the system call in which a thread sleeps; -1: it does not sleep; None: the kernel does not report it."""
    sleep = _sleep(pid, tid)
    return sleep[0] if sleep else None


def _sleep(pid: int, tid: int) -> tuple[int, int] | None:
    """Return the system call in which a thread sleeps, or -1, and its stack pointer, or 0 if it runs."""
    try:
        fields = Path(f"{pidns.directory(pid)}/task/{tid}/syscall").read_text().split()
        return (-1, 0) if fields[0] == "running" else (int(fields[0]), int(fields[-2], 16))
    except (OSError, IndexError, ValueError):
        return None
