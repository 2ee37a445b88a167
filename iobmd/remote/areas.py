"""What a task has mapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd.task import diagnosis

if TYPE_CHECKING:
    from iobmd.task.task import Task


def areas(task: Task) -> list[procfs.VMA]:
    """Return the areas of a task, ascending; none when its memory is gone. Raises OSError."""
    return list(procfs.maps(task.pid))


def known(task: Task, start: int, end: int) -> list[procfs.VMA]:
    """Return the areas of a task that overlap the addresses `start`…`end`, ascending.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound`, `kIOReturnUnsupported`: a kernel thread.
    """
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
