"""`--runs` and `--flags`: the physically contiguous runs of the areas, or the segments into which they are split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd.cli.folding import folded, show, terminal_width
from iobmd.pagemap.frame import describe_runs
from iobmd.pagemap.reader import Reader
from iobmd.pagemap.segment import segments
from iobmd.pagemap.span import read_runs
from iobmd.printable import printable
from iobmd.units import PAGE_SIZE, format_count, format_size

from .columns import brief
from .look import Look
from .table import shortened, show_head, show_restless, show_unmatched

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from iobmd.pagemap.frame import DescribedRun, FrameFacts
    from iobmd.pagemap.segment import Segment
    from iobmd.pagemap.span import Run


def run(arguments: argparse.Namespace) -> None:
    """Print the runs, or their segments, and a histogram."""
    look = Look(arguments)
    width = terminal_width()
    show_head(look, width)
    seen = Histogram()
    if arguments.segments:
        _show_segments(cut(look, seen.watch(chosen_runs(look))))
    elif arguments.flags:
        _show_described(look, seen, width)
    else:
        print(_HEADING)
        for found in seen.watch(chosen_runs(look)):
            print(_line(found))
    seen.show(width)
    show_restless(look, width)
    show_unmatched(look)
    look.require_task()


def _show_described(look: Look, seen: Histogram, width: int | None) -> None:
    """Print the runs with the properties of their frames: on a terminal, above the runs that share them."""
    counts = width is None or width > len(_HEADING) + len(_COUNTS)
    if width is not None:
        show("above the runs: their flags (~: of some), and cgroups", width)
    print(_HEADING + (_COUNTS if counts else "") + ("" if width else "  flags (~: of some) cgroups"))
    last = ""
    for found, facts in chosen_descriptions(look):
        seen.add(found)
        times, node = _times(facts), "?" if facts.node is None else str(facts.node)
        row = f"{_line(found)} {times:>9} {node:>4}" if counts else _line(found)
        if width is None:
            print(f"{row}  {_words(facts)}")
            continue
        words = _words(facts, width - len(_INDENT) - 3)
        if not counts:
            words = f"mapped {times}, node {node}, {words}"
        if words != last:
            print(folded(f"  {words}", width, _INDENT))
            last = words
        print(row)


def chosen_runs(look: Look) -> Iterator[Run]:
    """Iterate over the runs of the selected areas, until the task exits."""
    found = look.until_gone(_runs(look))
    if look.arguments.within is None:
        yield from found
        return
    low, length = look.arguments.within
    for one in found:
        if one.physical < low + length and low < one.physical + one.length:
            yield one


def _runs(look: Look) -> Iterator[Run]:
    with Reader(look.task) as reader:
        yield from read_runs(reader, look.ranges())
        reader.require_task()


def chosen_descriptions(look: Look) -> Iterator[DescribedRun]:
    """Like `chosen_runs`, with the properties of the frames."""
    return describe_runs(look.task, chosen_runs(look))


_HEADING = f"{'virtual':>12} {'physical':>11} {'frame':>9} {'size':>5}"
_COUNTS = f" {'mapped':>9} {'node':>4}"
_INDENT = "    "
"""Of the second line of flags, and those that follow."""


def _line(found: Run) -> str:
    frame = f"{found.physical // PAGE_SIZE:#x}"
    return f"{found.virtual:12x} {found.physical:11x} {frame:>9} {brief(found.length):>5}"


def _times(facts: FrameFacts) -> str:
    if facts.mapped is None:
        return "?"
    least, most = facts.mapped
    return f"{least}" if least == most else f"{least}-{most}"


def _words(facts: FrameFacts, room: int | None = None) -> str:
    """Return the flags and the cgroups, whose paths are cut to fit the room."""
    cgroups = [printable(path) for path in facts.cgroups or ()]
    cgroups = [shortened(path, room) for path in cgroups] if room else cgroups
    return " ".join((*facts.flags, *(f"~{name}" for name in facts.some_flags), *cgroups))


def chosen_segments(look: Look) -> Iterator[Segment]:
    """Iterate over the segments of these runs."""
    return cut(look, chosen_runs(look))


def cut(look: Look, found: Iterator[Run]) -> Iterator[Segment]:
    """Split runs to segments within the requested limits."""
    return segments(found, look.arguments.max_segment, look.arguments.boundary)


def _show_segments(found: Iterator[Segment]) -> None:
    print(f"{'physical':>14} {'length':>12}")
    number = 0
    for number, one in enumerate(found, 1):  # noqa: B007 (counts them)
        print(f"{one.physical:14x} {one.length:12,}")
    print(f"\n{format_count(number, 'segment')}")


_BAR = 46
"""The column at which the bars of the histogram start."""


class Histogram:
    """The numbers of runs by size, and their physical order."""

    def __init__(self) -> None:
        self._classes: dict[int, tuple[int, int]] = {}
        self._last = self._ascending = self._descending = self._largest = 0

    def add(self, found: Run) -> None:
        """Count a run."""
        least = 1 << (found.length.bit_length() - 1)
        number, length = self._classes.get(least, (0, 0))
        self._classes[least] = number + 1, length + found.length
        self._largest = max(self._largest, found.length)
        if self._last:
            self._ascending += found.physical > self._last
            self._descending += found.physical < self._last
        self._last = found.physical

    def watch(self, found: Iterator[Run]) -> Iterator[Run]:
        """Count each run while passing it on."""
        for one in found:
            self.add(one)
            yield one

    def show(self, width: int | None) -> None:
        """Print it, no wider than the terminal if there is one."""
        total = sum(length for _number, length in self._classes.values())
        runs_in_all = sum(number for number, _length in self._classes.values())
        print()
        show(
            f"{format_count(runs_in_all, 'run')}, {format_size(total)}, the largest {format_size(self._largest)}; "
            f"{self._ascending:,} ascend, {self._descending:,} descend",
            width,
        )
        room = min(40, width - _BAR - 1) if width else 40
        more = " and more" if room > 0 else "+"
        widest = max((length for _number, length in self._classes.values()), default=1)
        for least, (number, length) in sorted(self._classes.items()):
            bar = "  " + "#" * max(1, length * room // widest) if room > 0 else ""
            runs = format_count(number, "run")
            print(f"{format_size(least):>9}{more}: {runs:>14} {format_size(length):>9}{bar}")
