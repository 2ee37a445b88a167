"""A snapshot of a task's memory: a child that shares it copy-on-write and never runs.

While every thread of the task stands still, a guest is made in it, which forks the child: where a userfaultfd reports
forks (UFFD_FEATURE_EVENT_FORK), the call waits until the report is read, and a guest can be killed. The child shares
the descriptors altogether (CLONE_FILES), so that none stays open for it. Both stay stopped by their tracer, and die
with it (PTRACE_O_EXITKILL). The task gets no signal (no SIGCHLD), and is made to wait for the guest, as the guest
waits for the child, so that no zombie stays.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.remote import gadget, session
from iobmd.remote.guest import CLONE_FILES, CLONE_FS, NO_STACK, PATIENCE, Guest
from iobmd.remote.tracee import Unreadable, shielded
from iobmd.remote.tracing import WALL, interrupt, kill
from iobmd.task.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iobmd.remote.stop import Stop

_PATIENCE = 2.0  # seconds for the child to be made, and one more for each GiB: its page tables are copied
_GIB = 1 << 30


class NoSnapshot(Exception):  # noqa: N818 (there is another way)
    """No child can be made."""


class Snapshot:
    """The child, inside of `held`.

    Parameters
    ----------
    origin : Task
        Whose memory it is.
    resident : int
        How many bytes of it are resident.
    stopped : callable
        Calls its argument with a stopped thread while every thread of the task stands still.
    """

    def __init__(self, origin: Task, resident: int, stopped: Callable[[Callable[[Stop], None]], None]) -> None:
        self.origin = origin
        self.stopped_ns = 0
        """For how long a thread of the task stood still for its end, at most."""
        self._resident = resident
        self._stopped = stopped
        self._gadget = gadget.find(origin)
        self._guest = Guest(origin)
        self._pid = 0
        self._pid_there = 0  # as the task's pid namespace counts
        self._task: Task | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[Task]:
        """Make it, and end it with the `with`; gives it as a task, whose memory may be read.

        Raises
        ------
        NoSnapshot
            The task can have no more processes, or whoever is to be told of them does not listen.
        IOReturnError
            As `session.with_stopped`.
        """
        with session.beside(self.origin, self._live):
            assert self._task is not None
            yield self._task

    def _live(self, hold: Callable[[session.Leftover], None]) -> None:
        try:
            self._stopped(self.make)
            hold(self._guest.leftover(self._pid))
        finally:
            self._close()

    def make(self, stop: Stop) -> None:
        """Make it, by a thread of the task, while all of them stand still. Raises as `held`."""
        try:
            stop.ready(self._gadget)
            self._guest.make(stop)
            self._guest.begin()
            flags = CLONE_FS | CLONE_FILES
            until = time.monotonic() + _PATIENCE + self._resident / _GIB
            self._pid_there = self._guest.call("clone", flags, NO_STACK, 0, 0, 0, deadline=until)
        except Unreadable as error:
            raise NoSnapshot from error
        except OSError as error:
            if isinstance(error, IOReturnError) and error.code != IOReturn.kIOReturnTimeout:
                raise
            raise NoSnapshot from error
        finally:
            self._pid = self._guest.child
        if not self._pid:
            raise NoSnapshot
        self._task = Task(self._pid)
        try:
            interrupt(self._pid)  # it is still ours to trace: its number was its own when the Task was made
        except ProcessLookupError as error:
            raise NoSnapshot from error

    def _close(self) -> None:
        """End it, have the guest wait for it, and the task for the guest."""
        with shielded():
            if self._pid:
                kill(self._pid, PATIENCE)
            if self._pid_there:
                with contextlib.suppress(OSError):
                    self._guest.call("wait4", self._pid_there, 0, WALL | os.WNOHANG, 0)
            self.stopped_ns = session.end(self._guest)
