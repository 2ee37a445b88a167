"""The physical layout of a pinned range."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iobmd.units import format_size

if TYPE_CHECKING:
    from iobmd._native.pagemap import RunTable


class Layout(NamedTuple):
    """The physical layout of a range; sizes in bytes."""

    size: int
    """Length of the range."""
    runs: int
    """Number of physically contiguous runs."""
    largest: int
    """Length of the longest run."""
    huge: int
    """Bytes mapped by huge pages."""
    lowest: int
    """Lowest physical address."""
    highest: int
    """Highest physical address, that of the last byte."""

    @property
    def contiguous(self) -> bool:
        """Whether it is a single run."""
        return self.runs == 1

    def __str__(self) -> str:
        shape = "contiguous" if self.contiguous else f"{self.runs} runs, the largest {format_size(self.largest)}"
        return f"{shape}, {self.lowest:#x}…{self.highest:#x}, {format_size(self.huge)} in huge pages"


def layout(table: RunTable, huge: int) -> Layout:
    """Summarize the runs of a range with `huge` bytes that are mapped by huge pages."""
    size = largest = highest = 0
    lowest = 1 << 64
    for index in range(table.count):
        _virtual, physical, length = table[index]
        size, largest = size + length, max(largest, length)
        lowest, highest = min(lowest, physical), max(highest, physical + length - 1)
    return Layout(size, table.count, largest, huge, lowest, highest)
