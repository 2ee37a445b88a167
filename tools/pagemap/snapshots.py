"""`--save` and `--diff`: snapshots, and the changes since one was saved."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from typing import IO, TYPE_CHECKING

from iobmd import host
from iobmd.cli.printable import printable
from iobmd.pagemap.change import changes
from iobmd.pagemap.snapshot import Snapshot, save
from iobmd.units import format_size

from .document import VERSION, hidden_member, members, write_list
from .look import SWAPPED_SHARED, Hidden, Look
from .table import show_hidden

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from iobmd.pagemap.change import Change, Kind


def run(arguments: argparse.Namespace) -> None:
    """Save a snapshot, or print the changes since one."""
    if arguments.save is not None:
        _save(Look(arguments), arguments.save)
        return
    before = Snapshot(arguments.diff)
    if arguments.range is None:
        arguments.range = before.header.start, before.header.end
    look = Look(arguments)
    show = _write if arguments.json else _show
    with tempfile.TemporaryFile() as file:
        show(before, saved(look, file))


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
    write_list({"kind": kind, "start": start, "end": end} for kind, start, end in _joined(changes(before, after)))
    print("]}")


def _show(before: Snapshot, after: Snapshot) -> None:
    old, new = before.header, after.header
    print(
        f"{printable(new.name)} ({new.pid}) against {printable(old.name)} ({old.pid}) of "
        f"{time.strftime('%F %T', time.localtime(old.time))}, {new.time - old.time:.0f} s before"
    )
    show_hidden(_hidden(before, after))
    sums: Counter[Kind] = Counter()
    for kind, start, end in _joined(changes(before, after)):
        sums[kind] += end - start
        print(f"{f'{start:x}-{end:x}':>29} {format_size(end - start):>9} {kind}")
    print("\n" + (", ".join(f"{format_size(size)} {kind}" for kind, size in sums.items()) or "nothing changed"))


def _hidden(before: Snapshot, after: Snapshot) -> list[Hidden]:
    found = []
    if host.has_swap():
        found.append(SWAPPED_SHARED)
    if not (before.header.frames_visible and after.header.frames_visible):
        why = "frame numbers are hidden in one of the two"
        found.append(Hidden("moved pages, and which swap entries are markers", why, host.capability_remedy()))
    return found


def _joined(found: Iterator[Change]) -> Iterator[tuple[Kind, int, int]]:
    """Join contiguous pages with the same change."""
    last: tuple[Kind, int, int] | None = None
    for change in found:
        end = change.virtual + change.length
        if last and last[0] == change.kind and last[2] == change.virtual:
            last = change.kind, last[1], end
            continue
        if last:
            yield last
        last = change.kind, change.virtual, end
    if last:
        yield last
