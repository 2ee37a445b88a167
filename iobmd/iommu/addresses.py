"""Allocation of a device's I/O addresses."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from iobmd.units import PAGE_SIZE, round_up

if TYPE_CHECKING:
    from collections.abc import Iterable


class Addresses:
    """The addresses that an IOMMU translates, up to a limit, and those of them that are allocated.

    Parameters
    ----------
    usable : iterable of (int, int)
        First and last address of each range.
    highest : int
        The highest address of the device.
    """

    def __init__(self, usable: Iterable[tuple[int, int]], highest: int) -> None:
        # Not the first page: many devices treat address 0 as no address.
        self.usable = [
            (max(first, PAGE_SIZE), min(last, highest)) for first, last in sorted(usable) if first <= highest
        ]
        self._allocated: list[tuple[int, int]] = []

    def allocate(self, size: int, alignment: int, highest: int | None = None) -> int | None:
        """Allocate the lowest free `size` bytes, aligned to `alignment` and up to `highest`, or None."""
        for first, last in self.usable:
            at = round_up(first, alignment)
            for start, end in self._allocated:
                if end > at and start < at + size:
                    at = round_up(end, alignment)
            if at + size - 1 <= (last if highest is None else min(last, highest)):
                bisect.insort(self._allocated, (at, at + size))
                return at
        return None

    def release(self, address: int, size: int) -> None:
        """Free them."""
        self._allocated.remove((address, address + size))
