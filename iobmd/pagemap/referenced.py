"""The referenced bytes of each area, from the bits that the processor sets in the page tables.

/proc/PID/clear_refs clears the bits of the whole process (proc_pid_clear_refs(5)); smaps counts those that are set.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd.errors import NotPermittedError
from iobmd.pagemap.range import of_task
from iobmd.pagemap.sampling import Method, Part, Sample, Unseen, every_area
from iobmd.task import diagnosis

if TYPE_CHECKING:
    from iobmd.pagemap.range import Where
    from iobmd.pagemap.sampling import Chooses
    from iobmd.procfs import VMA

_ALL = b"1"
"""Clears the bits of all pages; only 4 would also reset the soft-dirty bits, which checkpoints use."""


class ReferencedBits:
    """A sampler (`sampling.Sampler`) of areas, which needs neither a privilege nor a page fault of the process.

    Parameters
    ----------
    where : Where
        The task, and the range of it; areas that the range cuts are not seen.
    chooses : callable
        Which areas are sampled; the bits of all areas are cleared.

    Notes
    -----
    Clearing the bits changes the kernel's own view: memory may be reclaimed earlier, as if it had not been used. The
    processor's cached translations are not flushed (fs/proc/task_mmu.c: clear_refs_write flushes them for 4 only): a
    page whose translation stays cached is not seen.
    """

    method = Method.REFERENCED
    resolution: int | None = None

    def __init__(self, where: Where, chooses: Chooses = every_area) -> None:
        self._where, self._chooses = where, chooses
        self._referenced: list[tuple[VMA, int, int]] = []
        self._hugetlb = 0

    def begin(self) -> None:
        """Clear the bits. Raises `kIOReturnNotPermitted`, `kIOReturnNotFound`."""
        pid = self._where.task.pid
        try:
            descriptor = os.open(procfs.memory_file(pid, "clear_refs"), os.O_WRONLY | os.O_CLOEXEC)
            try:
                if not self._where.task.alive:
                    raise diagnosis.without_memory(pid)
                os.write(descriptor, _ALL)
            finally:
                os.close(descriptor)
        except (FileNotFoundError, ProcessLookupError):
            raise diagnosis.without_memory(pid) from None
        except PermissionError as error:
            message = (
                f"cannot clear the referenced bits of task {pid}: only its user, or root, may write to "
                f"/proc/{pid}/clear_refs"
            )
            raise NotPermittedError(message, error.errno or 0) from None

    def sample(self) -> list[tuple[int, int, int]]:
        """Return the referenced bytes of each area, and clear the bits. Raises as `begin`."""
        self._read()
        self.begin()
        return [(vma.start, vma.end, used) for vma, _resident, used in self._referenced if used]

    def _read(self) -> None:
        where, found, hugetlb = self._where, [], 0
        for vma, counters, _flags in of_task(where.task, procfs.details(where.task.pid)):
            if where.start <= vma.start and vma.end <= where.end and self._chooses(vma):
                resident = counters.get("Rss", 0)  # like Referenced, it does not count hugetlb pages
                found.append((vma, resident, min(resident, counters.get("Referenced", 0))))
                hugetlb += counters.get("Private_Hugetlb", 0) + counters.get("Shared_Hugetlb", 0)
        self._referenced, self._hugetlb = found, hugetlb

    def parts(self) -> tuple[list[Part], list[Unseen]]:
        """Return the areas with resident memory. Raises `kIOReturnNotFound`."""
        self._read()
        parts = [
            Part(vma, Sample(0, 0, 0, [(vma.start, vma.end, resident)]))
            for vma, resident, _used in self._referenced
            if resident
        ]
        unseen = [Unseen("hugetlb pages, which have no referenced bits in smaps", self._hugetlb)]
        if self._where.cuts_an_area:
            unseen.append(Unseen("areas that the range cuts, because smaps counts whole areas", None))
        return parts, [one for one in unseen if one.size != 0]

    def close(self) -> None:
        """Do nothing: the bits are the kernel's."""
