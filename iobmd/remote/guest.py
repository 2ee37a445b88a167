"""A process in the address space of another task, for system calls that may wait.

A call that a stopped thread of the task makes must never wait: it may wait for that very thread, as it does for the
page faults that a task answers itself (userfaultfd(2)), and it cannot be taken out of the call. So the thread only
makes a process that shares its memory. That process does the rest while the task runs, with descriptors of its own
(`Guest.isolate`), and it alone is killed when a call does not return.

It is made by clone(2) with CLONE_VM, executes nothing but the task's own system call instruction, and is traced from
its first moment, then with PTRACE_O_EXITKILL: it dies with its tracer. The task gets no signal for it, and is made to
wait for it, so that no zombie stays. A thread (CLONE_THREAD) would leave no zombie, but could not be killed alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING

from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError, TaskTimeoutError
from iobmd.remote import tracing
from iobmd.remote.tracee import InterruptedJob, NotStopped, Tracee
from iobmd.task import diagnosis, identity
from iobmd.task.task import Task

if TYPE_CHECKING:
    from iobmd._native import apart
    from iobmd.remote.stop import Stop

_CLONE_VM, CLONE_FS, CLONE_FILES = 0x100, 0x200, 0x400
_UNSHARE, _LAST_DESCRIPTOR = 2, 0xFFFFFFFF
NO_STACK = 8  # nothing is mapped there: released by a tracer that died, it ends at its first instruction
_SPARES = 4  # what is open at a time while a guest is killed and waited for: folders and files of /proc, a pidfd
PATIENCE = 5.0  # seconds for a process that was killed to be dead, and for its first stop


class NoProcess(OSError):  # noqa: N818 (there may be another way)
    """The task can have no more processes."""


class Guest(Tracee):
    """The process: `make` it in a stopped thread, `begin`, make calls in it, and end it by `session.end`."""

    def __init__(self, task: Task) -> None:
        super().__init__(task, 0, 0)
        self.janitor: apart.Janitor | None = None
        """Who ends it if this process is killed, where its tracer is a thread of this process."""
        self.pid_there = 0
        """Its number as the task's pid namespace counts."""
        self._undo: list[tuple[str, tuple[int, ...]]] = []
        self._is_stuck = False
        self._spares: list[int] = []  # of descriptors, which its end takes: else a zombie would be left

    def make(self, stop: Stop) -> None:
        """Make it in a thread that is ready for system calls.

        Raises NoProcess; `kIOReturnNoResources`: too few descriptors are free.
        """
        try:
            self._take_spares()
            self.pid_there = stop.call("clone", _CLONE_VM | CLONE_FS | CLONE_FILES, NO_STACK, 0, 0, 0)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
            raise NoProcess(*error.args) from None
        finally:
            self._pid = self._tid = stop.child
            if not self._pid:
                self._give_spares()
        if not self._pid:
            message = f"task {self.task.pid} made a process that this one does not see"
            raise IOReturnError(IOReturn.kIOReturnError, message)
        self.gadget, self.options = stop.gadget, stop.options | tracing.O_EXITKILL
        if self.janitor:
            self.janitor.watch(self.leftover())

    def isolate(self) -> None:
        """Give it an empty descriptor table of its own, out of reach for the threads of its task.

        The task keeps its own (CLOSE_RANGE_UNSHARE, Linux 5.9). Copies for the guest may be made and closed again,
        for which the kernel asks the server of a FUSE file: where that never answers, the guest is given up.
        """
        self.call("close_range", 0, _LAST_DESCRIPTOR, _UNSHARE)

    def write(self, address: int, data: bytes) -> None:
        """Copy bytes to its memory, which is not its task's any more once that runs another program (execve(2)).

        Raises as `Task.write`: its task can have unmapped it.
        """
        memory = Task(self._pid)
        if tracing.stopped_for(self._tid) is None:  # else the number was its own when the Task was made
            raise self._ended()
        memory.write(address, data, timeout=PATIENCE)

    def leftover(self, child: int = 0) -> tuple[int, int, int, int, int, int, int]:
        """Return what is to be taken away of it, and of a `child` that it made, as `apart.hold` takes it."""
        options = self.options & ~tracing.O_EXITKILL
        return self.task.pid, self.task.pidfd, child, self._pid, self.pid_there, self.gadget, options

    @property
    def pid(self) -> int:
        """Its number, 0 until it is made."""
        return self._pid

    def begin(self) -> None:
        """Wait for it to be ready for calls."""
        self._look(lambda: tracing.stopped_for(self._tid), time.monotonic() + PATIENCE)
        tracing.set_options(self._tid, self.options, report_children=True)
        self._registers = tracing.registers(self._tid)

    def call(self, name: str, *arguments: int, deadline: float | None = None) -> int:
        """As `Tracee.call`, but it may wait, and with a deadline be interrupted; then no other call can be made.

        Raises
        ------
        InterruptedJob
            While it waited.
        IOReturnError
            `kIOReturnTimeout`: it did not return until the deadline.
        """
        try:
            until = deadline or time.monotonic() + PATIENCE
            return self._call(name, arguments, until, interruptible=deadline is not None)
        except (NotStopped, InterruptedJob) as error:
            self._is_stuck = True
            if isinstance(error, InterruptedJob):
                raise
            message = f"{name} in task {self.task.pid} did not return in time"
            raise TaskTimeoutError(message) from None

    def undo_by(self, name: str, *arguments: int) -> None:
        """Make a call when it ends, which undoes what was done; the last first."""
        self._undo.append((name, arguments))

    def fetch(self, fd: int) -> int:
        """As `Tracee.fetch`, whatever became of the first thread of the task."""
        return self._fetch_by(0, fd)

    def end(self) -> None:
        """Undo what is to be undone as far as this can do it, and kill it; `collect` has then to be called."""
        self._give_spares()
        if self._registers is not None and not self._is_stuck:
            with contextlib.suppress(IOReturnError):
                self._undo_in(self)
        tracing.kill(self._pid, PATIENCE)

    def _take_spares(self) -> None:
        try:
            for _ in range(_SPARES):
                self._spares.append(os.open("/", os.O_PATH | os.O_CLOEXEC))
        except OSError as error:
            raise identity.no_descriptor(self.task.pid, error) from None

    def _give_spares(self) -> None:
        while self._spares:
            os.close(self._spares.pop())

    def collect(self, stop: Stop) -> None:
        """Make the task wait for it, when it was killed, and undo the rest."""
        self._undo_in(stop)
        if self.pid_there > 0:
            stop.call("wait4", self.pid_there, 0, tracing.WALL | os.WNOHANG, 0)
        self._pid = 0

    def _undo_in(self, tracee: Tracee) -> None:
        while self._undo:
            name, arguments = self._undo[-1]
            try:
                tracee.call(name, *arguments)
            except OSError as error:
                if isinstance(error, IOReturnError):
                    raise
            self._undo.pop()

    def _ended(self) -> IOReturnError:
        if self.task.alive:
            message = f"the process that makes system calls for us in task {self.task.pid} was killed"
            return IOReturnError(IOReturn.kIOReturnError, message)
        return diagnosis.gone(f"task {self.task.pid} is gone: it exited")
