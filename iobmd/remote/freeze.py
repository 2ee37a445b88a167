"""A consistent copy of a task's memory: the task stands still for it, or for the moment that a snapshot takes.

The snapshot is quicker where memory is private and much of the task is wanted; otherwise every thread is stopped for
the length of the copy.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs, refusals
from iobmd.errors import IOReturnError, NotFoundError, UnsupportedError, VMError
from iobmd.remote import session, threads
from iobmd.remote.snapshot import Snapshot
from iobmd.remote.stop import NotStopped

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd.remote.stop import Stop
    from iobmd.task import Task

_NOT_IN_A_CHILD = {"sh", "dc", "wf", "ht", "io", "pf"}
"""Flags of memory that a child shares with its parent, does not get, or gets at the cost of hugetlb pages (smaps)."""
_USERFAULT = {"um", "uw", "ui"}
_QUICK = 4 << 20  # bytes that are copied in a call or two
_WORTH_IT = 4  # a child costs a fifth or less of what it takes to copy as much as it shares (measured)


class Source(NamedTuple):
    """What is to be copied."""

    task: Task
    address: int
    size: int
    fetch: Callable[[Task, bool], None]
    """Copies it from this task or from another with the same memory; True: the task stands still, and no wait may
    depend on it."""


def copy(source: Source) -> int:
    """Copy as it is at one moment; returns for how many nanoseconds, at the most, the task stood still.

    Raises
    ------
    IOReturnError
        As `Task.read`, and as `session.with_stopped`.
    """
    before, copied = 0, False
    if _suits_a_child(source):
        snapshot = Snapshot(source.task)
        try:
            before = session.in_tracer(source.task, lambda: _make(snapshot))
            source.fetch(snapshot.task, False)
            copied = True
        except (UnsupportedError, VMError, NotFoundError):
            pass  # a 32-bit program, memory that only the task itself has, or its child was killed: stopped, then
        except OSError as error:
            if isinstance(error, IOReturnError):
                raise  # and where it can have no more processes, too
        finally:
            snapshot.close()
        before += snapshot.stopped_ns
    if copied:
        return before
    # A long copy in a thread: it lets go of the GIL; if we are killed, tracing was all that was done to the task.
    quick = source.size < _QUICK
    return before + session.in_tracer(source.task, lambda: _copy_stopped(source), may_be_apart=quick)


def _make(snapshot: Snapshot) -> int:
    stops = _stop_all(snapshot.origin)
    try:
        snapshot.make(stops[0])
    finally:
        stopped = _release(stops)
    return stopped


def _copy_stopped(source: Source) -> int:
    stops = _stop_all(source.task)
    try:
        source.fetch(source.task, True)
    finally:
        stopped = _release(stops)
    return stopped


def _suits_a_child(source: Source) -> bool:
    """Say whether a child of the task would have the same memory, and be had sooner than a copy."""
    end = source.address + source.size
    try:
        if source.size * _WORTH_IT < procfs.status_bytes("VmRSS", source.task.pid):
            return False
        for area, flags in procfs.vm_flags(source.task.pid):
            if flags & _USERFAULT:  # who has to be told of the child may be a thread that stands still
                return False
            if area.start < end and source.address < area.end and flags & _NOT_IN_A_CHILD:
                return False
    except (OSError, KeyError):  # it is gone, or its memory
        return False
    return True


def _stop_all(task: Task) -> list[Stop]:
    """Stop every thread of a task."""
    options = session.options_for(task)
    deadline = time.monotonic() + session.PATIENCE
    stops: dict[int, Stop | None] = {}  # None: it ended
    try:
        # Until a look finds no new one: those that run still may make more.
        while fresh := [tid for tid in threads.thread_ids(task.pid) if tid not in stops]:
            for tid in fresh:
                activity = threads.activity(task.pid, tid)
                stops[tid] = session.seize(task, activity, options) if activity else None
            for tid in fresh:
                stops[tid] = _standing(stops[tid], deadline)
    except BaseException:
        _release(list(filter(None, stops.values())))
        raise
    if not any(stops.values()):
        raise refusals.gone(f"task {task.pid} is gone: it exited")
    return list(filter(None, stops.values()))


def _standing(stop: Stop | None, deadline: float) -> Stop | None:
    if stop is None:
        return None
    try:
        stop.wait(deadline)
    except NotFoundError:
        return None
    except NotStopped:
        raise session.never_stopped(stop.task) from None
    return stop


def _release(stops: list[Stop]) -> int:
    return max((stop.release() for stop in stops), default=0)
