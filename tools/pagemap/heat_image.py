"""`--heat` with `--svg` or `--png`: memory used over time, and below it, a row for each block of addresses."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from iobmd.pagemap.sampling import Method
from iobmd.units import format_size, format_time

from .drawing import WIDTH, Box, Label, fixed_width
from .heatmap import COLORS, LIMITS, grouped, level, rows_of
from .labels import shortened

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd.pagemap.sampling import Heat

    from .heatmap import Row

_LEFT, _PLOT = 340, 770
"""The left edge and the width of the plots; at their left, there are names and sizes."""
_NAMES, _NAME_ROOM = 34, 140
_ADDRESSES, _SIZES = 264, 332
"""The right edges of the columns of addresses and sizes."""
_INDENT = 12
_LINE = 18
_ROW = 14
"""Height of a row of addresses."""
_BARS = 72
"""Height of the plot of used memory."""
_MOST_ROWS = 48
_INKS = ["ground", *(f"heat{degree}" for degree in range(1, len(COLORS)))]


class HeatImage:
    """An image of sampled memory, with the lines above and below the picture of the terminal."""

    def __init__(self, title: str, heat: Heat, above: list[str], below: list[str]) -> None:
        self.width = WIDTH
        self.colors = dict(zip(_INKS[1:], COLORS[1:], strict=True))
        self._title, self._heat, self._above, self._below = title, heat, above, below
        self._verb = "written" if heat.method == Method.WRITTEN else "used"
        self._groups = grouped(heat.samples, _PLOT // 2)
        self._rows = list(rows_of(heat, _MOST_ROWS))
        self._bars_top = 92 + _LINE * (len(above) - 1)
        self._top = self._bars_top + _BARS + 76
        self._end = self._top + _ROW * len(self._rows)
        self.height = self._end + 56 + _LINE * len(below)

    def items(self) -> Iterator[Box | Label]:
        """Iterate over all items in drawing order."""
        yield Box(0, 0, self.width, self.height, "paper")
        yield Label(_NAMES, 32, f"Memory {self._verb} by {self._title}", role="title")
        for index, line in enumerate(self._above):
            yield Label(_NAMES, 54 + index * _LINE, line)
        yield from self._working_set()
        yield from self._legend()
        yield from self._blocks()
        yield from self._axis()
        for index, line in enumerate(self._below):
            yield Label(_NAMES, self._end + 62 + index * _LINE, line)

    def _x(self, group: int) -> int:
        return _LEFT + round(group * _PLOT / len(self._groups))

    def _working_set(self) -> Iterator[Box | Label]:
        """Draw how much memory was used in each interval."""
        top = self._bars_top
        yield Label(_LEFT, top - 8, f"Memory {self._verb} in each interval", role="heading")
        yield Box(_LEFT, top, _PLOT, _BARS, "ground")
        sizes = [max(sample.used for sample in group) for group in self._groups]
        most = max(sizes)
        for row, size in ((0, most), (_BARS, 0)):
            yield Box(_LEFT, top + row, _PLOT, 0.5, "line")
            yield Label(_LEFT - 8, top + row + 4, format_size(size) if size else "0", "end")
        for index, size in enumerate(sizes):
            if size:
                height = _BARS * size / most
                yield Box(self._x(index), top + _BARS - height, self._x(index + 1) - self._x(index), height, "heat1")

    def _legend(self) -> Iterator[Box | Label]:
        y = self._top - 30
        yield Label(_NAMES, y, "Memory by address", role="heading")
        x = float(_LEFT)
        for degree, ink in enumerate(_INKS):
            words = f"up to {LIMITS[degree]} %" if degree else "none"
            yield Box(x, y - 10, 12, 12, "border")
            yield Box(x + 1, y - 9, 10, 10, ink)
            yield Label(x + 18, y, words)
            x += 100 if degree else 60
        yield Label(x, y, f"of a row {self._verb} in an interval")
        yield Label(_ADDRESSES, self._top - 6, "address", "end")
        yield Label(_SIZES, self._top - 6, "resident", "end")
        yield Label(_LEFT + _PLOT + 8, self._top - 6, f"ever {self._verb}")

    def _blocks(self) -> Iterator[Box | Label]:
        """Draw a row for each block, with a line above each area."""
        ever = self._heat.used_ever()
        for index, row in enumerate(self._rows):
            y = self._top + index * _ROW
            indent = 0 if row.begins else _INDENT
            name = shortened(row.label.strip(), _NAME_ROOM - indent, fixed_width)
            yield Label(_NAMES + indent, y + 11, name, role="name", room=_NAME_ROOM - indent)
            if len(row.pieces) == 1:
                yield Label(_ADDRESSES, y + 11, f"{row.pieces[0][0]:x}", "end", "name")
            yield Label(_SIZES, y + 11, format_size(row.resident), "end", "name")
            yield Label(_LEFT + _PLOT + 8, y + 11, row.share(self._heat, ever), role="name")
            yield from self._cells(row, y)
            if row.begins:
                yield Box(_NAMES, y, _LEFT + _PLOT - _NAMES, 0.5, "border")
        yield Box(_NAMES, self._end, _LEFT + _PLOT - _NAMES, 0.5, "border")

    def _cells(self, row: Row, y: float) -> Iterator[Box]:
        """Draw the intervals of a row; consecutive ones of one level are a box."""
        levels = (level(row.peak(group), row.resident) for group in self._groups)
        start = 0
        for degree, same in groupby(levels):
            end = start + sum(1 for _ in same)
            yield Box(self._x(start), y, self._x(end) - self._x(start), _ROW, _INKS[degree])
            start = end

    def _axis(self) -> Iterator[Box | Label]:
        """Draw the scale of time below the picture."""
        whole = self._heat.samples[-1].time
        step = _step(whole)
        for tick in range(int(whole / step) + 1):
            x = _LEFT + _PLOT * tick * step / whole
            yield Box(x, self._end, 1, 5, "border")
            yield Label(x, self._end + 18, format_time(tick * step) if tick else "0", "middle")
        yield Label(_LEFT + _PLOT / 2, self._end + 36, "time since the start", "middle")


def _step(whole: float) -> float:
    """Return a round step with which a scale of this length has at most ten ticks."""
    step = 1e-3
    while True:
        for factor in (1, 2, 5):
            if whole / (step * factor) <= 10:
                return step * factor
        step *= 10
