"""A consistent copy of a task's memory: from a snapshot of the task, or while all its threads are stopped.

A snapshot stops the task for less time if the memory is private and a large part of the task is copied. A task whose
cgroup is frozen needs no stop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd._internal import log
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
from iobmd.remote.snapshot_child import SnapshotChild
from iobmd.task import userfault
from iobmd.task.job import WOULD_WAIT

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd._internal.chunked import Progress
    from iobmd.task.task import Task

_NOT_IN_A_CHILD = {"sh", "dc", "wf", "ht", "io", "pf"}
"""Flags (smaps) of memory that a child shares with its parent, does not inherit, or copies to new hugetlb pages."""
_WORTH_IT = 4  # a child takes at most a fifth of the time of copying the memory that it shares (measured)
_TRIES = 3
_DELIVERIES = 10  # of pages that their task removes again


class CopyRequest(NamedTuple):
    """The memory to copy, and how to fetch it."""

    task: Task
    address: int
    size: int
    fetch: Callable[[Task, Progress | None], None]
    """Copies the memory from this task, or from another with the same memory. The second argument is called with the
    progress; if it is given, the task is stopped, and the copy must wait for nothing that needs the task."""

    @property
    def userfault_area(self) -> procfs.VMA | None:
        """Its first area whose page faults are reported to a userfaultfd."""
        try:
            return areas.userfault_area(self.task, self.address, self.address + self.size)
        except OSError:  # the task has exited, which the copy will report
            return None


def copy(request: CopyRequest) -> int:
    """Copy the memory as of one moment, and return for how many nanoseconds the task was stopped, at most.

    Raises
    ------
    IOReturnError
        As `Task.read` and `session.frozen`. `kIOReturnUnsupported`: each time the task was stopped, pages that a
        userfaultfd handler delivers were missing.
    """
    if _copy_frozen(request):
        log.debug("task %d was copied while its cgroup was frozen: it was not stopped", request.task.pid)
        return 0
    copied, stopped = False, 0
    if resident := worth_a_child(request):
        copied, stopped = _copy_snapshot(request, resident)
    if copied:
        log.debug("task %d was copied from a snapshot, which stopped it for %d ns", request.task.pid, stopped)
        return stopped
    why = "failed" if resident else "would take longer, or lack some of the memory"
    log.debug("task %d is stopped for the copy: a snapshot %s", request.task.pid, why)
    return stopped + _copy_stopped(request)


def _copy_frozen(request: CopyRequest) -> bool:
    """Copy from a task whose cgroup is frozen; return False if it is not, or if one of its threads ran."""
    for _ in range(_TRIES):
        before = freezer.switches(request.task.pid)
        if before is None:
            return False
        try:
            request.fetch(request.task, None)
        except TaskTimeoutError as error:
            if frozen := freezer.why(request.task.pid):
                raise IOReturnError(error.code, f"{error.strerror}; {frozen}", address=error.address) from None
            raise
        if freezer.switches(request.task.pid) == before:
            return True
    return False


def _copy_snapshot(request: CopyRequest, resident: int) -> tuple[bool, int]:
    """Copy from a snapshot of a task of `resident` bytes; return whether that succeeded, and the stop in ns."""
    snapshot = SnapshotChild(request.task, resident)
    copied = False
    try:
        with snapshot as child:
            request.fetch(child, None)
        # A userfaultfd may have been registered since: a child has zeros for pages that its handler would fill.
        copied = request.userfault_area is None
    except (NoResourcesError, TaskTimeoutError, UnsupportedError, VMError, NotFoundError) as error:
        # The task can create no process, a userfaultfd handler does not read the report of the fork, the task is a
        # 32-bit program, the memory is not inherited by a child, or the child was killed.
        log.debug("the snapshot of task %d failed: %s", request.task.pid, error)
    except OSError as error:  # of the clone
        if isinstance(error, IOReturnError):
            raise
        log.debug("the snapshot of task %d failed: %s", request.task.pid, error)
    return copied, snapshot.stopped_ns


def _copy_stopped(request: CopyRequest) -> int:
    """Copy while every thread of the task is stopped, and return for how many nanoseconds they were, at most."""
    task = request.task
    missing = request.userfault_area is not None
    address = 0

    def deliver() -> None:
        if missing:  # while the task runs
            request.fetch(task, None)

    def fetch() -> bool:
        nonlocal missing, address
        try:
            request.fetch(task, _stopped)
        except NotReadyError as error:
            if error.errno != WOULD_WAIT:
                raise
            missing, address = True, error.address or 0
            return False
        return True

    copied, stopped_ns = session.frozen(task, deliver, fetch, _DELIVERIES)
    if copied:
        return stopped_ns
    message = (
        f"cannot copy {request.address:#x} of task {task.pid} as of one moment: the page at {address:#x} is "
        "delivered by another program (a userfaultfd handler or a file server), and was missing at each stop of the "
        "task; copy without freeze"
    )
    raise UnsupportedError(message, address=address)


def worth_a_child(request: CopyRequest) -> int:
    """Return the resident bytes of the task; 0 if a child would lack some of the memory, or a copy is faster."""
    end = request.address + request.size
    try:
        resident = procfs.status_bytes("VmRSS", request.task.pid)
        if request.size * _WORTH_IT < resident:
            return 0
        for area, flags in procfs.vm_flags(request.task.pid):
            if flags & userfault.FLAGS:  # its handler may be a stopped thread, and must read the report of the fork
                return 0
            if area.start < end and request.address < area.end and flags & _NOT_IN_A_CHILD:
                return 0
    except (OSError, KeyError):  # it has exited, or released its memory
        return 0
    return resident


def _stopped(_copied: int) -> None:
    """Serve as the progress callback of a copy from a stopped task."""
