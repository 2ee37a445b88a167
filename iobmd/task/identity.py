"""The identity of a process: its pid, its pidfd, and its start time."""

from __future__ import annotations

import errno
import os
from operator import index
from typing import Protocol, SupportsIndex

from iobmd import procfs
from iobmd.errors import NO_DESCRIPTOR, BadArgumentError, NoResourcesError
from iobmd.task import attempt, diagnosis

_PATIENCE = 10.0  # seconds for a process that executes a program


class Process(Protocol):
    """The part of a psutil.Process that a task uses. Type checkers know this protocol without psutil's stubs."""

    @property
    def pid(self) -> int:
        """The process id."""

    def is_running(self) -> bool:
        """Whether the process still exists, with its start time."""


class MemoryInfo(Protocol):
    """The part of the result of psutil's `memory_info` that `PsutilProcess` declares."""

    @property
    def rss(self) -> int:
        """Resident bytes."""

    @property
    def vms(self) -> int:
        """Bytes of address space."""


class PsutilProcess(Process, Protocol):
    """The methods of a psutil.Process that type checkers know without psutil's stubs.

    The object is a psutil.Process; ``psutil.Process(task.pid)`` has the type with all methods.
    """

    def name(self) -> str:
        """Return its name."""

    def exe(self) -> str:
        """Return the path of its program."""

    def cmdline(self) -> list[str]:
        """Return its arguments, beginning with the name of the program."""

    def cwd(self) -> str:
        """Return its working directory."""

    def username(self) -> str:
        """Return the name of its user."""

    def status(self) -> str:
        """Return its state, such as ``"sleeping"``."""

    def create_time(self) -> float:
        """Return when it was created, in seconds since the epoch."""

    def num_threads(self) -> int:
        """Return how many threads it has."""

    def memory_info(self) -> MemoryInfo:
        """Return its memory in bytes, with `rss` and `vms`."""

    def suspend(self) -> None:
        """Stop it (SIGSTOP)."""

    def resume(self) -> None:
        """Continue it (SIGCONT)."""

    def terminate(self) -> None:
        """End it (SIGTERM)."""

    def kill(self) -> None:
        """End it (SIGKILL)."""


def pid_of(process: int | Process) -> int:
    """Return the pid of a process; raise `kIOReturnBadArgument` for None and for numbers that cannot be pids.

    Raises TypeError for anything but a pid or a psutil.Process.
    """
    if process is None:
        raise BadArgumentError("a task is required, not None")
    number = process if isinstance(process, SupportsIndex) else getattr(process, "pid", None)
    if number is None:
        raise TypeError(f"a task must be a Task, a pid or a psutil.Process, not {process!r}")
    pid = index(number)
    if isinstance(process, bool) or not 0 < pid < 1 << 31:
        raise BadArgumentError(f"{process!r} is not a process id")
    return pid


def open_pidfd(pid: int) -> int:
    """Return a pidfd, or -1 if the kernel or a seccomp filter does not provide one."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise diagnosis.gone(f"no process has the pid {pid}", errno.ESRCH) from None
        if error.errno in (errno.EINVAL, errno.ENOENT):
            raise BadArgumentError(
                f"{pid} is a thread, not a process; use the pid of its process",
                errno.EINVAL,
            ) from None
        if error.errno in NO_DESCRIPTOR:
            raise no_descriptor(pid, error) from None
        return -1


def start_of(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot; 0 if /proc does not show that of this process.

    Raises `kIOReturnTimeout` as `attempt.require_unlocked`.
    """
    if procfs.waits(pid):  # the check itself takes three times as long as everything else here
        attempt.require_unlocked(pid, _PATIENCE)
    try:
        return procfs.start_time(pid)
    except OSError as error:
        if error.errno in NO_DESCRIPTOR:
            raise no_descriptor(pid, error) from None
        if pid == os.getpid():  # the pid of this process cannot be reused
            return 0
        raise diagnosis.hidden(pid) or diagnosis.gone(f"no process has the pid {pid}", errno.ESRCH) from None


def running(process: PsutilProcess) -> PsutilProcess:
    """Return `process`; raise `kIOReturnNotFound` if its pid was reused."""
    try:
        if process.is_running():
            return process
    except OSError as error:
        raise no_descriptor(process, error) from None
    gone = diagnosis.gone(f"task {process.pid} no longer exists: no process has that pid and start time")
    raise diagnosis.hidden(process.pid) or gone


def as_psutil(pid: int) -> PsutilProcess:
    """Return the psutil.Process of a process. Raises as `Task.process`."""
    # Loading psutil takes half as long as loading iobmd, and most tasks do not need it.
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
    """Raise `kIOReturnUnsupported` if /proc has different pids than this process."""
    # psutil would read /proc/PID of one process and send signals to the PID of another.
    if refusal := diagnosis.numbered_otherwise(pid):
        raise refusal


def no_descriptor(process: int | Process, error: OSError) -> NoResourcesError:
    """Return the error for a lack of file descriptors."""
    return NoResourcesError(
        f"no file descriptor is free to inspect task {process}; close some, or raise `ulimit -n`",
        error.errno or 0,
    )
