"""`--watch`: the changes in a process, read repeatedly."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import TYPE_CHECKING

from iobmd.printable import printable

from .document import VERSION, hidden_member, summary
from .look import Look
from .table import show_head
from .ticks import happened, line, ticks

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from .ticks import Tick


_DUMB = (None, "", "dumb", "unknown")
"""Types of terminals that cannot move the cursor: they get lines."""


def run(arguments: argparse.Namespace) -> None:
    """Show the ticks until the requested count, the exit of the process, or Ctrl-C."""
    look = Look(arguments)
    with tempfile.TemporaryFile() as even, tempfile.TemporaryFile() as odd:
        try:
            if sys.stdout.isatty() and os.environ.get("TERM") not in _DUMB and not arguments.json:
                from .live import show  # noqa: PLC0415 (slow to load)

                show(look, (even, odd), arguments)
            else:
                looks = ticks(look, (even, odd), arguments.watch, arguments.count)
                (_write if arguments.json else _print)(look, looks)
        except KeyboardInterrupt:
            pass  # the usual way to end it
    if look.has_ended:  # printed after the view on the terminal is closed
        print(f"{look.title} has exited", file=sys.stderr)


def _print(look: Look, looks: Iterator[Tick]) -> None:
    show_head(look)
    for tick in looks:
        print(line(tick))
        for vma, _area, sums in tick.changed:
            print(f"{f'{vma.start:x}-{vma.end:x}':>39} {happened(sums)}  {printable(tick.groups.name_of(vma))}")
        sys.stdout.flush()


def _write(look: Look, looks: Iterator[Tick]) -> None:
    """Print a JSON document per tick, one per line."""
    for tick in looks:
        changed = [
            {"start": vma.start, "end": vma.end, "name": vma.name, "kind": kind, "length": length}
            for vma, _area, sums in tick.changed
            for kind, length in sums.items()
        ]
        head = {"version": VERSION, "pid": look.task.pid, "name": look.name, "time": round(tick.time, 3)}
        found = {"summary": summary(tick.total, look.frames), "changes": changed}
        print(json.dumps(head | hidden_member(look.hidden) | found), flush=True)
