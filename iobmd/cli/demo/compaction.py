"""The control of the demonstration: mlocked pages that compaction or a collapse moves, unlike pinned ones."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

from iobmd import pagemap
from iobmd._native import mman
from iobmd._native.crosstask import HeldBuffer
from iobmd._native.mapping import Mapping
from iobmd.memory import pinning
from iobmd.memory.populate import populate
from iobmd.task.task import kernel_task
from iobmd.units import HUGE_PAGE_SIZE

HOLE = 64 << 10


def compact() -> bool:
    """Compact the host's memory once (vm.compact_memory, root); return whether that was permitted."""
    try:
        Path("/proc/sys/vm/compact_memory").write_text("1")
    except OSError:
        return False
    return True


def frames(address: int, size: int) -> list[int | None]:
    """Return the frame number of each page of a range of this process, None if it is absent or hidden."""
    return [page.pfn for page in pagemap.pages(kernel_task, address, size)]


def collapse(*, pin: bool) -> int:
    """Collapse mlocked small pages into a huge page (MADV_COLLAPSE, Linux 6.1); return how many of its pages moved.

    With `pin`, the pages are pinned first.
    """
    mapping = Mapping.anonymous(HUGE_PAGE_SIZE, HUGE_PAGE_SIZE)
    mman.advise(mapping.address, mapping.size, mman.MADV_NOHUGEPAGE)
    mman.lock(mapping.address, mapping.size)
    held = pinning.Pin(mapping.address, mapping.size) if pin else None
    try:
        before = frames(mapping.address, mapping.size)
        mman.advise(mapping.address, mapping.size, mman.MADV_HUGEPAGE)
        with contextlib.suppress(OSError):  # EAGAIN if pages are pinned
            mman.advise(mapping.address, mapping.size, mman.MADV_COLLAPSE)
        after = frames(mapping.address, mapping.size)
    finally:
        if held:
            held.release()
        mapping.close()
    return sum(old != new for old, new in zip(before, after, strict=True))


class ScatteredPages:
    """Mlocked, unpinned memory that is scattered: every other 64 KiB of `span` bytes."""

    def __init__(self, span: int) -> None:
        self._area = mmap.mmap(-1, span, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._held = HeldBuffer(self._area, True)
        self.address, self.size = self._held.address, span
        mman.advise(self.address, span, mman.MADV_NOHUGEPAGE)
        populate(self.address, span)
        # Before the lock, because locked memory cannot be dropped.
        for offset in range(0, span, 2 * HOLE):
            mman.advise(self.address + offset, HOLE, mman.MADV_DONTNEED)
        mman.lock_on_fault(self.address, span)
        self._before = frames(self.address, self.size)

    def moved(self) -> tuple[int, int]:
        """Return how many pages have moved to another page frame, and the total number of pages."""
        pairs = [(old, new) for old, new in zip(self._before, frames(self.address, self.size), strict=True) if old]
        return sum(old != new for old, new in pairs), len(pairs)

    def close(self) -> None:
        """Free the memory."""
        self._held.__exit__()
        self._area.close()
