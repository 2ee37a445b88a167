"""The areas of an address space (VMAs), and what each of them holds."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import repeat
from typing import NamedTuple

from iobmd import host, procfs
from iobmd._native import pagemap
from iobmd._native.pagemap import Tally
from iobmd.pagemap.frame import Frames, require_frames
from iobmd.pagemap.range import Target, Where, of_task, resolve
from iobmd.pagemap.reader import Reader
from iobmd.procfs import VMA, Details
from iobmd.task.task import Task

_SMALL = 2 << 20
"""Areas up to here are read several at once."""
_GAP = 128
"""Pages between two of them that cost less to read than another call does."""
MOST = 128
"""Of them at once, whatever their size."""
BEARABLE = 256 << 20
"""Bytes of small pages in one area that smaps walks through in a millisecond or two, while the task cannot mmap."""


class Area(NamedTuple):
    """One area of an address space, or the part of one that was asked for, and what it holds. Sizes are in bytes."""

    vma: VMA
    start: int
    end: int
    tally: Tally
    """What pagemap says, in bytes: `present`, and of that `hidden` (no frame number), `file`, `zero`, `exclusive`,
    `huge` and `huge_zero`; `swapped`, `guard`, `marker`, `soft_dirty`. Of the physical runs: how many (`runs`), the
    `largest`, and how many lie above (`ascending`) or below (`descending`) the one before."""
    details: Details | None
    """What smaps says, where it was read."""
    folios: dict[int, int] | None
    """Of what is mapped page by page, how many bytes lie in folios of which size; pages of no large folio count under
    the size of a page. None: not known."""
    visible: bool
    """Whether frame numbers are shown; if not there are no runs."""
    scans: bool
    """Whether there is PAGEMAP_SCAN; if not, huge pages are told by smaps alone."""
    nothing_locked: bool
    """Whether the task has locked no memory at all (VmLck)."""
    can_swap: bool
    """Whether the host has swap space."""

    @property
    def size(self) -> int:
        """Of the area."""
        return self.end - self.start

    @property
    def resident(self) -> int:
        """Mapped to memory, as RSS counts it: without the zero page, and without the memory of devices."""
        if self.is_device:
            return 0
        if not self.visible and not self.scans:  # then smaps alone tells the zero page
            told = self._counters("Rss", "Private_Hugetlb", "Shared_Hugetlb")
            if told is not None:
                return min(self.tally.present, told)
        return self.tally.present - self.tally.zero

    @property
    def device(self) -> int:
        """Mapped to what is not memory of the system, such as the registers of a device."""
        return self.tally.present - self.tally.zero if self.is_device else 0

    @property
    def file_or_shared(self) -> int:
        """Resident pages of files, or of shared memory."""
        return 0 if self.is_device else self.tally.file

    @property
    def shared(self) -> int:
        """Resident pages that others map too, or that are mapped more than once; of files or not."""
        return max(0, self.resident - self.tally.exclusive)

    @property
    def anonymous(self) -> int:
        """Resident pages that belong to no file and are not shared memory."""
        return self.resident - self.file_or_shared

    @property
    def swapped(self) -> int | None:
        """Kept in swap. Of shared memory pagemap does not tell: there it is what smaps says; None: not known."""
        if not self.can_swap:
            return 0
        told = self._counter("Swap")
        if told is None:
            may_be_shared = self.vma.inode and self.vma.device.startswith("00:")  # on a tmpfs, it may be
            return None if may_be_shared else self.tally.swapped
        # Where frames are hidden pagemap does not tell swap from the markers of userfaultfd.
        return max(self.tally.swapped, told) if self.visible else told

    @property
    def marker(self) -> int | None:
        """Neither memory nor swap: pages under migration, poisoned ones, markers of userfaultfd; None: not known.

        Where frames are hidden pagemap does not tell them from swap: they are what smaps does not count as such.
        """
        if self.visible or not self.can_swap:
            return self.tally.marker
        told = self._counter("Swap")
        return None if told is None else self.tally.marker + max(0, self.tally.swapped - told)

    @property
    def huge(self) -> int | None:
        """Resident and mapped by huge pages in the page tables: a PMD, or a page of hugetlb; None: not known."""
        if not self.scans:
            return self._counters(*procfs.HUGE)
        return self.tally.huge - self.tally.huge_zero

    @property
    def hugetlb_page(self) -> int:
        """The size of its pages where they come from a hugetlb pool and smaps was read, else 0."""
        pool = self.details is not None and "ht" in self.details.flags
        return (self._counter("KernelPageSize") or 0) if pool else 0

    @property
    def locked(self) -> int | None:
        """Resident and locked by mlock; None: not known."""
        if self.details is None:
            return 0 if self.nothing_locked else None
        return self.resident if "lo" in self.details.flags else 0

    @property
    def lazy_free(self) -> int | None:
        """Resident and given up by MADV_FREE: the kernel takes it when it is short; None: not known."""
        return self._counter("LazyFree")

    def _counters(self, *names: str) -> int | None:
        told = [self._counter(name) for name in names]
        return None if None in told else sum(filter(None, told))

    def _counter(self, name: str) -> int | None:
        # They count the whole area, which tells nothing of a part.
        if self.details is None or self.size != self.vma.end - self.vma.start:
            return None
        return self.details.counters.get(name, 0)

    @property
    def is_device(self) -> bool:
        """Whether it maps what is not memory of the system (VM_PFNMAP; without smaps judged by its name)."""
        if self.details is not None:
            return "pf" in self.details.flags
        name = self.vma.name
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
    """Iterate over the areas of an address space, ascending, with what each holds.

    Parameters
    ----------
    target, address, size
        As those of `spans`. What an area holds is told of whole pages, and so may be more than a part of it is long.
    details
        Whether to read /proc/PID/smaps too, which alone tells what is locked and what is lazily free. For that the
        kernel walks through the pages of a whole area while the task can map nothing: 7 ms a GiB of small pages
        (measured). By default it is read when no area holds more than `BEARABLE` bytes of small pages.
    folios
        Whether to tell the sizes of the folios (mTHP, split huge pages, of the page cache), which takes
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
        for batch in _batches(reader, _with_details(where) if wanted else zip(where.areas(), repeat(None))):
            ranges = [(vma.start, vma.end) for vma, _found in batch]
            ranges[0] = max(ranges[0][0], where.start), ranges[0][1]
            ranges[-1] = ranges[-1][0], min(ranges[-1][1], where.end)
            contents = _with_folios(reader, frames, ranges) if frames else zip(reader.totals(ranges), repeat(None))
            for (vma, found), (start, end), (tally, sizes) in zip(batch, ranges, contents, strict=True):
                yield Area(vma, start, end, tally, found, sizes, *known)
        reader.require_task()


def _with_details(where: Where) -> Iterator[tuple[VMA, Details | None]]:
    low, high = where.known
    for found in of_task(where.task, procfs.details(where.task.pid)):
        if low < found.area.end and max(low, found.area.start) < high:
            yield found.area, found


def _batches(
    reader: Reader, areas: Iterator[tuple[VMA, Details | None]]
) -> Iterator[list[tuple[VMA, Details | None]]]:
    """Group neighbours that are small, so that they can be read at once."""
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
        yield reader.take(), sizes


def is_bearable(where: Where, reader: Reader) -> bool:
    """Say whether reading smaps holds up no area of the task for longer than a millisecond or two."""
    resident = _status(where.task, "VmRSS")
    if resident is not None and resident <= BEARABLE:
        return True
    return not any(reader.has_small_pages(area.start, area.end, BEARABLE + 1) for area in where.areas())


def _status(task: Task, field: str) -> int | None:
    try:
        return procfs.status_bytes(field, task.pid)
    except (OSError, KeyError):
        return None
