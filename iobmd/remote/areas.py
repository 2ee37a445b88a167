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
