"""What a task has mapped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd import procfs, refusals

if TYPE_CHECKING:
    from iobmd.task import Task


def areas(task: Task) -> list[procfs.VMA]:
    """Return the areas of a task, ascending; none when its memory is gone. Raises OSError."""
    return list(procfs.maps(task.pid))


def known(task: Task) -> list[procfs.VMA]:
    """As `areas`.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound`, `kIOReturnUnsupported`: a kernel thread.
    """
    try:
        found = areas(task)
    except (FileNotFoundError, ProcessLookupError):
        found = []
    except OSError as error:
        raise refusals.refused(task.pid, error.errno or 0, "memory") from None
    if not task.alive:
        raise refusals.gone(f"task {task.pid} is gone: it exited")
    if not found:
        raise refusals.without_memory(task.pid)
    return found
