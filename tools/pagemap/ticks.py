"""Repeated readings of a process: its areas, and their changes since the previous reading."""

from __future__ import annotations

import heapq
import time
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from operator import attrgetter
from typing import IO, TYPE_CHECKING, NamedTuple, TypeAlias

from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.pagemap.change import changes
from iobmd.units import format_count, format_size, format_time

from .look import Look
from .snapshots import saved
from .table import amount
from .total import Total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iobmd.pagemap.area import Area
    from iobmd.pagemap.change import Change, Kind
    from iobmd.pagemap.snapshot import Snapshot
    from iobmd.procfs import VMA

    from .groups import Groups

LARGEST = 200
"""Maximum number of unchanged areas in a tick, those with the most memory: a screen does not have more lines."""


_A_MOMENT = 0.01


class Changed(NamedTuple):
    """A changed area."""

    vma: VMA
    area: Area | None
    """The present area; None if it no longer exists."""
    sums: Counter[Kind]
    """Changed bytes by kind."""


class Tick(NamedTuple):
    """One reading of a process."""

    time: float
    """Seconds since the epoch."""
    took: float
    """Seconds."""
    total: Total
    """The sums of the selected areas."""
    changed: list[Changed]
    """Areas that changed since the last reading, ascending."""
    largest: list[Area]
    """The unchanged areas with the most memory, largest first."""
    groups: Groups
    """The selected areas by what they map."""
    changed_groups: dict[str, Counter[Kind]]
    """The changes by the names of the groups."""
    first: bool

    @property
    def sums(self) -> Counter[Kind]:
        """The changes of all areas."""
        return sum((one.sums for one in self.changed), Counter())


def ticks(
    look: Look,
    files: tuple[IO[bytes], IO[bytes]],
    interval: float,
    count: int | None,
    *,
    wait: Callable[[float], None] = time.sleep,
    rank: Callable[[Area], float] = attrgetter("resident"),
) -> Iterator[Tick]:
    """Iterate over ticks, `interval` seconds apart or as fast as possible, until the process exits.

    `wait` is called with the time until the next one, in seconds; `rank` selects the unchanged areas of a tick: those
    with the highest values.
    """
    before: Snapshot | None = None
    number = 0
    while count is None or number < count:
        begin = time.monotonic()
        try:
            look.ask_anew()
            now = saved(look, files[number % 2])
            happened_in = attributed(changes(before, now, joined=False), (now, before)) if before else {}
            total, changed, largest, gone, groups = _looked(look, happened_in, rank)
        except IOReturnError as error:
            if error.code != IOReturn.kIOReturnNotFound:
                raise
            if look.task.alive:  # it has executed another program
                time.sleep(_A_MOMENT)
                continue
            if not number:
                raise
            look.has_ended = True
            return
        if before:
            changed.extend(_gone(look, (now, before), gone))
        changed_groups: defaultdict[str, Counter[Kind]] = defaultdict(Counter)
        for vma, _area, sums in changed:
            changed_groups[groups.name_of(vma)].update(sums)
        yield Tick(
            time.time(),
            time.monotonic() - begin,
            total,
            sorted(changed, key=lambda one: one.vma),
            largest,
            groups,
            changed_groups,
            not number,
        )
        before = now
        number += 1
        if count is None or number < count:
            wait(max(0.0, begin + interval - time.monotonic()))


Bounds: TypeAlias = tuple[int, int]
"""The start and end of an area."""


class _Bounds:
    """A compact list of the bounds of the areas of a snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._starts, self._ends = array("Q"), array("Q")
        for area in snapshot.areas():
            self._starts.append(area.start)
            self._ends.append(area.end)

    def cut(self, start: int, end: int) -> Iterator[tuple[int, int, Bounds | None]]:
        """Split a range at the bounds of areas; yield the start and end of each part, and its area."""
        index = bisect_right(self._ends, start)
        while start < end:
            low, high = (self._starts[index], self._ends[index]) if index < len(self._starts) else (end, end)
            stop = min(end, low if start < low else high)
            yield start, stop, None if start < low else (low, high)
            index += stop == high
            start = stop


def attributed(found: Iterator[Change], snapshots: tuple[Snapshot, Snapshot]) -> dict[Bounds, Counter[Kind]]:
    """Add up the changes by area, ascending; the area is that of the first snapshot that has one at the address."""
    now, before = map(_Bounds, snapshots)
    sums: dict[Bounds, Counter[Kind]] = {}
    for change in found:
        for start, end, area in now.cut(change.virtual, change.virtual + change.length):
            for first, last, where in [(start, end, area)] if area else before.cut(start, end):
                sums.setdefault(where or (first, last), Counter())[change.kind] += last - first
    return dict(sorted(sums.items()))


def _looked(
    look: Look, happened_in: dict[Bounds, Counter[Kind]], rank: Callable[[Area], float]
) -> tuple[Total, list[Changed], list[Area], dict[Bounds, Counter[Kind]], Groups]:
    """Read the areas; the result includes the changes of areas that no longer exist.

    Since the snapshot they may have grown or shrunk: changes of a part of an area are attributed to it.
    """
    total = Total()
    changed = []
    groups = look.make_groups()
    largest: list[tuple[float, int, Area]] = []
    gone: dict[Bounds, Counter[Kind]] = {}
    waiting = deque(happened_in.items())
    for number, area in enumerate(look.all_areas()):
        sums: Counter[Kind] = Counter()
        while waiting and waiting[0][0][0] < area.vma.end:
            bounds, more = waiting.popleft()
            if bounds[1] <= area.vma.start:
                gone[bounds] = more
            else:
                sums.update(more)
        if not look.chooses(area):
            continue
        total.counted(area)
        groups.counted(area)
        if sums:
            changed.append(Changed(area.vma, area, sums))
            continue
        keep = heapq.heappush if len(largest) < LARGEST else heapq.heappushpop
        keep(largest, (rank(area), -number, area))
    gone.update(waiting)
    return total, changed, [area for _rank, _number, area in sorted(largest, reverse=True)], gone, groups


def _gone(
    look: Look, snapshots: tuple[Snapshot, Snapshot], happened_in: dict[Bounds, Counter[Kind]]
) -> Iterator[Changed]:
    """Iterate over the remaining areas in `happened_in` that are selected."""
    for snapshot in snapshots:
        for vma in snapshot.areas() if happened_in else ():
            sums = happened_in.pop((vma.start, vma.end), None)
            if sums and look.may_choose(vma, vma.end - vma.start):
                yield Changed(vma, None, sums)


def line(tick: Tick) -> str:
    """Format a tick as a line."""
    total = tick.total
    when = time.strftime("%T", time.localtime(tick.time))
    news = "" if tick.first else f": {happened(tick.sums) or 'nothing changed'}"
    return (
        f"{when}  {format_count(total.areas, 'area')}, resident {amount(total.resident)}, "
        f"swapped {amount(total.swapped)}, "
        f"huge {amount(total.huge)}{news} (read in {format_time(tick.took)})"
    )


def happened(sums: Counter[Kind]) -> str:
    """Format the changes."""
    return ", ".join(f"{format_size(size)} {kind}" for kind, size in sums.most_common())
