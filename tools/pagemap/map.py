"""`--map`: the address space in the terminal, a cell for each block, colored by its most frequent state."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from iobmd.cli.folding import terminal_width
from iobmd.units import format_size

from .grid import Grid
from .look import Look
from .palette import INKS, main_state
from .survey import between, names, survey
from .table import show_head, show_restless

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from rich.text import Text

    from .grid import Sums
    from .survey import Part

_MARGIN = 18  # the address of the row, and spaces
_SHADES, _NOTHING, _LEFT_OUT = "░▒▓█", "·", "⋮"


def run(arguments: argparse.Namespace) -> None:
    """Print the map."""
    from rich.console import Console  # noqa: PLC0415 (slow to load)

    look = Look(arguments)
    show_head(look, terminal_width())
    screen = shutil.get_terminal_size((100, 44))
    cells = 1 << max(0, max(0, screen.columns - _MARGIN).bit_length() - 1)
    grid = Grid(max(8, screen.lines - 12), row=cells)
    parts = survey(look, grid)
    if not grid.totals():
        print("the selected areas are empty")
        look.require_task()
        return
    console = Console(width=max(screen.columns, _MARGIN + 1), highlight=False)
    paint = _shade if console.color_system and not console.no_color and _can_shade() else _letter
    print(f"a cell: {format_size(grid.block)}, a row: {format_size(grid.block * cells)}\n")
    for line in _lines(grid, cells, parts, paint):
        console.print(line, no_wrap=True, overflow="crop", crop=True)
    console.print(_legend(grid, paint))
    show_restless(look, terminal_width())
    look.require_task()


def _can_shade() -> bool:
    try:
        (_SHADES + _NOTHING + _LEFT_OUT).encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _lines(grid: Grid, cells: int, parts: list[Part], paint: Callable[..., Text]) -> list[Text]:
    from rich.text import Text  # noqa: PLC0415

    lines: list[Text] = []
    behind = 0
    for address, sums in grid.rows():
        end = address + cells * grid.block
        if lines and behind != address:
            lines.append(Text(_skipped(parts, behind, address), style="dim"))
        line = Text(f"{address:>16x}  ")
        here = list(between(parts, address, end))
        for index, one in enumerate(sums):
            start = address + index * grid.block
            line.append_text(paint(one, grid.block, any(between(here, start, start + grid.block))))
        lines.append(line.append("  " + ", ".join(names(here)), style="dim"))
        behind = end
    return lines


def _skipped(parts: list[Part], start: int, end: int) -> str:
    """Return a text on the areas between two rows: empty ones, or none."""
    size = sum(part.end - part.start for part in between(parts, start, end))
    sign = _LEFT_OUT if _can_shade() else ":"
    return f"{sign:>16}" + (f"  {format_size(size)} of empty areas" if size else "")


def _shade(sums: Sums, block: int, mapped: bool) -> Text:
    from rich.text import Text  # noqa: PLC0415

    if not sums:
        return Text(_NOTHING if mapped else " ", style="dim")
    filled = min(3, sum(sums.values()) * 4 // block)
    return Text(_SHADES[filled], style=INKS[main_state(sums)].color)


def _letter(sums: Sums, block: int, mapped: bool) -> Text:
    from rich.text import Text  # noqa: PLC0415

    if not sums:
        return Text("." if mapped else " ")
    letter = INKS[main_state(sums)].letter
    return Text(letter if sum(sums.values()) * 2 >= block else letter.lower())


def _legend(grid: Grid, paint: Callable[..., Text]) -> Text:
    from rich.text import Text  # noqa: PLC0415

    totals = grid.totals()
    legend = Text("\n")
    for state, ink in INKS.items():
        if state in totals:
            legend.append_text(paint({state: 1}, 1, True)).append(f" {ink.meaning}, {format_size(totals[state])}\n")
    legend.append_text(paint({}, 1, True)).append(" empty part of an area\n")
    shades = "paler: less of the block is filled" if paint is _shade else "small letters: less than half is filled"
    return legend.append(f"{shades}; a block shows its most frequent state")
