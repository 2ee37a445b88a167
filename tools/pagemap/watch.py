"""`--watch`: what changes in a process, look after look."""

from __future__ import annotations

import heapq
import json
import sys
import tempfile
import time
from array import array
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from iobmd.cli.printable import printable
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.pagemap.change import changes
from iobmd.pagemap.snapshot import Snapshot, save
from iobmd.units import format_size

from .document import VERSION, hidden_member, summary
from .look import Look
from .table import amount, show_head
from .total import Total

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from iobmd.pagemap.area import Area
    from iobmd.pagemap.change import Change, Kind
    from iobmd.procfs import VMA

LARGEST = 200
"""How many areas to which nothing happened a look keeps, those with most memory: a screen has no more lines."""


_A_MOMENT = 0.01


class Changed(NamedTuple):
    """An area to which something happened."""

    vma: VMA
    area: Area | None
    """None: it is gone."""
    sums: Counter[Kind]
    """Bytes to which it happened."""


class Tick(NamedTuple):
    """One look at a process."""

    time: float
    """Seconds since the epoch."""
    took: float
    """Seconds."""
    total: Total
    """Of all areas that were chosen."""
    changed: list[Changed]
    """Since the last look, ascending."""
    largest: list[Area]
    """Of the others, those with most memory, the largest first."""
    first: bool

    @property
    def sums(self) -> Counter[Kind]:
        """What happened to all of it."""
        return sum((one.sums for one in self.changed), Counter())


def run(arguments: argparse.Namespace) -> None:
    """Show the looks until there were enough, the process ends or Ctrl-C."""
    look = Look(arguments)
    with tempfile.TemporaryDirectory(prefix="iobmd-") as folder:
        looks = ticks(look, Path(folder), arguments.watch, arguments.count)
        try:
            if arguments.json:
                _write(look, looks)
            elif sys.stdout.isatty():
                from .live import show  # noqa: PLC0415 (slow to load)

                show(look, looks)
            else:
                _print(look, looks)
        except KeyboardInterrupt:
            pass  # the way to end it


def ticks(look: Look, folder: Path, interval: float, count: int | None) -> Iterator[Tick]:
    """Iterate over looks, `interval` seconds apart or as fast as one can look; ends when the process does."""
    before: Snapshot | None = None
    number = 0
    while count is None or number < count:
        begin = time.monotonic()
        try:
            now = _saved(look, folder / f"{number % 2}")
            happened_in = attributed(changes(before, now), (now, before)) if before else {}
            total, changed, largest = _looked(look, happened_in)
        except IOReturnError as error:
            if error.code != IOReturn.kIOReturnNotFound:
                raise
            if look.task.alive:  # it runs another program
                time.sleep(_A_MOMENT)
                continue
            if not number:
                raise
            print(f"{look.title} has ended", file=sys.stderr)
            return
        if before:
            changed.extend(_gone(look, before, happened_in))
        yield Tick(
            time.time(),
            time.monotonic() - begin,
            total,
            sorted(changed, key=lambda one: one.vma),
            largest,
            not number,
        )
        before = now
        number += 1
        if count is None or number < count:
            time.sleep(max(0.0, begin + interval - time.monotonic()))


def _saved(look: Look, path: Path) -> Snapshot:
    look.name_anew()
    save(look.where, path)
    return Snapshot(path)


class _Bounds:
    """Where the areas of a snapshot begin and end, in little memory."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._starts, self._ends = array("Q"), array("Q")
        for area in snapshot.areas():
            self._starts.append(area.start)
            self._ends.append(area.end)

    def at(self, address: int) -> tuple[int, int] | None:
        """Return the start and end of the area that has an address."""
        index = bisect_right(self._ends, address)
        found = index < len(self._starts) and self._starts[index] <= address
        return (self._starts[index], self._ends[index]) if found else None


def attributed(found: Iterator[Change], snapshots: tuple[Snapshot, Snapshot]) -> dict[tuple[int, int], Counter[Kind]]:
    """Add up what happened by area, its start and end: by that of the first snapshot that has one there."""
    now, before = map(_Bounds, snapshots)
    sums: dict[tuple[int, int], Counter[Kind]] = {}
    for change in found:
        if area := now.at(change.virtual) or before.at(change.virtual):
            sums.setdefault(area, Counter())[change.kind] += change.length
    return sums


def _looked(look: Look, happened_in: dict[tuple[int, int], Counter[Kind]]) -> tuple[Total, list[Changed], list[Area]]:
    """Look at the areas, and take out of `happened_in` what happened to those."""
    total = Total()
    changed = []
    largest: list[tuple[int, int, Area]] = []
    for number, area in enumerate(look.all_areas()):
        sums = happened_in.pop((area.vma.start, area.vma.end), None)
        if not look.chooses(area):
            continue
        total.counted(area)
        if sums:
            changed.append(Changed(area.vma, area, sums))
            continue
        keep = heapq.heappush if len(largest) < LARGEST else heapq.heappushpop
        keep(largest, (area.resident, -number, area))
    return total, changed, [area for _resident, _number, area in sorted(largest, reverse=True)]


def _gone(look: Look, before: Snapshot, happened_in: dict[tuple[int, int], Counter[Kind]]) -> Iterator[Changed]:
    """Iterate over the areas of the last look that are left in `happened_in`, as far as those are chosen."""
    for vma in before.areas() if happened_in else ():
        sums = happened_in.get((vma.start, vma.end))
        if sums and look.may_choose(vma, vma.end - vma.start):
            yield Changed(vma, None, sums)


def line(tick: Tick) -> str:
    """Write a look as a line."""
    total = tick.total
    when = time.strftime("%T", time.localtime(tick.time))
    news = "" if tick.first else f": {happened(tick.sums) or 'nothing changed'}"
    return (
        f"{when}  {total.areas:,} areas, resident {amount(total.resident)}, swapped {amount(total.swapped)}, "
        f"huge {amount(total.huge)}{news} (read in {tick.took:.2g} s)"
    )


def happened(sums: Counter[Kind]) -> str:
    """Write what happened."""
    return ", ".join(f"{format_size(size)} {kind}" for kind, size in sums.most_common())


def _print(look: Look, looks: Iterator[Tick]) -> None:
    show_head(look)
    for tick in looks:
        print(line(tick))
        for vma, _area, sums in tick.changed:
            print(f"{f'{vma.start:x}-{vma.end:x}':>39} {happened(sums)}  {printable(vma.name)}")
        sys.stdout.flush()


def _write(look: Look, looks: Iterator[Tick]) -> None:
    """Print a JSON document for each look, a line each."""
    for tick in looks:
        changed = [
            {"start": vma.start, "end": vma.end, "name": vma.name, "kind": kind, "length": length}
            for vma, _area, sums in tick.changed
            for kind, length in sums.items()
        ]
        head = {"version": VERSION, "pid": look.task.pid, "name": look.name, "time": round(tick.time, 3)}
        found = {"summary": summary(tick.total, look.frames), "changes": changed}
        print(json.dumps(head | hidden_member(look.hidden) | found), flush=True)
