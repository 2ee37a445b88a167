"""Transparent huge pages, selected by physical address: collected, inspected, and then sorted or freed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.memory import numa
from iobmd.memory.populate import populate
from iobmd.pagemap.self import own_runs
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE

if TYPE_CHECKING:
    from iobmd._native.pagemap import RunTable

_STEP = 32 << 20  # interrupts are handled at this interval
LONGEST = 1 << 62
"""Bytes, more than any range: as the size of huge pages, it makes `populate` disregard them."""
Each = Callable[[int], bool]
"""Called before each block with the address of the previous one (0: none); returns whether to allocate another."""
Places = dict[int, int]
"""Maps the physical address of a block to its virtual address."""


class Source(Protocol):
    """A source of blocks. `close` frees all that were not assembled."""

    block: int
    """Size of a block in bytes; blocks are aligned to it physically."""
    immovable: bool
    """Whether the pages never move, even without a pin."""
    hidden: bool
    """Whether the kernel hides the frames of this process's pages."""

    def more(self, count: int, alignment: int, each: Each | None = None) -> Places:
        """Allocate about `count` more blocks; empty if none are available.

        With `each`, they are allocated one by one, up to `count`, as long as it returns True.
        """

    def assemble(self, chosen: list[int], alignment: int) -> Mapping:
        """Return a mapping of the blocks at these positions, in this order, aligned to `alignment`."""

    def close(self) -> None:
        """Free all blocks that are held."""


def blocks_of(table: RunTable, block: int) -> Places:
    """Return the whole, aligned blocks in runs of pages."""
    places: Places = {}
    for index in range(table.count):
        virtual, physical, length = table[index]
        shift = -physical % block
        if (virtual + shift) % block == 0:
            for offset in range(shift, length - block + 1, block):
                places[physical + offset] = virtual + offset
    return places


def _spans(chosen: list[int], block: int, starts: set[int]) -> list[tuple[int, int]]:
    """Join contiguous blocks, except across the starts of mappings in `starts`; return starts and lengths."""
    spans: list[tuple[int, int]] = []
    for place in chosen:
        if spans and sum(spans[-1]) == place and place not in starts:
            spans[-1] = (spans[-1][0], spans[-1][1] + block)
        else:
            spans.append((place, block))
    return spans


class TransparentBlocks:
    """Pages of private memory, transparent huge ones or base pages, moved into place by mremap(2).

    Child processes do not inherit it until it is pinned (MADV_DOFORK).
    """

    immovable = False

    def __init__(self, block: int = HUGE_PAGE_SIZE) -> None:
        self.block = block
        self.hidden = False
        self._advice = mman.MADV_HUGEPAGE if block > PAGE_SIZE else mman.MADV_NOHUGEPAGE
        self._batches: list[Mapping] = []

    def more(self, count: int, alignment: int, each: Each | None = None) -> Places:
        """Allocate about `count` more blocks; huge pages that consist of small pages do not count."""
        size = count * self.block
        batch = Mapping.anonymous(size, self.block if self._batches else max(self.block, alignment))
        self._batches.append(batch)
        # A fork by another thread would share the huge page that is being populated, and the kernel would split it.
        mman.advise(batch.address, size, mman.MADV_DONTFORK)
        numa.place(batch.address, size)
        with contextlib.suppress(OSError):  # a kernel without huge pages: none are found
            mman.advise(batch.address, size, self._advice)
        if self.block == PAGE_SIZE:  # from the start: they mostly come from larger free blocks, in ascending order
            populate(batch.address, size, LONGEST)
        else:
            self._populate(batch.address, size, each)
        table = own_runs(batch.address, size)
        self.hidden = table.hidden > 0
        return blocks_of(table, self.block)

    def _populate(self, address: int, size: int, each: Each | None) -> None:
        """Populate large blocks from the end to the start.

        The kernel mostly allocates the most recently freed pages first, which are at descending addresses. Huge pages
        thus arrive in ascending order, and need not be moved.
        """
        most = self.block if each else max(self.block, _STEP)
        for top in range(size, 0, -most):
            step = min(most, top)
            if each and not each(address + top if top < size else 0):
                break
            done, error = mman.populate_downwards(address + top - step, step, self.block, PAGE_SIZE)
            if error:  # before 5.14, or out of memory, which is reported there
                populate(address, top - done)
                break

    def assemble(self, chosen: list[int], alignment: int) -> Mapping:
        """Move the blocks to contiguous addresses, except those that are already contiguous."""
        size = len(chosen) * self.block
        spans = _spans(chosen, self.block, {batch.address for batch in self._batches})
        if len(spans) == 1 and chosen[0] % alignment == 0:
            batch = next(batch for batch in self._batches if 0 <= chosen[0] - batch.address < batch.size)
            self._batches.remove(batch)
            batch.keep(chosen[0] - batch.address, size)
            return batch
        target = Mapping.reserve(size, max(self.block, alignment))
        place = target.address
        try:
            for start, length in spans:
                mman.move(start, place, length)
                place += length
        except BaseException:
            target.close()
            raise
        target.filled()
        return target

    def detach_first(self) -> Mapping:
        """Return the mapping of the first batch unchanged."""
        return self._batches.pop(0)

    def close(self) -> None:
        """Free all blocks that are held."""
        for batch in self._batches:
            batch.close()
        self._batches.clear()
