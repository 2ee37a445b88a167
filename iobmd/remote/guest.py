"""A process in the address space of another task, for system calls that may wait.

A system call that is made by a stopped thread of the task must never wait. It might wait for that very thread, for
example if the task serves its own page faults (userfaultfd(2)), and it cannot be aborted. The thread therefore only
creates a process that shares its memory. That process makes the other calls while the task runs, with its own
descriptors, and it alone is killed if a call does not return.

It is created by clone(2) with CLONE_VM, and executes only the task's system call instruction. It is traced from the
start, and then with PTRACE_O_EXITKILL, so that it dies with its tracer. The task gets no signal when the guest exits,
and is made to wait for it, so that no zombie remains. A thread (CLONE_THREAD) would leave no zombie, but could not be
killed without its process.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd._native import crosstask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from iobmd.task.task import Task

SCRATCH, MAPPING = 1, 2
"""Kinds of memory that a call maps: unmapped when the guest ends, always (SCRATCH) or after a failure (MAPPING)."""
PATIENCE = 5.0  # seconds for a call without its own deadline
_PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS = 0x3, 0x22
_UNSHARE, _LAST_DESCRIPTOR = 2, 0xFFFFFFFF


class Result(NamedTuple):
    """An argument: the result of an earlier call of the same program."""

    of: int
    """The index of that call."""
    plus: int = 0
    """A number that is added to its result."""


class Call(NamedTuple):
    """A system call and its arguments."""

    name: str
    arguments: tuple[int | Result, ...]
    made: int = 0
    """The kind of memory that it maps: `SCRATCH` or `MAPPING`; 0: it maps none, or in a reserved range."""


def call(name: str, *arguments: int | Result, made: int = 0) -> Call:
    """Return a system call."""
    return Call(name, arguments, made)


def map_scratch(size: int) -> Call:
    """Return the call that maps memory for the arguments of other calls."""
    return call("mmap", 0, size, _PROT_READ_WRITE, _MAP_PRIVATE_ANONYMOUS, -1, 0, made=SCRATCH)


class Guest:
    """A process in the address space of another task, held by a tracer.

    Parameters
    ----------
    task : Task
        The task.
    pid : int
        The number of the process.
    run : callable
        Makes system calls in it until a deadline (`time.monotonic`), and returns their results; raises as `run`. The
        last argument: whether they may wait for a long time.
    """

    def __init__(self, task: Task, pid: int, run: Callable[[Sequence[Call], float, bool], list[int]]) -> None:
        self.task = task
        self.pid = pid
        self._run = run
        self._is_isolated = False

    def run(self, *calls: Call, deadline: float | None = None) -> list[int]:
        """Make system calls, which may wait, until one fails, and return their results.

        Calls with a `deadline` (`time.monotonic`) are aborted if the caller is interrupted; they must map no memory.

        Before the first call, the guest replaces its descriptor table by an empty one, which the threads of the task
        cannot access (CLOSE_RANGE_UNSHARE, Linux 5.9); the task retains its table. The kernel may copy and close the
        task's descriptors for it, and then asks the server of a FUSE file; if it never answers, the guest is killed.

        Raises
        ------
        OSError
            The error of the call that failed.
        IOReturnError
            `kIOReturnTimeout`: a call did not return by the deadline. The guest can make no further call.
        """
        until = deadline or time.monotonic() + PATIENCE
        if self._is_isolated:
            return self._run(calls, until, deadline is not None)
        self._is_isolated = True
        isolation = call("close_range", 0, _LAST_DESCRIPTOR, _UNSHARE)
        if deadline:
            self._run([isolation], until, False)
            return self._run(calls, until, True)
        return self._run([isolation, *map(_moved, calls)], until, False)[1:]

    def call(self, name: str, *arguments: int, deadline: float | None = None, made: int = 0) -> int:
        """Make one system call, as `run` does, and return its result."""
        return self.run(Call(name, arguments, made), deadline=deadline)[-1]

    def fetch(self, fd: int) -> int:
        """Copy a descriptor of the guest to this process, and return its number here. Raises OSError."""
        pidfd = os.pidfd_open(self.pid)
        try:
            return crosstask.fetch_descriptor(pidfd, fd)
        finally:
            os.close(pidfd)


def _moved(one: Call) -> Call:
    """Return a call for a program that one other call precedes."""
    arguments = [value._replace(of=value.of + 1) if isinstance(value, Result) else value for value in one.arguments]
    return one._replace(arguments=tuple(arguments))
