"""Putting a thread back into a system call that our stop has ended.

The kernel resumes most calls by itself. Those in `threads.ENDED_BY_A_STOP` come back with EINTR, as if a signal
handler had run. In place of it goes the kernel's own code for "once more, unless a handler runs", ERESTARTNOHAND.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from iobmd import procfs
from iobmd._internal import pidns
from iobmd.remote import threads

if TYPE_CHECKING:
    from iobmd.task.task import Task

_WORD = 1 << 64
_ERESTARTNOHAND = 514
_EPOLL = (threads.EPOLL_WAIT, threads.EPOLL_PWAIT)


class Sleep(NamedTuple):
    """One sleep of a thread in epoll_wait: since when, by our clock in seconds, and how often it had slept before."""

    since: float
    switches: int


def look(pid: int, activity: threads.Activity) -> Sleep | None:
    """Return the sleep a thread is in, before it is stopped; None where that does not matter, or cannot be known.

    By the time it last ran (se.exec_start of /proc/PID/sched), which is on the clock of its processor: we have to run
    on the same one.
    """
    if activity.call not in _EPOLL:
        return None
    with contextlib.suppress(OSError, LookupError, ValueError):
        switches = _switches(pid, activity.tid)
        if os.sched_getaffinity(0) != {activity.cpu}:
            return None
        os.sched_yield()  # brings our own figure up to date
        ours, theirs = _last_ran("/proc/thread-self/sched"), _last_ran(_file(pid, activity.tid, "sched"))
        if not theirs:  # it was moved to this processor in its sleep
            return None
        asleep_ms = ours - theirs
        return Sleep(time.monotonic() - max(0.0, asleep_ms / 1e3), switches)
    return None


def undo_eintr(task: Task, tid: int, regs: Any, sleep: Sleep | None) -> bool:
    """Change the registers of a stopped thread so that it goes back into its call; says whether that was needed.

    Where the C library made the call, which does not look at the timeout's register again, that is set to the rest;
    elsewhere, and where the timeout is in memory or a setting of a socket, it begins again.
    """
    if regs.rax != _WORD - errno.EINTR or regs.orig_rax not in threads.ENDED_BY_A_STOP:
        return False
    regs.rax = _WORD - _ERESTARTNOHAND
    (timeout_ms,) = struct.unpack("=i", struct.pack("=I", regs.r10 & 0xFFFFFFFF))
    if regs.orig_rax in _EPOLL and timeout_ms > 0 and sleep and _is_in_c_library(task, regs.rip):
        with contextlib.suppress(OSError, LookupError, ValueError):
            # It has slept once more since: it stands still.
            if _switches(task.pid, tid) == sleep.switches + 1:
                regs.r10 = max(0, math.ceil(timeout_ms - (time.monotonic() - sleep.since) * 1e3))
    return True


def _is_in_c_library(task: Task, address: int) -> bool:
    try:
        area = procfs.find_vma(task.pid, address)
    except OSError:
        return False
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
