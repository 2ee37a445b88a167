"""The picture of `--heat`: a row for each block of resident memory, a column for each interval."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from iobmd.cli.encoding import can_write
from iobmd.pagemap.sampling import Method
from iobmd.units import PAGE_SIZE, format_count, format_size, format_time

from .survey import short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import Console
    from rich.text import Text

    from iobmd.pagemap.sampling import Heat, Part, Sample

_SHADES, _LETTERS = "·░▒▓█", ".-+*#"
COLORS = ("grey50", "#4b6bd6", "#a25ac8", "#e0567f", "#f5a12f")
"""By level, from cold to hot; the shades distinguish them without colors."""
LIMITS = (0, 25, 50, 75, 100)
"""The highest percentage of a block that is used at each level."""
_LEAST_CELLS = 8
_NARROW, _WIDE = 60, 120
"""Widths of the terminal that change the widths of the columns."""
_AREAS = 0.6
"""The share of the rows at which areas are no longer separate."""


class Row(NamedTuple):
    """A block of an area, or all small areas."""

    label: str
    pieces: list[tuple[int, int]]
    """Ranges of addresses."""
    resident: int
    begins: bool = True
    """Whether an area begins with it."""

    def peak(self, samples: Iterable[Sample]) -> int:
        """Return how much of it was used in the interval that used most."""
        return max(sum(sample.used_in(*piece) for piece in self.pieces) for sample in samples)

    def share(self, heat: Heat, ever: Sample) -> str:
        """Return the share that was used in any interval, as text."""
        used = self.peak([ever])
        may_be_more = not heat.is_exact and 0 < used < self.resident
        return f"{'>' if may_be_more else ''}{_percent(used, self.resident)} %"


def draw(heat: Heat, width: int, rows: int) -> None:
    """Print the picture, at most `width` columns wide and about `rows` rows high."""
    from rich.console import Console  # noqa: PLC0415 (slow to load)
    from rich.text import Text  # noqa: PLC0415

    console = Console(width=width, height=rows, highlight=False)  # with both, TERM=dumb does not set the width
    label, size, percent = (10, 8, 6) if width < _NARROW else (22 if width < _WIDE else 34, 9, 7)
    cells = max(_LEAST_CELLS, min(len(heat.samples), width - label - size - percent - 4))
    columns = grouped(heat.samples, cells)
    paint = _painter(console.color_system is not None and not console.no_color)
    ever = heat.used_ever()
    verb = "written" if heat.method == Method.WRITTEN else "used"
    heading = f"{'memory':{label}} {'resident':>{size}} {'share':>{percent}} "
    console.print(Text(heading + _axis(heat.samples[-1].time, len(columns)), style="dim"))
    for row in rows_of(heat, rows):
        share = row.share(heat, ever)
        line = Text(f"{_cut(row.label, label):{label}} {format_size(row.resident):>{size}} {share:>{percent}} ")
        for group in columns:
            line.append_text(paint(level(row.peak(group), row.resident)))
        console.print(line, no_wrap=True, overflow="crop", crop=True)
    _print_legend(console, paint, verb)


def _print_legend(console: Console, paint: Callable[[int], Text], verb: str) -> None:
    from rich.text import Text  # noqa: PLC0415

    legend = Text()
    most = "≤ " if can_write("≤") else "<="
    for degree, word in enumerate(("none", *(f"{most}{limit}" for limit in LIMITS[1:]))):
        legend.append("  " if degree else "").append_text(paint(degree)).append(f" {word}")
    meaning = f" % {verb} in an interval; share: in all"
    legend.append(meaning if len(legend) + len(meaning) < console.width else " %")
    console.print(legend, no_wrap=True, overflow="crop", crop=True)


def grouped(samples: Sequence[Sample], count: int) -> list[Sequence[Sample]]:
    """Divide the samples into at most `count` consecutive groups."""
    bounds = [index * len(samples) // count for index in range(count + 1)]
    return [samples[low:high] for low, high in pairwise(bounds) if low < high]


def _axis(seconds: float, cells: int) -> str:
    end = format_time(seconds)
    return f"0{end:>{cells - 1}}" if cells > len(end) else end


def rows_of(heat: Heat, most: int) -> Iterator[Row]:
    """Iterate over at most about `most` blocks of the areas, ascending, and a row for all small areas."""
    largest = sorted(heat.parts, key=lambda part: -part.resident.used)
    kept = sorted(largest[: max(1, int(most * _AREAS))], key=lambda part: part.vma.start)
    kept = [part for part in kept if part.resident.used * most * 4 >= heat.resident]
    rest = [part for part in heat.parts if part not in kept]
    block = PAGE_SIZE
    while heat.is_exact and sum(len(_blocks(part, block)) for part in kept) > most - bool(rest):
        block *= 2
    for part in kept:
        if not heat.is_exact:
            yield Row(_name(part), [(part.vma.start, part.vma.end)], part.resident.used)
            continue
        for index, (start, end, resident) in enumerate(_blocks(part, block)):
            offset = start - part.vma.start
            label = f"{' ' if index else _name(part)} +{format_size(offset)}" if offset else _name(part)
            yield Row(label, [(start, end)], resident, not index)
    if rest:
        label = f"{format_count(len(rest), 'other area')}"
        pieces = [(part.vma.start, part.vma.end) for part in rest]
        yield Row(label, pieces, sum(part.resident.used for part in rest))


def _blocks(part: Part, block: int) -> list[tuple[int, int, int]]:
    """Return the blocks of an area that have resident memory: start, end and resident bytes."""
    found: list[tuple[int, int, int]] = []
    at = part.vma.start
    for low, high in part.resident.ranges():
        at = max(at, low - (low - part.vma.start) % block)
        while at < high:
            end = min(part.vma.end, at + block)
            found.append((at, end, part.resident.used_in(at, end)))
            at = end
    return found


def _name(part: Part) -> str:
    return short(part.vma.name)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _percent(part: int, whole: int) -> int:
    return min(100, -(-part * 100 // whole)) if whole else 0


def level(used: int, resident: int) -> int:
    """Return the level of a block."""
    percent = _percent(used, resident)
    return sum(percent > limit for limit in LIMITS[:-1])


def _painter(colored: bool) -> Callable[[int], Text]:
    from rich.text import Text  # noqa: PLC0415

    signs = _SHADES if can_write(_SHADES) else _LETTERS
    return lambda level: Text(signs[level], style=COLORS[level] if colored else "")
