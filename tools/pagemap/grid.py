"""Sums of memory in blocks, as many as fit a picture, however much memory there is."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

Sums = dict[str, int]
"""Bytes in each state."""


class Block(NamedTuple):
    """Consecutive pages of a process: as many bytes as the size of a block, except in the last one."""

    start: int
    """The address of the first page."""
    end: int
    """The end address of the last page; there may be addresses without pages, which do not count, in between."""
    sums: Sums


class Grid:
    """The pages of a process in blocks of equal size, each with its sums by state and their physical positions.

    A block is addressed by its position: the number of bytes of pages before it. Addresses without pages have no
    position. Blocks are as small as the limits permit: if there are too many, they are joined in pairs. The grid is
    therefore filled in one pass, and its size does not depend on the amount of data.

    Parameters
    ----------
    limit : int
        Maximum number of blocks.
    physical_limit : int
        Maximum number of blocks of physical memory; 0: physical positions are not recorded.

    Attributes
    ----------
    block, physical_block : int
        Sizes of a block of pages, and of physical memory, in bytes; powers of two.
    length : int
        The bytes of pages in all blocks.
    """

    def __init__(self, limit: int, *, physical_limit: int = 0) -> None:
        self.block = self.physical_block = PAGE_SIZE
        self.length = 0
        self._limit, self._physical_limit = limit, physical_limit
        self._blocks: list[Block] = []
        self._cells: dict[int, int] = {}  # bytes; a dictionary for each cell would take three times the memory
        self._states: list[str] = []
        self._top = 0

    def add(self, address: int, physical: int | None, length: int, state: str) -> None:
        """Append pages, with the address of the first, and its physical address if it is known."""
        position, end = self.length, self.length + length
        while (end - 1) // self.block >= self._limit:
            self._join_blocks()
        if not self._physical_limit:
            physical = None
        if physical is not None:
            self.reach(physical + length)
            number = self._number(state)
        while position < end:
            column = position // self.block
            stop = min(end, (column + 1) * self.block)
            if physical is not None:
                row = physical // self.physical_block
                stop = min(stop, position + (row + 1) * self.physical_block - physical)
                key = (column << _ROW_BITS | row) << _STATE_BITS | number
                self._cells[key] = self._cells.get(key, 0) + stop - position
                physical += stop - position
            more = stop - position
            if column == len(self._blocks):
                self._blocks.append(Block(address, address + more, {state: more}))
            else:
                first, _end, sums = self._blocks[column]
                sums[state] = sums.get(state, 0) + more
                self._blocks[column] = Block(first, address + more, sums)
            address += more
            position = stop
        self.length = end

    def reach(self, physical: int) -> None:
        """Extend the blocks of physical memory up to an address."""
        while physical > self.physical_block * self._physical_limit:
            self.physical_block *= 2
            self._join_cells(column=0, row=1)
        self._top = max(self._top, physical)

    @property
    def physical_blocks(self) -> int:
        """The number of blocks of physical memory."""
        return -(-self._top // self.physical_block)

    @property
    def columns(self) -> int:
        """The number of blocks of pages."""
        return len(self._blocks)

    def blocks(self) -> list[Block]:
        """Return the blocks, by position."""
        return self._blocks

    def cells(self) -> Iterator[tuple[int, int, Sums]]:
        """Iterate over the pairs of blocks of pages and of physical memory: the number of each, and the sums."""
        for cell, keys in groupby(sorted(self._cells), lambda key: key >> _STATE_BITS):
            sums = {self._states[key & _STATE_MASK]: self._cells[key] for key in keys}
            yield cell >> _ROW_BITS, cell & _ROW_MASK, sums

    def _number(self, state: str) -> int:
        if state not in self._states:
            self._states.append(state)
        return self._states.index(state)

    def _join_blocks(self) -> None:
        self.block *= 2
        self._blocks = [_joined(self._blocks[index : index + 2]) for index in range(0, len(self._blocks), 2)]
        self._join_cells(column=1, row=0)

    def _join_cells(self, *, column: int, row: int) -> None:
        joined: defaultdict[int, int] = defaultdict(int)
        for key, length in self._cells.items():
            cell, state = key >> _STATE_BITS, key & _STATE_MASK
            cell = cell >> _ROW_BITS + column << _ROW_BITS | (cell & _ROW_MASK) >> row
            joined[cell << _STATE_BITS | state] += length
        self._cells = dict(joined)


_ROW_BITS = 44
"""Bits for the number of a physical block: 52 address bits less 12 of a page, with a reserve."""
_ROW_MASK = (1 << _ROW_BITS) - 1
_STATE_BITS = 4
_STATE_MASK = (1 << _STATE_BITS) - 1


def _joined(blocks: list[Block]) -> Block:
    sums: defaultdict[str, int] = defaultdict(int)
    for block in blocks:
        for state, length in block.sums.items():
            sums[state] += length
    return Block(blocks[0].start, blocks[-1].end, dict(sums))
