"""Which process a number or a psutil.Process names: its pid, its pidfd, and when it started."""

from __future__ import annotations

import errno
import os
from operator import index
from typing import TYPE_CHECKING, SupportsIndex

from iobmd import procfs
from iobmd.errors import NO_DESCRIPTOR, BadArgumentError, NoResourcesError
from iobmd.task import diagnosis

if TYPE_CHECKING:
    import psutil


def pid_of(process: int | psutil.Process) -> int:
    """Return the pid of a process. Raises `kIOReturnBadArgument` unless it is one, or a psutil.Process."""
    if process is None:
        raise BadArgumentError("a task is needed here, not None")
    number = process if isinstance(process, SupportsIndex) else getattr(process, "pid", None)
    if number is None:
        raise BadArgumentError(f"{process!r} is neither a task nor a process")
    pid = index(number)
    if isinstance(process, bool) or not 0 < pid < 1 << 31:
        raise BadArgumentError(f"{process!r} is not a process id")
    return pid


def open_pidfd(pid: int) -> int:
    """Return a pidfd, or -1 where the kernel or a seccomp filter has none to give."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise diagnosis.gone(f"no process has the pid {pid}", errno.ESRCH) from None
        if error.errno in (errno.EINVAL, errno.ENOENT):
            raise BadArgumentError(
                f"{pid} is a thread, not a process; name its process",
                errno.EINVAL,
            ) from None
        if error.errno in NO_DESCRIPTOR:
            raise no_descriptor(pid, error) from None
        return -1


def start_of(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 where /proc does not tell it of this process."""
    try:
        return procfs.start_time(pid)
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise no_descriptor(pid, error) from None
        if pid == os.getpid():  # it has this pid for as long as it runs
            return 0
        raise diagnosis.hidden(pid) or diagnosis.gone(f"no process has the pid {pid}", errno.ESRCH) from None


def running(process: psutil.Process) -> psutil.Process:
    """Return `process`. Raises `kIOReturnNotFound` if its pid is another process's now."""
    try:
        if process.is_running():
            return process
    except OSError as error:
        raise no_descriptor(process, error) from None
    gone = diagnosis.gone(f"task {process.pid} is gone: no process has that pid and start time")
    raise diagnosis.hidden(process.pid) or gone


def as_psutil(pid: int) -> psutil.Process:
    """Return a process as psutil sees it. Raises as `Task.process`."""
    # psutil takes as long to load as half of iobmd: most tasks need none of it.
    import psutil  # noqa: PLC0415

    require_same_numbers(pid)
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        raise diagnosis.hidden(pid) or diagnosis.gone(f"no process has the pid {pid}", errno.ESRCH) from None
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise no_descriptor(pid, error) from None
        raise diagnosis.hidden(pid) or diagnosis.gone(f"no process has the pid {pid}", errno.ESRCH) from None


def require_same_numbers(pid: int) -> None:
    """Raise `kIOReturnUnsupported` where /proc counts processes otherwise than this process does."""
    # psutil reads /proc/PID and sends signals to PID, which would be two processes.
    if refusal := diagnosis.numbered_otherwise(pid):
        raise refusal


def no_descriptor(process: int | psutil.Process, error: OSError) -> NoResourcesError:
    """Return the error for a lack of file descriptors."""
    return NoResourcesError(
        f"no file descriptor is free to look at task {process}; close some, or raise `ulimit -n`",
        error.errno or 0,
    )
