"""Sums over areas."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iobmd.pagemap.area import Area


class Total:
    """The sums of several areas, in bytes; None if the value is unknown for one of them."""

    def __init__(self) -> None:
        self.areas = self.size = self.resident = self.anonymous = self.file_or_shared = self.shared = 0
        self.exclusive = self.zero = self.guard = self.device = self.runs = self.largest = 0
        self.in_runs = self.ascending = self.descending = 0
        self.swapped: int | None = 0
        self.marker: int | None = 0
        self.huge: int | None = 0
        self.locked: int | None = 0
        self.lazy_free: int | None = 0
        self.folios: Counter[int] = Counter()

    def counted(self, area: Area) -> Area:
        """Add an area, and return it."""
        tally = area.tally
        self.areas += 1
        self.size += area.size
        self.resident += area.resident
        self.anonymous += area.anonymous
        self.file_or_shared += area.file_or_shared
        self.shared += area.shared
        self.swapped = _sum(self.swapped, area.swapped)
        self.exclusive += tally.exclusive
        self.zero += tally.zero
        self.guard += tally.guard
        self.marker = _sum(self.marker, area.marker)
        self.device += area.device
        self.huge = _sum(self.huge, area.huge)
        self.locked = _sum(self.locked, area.locked)
        self.lazy_free = _sum(self.lazy_free, area.lazy_free)
        self.runs += tally.runs
        self.in_runs += tally.present - tally.hidden
        self.largest = max(self.largest, tally.largest)
        self.ascending += tally.ascending
        self.descending += tally.descending
        self.folios.update(area.folios or {})
        return area


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other
