"""Addresses of a device's own: which of them are free."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from iobmd.units import PAGE_SIZE, round_up

if TYPE_CHECKING:
    from collections.abc import Iterable


class Addresses:
    """The addresses that an IOMMU translates, up to a limit, and those of them that are taken.

    Parameters
    ----------
    usable : iterable of (int, int)
        First and last address of each range.
    highest : int
        The highest address that the device can put out.
    """

    def __init__(self, usable: Iterable[tuple[int, int]], highest: int) -> None:
        # Not the first page: many devices take the address 0 for none.
        self.usable = [
            (max(first, PAGE_SIZE), min(last, highest)) for first, last in sorted(usable) if first <= highest
        ]
        self._taken: list[tuple[int, int]] = []

    def take(self, size: int, alignment: int) -> int | None:
        """Take the lowest `size` bytes that are free, at a multiple of `alignment`; None when there are none."""
        for first, last in self.usable:
            at = round_up(first, alignment)
            for start, end in self._taken:
                if end > at and start < at + size:
                    at = round_up(end, alignment)
            if at + size - 1 <= last:
                bisect.insort(self._taken, (at, at + size))
                return at
        return None

    def give_back(self, address: int, size: int) -> None:
        """Have them free again."""
        self._taken.remove((address, address + size))
