"""The time since which a thread sleeps in epoll_wait, so that a stop does not prolong its sleep.

The kernel resumes most calls by itself. Those in `tracer.CALLS_ENDED_BY_A_STOP` return EINTR, as if a signal handler
had run, and the tracer restarts them (`cython_ext/tracer.h`). If the C library made the call, it does not read the
register of the timeout again, so the tracer sets that to the remaining time. Other calls, and those whose timeout is
in memory or an option of a socket, restart with their whole timeout.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd._internal import pidns
from iobmd._native import tracer as native

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd.remote import threads
    from iobmd.task.task import Task

EPOLL = {number for name, number in native.CALLS_ENDED_BY_A_STOP.items() if name in ("epoll_wait", "epoll_pwait")}


class Sleep(NamedTuple):
    """One sleep of a thread in epoll_wait."""

    since_ns: int
    """Its start, on CLOCK_MONOTONIC."""
    switches: int
    """How often the thread had slept before (voluntary context switches)."""


def measure(task: Task, activity: threads.Activity) -> Sleep | None:
    """Return the sleep of a thread that is about to be stopped; None if it is in another call, or cannot be measured.

    The start is the time at which the thread last ran (se.exec_start of /proc/PID/sched), on the clock of its
    processor: this thread must run on the same processor to compare.
    """
    if activity.call not in EPOLL or activity.cpu < 0:
        return None
    pid = task.pid
    with contextlib.suppress(OSError, LookupError, ValueError):
        switches = _switches(pid, activity.tid)
        if not _is_in_c_library(task, activity.tid):
            return None
        with _on(activity.cpu):
            os.sched_yield()  # updates the time of this thread
            ours, theirs = _last_ran("/proc/thread-self/sched"), _last_ran(_file(pid, activity.tid, "sched"))
            now_ns = time.monotonic_ns()
        if not theirs:  # it was moved to this processor while it slept
            return None
        return Sleep(now_ns - max(0, round((ours - theirs) * 1e6)), switches)
    return None


@contextlib.contextmanager
def _on(cpu: int) -> Iterator[None]:
    """Run on one processor. Raises OSError if its use is not permitted."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, allowed)


def _is_in_c_library(task: Task, tid: int) -> bool:
    """Return whether the C library made the call in which a thread sleeps."""
    address = int(Path(_file(task.pid, tid, "syscall")).read_text().split()[-1], 16)
    area = procfs.find_vma(task.pid, address)
    return area is not None and Path(area.name).name.startswith(("libc.so", "libc-", "ld-musl"))


def _switches(pid: int, tid: int) -> int:
    return int(_field(_file(pid, tid, "status"), "voluntary_ctxt_switches"))


def _file(pid: int, tid: int, name: str) -> str:
    return f"{pidns.directory(pid)}/task/{tid}/{name}"


def _last_ran(path: str) -> float:
    return float(_field(path, "se.exec_start"))


def _field(path: str, name: str) -> str:
    # The name of the program is first, and may resemble any other line.
    lines = Path(path).read_text(errors="replace").split("\n")
    found = [line.rpartition(":")[2] for line in lines if line.startswith(name)]
    return found[-1]
