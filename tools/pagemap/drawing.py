"""A picture as boxes and labels: the largest mappings, all memory by address, and its physical positions."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from iobmd.units import format_count, format_size

from .labels import letters, shortened
from .palette import INKS, main_state
from .survey import memory_of, percentage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .grid import Grid, Sums
    from .look import Look
    from .survey import Part, Survey

WIDTH = 1200
_LEFT, _RIGHT = 84, 30
_PLOT = WIDTH - _LEFT - _RIGHT
_LETTER = 6.7  # width of a letter of the monospaced font in the size of labels
_LINE = 18
_BARS = 8
_NAMES = 210  # width of the names of bars
_BAR_ROOM = 150  # behind the longest bar, for its size
_BOXES = 34  # height of the boxes of mappings
_STRIP = 46  # height of the strip with the states of blocks
_FIELD = 384  # physical memory
_LEAST = 36
"""Width of the smallest mapping with a border and a name, in pixels."""
STRENGTHS = 6
"""Degrees of filling that are distinguished."""


class Box(NamedTuple):
    """A filled rectangle, in pixels from the upper left."""

    x: float
    y: float
    width: float
    height: float
    ink: str
    """One of the `colors` of the image, or `paper`, `ground`, `line`, `border`."""
    strength: float = 1
    """Its opacity."""
    tip: str = ""
    """Its tooltip."""


class Label(NamedTuple):
    """A line of text; x and y are the start, middle or end of its baseline."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    role: str = "plain"
    """`title`, `heading`, `plain` or `name`: the last is of fixed pitch, and may not exceed `room`."""
    room: float = WIDTH


class Image(Protocol):
    """Boxes and labels on a sheet of paper."""

    width: int
    height: int
    colors: dict[str, str]
    """The colors of its inks, besides `paper`, `ground`, `line` and `border`."""

    def items(self) -> Iterator[Box | Label]:
        """Iterate over all items in drawing order."""
        ...


class Drawing:
    """A picture of a survey: bars of the largest mappings, a strip by address, and unless hidden, physical memory."""

    def __init__(self, look: Look, survey: Survey) -> None:
        self.look, self.survey, self.grid = look, survey, survey.grid
        self.width = WIDTH
        self.colors = {state: ink.color for state, ink in INKS.items()}
        self._scale = _PLOT / max(1, survey.grid.length)
        self._legend = list(self._placed_legend())
        self._bars, count, rest = survey.largest(_BARS)
        if count:
            self._bars.append((f"{count} others", rest))
        self._bars_top = 76 + _LINE * (1 + self._legend[-1][0] if self._legend else 0)
        self._top = self._bars_top + 24 + _LINE * len(self._bars) + 34
        self._field = _FIELD if look.frames and survey.grid.physical_blocks else 0
        self._field_top = self._top + _BOXES + _STRIP + 30
        self._end = self._field_top + self._field if self._field else self._top + _BOXES + _STRIP
        self._notes = list(self._all_notes())
        self.height = self._end + 56 + _LINE * len(self._notes)

    def items(self) -> Iterator[Box | Label]:
        """Iterate over all items in drawing order."""
        yield Box(0, 0, self.width, self.height, "paper")
        yield Label(_LEFT, 32, f"Memory of {self.look.title}", role="title")
        when = time.strftime("%F %T", time.localtime(self.look.time))
        yield Label(_LEFT, 54, f"{self.survey.extent()}; Linux {self.look.kernel}, {when}")
        for row, x, state, words in self._legend:
            y = 78 + row * _LINE
            yield Box(x, y - 10, 12, 12, state)
            yield Label(x + 18, y, words)
        if self.survey.grid.length:
            yield from self._largest()
            yield from self._by_address()
            if self._field:
                yield from self._physical()
            yield from self._axis()
        for index, note in enumerate(self._notes):
            yield Label(_LEFT, self._end + 62 + index * _LINE, note)

    def _placed_legend(self) -> Iterator[tuple[int, float, str, str]]:
        """Yield the row and the x of each entry, as many in a row as fit."""
        row, x = 0, float(_LEFT)
        for state, words in self.survey.legend():
            needed = 18 + len(words) * _LETTER + 22
            if x > _LEFT and x + needed > WIDTH - _RIGHT:
                row, x = row + 1, float(_LEFT)
            yield row, x, state, words
            x += needed

    def _largest(self) -> Iterator[Box | Label]:
        """Draw a bar for each of the largest groups of areas."""
        yield Label(_LEFT, self._bars_top + 8, "Memory by mapping, largest first", role="heading")
        most = max(map(memory_of, (sums for _name, sums in self._bars)), default=0)
        scale = (_PLOT - _NAMES - _BAR_ROOM) / max(1, most)
        for index, (name, sums) in enumerate(self._bars):
            y = self._bars_top + 20 + index * _LINE
            yield Label(
                _LEFT + _NAMES - 8, y + 12, shortened(name, _NAMES - 8, fixed_width), "end", "name", _NAMES - 8
            )
            x = float(_LEFT + _NAMES)
            for state, ink in INKS.items():
                if ink.is_memory and (length := sums.get(state, 0)):
                    yield Box(x, y + 1, length * scale, _LINE - 3, state, tip=f"{name}\n{held(sums)}")
                    x += length * scale
            total = memory_of(sums)
            yield Label(x + 8, y + 12, f"{format_size(total)}, {percentage(total, self.survey.memory)}")

    def _x(self, position: int) -> int:
        return round(_LEFT + position * self._scale)  # whole pixels: no gaps between neighbors

    def _by_address(self) -> Iterator[Box | Label]:
        """Draw the boxes of mappings, and below them the states of all blocks."""
        yield Label(_LEFT, self._top - 10, "Memory in order of address", role="heading")
        yield from self._boxes()
        top = self._top + _BOXES
        for index, block in enumerate(self.grid.blocks()):
            position = index * self.grid.block
            whole = min(self.grid.block, self.grid.length - position)
            y = float(top)
            width = self._x(position + whole) - self._x(position)
            names = ", ".join(self.survey.names_between(position, position + whole)[:4])
            tip = f"{block.start:#x}-{block.end:#x}\n{held(block.sums)}\n{names}"
            for state in filter(block.sums.__contains__, INKS):
                height = block.sums[state] * _STRIP / whole
                yield Box(self._x(position), y, width, height, state, tip=tip)
                y += height

    def _boxes(self) -> Iterator[Box | Label]:
        """Draw a border and a name for each mapping that is wide enough; small ones next to each other share one."""
        for position, end, name, tip in named_boxes(self.survey, round(_LEAST / self._scale)):
            x, width = self._x(position), self._x(end) - self._x(position)
            yield Box(x, self._top, width, _BOXES, "border", tip=tip)
            yield Box(x + 1, self._top + 1, width - 1, _BOXES - 1, "ground" if name else "paper")
            room = width - 8
            size = format_size(end - position)
            for row, text in enumerate((name or tip.partition(":")[0], size)):
                cut = shortened(text, room, fixed_width)
                if cut and (cut == text or row == 0):  # a size is not cut
                    yield Label(x + 4, self._top + 14 + row * 14, cut, role="name", room=room)
        yield Box(self._x(self.grid.length), self._top, 1, _BOXES, "border")

    def _physical(self) -> Iterator[Box | Label]:
        """Draw where the pages of each block are located in physical memory."""
        top, grid = self._field_top, self.grid
        height = self._field / max(1, grid.physical_blocks)
        yield Label(_LEFT, top - 9, "Physical address of this memory (stronger: more of it is there)", role="heading")
        yield Box(_LEFT, top, _PLOT, self._field, "ground")
        yield from self._physical_scale(top)
        # Boxes of one color follow one another, so that an SVG needs no element for each. Numbers instead of tuples
        # save 6 MB.
        states = list(INKS)
        found = sorted(
            ((states.index(main_state(sums)) * (STRENGTHS + 1) + strength(grid, sums)) * grid.columns + column)
            * grid.physical_blocks
            + row
            for column, row, sums in grid.cells()
        )
        for number in found:
            rest, row = divmod(number, grid.physical_blocks)
            rest, column = divmod(rest, grid.columns)
            state, degree = divmod(rest, STRENGTHS + 1)
            x = self._x(column * grid.block)
            width = self._x(min(grid.length, (column + 1) * grid.block)) - x
            y = top + self._field - (row + 1) * height
            yield Box(x, y, width, height, states[state], degree / STRENGTHS)

    def _physical_scale(self, top: float) -> Iterator[Box | Label]:
        covered = self.grid.physical_blocks * self.grid.physical_block
        step = 1 << max(0, (covered // 5).bit_length() - 1)
        for physical in range(0, covered + 1, step):
            y = top + self._field - physical * self._field / max(1, covered)
            yield Label(_LEFT - 8, y + 4, format_size(physical) if physical else "0", "end")
            yield Box(_LEFT, y, _PLOT, 0.5, "line")

    def _axis(self) -> Iterator[Box | Label]:
        """Draw the scale of memory below the picture."""
        for position in ticks(self.grid.length):
            x = self._x(position)
            yield Box(x, self._end, 1, 5, "border")
            at_end = x > WIDTH - _RIGHT - 30
            yield Label(x, self._end + 18, format_size(position) if position else "0", "end" if at_end else "middle")
        title = "memory, in order of address; addresses without pages are left out"
        yield Label(_LEFT + _PLOT / 2, self._end + 36, title, "middle")

    def _all_notes(self) -> Iterator[str]:
        grid = self.grid
        blocks = f"a column: {format_size(grid.block)} of memory"
        rows = f"; a row: {format_size(grid.physical_block)} of physical memory" if self._field else ""
        yield blocks + rows if grid.length else "the selected areas are empty"
        yield from self.survey.notes()
        yield from map(str, self.look.hidden)
        if restless := self.look.restless():
            yield str(restless)


def strength(grid: Grid, sums: Sums) -> int:
    """Return how much of what fits is in a cell of physical memory, from 1 to `STRENGTHS`."""
    # Not in proportion: a single page among megabytes would be invisible.
    share = math.sqrt(min(1, sum(sums.values()) / min(grid.block, grid.physical_block)))
    return max(1, round(share * STRENGTHS))


def held(sums: Sums) -> str:
    """Return the sums as text."""
    return ", ".join(f"{format_size(sums[state])} {ink.word}" for state, ink in INKS.items() if sums.get(state))


def ticks(length: int) -> Iterator[int]:
    """Iterate over round positions, five to ten on an axis of this length."""
    step = 1 << max(12, (length // 5).bit_length() - 1)
    return iter(range(0, length + 1, step))


def named_boxes(survey: Survey, least: int) -> Iterator[tuple[int, int, str, str]]:
    """Iterate over mappings of at least `least` bytes; smaller ones between them are joined under an empty name.

    Yields the positions of the start and the end, the name, and a tooltip.
    """
    small: list[Part] = []
    for mapping in survey.mappings():
        if mapping.length < least:
            small.append(mapping)
            continue
        yield from _joined(small)
        small = []
        yield mapping.position, mapping.position + mapping.length, mapping.name, _tip(mapping)
    yield from _joined(small)


def _joined(small: list[Part]) -> Iterator[tuple[int, int, str, str]]:
    if not small:
        return
    names = dict.fromkeys(part.name for part in small)
    listed = ", ".join(list(names)[:8]) + (", …" if len(names) > 8 else "")
    count = format_count(sum(part.areas for part in small), "small area")
    yield small[0].position, small[-1].position + small[-1].length, "", f"{count}: {listed}"


def _tip(mapping: Part) -> str:
    areas = f", {format_count(mapping.areas, 'area')}" if mapping.areas > 1 else ""
    return f"{mapping.name}\n{mapping.start:#x}-{mapping.end:#x}{areas}\n{format_size(mapping.length)} in pages"


def fixed_width(text: str) -> float:
    """Return the width of a label of fixed pitch, in pixels."""
    return letters(text) * _LETTER
