"""`--frame`: what certain frames are, and which processes map them."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING

from iobmd.errors import IOReturnError
from iobmd.pagemap.frame import Frames, require_frames, users
from iobmd.units import PAGE_SIZE, format_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from iobmd.pagemap.frame import FrameFacts


def run(arguments: argparse.Namespace) -> None:
    """Print them."""
    physical, length = arguments.frame
    require_frames()
    facts: FrameFacts | None = None
    with contextlib.suppress(IOReturnError), Frames() as frames:
        facts = frames.describe(physical, length)
    with _progress() as progress:
        found = list(users(physical, length, progress=progress))
    if arguments.json:
        uses = [use._asdict() | {"area": use.area._asdict()} for use in found]
        about = facts._asdict() if facts else None
        document = {"version": 1, "physical": physical, "length": length, "frames": about, "users": uses}
        print(json.dumps(document, indent=2))
        return
    print(f"frames {physical // PAGE_SIZE:#x}-{(physical + length) // PAGE_SIZE - 1:#x}, {format_size(length)}")
    if facts:
        least, most = facts.mapped or ("?", "?")
        print(f"  flags: {' '.join(facts.flags) or 'none common to all'}")
        print(f"  of some: {' '.join(facts.some_flags) or 'none'}; mapped {least} to {most} times")
        print(f"  cgroups: {' '.join(facts.cgroups or ()) or 'none known'}")
    for use in found:
        where = f"{use.virtual:16x} {use.physical:14x} {format_size(use.length):>9}"
        print(f"{use.pid:8} {use.process:16} {where}  {use.area}")
    print(f"mapped by {len({use.pid for use in found})} processes")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], object] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415 (slow to load)
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True) as bar:
        scan = bar.add_task("processes")
        yield lambda done, total: bar.update(scan, completed=done, total=total)
