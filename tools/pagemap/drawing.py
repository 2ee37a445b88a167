"""A picture as boxes and labels: addresses from left to right, physical memory from the bottom up."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from iobmd.units import format_size

from .look import page_line
from .palette import INKS, main_state, tinted
from .survey import between, names

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .grid import Grid, Sums
    from .look import Look
    from .survey import Part

_LEFT, _TOP, _RIGHT = 80, 64, 24
_PLOT = 960
_STRIP = 64  # height of the strip with the shares of states in each block
_FIELD = 480  # physical memory
_LETTER = 6.2  # width of a letter in this font size
_BOTTOM = 56
_LINE = 17
_WIDEST = 24  # maximum width of a block, if there are few


class Box(NamedTuple):
    """A filled rectangle, in pixels from the upper left, and its tooltip."""

    x: float
    y: float
    width: float
    height: float
    color: str
    tip: str = ""


class Label(NamedTuple):
    """A line of text; x and y are the start or the end of its baseline."""

    x: float
    y: float
    text: str
    to_the_left: bool = False
    strong: bool = False


class Drawing:
    """A picture of a survey: a strip of states, and below it, unless frames are hidden, their physical positions."""

    def __init__(self, look: Look, grid: Grid, parts: list[Part]) -> None:
        self.look, self.grid, self.parts = look, grid, parts
        self._columns = {address: index for index, (address, _sums) in enumerate(grid.blocks())}
        self._step = min(_WIDEST, _PLOT // max(1, len(self._columns)))
        self._field = _FIELD if look.frames else 0
        self._notes = list(self._captions())
        self.width = _LEFT + _PLOT + _RIGHT
        self._end = _TOP + _STRIP + (self._field + 8 if self._field else 0)
        self.height = self._end + _BOTTOM + _LINE * (len(self._legend()) + len(self._notes))

    def items(self) -> Iterator[Box | Label]:
        """Iterate over all items in drawing order."""
        yield Box(0, 0, self.width, self.height, "#ffffff")
        yield Label(_LEFT, 26, page_line(self.look), strong=True)
        when = time.strftime("%F %T", time.localtime(self.look.time))
        yield Label(_LEFT, 46, f"{when}; nonempty blocks of addresses, in order")
        yield from self._strip()
        if self._field:
            yield from self._physical()
        yield from self._breaks()
        yield from self._names()
        yield from self._explanation()

    def _x(self, address: int) -> int:
        return _LEFT + self._columns[address] * self._step

    def _strip(self) -> Iterator[Box | Label]:
        yield Label(_LEFT - 8, _TOP + 10, "filled", to_the_left=True)
        yield Box(_LEFT, _TOP, len(self._columns) * self._step, _STRIP, "#f1f1f1")
        for address, sums in self.grid.blocks():
            tip = self._tip(address, sums)
            y: float = _TOP + _STRIP
            for state in INKS:
                if state in sums:
                    height = sums[state] * _STRIP / self.grid.block
                    y -= height
                    yield Box(self._x(address), y, self._step, height, INKS[state].color, tip)

    def _physical(self) -> Iterator[Box | Label]:
        top = _TOP + _STRIP + 8
        height = self._field / max(1, self.grid.physical_blocks)
        yield Box(_LEFT, top, len(self._columns) * self._step, self._field, "#f7f7f7")
        yield from self._scale(top)
        least = min(self.grid.block, self.grid.physical_block)
        for address, physical, sums in self.grid.cells():
            state = main_state(sums)
            color = tinted(INKS[state].color, sum(sums.values()) / least)
            y = top + self._field - (physical // self.grid.physical_block + 1) * height
            where = f"physical {physical:#x}-{physical + self.grid.physical_block:#x}"
            yield Box(self._x(address), y, self._step, height, color, self._tip(address, sums, where))

    def _scale(self, top: float) -> Iterator[Box | Label]:
        covered = self.grid.physical_blocks * self.grid.physical_block
        step = 1 << max(0, (covered // 5).bit_length() - 1)
        for physical in range(0, covered + 1, step):
            y = top + self._field - physical * self._field / max(1, covered)
            yield Label(_LEFT - 8, y + 4, format_size(physical) if physical else "0", to_the_left=True)
            yield Box(_LEFT, y, len(self._columns) * self._step, 0.5, "#d0d0d0")

    def _breaks(self) -> Iterator[Box]:
        """Draw a line where addresses are omitted."""
        for one, other in pairwise(self._columns):
            if one + self.grid.block != other:
                yield Box(self._x(other) - 0.5, _TOP, 1, self._end - _TOP, "#9a9a9a")

    def _names(self) -> Iterator[Label]:
        """Write the names of areas below their blocks, as far as there is room."""
        free = 0.0
        for first, last in self._block_ranges():
            room = min(self._x(last) + self._step, _LEFT + _PLOT) - max(free, self._x(first))
            text = ", ".join(names(between(self.parts, first, last + self.grid.block)))
            for row, words in enumerate((f"{first:x}", text)):
                letters = int(room / _LETTER) - 1  # a space separates it from the next
                if letters >= 6:
                    cut = words if len(words) <= letters else words[: letters - 1] + "…"
                    yield Label(max(free, self._x(first)), self._end + 16 + row * 14, cut)

    def _block_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the first and the last address of each run of consecutive blocks."""
        first = last = None
        for address in self._columns:
            if first is None or last is None or last + self.grid.block != address:
                if first is not None and last is not None:
                    yield first, last
                first = address
            last = address
        if first is not None and last is not None:
            yield first, last

    def _tip(self, address: int, sums: Sums, where: str = "") -> str:
        end = address + self.grid.block
        held = ", ".join(f"{format_size(length)} {INKS[state].word}" for state, length in sums.items())
        areas = ", ".join(names(between(self.parts, address, end))[:4])
        return "\n".join(filter(None, (f"{address:#x}-{end:#x}", where, held, areas)))

    def _legend(self) -> list[tuple[str, int]]:
        totals = self.grid.totals()
        return [(state, totals[state]) for state in INKS if state in totals]

    def _captions(self) -> Iterator[str]:
        yield f"column: {format_size(self.grid.block)} of addresses; gray line: addresses are omitted"
        if self._field:
            size = format_size(self.grid.physical_block)
            yield f"row: {size} of physical memory; paler: less of the block is there"
        for hidden in self.look.hidden:
            yield f"not shown: {hidden.what} ({hidden.why})"
        if restless := self.look.restless():
            yield str(restless)

    def _explanation(self) -> Iterator[Box | Label]:
        y = self._end + _BOTTOM
        for state, length in self._legend():
            yield Box(_LEFT, y - 10, 12, 12, INKS[state].color)
            yield Label(_LEFT + 20, y, f"{INKS[state].meaning}: {format_size(length)}")
            y += _LINE
        for note in self._notes:
            yield Label(_LEFT, y, note)
            y += _LINE
