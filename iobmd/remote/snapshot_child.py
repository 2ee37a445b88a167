"""A child of a task that holds the task's memory as of one moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd.remote.session import PATIENCE, Session, again, guard_of, insist
from iobmd.task.task import Task

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iobmd.remote.session import SharedObject

_GIB = 1 << 30
_SLOWEST = 128 << 20
"""Bytes of shared files that are read in a second, at least."""


class _Still(Task):
    is_snapshot = True


class SnapshotChild:
    """A child of a task that shares the task's memory copy-on-write and never runs, from `begin` until `end`.

    It also ends when this process does. As a context, it is the child as a task.

    Parameters
    ----------
    origin : Task
        The task.
    resident : int
        The resident bytes of the task, whose page tables are copied; they extend the timeout.
    records : bool
        Whether to save the registers of all threads.
    objects : sequence of SharedObject
        The shared memory to copy while all threads are stopped.

    Raises
    ------
    OSError
        As `with_guest`. `EAGAIN`: the task can create no process.
    """

    def __init__(
        self, origin: Task, resident: int, *, records: bool = False, objects: Sequence[SharedObject] = ()
    ) -> None:
        self._origin = origin
        self._patience = PATIENCE + resident / _GIB + sum(one.size for one in objects) / _SLOWEST
        self._records = records
        self._objects = objects
        self._session: Session | None = None
        self._stopped_ns = 0
        self.registers: list[tuple[int, int, list[tuple[int, bytes]]]] = []
        """The registers of the threads, as `native.Tracer.registers`."""

    @property
    def stopped_ns(self) -> int:
        """The total time in nanoseconds for which a thread of the task was stopped, at most."""
        return self._stopped_ns + (self._session.stopped_ns if self._session else 0)

    def __enter__(self) -> Task:
        return _Still(self.begin())

    def begin(self) -> int:
        """Create the child and return its pid."""
        return again(self._origin, self._make)

    def _make(self) -> int:
        with guard_of(self._origin):
            self._session = session = Session(self._origin)
            try:
                pid = session.snapshot(self._patience, records=self._records, objects=self._objects)
                self.registers = session.registers
            except BaseException:
                insist(self._end)
                raise
            return pid

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the child, and make the task reap it; idempotent."""
        with guard_of(self._origin):
            insist(self._end)

    def _end(self) -> None:
        if self._session:
            self._session.end(failed=True)
            self._stopped_ns += self._session.stopped_ns
            self._session = None
