"""A snapshot of a task's memory: a child of it, made by clone(2) in it, that is never run.

The child shares the memory copy-on-write, and the descriptors altogether (CLONE_FILES), so that none stays open for
it. It is killed when it has been read. The task is not told (no SIGCHLD), and is made to wait for it, so that no
zombie stays.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.remote import gadget, session, tracing
from iobmd.remote.stop import Stop
from iobmd.task import Task

_CLONE_FS, _CLONE_FILES = 0x200, 0x400
_NO_STACK = 8  # nothing is mapped there: if we are killed, whatever the child does kills it too
_WALL, _WNOHANG = 0x40000000, 1


class Snapshot:
    """The child: `make` it while every thread of the task stands still, read the memory of `task`, and `close` it."""

    def __init__(self, origin: Task) -> None:
        self._origin = origin
        self._gadget = gadget.find(origin)
        self._pid = 0
        self._pid_there = 0  # as the task's pid namespace counts
        self._task: Task | None = None

    @property
    def task(self) -> Task:
        """The child as a task."""
        assert self._task is not None
        return self._task

    def make(self, stop: Stop) -> None:
        """Make it. Raises OSError when the task can have no more processes, and as `Stop.ready`."""
        stop.ready(self._gadget)
        try:
            self._pid_there = stop.call("clone", _CLONE_FS | _CLONE_FILES, _NO_STACK, 0, 0, 0)
        finally:
            self._pid = stop.child
        if not self._pid:
            raise IOReturnError(IOReturn.kIOReturnError, f"task {self._origin.pid} made a child that we do not see")
        tracing.kill_with_tracer(self._pid)
        self._task = Task(self._pid)

    def close(self) -> None:
        """End it, and have the task wait for it."""
        if not self._pid:
            return
        os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # another thread of ours waited for whatever came
            os.waitpid(self._pid, _WALL)
        # Whatever keeps the task from being stopped once more: a zombie stays until it exits.
        with contextlib.suppress(OSError):
            session.stop_one(self._origin, session.options_for(self._origin), self._gadget, self._collect)

    def _collect(self, stop: Stop) -> None:
        deadline = time.monotonic() + 0.1
        while stop.call("wait4", self._pid_there, 0, _WALL | _WNOHANG, 0) == 0 and time.monotonic() < deadline:
            pass  # it becomes the task's to wait for a moment after we have
