"""Pages that a task shares with others since a fork: reading them without a copy, and the room for their copies.

process_vm_readv(2) pins the pages that it reads. Before the kernel pins an anonymous page that several tasks map, it
copies the page, charged to the task that is read, so that a later write cannot replace the pinned page
(gup_must_unshare(), Linux 5.19): reading 64 MiB of a forked worker added 64 MiB to it, and took more than twice as
long as through /proc/PID/mem, which pins nothing. That file ignores protections, however, returns an error where the
call would wait for a fault handler, and reads other pages at little more than half the speed (3.2 instead of 5.6 GB/s
into warm memory). It is therefore used only for these pages, and only where the task itself may read.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd._internal import pidns
from iobmd._native import crosstask
from iobmd.errors import NO_DESCRIPTOR, TaskTimeoutError
from iobmd.host import headroom
from iobmd.task import attempt
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd._native.crosstask import Ranges
    from iobmd.task.job import Transfer


def open_memory(job: Transfer) -> int:
    """Open the /proc/PID/mem of a task. Raises OSError: `ESRCH`, it has exited."""
    flags = (os.O_RDWR if job.write else os.O_RDONLY) | os.O_CLOEXEC
    memory = os.open(f"{pidns.directory(job.pid)}/mem", flags)
    if crosstask.has_exited(job.pidfd):  # otherwise it belongs to the task, even if the pid is reused
        os.close(memory)
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return memory


class SharedPages:
    """The access to shared pages during a transfer, prepared when the first such page is found.

    Parameters
    ----------
    job, pagemap
        The transfer, and the open pagemap of the task.
    is_bounded
        Whether the job's time limit also applies to waits for the lock of the address space.
    """

    def __init__(self, job: Transfer, pagemap: int, *, is_bounded: bool) -> None:
        self._job = job
        self._pagemap = pagemap
        self._is_bounded = is_bounded
        self._lock = threading.Lock()
        self._is_prepared = False
        self.access: tuple[int, Ranges | None] = -1, crosstask.Ranges()
        """The open /proc/PID/mem and where it is used, in the form that `crosstask.transfer` accepts.

        Before `prepare`, transfers end at the first shared page. Without ranges (None) it is used nowhere.
        """

    def prepare(self) -> None:
        """Prepare the access for all threads of the transfer; idempotent.

        Raises
        ------
        OSError
            No descriptor is free.
        IOReturnError
            `kIOReturnNoMemory`: writing would copy more pages than fit the memory cgroup of the task.
            `kIOReturnTimeout`: the lock of the address space is not released.
        """
        with self._lock:
            if self._is_prepared:
                return
            if self._is_bounded:
                attempt.require_unlocked(self._job.pid, self._job.patience)
            if self._job.write:
                self._require_room()
            self.access = (-1, None) if self._job.write else self._opened()
            self._is_prepared = True

    def _require_room(self) -> None:
        job = self._job

        def copies() -> int:
            return crosstask.count_shared(self._pagemap, job.theirs, job.size, PAGE_SIZE)

        headroom.require(job.size, swappable=True, pid=job.pid, absent=copies)

    def _opened(self) -> tuple[int, Ranges | None]:
        job = self._job
        read = attempt.read_file(job.patience) if self._is_bounded else None
        try:
            areas = procfs.areas(job.pid, job.theirs, job.end, read)
            readable = crosstask.Ranges((area.start, area.end) for area in areas if "r" in area.perms)
            return open_memory(job), readable
        except OSError as error:
            if error.errno in NO_DESCRIPTOR or isinstance(error, TaskTimeoutError):
                raise
            # A security module forbids it, or the task keeps moving its areas. If it has exited, the call fails too.
            return -1, None

    def divide(self, present: Ranges) -> Iterator[tuple[Ranges, int]]:
        """Divide ranges of present pages, in ascending order, by the descriptor that transfers them, or -1."""
        memory, readable = self.access
        at, end = present[0][0], present[-1][1]
        for start, stop in readable.between(at, end) if readable else ():
            if before := present.between(at, start):
                yield before, -1
            if inside := present.between(start, stop):
                yield inside, memory
            at = stop
        if behind := present.between(at, end):
            yield behind, -1

    def close(self) -> None:
        """Close the file."""
        if self.access[0] >= 0:
            os.close(self.access[0])
