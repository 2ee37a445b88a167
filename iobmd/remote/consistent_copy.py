"""A consistent copy of a task's memory: the task stands still for it, or for the moment that a snapshot takes.

The snapshot is quicker where memory is private and much of the task is wanted; otherwise every thread is stopped for
the length of the copy. A task whose cgroup is frozen stands still already, and is copied as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd.errors import (
    IOReturnError,
    NoResourcesError,
    NotFoundError,
    NotReadyError,
    TaskTimeoutError,
    UnsupportedError,
    VMError,
)
from iobmd.remote import areas, freezer, session
from iobmd.task import transfer

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd._internal.chunked import Progress
    from iobmd.task.task import Task

_NOT_IN_A_CHILD = {"sh", "dc", "wf", "ht", "io", "pf"}
"""Flags of memory that a child shares with its parent, does not get, or gets at the cost of hugetlb pages (smaps)."""
_WORTH_IT = 4  # a child costs a fifth or less of what it takes to copy as much as it shares (measured)
_TRIES = 3
_DELIVERIES = 10  # of pages that their task takes away again


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
            return areas.userfault_area(self.task, self.address, self.address + self.size)
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
    snapshot = session.Snapshot(source.task, resident)
    copied = False
    try:
        with snapshot as child:
            source.fetch(child, None)
        # A child has zeros for what a userfaultfd, which may have been registered since, would have filled in.
        copied = source.userfault_area is None
    except (NoResourcesError, TaskTimeoutError, UnsupportedError, VMError, NotFoundError):
        # No more processes, whoever is to be told of them does not listen, a 32-bit program, memory that only the
        # task has, or the child was killed.
        pass
    except OSError as error:  # of the clone
        if isinstance(error, IOReturnError):
            raise
    return copied, snapshot.stopped_ns


def _copy_stopped(source: Source) -> int:
    """Copy while every thread of the task stands still; returns for how many nanoseconds they did, at most."""
    task = source.task
    missing = source.userfault_area is not None
    address = 0

    def deliver() -> None:
        if missing:  # while the task runs
            source.fetch(task, None)

    def fetch() -> bool:
        nonlocal missing, address
        try:
            source.fetch(task, _standing)
        except NotReadyError as error:
            if error.errno != transfer.WOULD_WAIT:
                raise
            missing, address = True, error.address or 0
            return False
        return True

    copied, stopped_ns = session.frozen(task, deliver, fetch, _DELIVERIES)
    if copied:
        return stopped_ns
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
            if flags & areas.USERFAULT:  # who has to be told of the child may be a thread that stands still
                return 0
            if area.start < end and source.address < area.end and flags & _NOT_IN_A_CHILD:
                return 0
    except (OSError, KeyError):  # it is gone, or its memory
        return 0
    return resident


def _standing(_copied: int) -> None:
    """Stand for the progress of a copy from a task that stands still."""
