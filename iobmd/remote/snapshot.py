"""A snapshot of a task's memory: a child of it, made by clone(2) in it, that is never run.

The child shares the memory copy-on-write, and the descriptors altogether (CLONE_FILES), so that none stays open for
it. It waits in a system call, with all signals blocked, and is killed when it has been read. The task is not told (no
SIGCHLD), and is made to wait for it, so that no zombie stays.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.remote import gadget, session, threads, tracing
from iobmd.remote.stop import Stop
from iobmd.task import Task

_CLONE_FS, _CLONE_FILES = 0x200, 0x400
_NO_STACK = 8  # nothing is mapped there: if we are killed, whatever the child does kills it too
_WALL, _WNOHANG = 0x40000000, 1
_LONGEST_MS = 3600 * 1000  # for which it waits to be killed; if we are killed meanwhile, its end comes of itself
_PATIENCE = 10.0  # seconds for it to be dead


class Snapshot:
    """The child: `make` it while every thread of the task stands still, read the memory of `task`, and `close` it."""

    def __init__(self, origin: Task) -> None:
        self.origin = origin
        self._gadget = gadget.find(origin)
        self._pid = 0
        self.stopped_ns = 0
        """For how long the task stood still, at the most, while its zombie was collected."""
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
            raise IOReturnError(IOReturn.kIOReturnError, f"task {self.origin.pid} made a child that we do not see")
        tracing.park(self._pid, self._gadget, _LONGEST_MS)
        self._task = Task(self._pid)

    def close(self) -> None:
        """End it, and have the task wait for it."""
        if not self._pid:
            return
        with contextlib.suppress(OSError):  # somebody else has killed it
            os.kill(self._pid, signal.SIGKILL)
        deadline = time.monotonic() + _PATIENCE
        while threads.state(self._pid, self._pid) not in ("", "Z", "X") and time.monotonic() < deadline:
            time.sleep(0.001)
        self._pid = 0
        # Whatever keeps the task from being stopped once more: a zombie stays until it exits.
        with contextlib.suppress(OSError):
            self.stopped_ns += session.with_stopped(self.origin, self._collect)

    def _collect(self, stop: Stop) -> None:
        stop.call("wait4", self._pid_there, 0, _WALL | _WNOHANG, 0)
