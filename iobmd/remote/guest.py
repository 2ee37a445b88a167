"""A process in the address space of another task, for system calls that may wait.

A call that a stopped thread of the task makes must never wait: it may wait for that very thread, as it does for the
page faults that a task answers itself (userfaultfd(2)), and it cannot be taken out of the call. So the thread only
makes a process that shares its memory. That process does the rest while the task runs, with descriptors of its own,
and it alone is killed when a call does not return.

It is made by clone(2) with CLONE_VM, executes nothing but the task's own system call instruction, and is traced from
its first moment, then with PTRACE_O_EXITKILL: it dies with its tracer. The task gets no signal for it, and is made to
wait for it, so that no zombie stays. A thread (CLONE_THREAD) would leave no zombie, but could not be killed alone.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd._native import crosstask
from iobmd.task.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SYSCALLS = {
    "mmap": 9, "munmap": 11, "socketpair": 53, "recvfrom": 45, "recvmsg": 47, "close": 3, "clone": 56,
    "close_range": 436, "mlock": 149, "munlock": 150, "mprotect": 10, "io_uring_setup": 425, "io_uring_register": 427,
}  # fmt: skip
SCRATCH, MAPPING = 1, 2
"""What a call maps: memory that is unmapped when the guest ends, always, or unless that is after a success."""
PATIENCE = 5.0  # seconds for a call, unless it is given a deadline of its own
_PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS = 0x3, 0x22
_UNSHARE, _LAST_DESCRIPTOR = 2, 0xFFFFFFFF


class Result(NamedTuple):
    """An argument that is known once another call of the same program has returned."""

    of: int
    """The index of that call."""
    plus: int = 0


class Call(NamedTuple):
    """A system call with its arguments, and what it maps, if that is to be unmapped."""

    name: str
    arguments: tuple[int | Result, ...]
    made: int = 0


def call(name: str, *arguments: int | Result, made: int = 0) -> Call:
    """Return a system call."""
    return Call(name, arguments, made)


def map_scratch(size: int) -> Call:
    """Return the call that maps memory for the arguments of other calls."""
    return call("mmap", 0, size, _PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS, -1, 0, made=SCRATCH)


class Guest:
    """The process, which a tracer holds.

    Parameters
    ----------
    task : Task
        Whose address space it is in.
    pid : int
        Its number.
    run : callable
        Has it make system calls until a time (`time.monotonic`), and returns their results; raises as `run` does. The
        last argument: they may wait for long.
    """

    def __init__(self, task: Task, pid: int, run: Callable[[Sequence[Call], float, bool], list[int]]) -> None:
        self.task = task
        self.pid = pid
        self._run = run
        self._is_isolated = False

    def run(self, *calls: Call, deadline: float | None = None) -> list[int]:
        """Make system calls, which may wait, one after the other until one fails; returns their results.

        Those with a `deadline` (`time.monotonic`) are given up when the caller is interrupted, and map nothing.

        Before the first, it gets an empty descriptor table of its own, out of reach for the threads of its task. The
        task keeps its own (CLOSE_RANGE_UNSHARE, Linux 5.9). Copies for the guest may be made and closed again, for
        which the kernel asks the server of a FUSE file: where that never answers, the guest is given up.

        Raises
        ------
        OSError
            As the call failed there.
        IOReturnError
            `kIOReturnTimeout`: it did not return until the deadline. No other call can be made then.
        """
        until = deadline or time.monotonic() + PATIENCE
        if not self._is_isolated:
            self._is_isolated = True
            self._run([call("close_range", 0, _LAST_DESCRIPTOR, _UNSHARE)], until, False)
        return self._run(calls, until, deadline is not None)

    def call(self, name: str, *arguments: int, deadline: float | None = None, made: int = 0) -> int:
        """Make one system call, as `run`; returns its result."""
        return self.run(Call(name, arguments, made), deadline=deadline)[-1]

    def fetch(self, fd: int) -> int:
        """Return a descriptor of this process for one of its. Raises OSError."""
        pidfd = os.pidfd_open(self.pid)
        try:
            return crosstask.fetch_descriptor(pidfd, fd)
        finally:
            os.close(pidfd)

    def write(self, address: int, data: bytes) -> None:
        """Copy bytes to its memory, which is not its task's any more once that runs another program (execve(2)).

        Raises as `Task.write`: its task can have unmapped it.
        """
        Task(self.pid).write(address, data, timeout=PATIENCE)
