"""What the kernel moves: mlocked pages, strewn for compaction or collapsed. The control beside pinned memory."""

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
    """Have the whole host's memory compacted once, and say whether that was allowed (root; vm.compact_memory)."""
    try:
        Path("/proc/sys/vm/compact_memory").write_text("1")
    except OSError:
        return False
    return True


def frames(address: int, size: int) -> list[int | None]:
    """Return the frame number of each page of this process, None where there is none to see."""
    return [page.pfn for page in pagemap.pages(kernel_task, address, size)]


def collapse(*, pin: bool) -> int:
    """Have mlocked small pages collapsed into a huge page (MADV_COLLAPSE, Linux 6.1), pinned as well or not.

    Returns how many of the pages of one huge page moved.
    """
    mapping = Mapping.anonymous(HUGE_PAGE_SIZE, HUGE_PAGE_SIZE)
    mman.advise(mapping.address, mapping.size, mman.MADV_NOHUGEPAGE)
    mman.lock(mapping.address, mapping.size)
    held = pinning.Pin(mapping.address, mapping.size) if pin else None
    try:
        before = frames(mapping.address, mapping.size)
        mman.advise(mapping.address, mapping.size, mman.MADV_HUGEPAGE)
        with contextlib.suppress(OSError):  # EAGAIN for what is pinned
            mman.advise(mapping.address, mapping.size, mman.MADV_COLLAPSE)
        after = frames(mapping.address, mapping.size)
    finally:
        if held:
            held.release()
        mapping.close()
    return sum(old != new for old, new in zip(before, after, strict=True))


class Strewn:
    """Half of `span` bytes, resident by mlock and no more than that, spread over all of it."""

    def __init__(self, span: int) -> None:
        self._area = mmap.mmap(-1, span, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._held = HeldBuffer(self._area, True)
        self.address, self.size = self._held.address, span
        mman.advise(self.address, span, mman.MADV_NOHUGEPAGE)
        populate(self.address, span)
        # Holes first, for memory that is locked cannot be given back.
        for offset in range(0, span, 2 * HOLE):
            mman.advise(self.address + offset, HOLE, mman.MADV_DONTNEED)
        mman.lock_on_fault(self.address, span)
        self._before = frames(self.address, self.size)

    def moved(self) -> tuple[int, int]:
        """Return how many of how many pages lie in another frame than at first."""
        pairs = [(old, new) for old, new in zip(self._before, frames(self.address, self.size), strict=True) if old]
        return sum(old != new for old, new in pairs), len(pairs)

    def close(self) -> None:
        """Give the memory back."""
        self._held.__exit__()
        self._area.close()
