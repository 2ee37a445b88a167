"""Sums over areas: the figures of one row of a table, whether it is an area, a group of areas, or all of them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iobmd.pagemap.area import Area

_NO_FOLIOS: Counter[int] = Counter()


class Total:
    """The sums of several areas, in bytes; None if the value is unknown for one of them.

    Attributes
    ----------
    areas, processes : int
        The number of areas, and of processes in sums of several.
    size, resident, anonymous, file, shmem, file_or_shared, shared, uss, zero, guard, device : int
        As the properties of `Area`, or of its tally.
    pss, swapped, marker, huge, locked, lazy_free : int or None
        The same; None if unknown.
    thp_eligible : int or None
        The size of the areas where the kernel may use transparent huge pages.
    runs, largest, in_runs, ascending, descending : int
        The number of physical runs, the largest, the bytes in them, and their order.
    folios : Counter or None
        Bytes that are mapped page by page, by the size of their folio.
    """

    __slots__ = (
        "anonymous", "areas", "ascending", "descending", "device", "exclusive", "file", "file_or_shared", "folios",
        "guard", "huge", "in_runs", "largest", "lazy_free", "locked", "marker", "processes", "pss", "resident",
        "runs", "shared", "shmem", "size", "swapped", "thp_eligible", "uss", "zero",
    )  # fmt: skip

    def __init__(self) -> None:
        self.areas = self.size = self.resident = self.anonymous = self.file_or_shared = self.shared = 0
        self.file = self.shmem = self.uss = 0
        self.exclusive = self.zero = self.guard = self.device = self.runs = self.largest = 0
        self.processes = 0
        self.in_runs = self.ascending = self.descending = 0
        self.pss: int | None = 0
        self.swapped: int | None = 0
        self.marker: int | None = 0
        self.huge: int | None = 0
        self.locked: int | None = 0
        self.lazy_free: int | None = 0
        self.thp_eligible: int | None = 0
        self.folios: Counter[int] | None = _NO_FOLIOS  # most have none

    def counted(self, area: Area) -> Area:
        """Add an area, and return it."""
        tally = area.tally
        self.areas += 1
        self.size += area.size
        self.resident += area.resident
        self.anonymous += area.anonymous
        self.file_or_shared += area.file_or_shared
        self.file += area.file
        self.shmem += area.shmem
        self.shared += area.shared
        self.uss += area.uss
        self.pss = _sum(self.pss, area.pss)
        self.swapped = _sum(self.swapped, area.swapped)
        self.exclusive += tally.exclusive
        self.zero += tally.zero
        self.guard += tally.guard
        self.marker = _sum(self.marker, area.marker)
        self.device += area.device
        self.huge = _sum(self.huge, area.huge)
        self.locked = _sum(self.locked, area.locked)
        self.lazy_free = _sum(self.lazy_free, area.lazy_free)
        eligible = area.thp_eligible
        self.thp_eligible = _sum(self.thp_eligible, None if eligible is None else area.size * eligible)
        self.runs += tally.runs
        self.in_runs += tally.present - tally.hidden
        self.largest = max(self.largest, tally.largest)
        self.ascending += tally.ascending
        self.descending += tally.descending
        self._add_folios(area.folios)
        return area

    def add(self, other: Total) -> None:
        """Add the sums of other areas."""
        for name in self.__slots__:
            if name in ("folios", "largest"):
                continue
            setattr(self, name, _sum(getattr(self, name), getattr(other, name)))
        self.largest = max(self.largest, other.largest)
        self._add_folios(other.folios)

    def _add_folios(self, folios: dict[int, int] | None) -> None:
        if folios is None:
            self.folios = None
        elif folios and self.folios is not None:
            if self.folios is _NO_FOLIOS:
                self.folios = Counter()
            self.folios.update(folios)


def total_of(area: Area) -> Total:
    """Return the figures of one area."""
    total = Total()
    total.counted(area)
    return total


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other
