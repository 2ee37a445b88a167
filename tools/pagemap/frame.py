"""`--frame`: what certain frames are, and which processes map them."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING

from iobmd import host
from iobmd.cli.printable import printable
from iobmd.errors import IOReturnError
from iobmd.pagemap.frame import Frames, require_frames, users
from iobmd.units import PAGE_SIZE, format_size

from .document import VERSION, hidden_member, members, write_list
from .look import Hidden
from .table import show_hidden

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from iobmd.pagemap.frame import FrameFacts, Use


def run(arguments: argparse.Namespace) -> None:
    """Print them."""
    physical, length = arguments.frame
    require_frames()
    facts = _facts(physical, length)
    with _progress() as progress:
        refused: list[int] = []
        found = users(physical, length, progress=progress, refused=refused.append)
        if arguments.json:
            _write(physical, length, facts, found, refused)
        else:
            _show(physical, length, facts, found, refused)


def _facts(physical: int, length: int) -> FrameFacts | None:
    with contextlib.suppress(IOReturnError), Frames() as frames:
        return frames.describe(physical, length)
    return None


def _changed(physical: int, length: int, before: FrameFacts | None) -> bool:
    """Say whether they are mapped more or less often by now. Their flags change while nobody touches them."""
    now = _facts(physical, length)
    return now is not None and before is not None and now.mapped != before.mapped


def _hidden(refused: list[int]) -> list[Hidden]:
    """Return what is not shown, once all processes were looked at."""
    if not refused:
        return []
    what = f"what {len(refused)} other processes map"
    return [Hidden(what, "they may not be traced by this one", host.capability_remedy())]


def _write(physical: int, length: int, facts: FrameFacts | None, found: Iterator[Use], refused: list[int]) -> None:
    about = facts._asdict() if facts else None
    head: dict[str, object] = {"version": VERSION, "time": round(time.time()), "kernel": os.uname().release}
    head |= {"physical": physical, "length": length, "frames": about}
    print("{" + members(head) + ',\n"users": [', end="")
    write_list(use._asdict() | {"area": use.area._asdict()} for use in found)
    last: dict[str, object] = {"changed_while_read": _changed(physical, length, facts)}
    print("],\n" + members(last | hidden_member(_hidden(refused))) + "}")


def _show(physical: int, length: int, facts: FrameFacts | None, found: Iterator[Use], refused: list[int]) -> None:
    print(f"frames {physical // PAGE_SIZE:#x}-{(physical + length) // PAGE_SIZE - 1:#x}, {format_size(length)}")
    if facts:
        least, most = facts.mapped or ("?", "?")
        print(f"  flags: {' '.join(facts.flags) or 'none common to all'}")
        print(f"  of some: {' '.join(facts.some_flags) or 'none'}; mapped {least} to {most} times")
        print(f"  cgroups: {' '.join(facts.cgroups or ()) or 'none known'}")
    pids = set()
    for use in found:
        pids.add(use.pid)
        where = f"{use.virtual:16x} {use.physical:14x} {format_size(use.length):>9}"
        print(f"{use.pid:8} {printable(use.process):16} {where}  {printable(str(use.area))}")
    print(f"mapped by {len(pids)} processes")
    show_hidden(_hidden(refused))
    if _changed(physical, length, facts):
        print("  they were mapped or unmapped while the processes were looked through")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], object] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415 (slow to load)
    from rich.progress import Progress  # noqa: PLC0415

    # What is printed meanwhile goes above the bar if both are on the terminal, and past it if not.
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as bar:
        scan = bar.add_task("processes")
        yield lambda done, total: bar.update(scan, completed=done, total=total)
