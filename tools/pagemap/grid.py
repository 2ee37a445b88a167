"""Sums of memory in blocks, as many as fit a picture, however much memory there is."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Sums = dict[str, int]
"""Bytes in each state."""


class Grid:
    """Nonempty blocks of addresses, each with its sums by state and their physical positions.

    Blocks are as small as the limits permit: if there are too many, they are joined in pairs. The grid is therefore
    filled in one pass, and its size does not depend on the amount of data.

    Parameters
    ----------
    limit : int
        Maximum number of nonempty rows of blocks.
    row : int
        Blocks per row, a power of two. A row begins at a multiple of its size.
    physical_limit : int
        Maximum number of blocks of physical memory; 0: physical positions are not recorded.

    Attributes
    ----------
    block, physical_block : int
        Sizes of a block of addresses, and of physical memory, in bytes; powers of two.
    """

    def __init__(self, limit: int, *, row: int = 1, physical_limit: int = 0) -> None:
        self.block = self.physical_block = PAGE_SIZE
        self._limit, self._row, self._physical_limit = limit, row, physical_limit
        self._blocks: dict[int, Sums] = {}
        self._rows: Counter[int] = Counter()
        self._cells: defaultdict[int, Sums] = defaultdict(dict)
        self._top = 0

    def add(self, virtual: int, physical: int | None, length: int, state: str) -> None:
        """Add a range of addresses, in bytes, and its physical start address, if known."""
        end = virtual + length
        while virtual < end:
            self._make_room(virtual, physical)
            column = virtual // self.block
            stop = min(end, (column + 1) * self.block)
            if physical is not None and self._physical_limit:
                stop = min(stop, virtual + self.physical_block - physical % self.physical_block)
                _add(self._cells[column << _SHIFT | physical // self.physical_block], state, stop - virtual)
                physical += stop - virtual
            _add(self._blocks[column], state, stop - virtual)
            virtual = stop

    def reach(self, physical: int) -> None:
        """Extend the blocks of physical memory up to an address."""
        while physical > self.physical_block * self._physical_limit:
            self.physical_block *= 2
            self._cells = _joined(self._cells, lambda key: key >> _SHIFT << _SHIFT | (key & _MASK) >> 1)
        self._top = max(self._top, physical)

    @property
    def physical_blocks(self) -> int:
        """The number of blocks of physical memory."""
        return -(-self._top // self.physical_block)

    def _make_room(self, virtual: int, physical: int | None) -> None:
        if physical is not None and physical >= self._top and self._physical_limit:
            self.reach(physical + 1)
        while (column := virtual // self.block) not in self._blocks:
            if column // self._row in self._rows or len(self._rows) < self._limit:
                self._blocks[column] = {}
                self._rows[column // self._row] += 1
            else:
                self._join_blocks()

    def _join_blocks(self) -> None:
        self.block *= 2
        self._blocks = dict(_joined(self._blocks, lambda key: key >> 1))
        self._cells = _joined(self._cells, lambda key: key >> _SHIFT + 1 << _SHIFT | key & _MASK)
        self._rows = Counter(column // self._row for column in self._blocks)

    def blocks(self) -> Iterator[tuple[int, Sums]]:
        """Iterate over the nonempty blocks, ascending: the address of each, and its sums."""
        for column in sorted(self._blocks):
            yield column * self.block, self._blocks[column]

    def totals(self) -> Sums:
        """Return the sums over all blocks."""
        totals: Counter[str] = Counter()
        for sums in self._blocks.values():
            totals.update(sums)
        return dict(totals)

    def rows(self) -> Iterator[tuple[int, list[Sums]]]:
        """Iterate over the nonempty rows, ascending: the address of each, and the sums of its blocks."""
        for row in sorted(self._rows):
            first = row * self._row
            yield first * self.block, [self._blocks.get(first + index, {}) for index in range(self._row)]

    def cells(self) -> Iterator[tuple[int, int, Sums]]:
        """Iterate over the pairs of address blocks and physical blocks: both addresses, and the sums."""
        for key in sorted(self._cells):
            yield (key >> _SHIFT) * self.block, (key & _MASK) * self.physical_block, self._cells[key]


_SHIFT = 44
"""Bits for the number of a physical block: 52 address bits less 12 of a page, with a reserve."""
_MASK = (1 << _SHIFT) - 1


def _add(sums: Sums, state: str, length: int) -> None:
    sums[state] = sums.get(state, 0) + length


def _joined(sums: dict[int, Sums], key_of: Callable[[int], int]) -> defaultdict[int, Sums]:
    joined: defaultdict[int, Sums] = defaultdict(dict)
    for key, states in sums.items():
        for state, length in states.items():
            _add(joined[key_of(key)], state, length)
    return joined
