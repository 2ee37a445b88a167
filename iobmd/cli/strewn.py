"""Mlocked small pages with a hole beside each: what compaction exists to move. The control beside pinned memory."""

from __future__ import annotations

import mmap
from pathlib import Path

from iobmd import pagemap
from iobmd._native import memory
from iobmd._native.crosstask import HeldBuffer
from iobmd.task import kernel_task

HOLE = 64 << 10


def compact() -> bool:
    """Have the whole host's memory compacted once, and say whether that was allowed (root; vm.compact_memory)."""
    try:
        Path("/proc/sys/vm/compact_memory").write_text("1")
    except OSError:
        return False
    return True


class Strewn:
    """Half of `span` bytes, resident by mlock and no more than that, spread over all of it."""

    def __init__(self, span: int) -> None:
        self._area = mmap.mmap(-1, span, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._held = HeldBuffer(self._area, True)
        self.address, self.size = self._held.address, span
        memory.advise(self.address, span, memory.MADV_NOHUGEPAGE)
        memory.advise(self.address, span, memory.MADV_POPULATE_WRITE)
        # Holes first, for memory that is locked cannot be given back.
        for offset in range(0, span, 2 * HOLE):
            memory.advise(self.address + offset, HOLE, memory.MADV_DONTNEED)
        memory.lock_on_fault(self.address, span)
        self._before = self._frames()

    def _frames(self) -> list[int | None]:
        return [page.pfn for page in pagemap.pages(kernel_task, self.address, self.size)]

    def moved(self) -> tuple[int, int]:
        """Return how many of how many pages lie in another frame than at first."""
        pairs = [(old, new) for old, new in zip(self._before, self._frames(), strict=True) if old]
        return sum(old != new for old, new in pairs), len(pairs)

    def close(self) -> None:
        """Give the memory back."""
        self._held.__exit__()
        self._area.close()
