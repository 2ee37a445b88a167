"""What a task has mapped, also when its first thread has ended before others, which have the memory still."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd import procfs, refusals

if TYPE_CHECKING:
    from iobmd.task import Task


def thread_with_memory(task: Task) -> int:
    """Return the id of a thread that /proc shows the memory of."""
    if next(procfs.maps(task.pid), None):
        return task.pid
    return refusals.thread_with_memory(task.pid) or task.pid


def areas(task: Task) -> list[procfs.VMA]:
    """Return the areas of a task, ascending; none when its memory is gone. Raises OSError."""
    return list(procfs.maps(task.pid)) or list(procfs.maps(thread_with_memory(task)))


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
