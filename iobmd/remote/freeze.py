"""A consistent copy of a task's memory: the task stands still for it, or for the moment that a snapshot takes.

The snapshot is quicker where memory is private and much of the task is wanted; otherwise every thread is stopped for
the length of the copy. A task whose cgroup is frozen stands still already, and is copied as it is.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd.errors import IOReturnError, NotFoundError, NotReadyError, TaskTimeoutError, UnsupportedError, VMError
from iobmd.remote import freezer, session, threads, wired
from iobmd.remote.snapshot import NoSnapshot, Snapshot
from iobmd.remote.tracee import NotStopped, StrangerSeized, check_interrupt, shielded
from iobmd.task import diagnosis, transfer

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd._internal.chunked import Progress
    from iobmd.remote.stop import Stop
    from iobmd.task.task import Task

_NOT_IN_A_CHILD = {"sh", "dc", "wf", "ht", "io", "pf"}
"""Flags of memory that a child shares with its parent, does not get, or gets at the cost of hugetlb pages (smaps)."""
_QUICK = 4 << 20  # bytes that are copied in a call or two
_WORTH_IT = 4  # a child costs a fifth or less of what it takes to copy as much as it shares (measured)
_TRIES = 3
_SHORT = 0.1  # seconds for one thread to stop, before the others go on


class Source(NamedTuple):
    """What is to be copied."""

    task: Task
    address: int
    size: int
    fetch: Callable[[Task, Progress | None], None]
    """Copies it from this task, or from another with the same memory. With a second argument, which is then called
    now and then, the task stands still, and no wait may depend on it."""

    @property
    def userfault_area(self) -> procfs.VMA | None:
        """The first area of it whose page faults a userfaultfd reports."""
        try:
            return wired.userfault_area(self.task, self.address, self.address + self.size)
        except OSError:  # the task is gone, as who reads it will find out
            return None


def copy(source: Source) -> int:
    """Copy as it is at one moment; returns for how many nanoseconds, at the most, the task stood still.

    Raises
    ------
    IOReturnError
        As `Task.read`, and as `session.with_stopped`. `kIOReturnUnsupported`: pages that a handler of userfaultfd(2)
        delivers are missing each time that the task stands still.
    """
    if _copy_standing(source):
        return 0
    copied, stopped = False, 0
    if resident := _worth_a_child(source):
        copied, stopped = _copy_snapshot(source, resident)
    return stopped if copied else stopped + _copy_stopped(source)


def _copy_standing(source: Source) -> bool:
    """Copy a task whose cgroup is frozen, as long as none of its threads has run; says whether that was so."""
    for _ in range(_TRIES):
        before = freezer.standing(source.task.pid)
        if before is None:
            return False
        try:
            source.fetch(source.task, None)
        except TaskTimeoutError as error:
            if frozen := freezer.why(source.task.pid):
                raise IOReturnError(error.code, f"{error.strerror}; {frozen}", address=error.address) from None
            raise
        if freezer.standing(source.task.pid) == before:
            return True
    return False


def _copy_snapshot(source: Source, resident: int) -> tuple[bool, int]:
    """Copy out of a snapshot of a task of `resident` bytes; returns whether that was possible, and its stop in ns."""
    task = source.task
    stopped: list[int] = []
    snapshot = Snapshot(task, resident, lambda work: _with_all_stopped(task, lambda stops: work(stops[0]), stopped))
    copied = False
    try:
        with snapshot.held() as child:
            source.fetch(child, None)
        # A child has zeros for what a userfaultfd, which may have been registered since, would have filled in.
        copied = source.userfault_area is None
    except (NoSnapshot, UnsupportedError, VMError, NotFoundError, StrangerSeized):
        # No more processes, a 32-bit program, memory that only the task has, the child was killed, or a thread ended.
        pass
    return copied, sum(stopped) + snapshot.stopped_ns


def _copy_stopped(source: Source) -> int:
    """Copy while every thread of the task stands still; returns for how many nanoseconds they did, at most."""
    task = source.task
    stopped: list[int] = []
    look = lambda _copied: check_interrupt()  # noqa: E731

    def attempt() -> None:
        _with_all_stopped(task, lambda _stops: source.fetch(task, look), stopped)

    # A long copy in a thread: it releases the GIL; if we are killed, tracing was all that was done to the task.
    quick = source.size < _QUICK
    missing = source.userfault_area is not None
    for _ in range(_TRIES):
        if missing:  # has them delivered, while the task runs
            source.fetch(task, None)
        try:
            session.in_tracer(task, attempt, may_be_apart=quick)
        except NotReadyError as error:
            if error.errno != transfer.WOULD_WAIT:
                raise
            missing, address = True, error.address or 0
        else:
            return sum(stopped)
    message = (
        f"cannot copy {source.address:#x} of task {task.pid} as of one moment: the page at {address:#x} is delivered "
        "by another program (a handler of userfaultfd, or the server of a file), and was missing again each time the "
        "task stood still; copy without freeze"
    )
    raise UnsupportedError(message, address=address)


def _worth_a_child(source: Source) -> int:
    """Return the resident bytes of the task; 0 if a child lacks some of the memory, or a copy is made sooner."""
    end = source.address + source.size
    try:
        resident = procfs.status_bytes("VmRSS", source.task.pid)
        if source.size * _WORTH_IT < resident:
            return 0
        for area, flags in procfs.vm_flags(source.task.pid):
            if flags & wired.USERFAULT:  # who has to be told of the child may be a thread that stands still
                return 0
            if area.start < end and source.address < area.end and flags & _NOT_IN_A_CHILD:
                return 0
    except (OSError, KeyError):  # it is gone, or its memory
        return 0
    return resident


def _with_all_stopped(task: Task, work: Callable[[list[Stop]], None], stopped: list[int]) -> None:
    """Do `work` while every thread of a task stands still; `stopped` gets for how many nanoseconds, at most."""
    options = session.options_for(task)
    deadline = time.monotonic() + session.PATIENCE
    while True:
        stops: dict[int, Stop | None] = {}  # None: it ended
        try:
            try:
                _stop_each(task, options, stops, deadline)
            except NotStopped:
                # It may be waiting for one that stands still: a page fault that a thread of the task serves.
                stopped.append(_let_stop(task, stops, deadline))
                continue
            work(list(filter(None, stops.values())))
        finally:
            stopped.append(_release(stops))
        return


def _stop_each(task: Task, options: int, stops: dict[int, Stop | None], deadline: float) -> None:
    """Stop every thread of a task. Raises NotStopped when one does not stop soon."""
    # Until a look finds no new one: those that run still may make more. Hundreds of them take seconds.
    while fresh := [tid for tid in threads.thread_ids(task.pid) if tid not in stops]:
        for tid in fresh:
            if time.monotonic() > deadline:
                raise session.never_stopped(task)
            activity = threads.activity(task.pid, tid)
            stops[tid] = session.seize(task, activity, options) if activity else None
        for tid in fresh:
            _wait(stops, tid, min(time.monotonic() + _SHORT, deadline))
    if not any(stops.values()):
        raise diagnosis.gone(f"task {task.pid} is gone: it exited")


def _wait(stops: dict[int, Stop | None], tid: int, until: float) -> None:
    """Wait for a thread to stand still, or to have ended."""
    stop = stops[tid]
    try:
        if stop:
            stop.wait(until)
    except NotFoundError:
        stops[tid] = None


def _let_stop(task: Task, stops: dict[int, Stop | None], deadline: float) -> int:
    """Let those go on that stand still, and wait for the others, for only what stands still can be released.

    Returns for how many nanoseconds they stood still.
    """
    standing = {tid: stop for tid, stop in stops.items() if stop is None or stop.stands}
    for tid in standing:
        del stops[tid]
    stopped = _release(standing)
    for tid in stops:
        try:
            _wait(stops, tid, deadline)
        except NotStopped:
            raise session.never_stopped(task) from None
    return stopped


def _release(stops: dict[int, Stop | None]) -> int:
    with shielded():
        return max((stop.release() for stop in stops.values() if stop), default=0)
