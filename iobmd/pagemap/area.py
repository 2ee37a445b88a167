"""The areas of an address space (VMAs), and their contents."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import repeat
from typing import NamedTuple

from iobmd import host, procfs
from iobmd._native import pagemap
from iobmd._native.pagemap import Tally
from iobmd.pagemap.frame import Frames
from iobmd.pagemap.range import Target, Where, of_task, resolve
from iobmd.pagemap.reader import Reader, require_frames
from iobmd.procfs import VMA, Details
from iobmd.task.task import Task

_SMALL = 2 << 20
"""Areas up to this size are read together with others."""
_GAP = 128
"""Maximum gap between two of them, in pages, whose reading costs less than another call."""
MOST = 128
"""Maximum number of areas that are read at once."""
BEARABLE = 256 << 20
"""Bytes of small pages in one area that smaps walks in a millisecond or two, during which the task cannot mmap."""


class Area(NamedTuple):
    """An area of an address space, or the requested part of one, and its contents. Sizes are in bytes."""

    vma: VMA
    """The whole area."""
    start: int
    """The first address of the requested part."""
    end: int
    """The end of the requested part."""
    tally: Tally
    """The contents according to pagemap, in bytes: `present`, including `hidden` (no frame number), `file`, `zero`,
    `exclusive`, `huge` and `huge_zero`; `swapped`, `guard`, `marker`, `soft_dirty`. For the physical runs: their
    number (`runs`), the `largest`, and how many are above (`ascending`) or below (`descending`) the previous one."""
    details: Details | None
    """The data of smaps, if it was read."""
    folios: dict[int, int] | None
    """Bytes that are mapped page by page, by the size of their folio; None if unknown.

    Pages without a large folio count under the page size.
    """
    visible: bool
    """Whether frame numbers are visible; if not, there are no runs."""
    scans: bool
    """Whether PAGEMAP_SCAN is available; if not, only smaps shows huge pages."""
    nothing_locked: bool
    """Whether the task has locked no memory at all (VmLck)."""
    can_swap: bool
    """Whether the host has swap space."""
    on_tmpfs: bool = False
    """Whether it maps shared memory: a file on a tmpfs, a memfd, System V or shared anonymous memory."""

    @property
    def name(self) -> str:
        """The path of the file, or a name such as ``[heap]``; empty for anonymous memory."""
        return self.vma.name

    @property
    def perms(self) -> str:
        """The permissions, as in ``rw-p``."""
        return self.vma.perms

    @property
    def size(self) -> int:
        """The size of the area."""
        return self.end - self.start

    @property
    def resident(self) -> int:
        """Bytes mapped to memory, as counted by RSS: without the zero page and device memory."""
        if self.is_device:
            return 0
        if not self.visible and not self.scans:  # then only smaps shows the zero page
            counted = self._counters("Rss", "Private_Hugetlb", "Shared_Hugetlb")
            if counted is not None:
                return min(self.tally.present, counted)
        return self.tally.present - self.tally.zero

    @property
    def device(self) -> int:
        """Bytes mapped to something other than system memory, such as device registers."""
        return self.tally.present - self.tally.zero if self.is_device else 0

    @property
    def file_or_shared(self) -> int:
        """Resident bytes of files, or of shared memory."""
        return 0 if self.is_device else self.tally.file

    @property
    def shared(self) -> int:
        """Resident bytes that other processes map too, or that are mapped more than once: of files, or anonymous."""
        return max(0, self.resident - self.tally.exclusive)

    @property
    def file(self) -> int:
        """Resident bytes of files, without shared memory."""
        return self.file_or_shared - self.shmem

    @property
    def shmem(self) -> int:
        """Resident bytes of shared memory, as counted by RssShmem."""
        return self.file_or_shared if self.on_tmpfs else 0

    @property
    def uss(self) -> int:
        """Resident bytes that nothing else maps, which the exit of the task would free (unique set size)."""
        return self.resident - self.shared

    @property
    def pss(self) -> int | None:
        """Resident bytes, each page divided by the number of its mappings (proportional set size); None if unknown.

        Without smaps, it is known only if nothing is shared. The kernel rounds it down to 1 KiB and does not report
        the share of a task in hugetlb pages of several tasks: these do not count.
        """
        counted = self._counters("Pss", "Private_Hugetlb")
        if counted is None:
            return None if self.shared else self.resident
        return 0 if self.is_device else counted

    @property
    def anonymous(self) -> int:
        """Resident bytes that belong neither to a file nor to shared memory."""
        return self.resident - self.file_or_shared

    @property
    def swapped(self) -> int | None:
        """Bytes in swap. Pagemap does not show shared memory in swap, for which smaps is used; None if unknown."""
        if not self.can_swap:
            return 0
        counted = self._counter("Swap")
        if counted is None:
            may_be_shared = self.vma.inode and self.vma.device.startswith("00:")  # possibly on a tmpfs
            return None if may_be_shared else self.tally.swapped
        # If frames are hidden, pagemap does not distinguish swap from userfaultfd markers.
        return max(self.tally.swapped, counted) if self.visible else counted

    @property
    def marker(self) -> int | None:
        """Bytes neither in memory nor in swap: migrating or poisoned pages, userfaultfd markers; None if unknown.

        If frames are hidden, pagemap does not distinguish them from swap; they are the difference to smaps.
        """
        if self.visible or not self.can_swap:
            return self.tally.marker
        counted = self._counter("Swap")
        return None if counted is None else self.tally.marker + max(0, self.tally.swapped - counted)

    @property
    def huge(self) -> int | None:
        """Resident bytes mapped by huge pages in the page tables: by a PMD, or as hugetlb pages; None if unknown."""
        if not self.scans:
            return self._counters(*procfs.HUGE)
        return self.tally.huge - self.tally.huge_zero

    @property
    def thp_eligible(self) -> bool | None:
        """Whether the kernel may map it by transparent huge pages or mTHP of any enabled size; None if unknown."""
        if self.details is None or "THPeligible" not in self.details.counters:  # Linux 5.0
            return None
        return bool(self.details.counters["THPeligible"])

    @property
    def hugetlb_page(self) -> int:
        """The page size if the pages come from a hugetlb pool and smaps was read, otherwise 0."""
        pool = self.details is not None and "ht" in self.details.flags
        return (self._counter("KernelPageSize") or 0) if pool else 0

    @property
    def locked(self) -> int | None:
        """Resident bytes locked by mlock; None if unknown."""
        if self.details is None:
            return 0 if self.nothing_locked else None
        return self.resident if "lo" in self.details.flags else 0

    @property
    def lazy_free(self) -> int | None:
        """Resident bytes that are lazily freed (MADV_FREE): reclaimed when memory is short; None if unknown."""
        return self._counter("LazyFree")

    def _counters(self, *names: str) -> int | None:
        counted = [self._counter(name) for name in names]
        return None if None in counted else sum(filter(None, counted))

    def _counter(self, name: str) -> int | None:
        # The counters refer to the whole area, not to a part of it.
        if self.details is None or self.size != self.vma.end - self.vma.start:
            return None
        return self.details.counters.get(name, 0)

    @property
    def is_device(self) -> bool:
        """Whether it maps something other than system memory (VM_PFNMAP; without smaps, judged by its name)."""
        if self.details is not None:
            return "pf" in self.details.flags
        return maps_a_device(self.name)


def maps_a_device(name: str) -> bool:
    """Return whether an area of this name maps something other than system memory, as far as the name shows it."""
    return name.startswith("[vvar") or (name.startswith("/dev/") and not name.startswith(_MEMORY))


_MEMORY = ("/dev/shm/", "/dev/zero", "/dev/hugepages", "/dev/mqueue")


def areas(
    target: Target,
    address: int | None = None,
    size: int | None = None,
    *,
    details: bool | None = None,
    folios: bool = False,
) -> Iterator[Area]:
    """Iterate over the areas of an address space and their contents, ascending.

    Parameters
    ----------
    target, address, size
        As for `spans`. Contents are counted in whole pages, and can therefore exceed the length of a part of an area.
    details
        Whether to read /proc/PID/smaps as well, which is the only source for locked and lazily freed memory. The
        kernel then walks whole areas, during which the task cannot map memory: 7 ms per GiB of small pages
        (measured). By default smaps is read if no area has more than `BEARABLE` bytes of small pages.
    folios
        Whether to determine the sizes of folios (mTHP, split huge pages, the page cache), which requires
        /proc/kpageflags: root.

    Raises
    ------
    IOReturnError
        As `spans`; `kIOReturnNotPrivileged`: `folios`, and frames are hidden or /proc/kpageflags cannot be read.
    """
    where = resolve(target, address, size)
    with ExitStack() as opened:
        reader = opened.enter_context(Reader(where.task, whole=where.cuts_no_huge_page))
        if folios:
            require_frames()
        frames = opened.enter_context(Frames()) if folios else None
        wanted = details if details is not None else is_bearable(where, reader)
        nothing_locked = _status(where.task, "VmLck") == 0
        known = reader.visible, reader.scans, nothing_locked, host.has_swap()
        shared_memory = SharedMemory(where.task)
        for batch in _batches(reader, _with_details(where) if wanted else zip(where.areas(), repeat(None))):
            ranges = [(vma.start, vma.end) for vma, _found in batch]
            ranges[0] = max(ranges[0][0], where.start), ranges[0][1]
            ranges[-1] = ranges[-1][0], min(ranges[-1][1], where.end)
            contents = _with_folios(reader, frames, ranges) if frames else zip(reader.totals(ranges), repeat(None))
            for (vma, found), (start, end), (tally, sizes) in zip(batch, ranges, contents, strict=True):
                yield Area(vma, start, end, tally, found, sizes, *known, vma in shared_memory)
        reader.require_task()


class SharedMemory:
    """Recognizes areas of shared memory by their file system, which is determined when it is first needed."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._devices: frozenset[str] | None = None

    def __contains__(self, vma: VMA) -> bool:
        # Of file systems without a block device, whose major number is 0.
        if not vma.inode or not vma.device.startswith("00:"):
            return False
        if self._devices is None:
            self._devices = self._find()
        return vma.device in self._devices

    def _find(self) -> frozenset[str]:
        found = set()
        with suppress(OSError):  # the kernel's own mount, which is in no list of mounts: memfd, System V, /dev/zero
            descriptor = os.memfd_create("iobmd-shmem")
            try:
                found.add(os.fstat(descriptor).st_dev)
            finally:
                os.close(descriptor)
        with suppress(OSError):
            found |= {
                os.makedev(*mount.device)
                for mount in procfs.mounts(self._task.pid)
                if mount.kind in ("tmpfs", "devtmpfs")
            }
        return frozenset(f"{os.major(device):02x}:{os.minor(device):02x}" for device in found)


def _with_details(where: Where) -> Iterator[tuple[VMA, Details | None]]:
    low, high = where.known
    for found in of_task(where.task, procfs.details(where.task.pid)):
        if low < found.area.end and max(low, found.area.start) < high:
            yield found.area, found


def _batches(
    reader: Reader, areas: Iterator[tuple[VMA, Details | None]]
) -> Iterator[list[tuple[VMA, Details | None]]]:
    """Group neighboring small areas, so that they can be read at once."""
    batch: list[tuple[VMA, Details | None]] = []
    gap, first, last = _GAP * reader.page, 0, 0
    for area, found in areas:
        start, end = area.start, area.end
        together = end - start <= _SMALL and start - last <= gap and end - first <= reader.reach
        if batch and not (together and len(batch) < MOST):
            yield batch
            batch = []
        if not batch:
            first = start
        last = end
        batch.append((area, found))
    if batch:
        yield batch


def _with_folios(
    reader: Reader, frames: Frames, ranges: list[tuple[int, int]]
) -> Iterator[tuple[Tally, dict[int, int]]]:
    reader.read_ahead(ranges)
    for start, end in ranges:
        sizes: dict[int, int] = {}
        for step in reader.steps(start, end):
            frames.add_folios(step.raw(), pagemap.PRESENT, pagemap.HUGE | pagemap.ZERO, sizes)
        yield reader.collect(), sizes


def is_bearable(where: Where, reader: Reader) -> bool:
    """Return whether reading smaps blocks the task for no longer than a millisecond or two per area."""
    resident = _status(where.task, "VmRSS")
    if resident is not None and resident <= BEARABLE:
        return True
    return not any(reader.has_small_pages(area.start, area.end, BEARABLE + 1) for area in where.areas())


def _status(task: Task, field: str) -> int | None:
    try:
        return procfs.status_bytes(field, task.pid)
    except (OSError, KeyError):
        return None
