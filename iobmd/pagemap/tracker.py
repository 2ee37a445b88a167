"""The used pages of a task, detected by page faults that the kernel resolves itself (userfaultfd(2)).

With write protection, the first write to a page in each interval is detected (UFFD_FEATURE_WP_ASYNC, Linux 6.7); with
read-write protection, the first access (UFFD_FEATURE_RWP_ASYNC, Linux 7.3). PAGEMAP_SCAN reports the pages. When the
userfaultfd is closed, also because this process is killed, the kernel removes the protection.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from iobmd._native import mman
from iobmd._native import pagemap as native
from iobmd.errors import IOReturnError, UnsupportedError
from iobmd.pagemap.file import PagemapFile
from iobmd.pagemap.sampling import Method, Unseen, every_area, resident_part
from iobmd.task import diagnosis
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from iobmd.pagemap.range import Where
    from iobmd.pagemap.sampling import Chooses, Part
    from iobmd.procfs import VMA

_STEP = 16 << 20
"""Bytes that a scan covers: if all pages are present, it locks the address space for a tenth of a millisecond."""
_STEPS = 4096
"""Maximum number of steps for an area; those of larger areas, which are mostly empty, are longer."""


class Tracker:
    """A sampler (`sampling.Sampler`) of single pages. It closes the userfaultfd.

    Parameters
    ----------
    where : Where
        The task, and the range of it.
    userfaultfd : int
        A userfaultfd(2) that was created in the task, and not used yet.
    accesses : bool
        Whether to detect all accesses (`Method.ACCESSED`), not only writes (`Method.WRITTEN`).
    chooses : callable
        Which areas are sampled.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`: the kernel lacks it. The userfaultfd is closed.

    Notes
    -----
    The first use of a page in an interval costs the task a page fault. A write to a write-protected huge page would
    make the kernel map it by small pages: huge pages are therefore not write-protected, and their use is not seen.
    In areas that are registered, new memory gets no large folios (mm/memory.c: alloc_anon_folio).
    """

    resolution: int | None = PAGE_SIZE

    def __init__(self, where: Where, userfaultfd: int, *, accesses: bool, chooses: Chooses = every_area) -> None:
        self._chooses = chooses
        self._where, self._fd, self._accesses = where, userfaultfd, accesses
        self.method = Method.ACCESSED if accesses else Method.WRITTEN
        self._used, self._excluded = (
            (native.PAGE_IS_PRESENT | native.PAGE_IS_ACCESSED, native.PAGE_IS_PFNZERO)
            if accesses
            else (native.PAGE_IS_PRESENT | native.PAGE_IS_WRITTEN, native.PAGE_IS_PFNZERO | native.PAGE_IS_HUGE)
        )
        self._registered: dict[tuple[int, int], VMA] = {}
        self._refused: dict[tuple[int, int], str] = {}
        try:
            mman.configure_tracker(self._fd, accesses)
            self._pagemap = PagemapFile(where.task)
        except BaseException as error:
            os.close(self._fd)
            if isinstance(error, IOReturnError) or not isinstance(error, OSError):
                raise
            needed = (
                "accesses (UFFD_FEATURE_RWP): Linux 7.3" if accesses else "writes (UFFD_FEATURE_WP_ASYNC): Linux 6.7"
            )
            message = f"the userfaultfd(2) of this kernel cannot track {needed} or later is needed"
            raise UnsupportedError(message, error.errno or 0) from None

    def begin(self) -> None:
        """Register the areas, and protect their pages. Raises `kIOReturnNotFound`."""
        self.sample()

    def sample(self) -> list[tuple[int, int, int]]:
        """Return the pages that were used since the last call, and protect them. Raises `kIOReturnNotFound`."""
        found = []
        for start, end in self._ranges():
            for low, high in _steps(start, end):
                try:
                    ranges = native.scan(self._pagemap.fd, low, high, self._used, self._excluded, not self._accesses)
                    for first, last in ranges if self._accesses else ():
                        mman.await_access(self._fd, first, last - first)
                except OSError as error:
                    self._require_task(error)
                    continue  # the area was unmapped, or replaced
                found += [(first, last, last - first) for first, last in ranges]
        return found

    def _ranges(self) -> list[tuple[int, int]]:
        """Register new areas; return the observed ranges, ascending."""
        found, registered = [], {}
        for vma in filter(self._chooses, self._where.areas()):
            start, end = max(vma.start, self._where.start), min(vma.end, self._where.end)
            bounds = start, end
            if self._is_registered(vma, bounds):
                registered[bounds] = vma
                found.append(bounds)
        self._registered = registered
        return found

    def _is_registered(self, vma: VMA, bounds: tuple[int, int]) -> bool:
        # Pages of a file mapping that the task cannot write to are never written; reads are only seen in anonymous
        # and shared memory.
        if "w" not in vma.perms and not (self._accesses and "r" in vma.perms):
            self._refused[bounds] = "areas without write permission"
            return False
        if bounds in self._registered and bounds not in self._refused:
            return True
        start, end = bounds
        try:
            mman.register_tracked(self._fd, start, end - start, self._accesses)
        except OSError as error:
            self._require_task(error)
            reason = (
                "areas that another userfaultfd(2) tracks"
                if error.errno == errno.EBUSY
                else ("areas that userfaultfd(2) does not support: files, and special mappings")
            )
            self._refused[bounds] = reason
            return False
        self._refused.pop(bounds, None)
        return True

    def _require_task(self, error: OSError) -> None:
        """Raise `kIOReturnNotFound` if a call failed because the task, or its memory, no longer exists."""
        if error.errno == errno.ESRCH or not self._where.task.alive:
            raise diagnosis.without_memory(self._where.task.pid)

    def parts(self) -> tuple[list[Part], list[Unseen]]:
        """Return the resident memory of the registered areas. Raises `kIOReturnNotFound`."""
        parts: list[Part] = []
        hidden: dict[str, int] = {}
        for vma in filter(self._chooses, self._where.areas()):
            bounds = max(vma.start, self._where.start), min(vma.end, self._where.end)
            ranges = self._resident(*bounds, self._excluded)
            reason = None if bounds in self._registered else self._refused.get(bounds, "areas that are new")
            if reason is None:
                parts.append(resident_part(vma, ranges))
                if not self._accesses:
                    huge = _size(self._resident(*bounds, native.PAGE_IS_PFNZERO)) - _size(ranges)
                    hidden[_HUGE] = hidden.get(_HUGE, 0) + huge
            else:
                hidden[reason] = hidden.get(reason, 0) + _size(ranges)
        return [part for part in parts if part.resident.used], [
            Unseen(reason, size) for reason, size in hidden.items() if size
        ]

    def _resident(self, start: int, end: int, excluded: int) -> list[tuple[int, int]]:
        return resident_ranges(self._pagemap.fd, start, end, excluded)

    def close(self) -> None:
        """Remove the protection."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        self._pagemap.__exit__()


_HUGE = "huge pages, which write protection would split"


def resident_ranges(
    pagemap: int, start: int, end: int, excluded: int = native.PAGE_IS_PFNZERO
) -> list[tuple[int, int]]:
    """Return the ranges of resident pages between two addresses, ascending, without the `excluded` categories."""
    found: list[tuple[int, int]] = []
    for low, high in _steps(start, end):
        try:
            found += native.scan(pagemap, low, high, native.PAGE_IS_PRESENT, excluded)
        except OSError:
            break  # the process has exited, or these addresses are above the end of pagemap (vsyscall)
    return found


def _steps(start: int, end: int) -> list[tuple[int, int]]:
    step = max(_STEP, (end - start) // _STEPS // PAGE_SIZE * PAGE_SIZE)
    return [(low, min(end, low + step)) for low in range(start, end, step)]


def _size(ranges: list[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)
