"""`--map`: the memory of a process in the terminal, a cell for each block, by its most frequent state."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from iobmd.cli.color import has_color, painter
from iobmd.cli.encoding import can_write
from iobmd.cli.folding import folded, terminal_width
from iobmd.units import PAGE_SIZE, format_size

from .grid import Grid
from .labels import shortened
from .look import Look, page_line
from .palette import INKS, main_state
from .survey import Survey
from .table import show_restless

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from .grid import Sums
    from .survey import Part

_BLOCKS = 8192
"""Blocks that are read: several in each cell, because areas do not begin at multiples of a cell."""
_NARROW = 60  # columns of a terminal below which rows have no address
_ADDRESS = 13  # the address of a row, and a space
_MOST_NAMES = 12  # in a label
_SIZE = 8  # of a label
_FEWEST_ROWS = 4
_SPARE = 2  # lines below the map: for the prompt, and for a note that the process changed


class Row(NamedTuple):
    """A row of the map: a part of a mapping, or several small ones."""

    position: int
    """The bytes of pages before it."""
    end: int
    """The position of its end."""
    address: int
    label: str
    """Empty if it continues the mapping of the row above."""
    size: int
    """The size of the whole mapping, or of all the small ones."""


def run(arguments: argparse.Namespace) -> None:
    """Print the map."""
    look = Look(arguments)
    screen = shutil.get_terminal_size((100, 44))
    columns = max(screen.columns - 1, 20)
    survey = Survey(look, Grid(_BLOCKS))
    margin = _ADDRESS if columns >= _NARROW else 0
    cells = max(8, (columns - margin) * 6 // 10)
    width = terminal_width()
    head = [*folded(page_line(look), width).splitlines()]
    head += [part for line in map(str, look.hidden) for part in folded(line, width).splitlines()]
    head += [part for line in (survey.extent(), *survey.notes()) for part in folded(line, columns).splitlines()]
    legend = list(_legend(survey, columns))
    scale = len(folded(_scale(1023 << 10, 1), columns).splitlines())
    if survey.grid.length:
        most = max(_FEWEST_ROWS, screen.lines - len(head) - scale - len(legend) - _SPARE)
        block, rows = _rows(survey, cells, most)
        head += folded(_scale(block, cells), columns).splitlines()
    else:
        rows = []
        head.append("the selected areas are empty")
    print("\n".join(head))
    paint = painter()
    for row in rows:
        address = paint(f"{row.address:>{_ADDRESS - 1}x} ", "dim") if margin else ""
        drawn = "".join(_cells(state, len(list(same))) for state, same in groupby(_states(survey, row, block)))
        blank = " " * (cells - -(-(row.end - row.position) // block))
        print(f"{address}{drawn}{blank} {_labelled(row, columns - margin - cells - 1)}".rstrip())
    print("\n".join(legend))
    show_restless(look, width)
    look.require_task()


def _scale(block: int, cells: int) -> str:
    return f"a cell: {format_size(block)}, by its most frequent state; a row: {format_size(block * cells)}"


def _cells(state: str, count: int = 1) -> str:
    """Return cells in a state: in its color, or as its letter if there are none."""
    ink = INKS[state]
    if has_color() and can_write("█▒"):
        return painter()(("█" if ink.is_memory else "▒") * count, ink.terminal)
    return ink.letter * count


def _rows(survey: Survey, cells: int, limit: int) -> tuple[int, list[Row]]:
    """Return the smallest size of a cell with which the rows fit, and the rows.

    A mapping that fills at least half a row begins a new one; smaller ones share rows.
    """
    mappings = list(survey.mappings())
    for block in _sizes(survey.grid.block):
        if block * cells * limit >= survey.grid.length:
            rows = list(_laid_out(survey, mappings, block * cells, limit))
            if len(rows) <= limit:
                return block, rows
    raise AssertionError("one row is enough for all")


def _sizes(least: int) -> Iterator[int]:
    """Iterate over sizes of a cell: 4, 5, 6, 7, 8, 10, 12, … quarters of the least."""
    while True:
        yield from (least * quarters // 4 // PAGE_SIZE * PAGE_SIZE for quarters in range(4, 8))
        least *= 2


def _laid_out(survey: Survey, mappings: list[Part], row: int, limit: int) -> Iterator[Row]:
    """Lay out rows of this many bytes, or until there are more than `limit`."""
    small: list[Part] = []
    count = 0
    for mapping in [*mappings, None]:
        if mapping and mapping.length * 2 < row:
            small.append(mapping)
            continue
        rows = [*_cut(survey, small, row), *_cut(survey, [mapping] if mapping else [], row)]
        yield from rows
        small = []
        count += len(rows)
        if count > limit:
            return


def _cut(survey: Survey, mappings: list[Part], row: int) -> Iterator[Row]:
    """Cut mappings that follow one another to rows, with the names in each."""
    if not mappings:
        return
    position, end = mappings[0].position, mappings[-1].position + mappings[-1].length
    first = mappings[0].start
    while position < end:
        stop = min(end, position + row)
        while mappings[0].position + mappings[0].length <= position:
            mappings = mappings[1:]
        inside: Counter[str] = Counter()
        for mapping in mappings:
            if mapping.position >= stop:
                break
            begin = max(position, mapping.position)
            inside[mapping.name] += min(stop, mapping.position + mapping.length) - begin
        label = ", ".join(name for name, _length in inside.most_common(_MOST_NAMES))
        if len(mappings) > 1 or position == mappings[0].position:
            yield Row(position, stop, first, label, stop - position if len(mappings) > 1 else mappings[0].length)
        else:
            yield Row(position, stop, first, "", 0)
        position = stop
        if position < end:
            first = survey.grid.blocks()[position // survey.grid.block].start


def _states(survey: Survey, row: Row, cell: int) -> Iterator[str]:
    """Iterate over the most frequent states in the cells of a row."""
    blocks, size = survey.grid.blocks(), survey.grid.block
    for start in range(row.position, row.end, cell):
        end = min(start + cell, row.end)
        # A block at the border belongs to a neighbor in part, whose state seldom prevails: a cell has several blocks.
        sums: Counter[str] = Counter()
        for number in range(start // size, -(-end // size)):
            sums.update(_within(blocks[number].sums, number * size, size, start, end))
        yield main_state(sums)


def _within(sums: Sums, position: int, size: int, start: int, end: int) -> Sums:
    """Return the sums of a block, in proportion to the part of it between two positions."""
    part = min(end, position + size) - max(start, position)
    return sums if part == size else {state: length * part // size + 1 for state, length in sums.items()}


def _labelled(row: Row, room: int) -> str:
    """Return the size and the names of what begins in a row, shortened to the room."""
    if not row.label:
        return ""
    size = format_size(row.size)
    left = room - max(len(size), _SIZE) - 1
    if left < 3:
        return ""
    return f"{size:>{_SIZE}} {shortened(row.label, left)}"


def _legend(survey: Survey, width: int) -> list[str]:
    """Return the lines of the legend: as many entries in each as fit."""
    lines: list[str] = []
    room = 0
    for state, whole in survey.legend():
        words = shortened(whole, width - 2)
        needed = len(words) + 5
        if needed > room or not lines:
            lines.append("")
            room = width + 3
        lines[-1] += f"{'   ' if lines[-1] else ''}{_cells(state)} {words}"
        room -= needed
    return lines
