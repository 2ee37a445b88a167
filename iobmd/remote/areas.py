"""The memory areas of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd.task import attempt, diagnosis, userfault
from iobmd.task.job import TIMEOUT

if TYPE_CHECKING:
    from iobmd.task.task import Task


def areas(task: Task) -> list[procfs.VMA]:
    """Return all areas of a task, ascending; none once its memory is released. Raises OSError."""
    return list(procfs.maps(task.pid))


def overlapping(task: Task, start: int, end: int) -> list[procfs.VMA]:
    """Return the areas of a task that overlap the addresses `start`…`end`, ascending.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound`, `kIOReturnUnsupported`: a kernel thread; `kIOReturnTimeout`.
    """
    attempt.require_unlocked(task.pid, TIMEOUT)
    found = None
    try:
        found = list(procfs.areas(task.pid, start, end))
    except (FileNotFoundError, ProcessLookupError):
        pass
    except OSError as error:
        raise diagnosis.refused(task.pid, error.errno or 0, "memory") from None
    if not task.alive:
        raise diagnosis.gone(f"task {task.pid} is gone: it exited")
    if found is None:
        raise diagnosis.without_memory(task.pid)
    return found


def userfault_area(task: Task, address: int, end: int) -> procfs.VMA | None:
    """Return the first area of a range whose page faults are reported to a userfaultfd. Raises OSError."""
    for area, flags in procfs.vm_flags(task.pid):
        if area.start >= end:  # reading on to the last of thousands of areas may take seconds
            break
        if address < area.end and flags & userfault.FLAGS:
            return area
    return None
