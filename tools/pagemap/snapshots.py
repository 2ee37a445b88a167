"""`--save` and `--diff`: snapshots, and the changes since one was saved."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from typing import IO, TYPE_CHECKING, NamedTuple

from iobmd import host
from iobmd.cli.folding import show, terminal_width
from iobmd.pagemap.change import Kind, changes
from iobmd.pagemap.snapshot import Snapshot, save
from iobmd.printable import printable
from iobmd.units import format_size

from .document import VERSION, hidden_member, members, write_list
from .groups import Groups
from .look import SWAPPED_SHARED, Hidden, Look
from .table import shortened, show_hidden

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from iobmd.procfs import VMA


def run(arguments: argparse.Namespace) -> None:
    """Save a snapshot, or print the changes since one."""
    if arguments.save is not None:
        _save(Look(arguments), arguments.save)
        return
    before = Snapshot(arguments.diff)
    if arguments.range is None:
        arguments.range = before.header.start, before.header.end
    look = Look(arguments)
    report = _write if arguments.json else _show
    with tempfile.TemporaryFile() as file:
        report(before, saved(look, file))


def saved(look: Look, file: IO[bytes]) -> Snapshot:
    """Save a snapshot to an open file, replacing its contents, and return it.

    The file needs no name: one in TMPDIR could be replaced by the user who owns that directory.
    """
    file.seek(0)
    file.truncate()
    path = f"/proc/self/fd/{file.fileno()}"
    save(look.where, path)
    return Snapshot(path)


def _save(look: Look, path: str) -> None:
    save(look.where, "/dev/stdout" if path == "-" else path)
    restless = look.restless()
    print(f"saved {look.title} to {path}" + (f"; {restless}" if restless else ""), file=sys.stderr)


def _write(before: Snapshot, after: Snapshot) -> None:
    head = {"version": VERSION, "before": before.header._asdict(), "after": after.header._asdict()}
    print("{" + members(head | hidden_member(_hidden(before, after))) + ',\n"changes": [', end="")
    write_list(row._asdict() for row in _rows(before, after, lambda area: area.name))
    print("]}")


def _show(before: Snapshot, after: Snapshot) -> None:
    old, new = before.header, after.header
    print(
        f"{printable(new.name)} ({new.pid}) against {printable(old.name)} ({old.pid}) of "
        f"{time.strftime('%F %T', time.localtime(old.time))}, {new.time - old.time:.0f} s before"
    )
    width = terminal_width()
    show_hidden(_hidden(before, after), width)
    sums: Counter[Kind] = Counter()
    for kind, start, end, name in _rows(before, after, Groups().name_of):
        sums[kind] += end - start
        cells = f"{f'{start:x}-{end:x}':>29} {format_size(end - start):>9} {kind:14}  "
        shown = printable(name)
        print(f"{cells}{shortened(shown, width - 1 - len(cells)) if width else shown}".rstrip())
    print()
    show(", ".join(f"{format_size(size)} {kind}" for kind, size in sums.items()) or "nothing changed", width)


def _hidden(before: Snapshot, after: Snapshot) -> list[Hidden]:
    found = []
    if host.has_swap():
        found.append(SWAPPED_SHARED)
    if not (before.header.frames_visible and after.header.frames_visible):
        why = "frame numbers are hidden in one of the two"
        found.append(Hidden("moved pages, and which swap entries are markers", why, host.capability_remedy()))
    return found


class _Row(NamedTuple):
    """Contiguous pages with the same change, in areas of the same name."""

    kind: Kind
    start: int
    end: int
    name: str


def _rows(before: Snapshot, after: Snapshot, name_of: Callable[[VMA], str]) -> Iterator[_Row]:
    """Join the changes to rows."""
    old, new = _Names(before, name_of), _Names(after, name_of)
    last: _Row | None = None
    for change in changes(before, after):
        names = old if change.kind in (Kind.UNMAPPED, Kind.RELEASED) else new
        row = _Row(change.kind, change.virtual, change.virtual + change.length, names.at(change.virtual))
        if last and (last.kind, last.end, last.name) == (row.kind, row.start, row.name):
            last = last._replace(end=row.end)
            continue
        if last:
            yield last
        last = row
    if last:
        yield last


class _Names:
    """The names of the areas of a snapshot, which are read again for each ascending sequence of addresses."""

    def __init__(self, snapshot: Snapshot, name_of: Callable[[VMA], str]) -> None:
        self._snapshot = snapshot
        self._name_of = name_of
        self._last = -1
        self._areas: Iterator[VMA] = iter(())
        self._area: VMA | None = None

    def at(self, address: int) -> str:
        """Return the name of the area that contains an address; empty if there is none."""
        if address < self._last or self._last < 0:
            self._areas = self._snapshot.areas()
            self._area = next(self._areas, None)
        self._last = address
        while self._area and self._area.end <= address:
            self._area = next(self._areas, None)
        return self._name_of(self._area) if self._area and self._area.start <= address else ""
