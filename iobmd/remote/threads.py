"""Which thread of a task can be stopped with the least harm, by what /proc says it is doing."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

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
_SOCKET_CALLS = {0, 1, 19, 20}  # only with a timeout, which files and pipes do not have
_PATIENT = 16  # threads looked at; one of them will do


class Activity(NamedTuple):
    """What a thread does, lower `rank` first."""

    rank: int
    tid: int
    timeout_ms: int | None
    """Of the epoll_wait it is in."""


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
    """Return the ids of a task's threads; none when it is gone."""
    try:
        return sorted(int(entry) for entry in os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208 (one call less)
    except OSError:
        return []


def state(pid: int, tid: int) -> str:
    """Return the state of a thread as ps(1) shows it, "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/task/{tid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def activity(pid: int, tid: int) -> Activity | None:
    """Return what a thread does; None when it has ended."""
    now = state(pid, tid)
    if now in ("", "Z", "X", "x"):
        return None
    try:
        call, *arguments = Path(f"/proc/{pid}/task/{tid}/syscall").read_text().split()
    except OSError:  # the kernel has no such file, or does not show it to us: any thread, then
        return Activity(2, tid, None)
    if now == "D":
        return Activity(9, tid, None)
    if call in ("running", "-1"):
        return Activity(1, tid, None)
    number = int(call)
    timeout = None
    if number in (EPOLL_WAIT, EPOLL_PWAIT):
        timeout = int(arguments[3], 16) & 0xFFFFFFFF
        timeout = None if timeout >> 31 else timeout  # negative: for ever
    if number in _SOCKET_CALLS:
        return Activity(1, tid, None)
    return Activity(3 if number in ENDED_BY_A_STOP else 0, tid, timeout)


def asleep_ms(pid: int, tid: int) -> float:
    """Return for how long a sleeping thread has been asleep, in milliseconds; 0 where the kernel does not tell.

    By the time it last ran (se.exec_start of /proc/PID/sched, on the scheduler's clock) and that we do.
    """
    os.sched_yield()  # brings our own figure up to date
    with contextlib.suppress(OSError, StopIteration, ValueError):
        return max(0.0, _last_ran("/proc/thread-self/sched") - _last_ran(f"/proc/{pid}/task/{tid}/sched"))
    return 0.0


def _last_ran(path: str) -> float:
    lines = Path(path).read_text().splitlines()
    return float(next(line for line in lines if line.startswith("se.exec_start")).rpartition(":")[2])
