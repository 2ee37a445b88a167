"""`--frame`: the properties of page frames, and the processes that map them."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING

from iobmd import host
from iobmd.cli.folding import show, terminal_width
from iobmd.errors import IOReturnError
from iobmd.pagemap.frame import Frames, users
from iobmd.pagemap.reader import require_frames
from iobmd.physical import zones
from iobmd.printable import printable
from iobmd.units import PAGE_SIZE, format_count, format_size

from .columns import brief
from .document import VERSION, hidden_member, members, write_list
from .look import Hidden
from .progress import show_progress
from .table import shortened, show_hidden

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from iobmd.pagemap.frame import FrameFacts, FrameMapping


def run(arguments: argparse.Namespace) -> None:
    """Print the properties and the processes."""
    require_frames()
    asked = _Asked(*arguments.frame)
    with show_progress("processes") as progress:
        found = users(asked.physical, asked.length, progress=progress, refused=asked.refuse)
        if arguments.json:
            _write(asked, found)
        else:
            _show(asked, found)


class _Asked:
    """The requested page frames, and what is hidden about them."""

    def __init__(self, physical: int, length: int) -> None:
        self.physical, self.length = physical, length
        self.facts = self._look()
        self.end_of_memory = _end_of_memory()
        self.is_beyond = self.end_of_memory is not None and physical + length > self.end_of_memory
        self._refused: list[str] = []

    def _look(self) -> FrameFacts | None:
        with contextlib.suppress(IOReturnError), Frames() as frames:
            return frames.describe(self.physical, self.length)
        return None

    def refuse(self, _pid: int, error: IOReturnError) -> None:
        """Record a process that may not be inspected."""
        self._refused.append(str(error))

    def changed(self) -> bool | None:
        """Return whether their map counts have changed; None if unknown.

        Flags are not compared, because the kernel changes them without any access.
        """
        now = self._look()
        return None if now is None or self.facts is None else now.mapped != self.facts.mapped

    def hidden(self) -> list[Hidden]:
        """Return what is hidden, after all processes were inspected."""
        found = []
        if self.facts is None:
            found.append(Hidden("flags, map counts and cgroups", "/proc/kpageflags requires root", "run as root"))
        if self._refused:
            what = f"mappings of {format_count(len(self._refused), 'other process', 'other processes')}"
            # With this capability, the first error names what is missing, such as another capability of the process.
            remedy = "" if host.has_capability("CAP_SYS_PTRACE") else "run with CAP_SYS_PTRACE"
            found.append(Hidden(what, f"such as: {self._refused[0]}", remedy))
        return found


def _end_of_memory() -> int | None:
    try:
        return zones.end_of_memory()
    except OSError:  # /proc/zoneinfo is hidden
        return None


def _write(asked: _Asked, found: Iterator[FrameMapping]) -> None:
    about = asked.facts._asdict() if asked.facts else None
    head: dict[str, object] = {"version": VERSION, "time": round(time.time()), "kernel": os.uname().release}
    head |= {"physical": asked.physical, "length": asked.length, "frame": asked.physical // PAGE_SIZE}
    head |= {"frames": about, "beyond_memory": asked.is_beyond, "memory_end": asked.end_of_memory}
    print("{" + members(head) + ',\n"users": [', end="")
    write_list(use._asdict() | {"area": use.area._asdict()} for use in found)
    last: dict[str, object] = {"changed_while_read": asked.changed()}
    print("],\n" + members(last | hidden_member(asked.hidden())) + "}")


def _show(asked: _Asked, found: Iterator[FrameMapping]) -> None:
    width = terminal_width()
    first, behind = asked.physical // PAGE_SIZE, (asked.physical + asked.length) // PAGE_SIZE
    number = f"frame {first:#x}" if behind - first == 1 else f"frames {first:#x}-{behind - 1:#x}"
    end = asked.physical + asked.length
    show(f"{number}, physical {asked.physical:#x}-{end:#x}, {format_size(asked.length)}", width)
    if asked.is_beyond and asked.end_of_memory:
        last = asked.end_of_memory // PAGE_SIZE - 1
        text = f"  beyond the memory of this host, whose last frame is {last:#x}; device memory may be there"
        show(text, width)
    if (facts := asked.facts) and facts.flags + facts.some_flags:
        least, most = facts.mapped or ("?", "?")
        show(f"  flags of all: {' '.join(facts.flags) or 'none'}", width)
        show(f"  flags of some: {' '.join(facts.some_flags) or 'none'}; map counts {least} to {most}", width)
        paths = [printable(path) for path in facts.cgroups or ()]
        paths = [shortened(path, width - 5) for path in paths] if width else paths
        show(f"  cgroups: {' '.join(paths) or 'unknown'}", width)
    pids = set()
    for use in found:
        pids.add(use.pid)
        print(_row(use, width))
    print(f"mapped by {format_count(len(pids), 'process', 'processes')}")
    show_hidden(asked.hidden(), width)
    if asked.changed():
        print("  some were mapped or unmapped during the search")


_WIDE, _LEAST_NAME = 70, 8
"""Columns of a terminal from which frames are shown, and those that the name of a mapping has at least."""


def _row(use: FrameMapping, width: int | None) -> str:
    """Return the process, its addresses, and the area; on a terminal, the name of the area as far as it fits."""
    frame = f"{use.physical // PAGE_SIZE:#x}"
    process, length = printable(use.process), f"{brief(use.length):>5}"
    if width is None:
        where = f"{use.virtual:12x} {use.physical:11x} {frame:>9} {length}"
        return f"{use.pid:8} {process:16} {where}  {printable(str(use.area))}"
    start = f"{use.pid:8} {process[:15]:15} {use.virtual:12x}"
    if width >= _WIDE:
        start += f" {frame:>9} {length}"
    room = width - 3 - len(start)
    name = printable(use.area.name) or "[anon]"
    return f"{start}  {shortened(name, room)}" if room >= _LEAST_NAME else start
