"""Addresses of another bus, which a descriptor only carries (kIOMemoryRemote): this processor cannot access them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd._internal.arguments import integers
from iobmd._native import pagemap
from iobmd.backing.mapped import span
from iobmd.backing.pageless import PagelessBacking
from iobmd.errors import BadArgumentError
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from iobmd._native.pagemap import RunTable


class BusBacking(PagelessBacking):
    """Ranges of addresses of another bus, end to end.

    Parameters
    ----------
    ranges : iterable of (int, int)
        Addresses and lengths, which need not be multiples of any page size.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: an address or length exceeds 64 bits.
    """

    refusal = "these are addresses of another bus (kIOMemoryRemote): this processor cannot read, write or map them"

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self._ranges = [_checked(*one) for one in ranges]
        super().__init__(sum(length for _address, length in self._ranges))
        if self.size >> 64:
            raise BadArgumentError(f"ranges of {self.size:#x} bytes in total exceed 64 bits")
        self._runs = pagemap.listed(self._ranges)

    @property
    def runs(self) -> RunTable:
        """The addresses."""
        return self._runs

    def in_page(self, offset: int) -> int:
        """Return the offset of a byte in its page."""
        address, _length = self.runs.segment(offset, 1)
        return address % PAGE_SIZE

    def span(self, offset: int, length: int) -> int:
        """Return the total size of the pages that contain a range, counted separately for each range of addresses."""
        total = begin = 0
        for address, size in self._ranges:
            low, high = max(offset, begin), min(offset + length, begin + size)
            total += span((address + low - begin) % PAGE_SIZE, max(high - low, 0))
            begin += size
        return total


def _checked(address: int, length: int) -> tuple[int, int]:
    address, length = integers(address=address, length=length)
    if address < 0 or length < 0 or address + length > 1 << 64:
        raise BadArgumentError(f"{length} bytes at bus address {address:#x} exceed 64 bits")
    return address, length
