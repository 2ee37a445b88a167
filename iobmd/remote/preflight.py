"""Preflight checks: whether the threads of a task can be stopped, before anything is done to it."""

from __future__ import annotations

import errno
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd import host, procfs
from iobmd._native.tracer import PROCESSOR
from iobmd.errors import BadArgumentError, IOReturnError, NotPermittedError, UnsupportedError
from iobmd.printable import printable
from iobmd.task import diagnosis

if TYPE_CHECKING:
    from iobmd.task.task import Task


_SUSPEND_SECCOMP = 1 << 21  # PTRACE_O_SUSPEND_SECCOMP


class Traced(Exception):  # noqa: N818 (another attempt may succeed)
    """The task is being traced."""


def require_processor() -> None:
    """Raise `kIOReturnUnsupported` if the tracer does not know this processor."""
    if not PROCESSOR:
        message = f"system calls in another task need x86-64 or aarch64, and this is {platform.machine()}"
        raise UnsupportedError(message)


def check(task: Task) -> int:
    """Return the ptrace options for a task.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`, `kIOReturnNotFound`, `kIOReturnNotPermitted`, with the reason.
    Traced
        It has a tracer.
    """
    pid = task.pid
    if task.is_current:
        message = f"task {pid} is the calling process, which can make its system calls itself"
        raise BadArgumentError(message)
    if refusal := diagnosis.numbered_otherwise(pid):
        raise refusal
    try:
        status = procfs.status(pid)
    except OSError as error:
        diagnosis.unless_exhausted(error, f"cannot read the status of task {pid}")
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
    what = "may only read, write and exit (strict seccomp)" if mode == "1" else "has a seccomp filter"
    if not host.has_capability("CAP_SYS_ADMIN"):
        why = "which could kill it for the system calls of iobmd; suspending the filter needs CAP_SYS_ADMIN"
    elif procfs.status().get("Seccomp", "0") != "0":
        why = "which this process cannot suspend, because it has a seccomp filter itself"
    else:
        return _SUSPEND_SECCOMP
    raise NotPermittedError(f"task {pid} {what}, {why}", errno.EPERM)


def tracer(pid: int, tid: int) -> int | None:
    """Return the tracer of a thread of a task; 0 if the thread is not traced, None if it has ended.

    Raises `kIOReturnNoResources`: no file descriptor is free.
    """
    try:
        status = procfs.status(pid, tid)
    except OSError as error:
        diagnosis.unless_exhausted(error, f"cannot read the status of task {pid}")
        return None
    return None if status["State"][0] in "ZX" else int(status["TracerPid"])


def traced_by_another(pid: int, tracer: int) -> NotPermittedError:
    """Return the error for a task that already has a tracer."""
    try:
        name = Path(f"/proc/{tracer}/comm").read_text(errors="surrogateescape").removesuffix("\n")
        whom = f"process {tracer} ({printable(name)})"
    except OSError:
        whom = "another process"
    message = f"task {pid} is already traced by {whom}, and can have only one tracer: detach that tracer first"
    return NotPermittedError(message, errno.EPERM)


def refused(pid: int, error: OSError) -> IOReturnError:
    """Return the error for a task that the kernel does not permit this process to trace."""
    return diagnosis.refused(pid, error.errno or errno.EPERM, "system calls")
