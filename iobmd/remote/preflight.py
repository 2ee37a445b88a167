"""Why a task's threads cannot be stopped, as the error to raise: found out before anything is done to it."""

from __future__ import annotations

import errno
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd import host, procfs
from iobmd.errors import BadArgumentError, IOReturnError, NotPermittedError, UnsupportedError
from iobmd.task import diagnosis

if TYPE_CHECKING:
    from iobmd.task.task import Task


_SUSPEND_SECCOMP = 1 << 21  # PTRACE_O_SUSPEND_SECCOMP


class Traced(Exception):  # noqa: N818 (it may pass)
    """Somebody traces the task at this moment."""


def require_processor() -> None:
    """Raise `kIOReturnUnsupported` where the processor is another than x86-64."""
    if platform.machine() != "x86_64":
        message = f"system calls in another task are made on x86-64 only, and this is {platform.machine()}"
        raise UnsupportedError(message)


def check(task: Task) -> int:
    """Return the options to trace a task with.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`, `kIOReturnNotFound`, `kIOReturnNotPermitted`, with the reason.
    Traced
        Another tracer is at it.
    """
    pid = task.pid
    if task.is_current:
        message = f"task {pid} is this process, which makes its system calls itself"
        raise BadArgumentError(message)
    if refusal := diagnosis.numbered_otherwise(pid):
        raise refusal
    try:
        status = procfs.status(pid)
    except OSError as error:
        diagnosis.unless_exhausted(error, f"cannot look at task {pid}")
        status = {}
    if not task.alive:
        zombie = status.get("State", "").startswith("Z")
        raise diagnosis.gone(
            f"task {pid} is gone: {'it is a zombie, its parent has not waited' if zombie else 'exited'}"
        )
    if not status:
        raise diagnosis.hidden(pid) or diagnosis.gone(f"task {pid} is gone: it exited")
    if diagnosis.is_kernel_thread(pid):
        raise diagnosis.without_memory(pid)
    if status["TracerPid"] != "0":
        raise Traced
    return _past_seccomp(pid, status.get("Seccomp", "0"))


def _past_seccomp(pid: int, mode: str) -> int:
    if mode == "0":
        return 0
    what = "lets only read and write through (strict seccomp)" if mode == "1" else "has a seccomp filter"
    if not host.has_capability("CAP_SYS_ADMIN"):
        why = "which could kill it for calls of ours; suspending it needs CAP_SYS_ADMIN"
    elif procfs.status().get("Seccomp", "0") != "0":
        why = "which this process cannot suspend, for it has a seccomp filter itself"
    else:
        return _SUSPEND_SECCOMP
    raise NotPermittedError(f"task {pid} {what}, {why}", errno.EPERM)


def tracer(pid: int, tid: int) -> int | None:
    """Return the number of the thread that traces one of a task, 0 for none; None when that has ended.

    Raises `kIOReturnNoResources`: no descriptor is free to look.
    """
    try:
        status = procfs.status(pid, tid)
    except OSError as error:
        diagnosis.unless_exhausted(error, f"cannot look at task {pid}")
        return None
    return None if status["State"][0] in "ZX" else int(status["TracerPid"])


def traced_by_another(pid: int, tracer: int) -> NotPermittedError:
    """Return the error for a task that has a tracer already."""
    try:
        name = Path(f"/proc/{tracer}/comm").read_text(errors="surrogateescape").removesuffix("\n")
        whom = f"process {tracer} ({name})"
    except OSError:
        whom = "another process"
    message = f"task {pid} is traced by {whom} already, and a task has one tracer only: detach that first"
    return NotPermittedError(message, errno.EPERM)


def refused(pid: int, error: OSError) -> IOReturnError:
    """Return the error for a kernel that would not let us trace a task."""
    return diagnosis.refused(pid, error.errno or errno.EPERM, "system calls")
