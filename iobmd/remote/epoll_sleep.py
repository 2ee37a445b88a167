"""Since when a thread sleeps in epoll_wait, so that it sleeps no longer for a stop of ours.

The kernel resumes most calls by itself. Those in `threads.ENDED_BY_A_STOP` come back with EINTR, as if a signal
handler had run, and the tracer has them begin again (`cython_ext/tracer.h`). Where the C library made the call, which
does not look at the timeout's register again, that is set to the rest; elsewhere, and where the timeout is in memory
or a setting of a socket, it begins again with all of it.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd._internal import pidns
from iobmd.remote import threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd.task.task import Task

EPOLL = (threads.EPOLL_WAIT, threads.EPOLL_PWAIT)


class Sleep(NamedTuple):
    """One sleep of a thread in epoll_wait: since when, by our clock in ns, and how often it had slept before."""

    since_ns: int
    switches: int


def look(task: Task, activity: threads.Activity) -> Sleep | None:
    """Return the sleep a thread is in, before it is stopped; None where that does not matter, or cannot be known.

    By the time it last ran (se.exec_start of /proc/PID/sched), which is on the clock of its processor: we have to run
    on the same one.
    """
    if activity.call not in EPOLL or activity.cpu < 0:
        return None
    pid = task.pid
    with contextlib.suppress(OSError, LookupError, ValueError):
        switches = _switches(pid, activity.tid)
        if not _is_in_c_library(task, activity.tid):
            return None
        with _on(activity.cpu):
            os.sched_yield()  # brings our own figure up to date
            ours, theirs = _last_ran("/proc/thread-self/sched"), _last_ran(_file(pid, activity.tid, "sched"))
            now_ns = time.monotonic_ns()
        if not theirs:  # it was moved to this processor in its sleep
            return None
        return Sleep(now_ns - max(0, round((ours - theirs) * 1e6)), switches)
    return None


@contextlib.contextmanager
def _on(cpu: int) -> Iterator[None]:
    """Run on a processor. Raises OSError where that is not allowed."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, allowed)


def _is_in_c_library(task: Task, tid: int) -> bool:
    """Say whether it is the C library that made the call which a thread sleeps in."""
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
    # The name of the program comes first, and may look like any other line.
    lines = Path(path).read_text(errors="replace").split("\n")
    found = [line.rpartition(":")[2] for line in lines if line.startswith(name)]
    return found[-1]
