"""Which thread of a task can be stopped with the least harm, by what /proc says it is doing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from iobmd._internal import pidns
from iobmd.errors import NO_DESCRIPTOR
from iobmd.task import diagnosis

EPOLL_WAIT, EPOLL_PWAIT = 232, 281
ENDED_BY_A_STOP = {
    0: "read", 1: "write", 19: "readv", 20: "writev", 42: "connect", 43: "accept", 44: "sendto", 45: "recvfrom",
    46: "sendmsg", 47: "recvmsg", 65: "semop", 128: "rt_sigtimedwait", 208: "io_getevents", 220: "semtimedop",
    EPOLL_WAIT: "epoll_wait", EPOLL_PWAIT: "epoll_pwait", 288: "accept4", 299: "recvmmsg", 307: "sendmmsg",
    333: "io_pgetevents", 426: "io_uring_enter", 441: "epoll_pwait2",
}  # fmt: skip
"""System calls that may return EINTR for a stop which no signal handler had a part in (signal(7)), by number.

They have done nothing then, and are begun once more.
"""
_RANKS = {0: 1, 19: 1, 1: 4, 20: 4, 44: 4, 45: 4, 46: 4, 47: 4, 299: 4, 307: 4, 426: 4}
"""Reads are ended only on sockets with a timeout; what may have done a part of its work would stop with that."""
_PATIENT = 16  # threads looked at; one of them will do


class Activity(NamedTuple):
    """What a thread does, lower `rank` first."""

    rank: int
    tid: int
    cpu: int
    """The processor it ran on last; -1: unknown."""
    call: int
    """The system call it sleeps in, -1 when it does not."""


def candidates(pid: int) -> list[Activity]:
    """Return threads of a task that may be stopped, those first that will not notice.

    A thread that sleeps in a call which the kernel resumes by itself is best; one that computes must be caught first;
    one in a call that a stop ends has to be put back into it.
    """
    found: list[Activity] = []
    for tid in thread_ids(pid):
        one = activity(pid, tid)
        if one:
            found.append(one)
            if not one.rank or len(found) >= _PATIENT:
                break
    return sorted(found)


def thread_ids(pid: int) -> list[int]:
    """Return the ids of a task's threads; none when it is gone. Raises `kIOReturnNoResources`: no free descriptor."""
    try:
        return sorted(int(entry) for entry in os.listdir(f"{pidns.directory(pid)}/task"))  # noqa: PTH208 (one call less)
    except OSError as error:
        diagnosis.unless_exhausted(error, f"cannot list the threads of task {pid}")
        return []


def state(pid: int, tid: int) -> str:
    """Return the state of a thread as ps(1) shows it, "" when it is gone, "?" where no descriptor is free to look."""
    return _stat(pid, tid)[0]


def _stat(pid: int, tid: int) -> tuple[str, int]:
    """Return the state of a thread and its processor, -1 for one of a real-time policy, which would not let us run.

    The third, 39th and 41st field of its stat (proc_pid_stat(5)).
    """
    try:
        fields = (
            Path(f"{pidns.directory(pid)}/task/{tid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        )
        real_time = int(fields[38]) not in (os.SCHED_OTHER, os.SCHED_BATCH, os.SCHED_IDLE)
        return fields[0], -1 if real_time else int(fields[36])
    except (OSError, IndexError, ValueError) as error:
        # Taken for gone, a thread would be given up in the middle of a call that is made in it.
        return "?" if getattr(error, "errno", None) in NO_DESCRIPTOR else "", -1


def activity(pid: int, tid: int) -> Activity | None:
    """Return what a thread does; None when it has ended."""
    now, cpu = _stat(pid, tid)
    if now in ("", "Z", "X", "x"):
        return None
    number = call(pid, tid)
    if number is None:  # any thread, then
        return Activity(2, tid, cpu, -1)
    if now == "D":
        return Activity(9, tid, cpu, -1)
    if number < 0:
        return Activity(1, tid, cpu, -1)
    rank = 3 if number in ENDED_BY_A_STOP else 0
    return Activity(_RANKS.get(number, rank), tid, cpu, number)


def call(pid: int, tid: int) -> int | None:
    """Return the system call that a thread sleeps in, -1 for none; None where the kernel does not show that."""
    try:
        name = Path(f"{pidns.directory(pid)}/task/{tid}/syscall").read_text().split()[0]
    except (OSError, IndexError):
        return None
    return -1 if name == "running" else int(name)
