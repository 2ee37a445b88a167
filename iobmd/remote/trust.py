"""Which shared memory may be mapped in which task.

A task that has a descriptor of memory could truncate it, or punch holes into it, and a process that accesses the
memory then gets SIGBUS. Any process that may trace the task can copy the descriptor (pidfd_getfd(2)). Tasks of root
and of this user are trusted: they could harm this process anyway. For others, the memory is sealed, or the task
receives it read-only.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd.errors import NotPermittedError
from iobmd.memory import shmem

if TYPE_CHECKING:
    from iobmd._internal.process_local import Fd
    from iobmd.task.task import Task


def is_trusted(task: Task) -> bool:
    """Return whether all user ids of a task are those of root or of this user."""
    try:
        return {int(uid) for uid in procfs.status(task.pid)["Uid"].split()} <= {0, os.geteuid()}
    except (OSError, KeyError):  # it has exited
        return False


def require_safe(task: Task, objects: set[Fd], *, writable: bool) -> None:
    """Raise `kIOReturnNotPermitted` if a task that is not trusted could cause SIGBUS in this process.

    It is also raised for memory that another process has sealed against writing.
    """
    if not writable:  # a descriptor that is open for reading permits neither truncation nor holes
        return
    trusted = is_trusted(task)
    for fd in objects:
        with fd.use() as number:
            if sealed := shmem.sealed_against_writing([number]):
                raise sealed
            why = "" if trusted else shmem.why_unsafe(number)
        if why:
            message = (
                f"this memory is not mapped in task {task.pid}, which is another user's and could {why}: allocate it "
                "in that task (task=…, shared=True) and map it here, or map it read-only there"
            )
            raise NotPermittedError(message)
