"""`--watch`: what changes in a process, look after look."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.pagemap.change import Kind, changes
from iobmd.pagemap.snapshot import Snapshot, save
from iobmd.units import format_size

from .document import VERSION, summary
from .look import Look
from .table import amount, show_head
from .total import Total

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from iobmd.pagemap.area import Area
    from iobmd.pagemap.change import Change
    from iobmd.procfs import VMA


class Tick(NamedTuple):
    """One look at a process."""

    time: float
    """Seconds since the epoch."""
    took: float
    """Seconds."""
    areas: list[Area]
    """Those that were chosen, in the order that was asked for."""
    total: Total
    changed: dict[VMA, Counter[Kind]]
    """Bytes to which something happened since the last look, by area; also areas that are gone."""
    first: bool

    @property
    def sums(self) -> Counter[Kind]:
        """Over all areas."""
        return sum(self.changed.values(), Counter())


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
    old: list[VMA] = []
    number = 0
    while count is None or number < count:
        begin = time.monotonic()
        try:
            path = folder / f"{number % 2}"
            save(look.where, path)
            now = Snapshot(path)
            areas = list(look.areas())
        except IOReturnError as error:
            if number and error.code == IOReturn.kIOReturnNotFound:
                print(f"{look.name} ({look.task.pid}) has ended", file=sys.stderr)
                return
            raise
        new = sorted(area.vma for area in areas)
        changed = attributed(changes(before, now), (new, old)) if before else {}
        yield Tick(time.time(), time.monotonic() - begin, areas, _total(areas), changed, not number)
        before, old = now, new
        number += 1
        if count is None or number < count:
            time.sleep(max(0.0, begin + interval - time.monotonic()))


def attributed(found: Iterator[Change], areas: Sequence[Sequence[VMA]]) -> dict[VMA, Counter[Kind]]:
    """Add up what happened by area: by the first of several ascending lists that has one there."""
    sums: dict[VMA, Counter[Kind]] = {}
    for change in found:
        if area := next(filter(None, (_at(some, change.virtual) for some in areas)), None):
            sums.setdefault(area, Counter())[change.kind] += change.length
    return sums


def _at(areas: Sequence[VMA], address: int) -> VMA | None:
    index = bisect_right(areas, address, key=lambda area: area.end)
    return areas[index] if index < len(areas) and areas[index].start <= address else None


def _total(areas: list[Area]) -> Total:
    total = Total()
    for area in areas:
        total.add(area)
    return total


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
        for area, sums in sorted(tick.changed.items()):
            print(f"{f'{area.start:x}-{area.end:x}':>39} {happened(sums)}  {area.name}")
        sys.stdout.flush()


def _write(look: Look, looks: Iterator[Tick]) -> None:
    """Print a JSON document for each look, a line each."""
    for tick in looks:
        changed = [
            {"start": area.start, "end": area.end, "name": area.name, "kind": kind, "length": length}
            for area, sums in sorted(tick.changed.items())
            for kind, length in sums.items()
        ]
        head = {"version": VERSION, "pid": look.task.pid, "name": look.name, "time": round(tick.time, 3)}
        print(json.dumps(head | {"summary": summary(tick.total, look.frames), "changes": changed}), flush=True)
