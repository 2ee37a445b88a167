"""The map of the host's physical memory: a cell for each block, colored by the kind of most of its used frames."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, NamedTuple

from iobmd.cli.encoding import can_write
from iobmd.cli.folding import show
from iobmd.pagemap.census import MOVABLE
from iobmd.units import format_size

if TYPE_CHECKING:
    from rich.text import Text

    from iobmd.pagemap.census import MapRow

_MARGIN = 13
"""Columns for the address of a row."""
_SHADES = "░▒▓█"
_UNUSED = {"free": "·", "uninitialized": ":"}
"""The signs of memory that is not in use."""
_PIPE_LINES = 40
_BARS = 8
"""The minimum number of columns of a bar."""


class Ink(NamedTuple):
    """The representation of a kind of memory."""

    color: str
    plain: str
    """The color among the 16 of a terminal."""
    letter: str
    """The letter if there are no colors."""
    word: str


KINDS = {
    "free": Ink("#808080", "white", ".", "free"),
    "anonymous": Ink("#6cb9ee", "bright_cyan", "A", "anonymous"),
    "file": Ink("#1c9c6c", "green", "F", "page cache"),
    "shared": Ink("#a6d96a", "bright_green", "M", "shared memory"),
    "huge": Ink("#0b5fa5", "blue", "H", "huge pages"),
    "hugetlb": Ink("#7b61c9", "bright_blue", "P", "hugetlb pools"),
    "slab": Ink("#e8751a", "yellow", "S", "slab"),
    "page_tables": Ink("#c76bb0", "magenta", "T", "page tables"),
    "kernel": Ink("#d1383d", "red", "K", "kernel"),
    "listed": Ink("#d1383d", "red", "K", "free, in lists"),
    "reserved": Ink("#5a5a5a", "bright_black", "R", "reserved"),
    "offline": Ink("#b9a44c", "bright_yellow", "O", "offline"),
    "poisoned": Ink("#ff00ff", "bright_magenta", "X", "poisoned"),
    "uninitialized": Ink("#808080", "white", ":", "uninitialized"),
}
"""Kinds in the order of the legend."""


def map_shape(columns: int) -> tuple[int, int]:
    """Return the maximum number of rows of a map that fit the terminal, and of cells in a row."""
    lines = shutil.get_terminal_size((100, _PIPE_LINES)).lines if sys.stdout.isatty() else _PIPE_LINES
    cells = max(8, columns - _MARGIN)
    return max(16, min(24, lines - len(KINDS) - 6)), cells - cells % 8


def draw(kinds: dict[str, int], huge: dict[str, int], rows: list[MapRow], cell: int, columns: int) -> None:
    """Print the map, and its legend with the sums."""
    from rich.console import Console  # noqa: PLC0415 (slow to load)

    console = Console(width=columns + 1, highlight=False)
    brush = _Brush(console.color_system if not console.no_color else None)
    if rows:
        print(f"a cell: {format_size(cell)}, a row: {format_size(cell * len(rows[0].cells))}\n")
    for row in rows:
        line = brush.text(f"{row.physical:>{_MARGIN - 2}x}  ")
        for one in row.cells:
            line.append_text(brush.cell(one, cell))
        console.print(line, no_wrap=True, overflow="crop", crop=True)
    print()
    for line in _legend(kinds, huge, brush, columns):
        console.print(line, no_wrap=True, overflow="crop", crop=True)
    if rows:
        rule = "░ to █: the part in use" if brush.shades else "small letters: less than half is in use"
        show(f"a cell shows the most frequent kind in use; {rule}", columns + 1)
    if parts := [f"{format_size(huge[kind])} {KINDS[kind].word}" for kind in MOVABLE if huge.get(kind)]:
        show(f"in huge pages: {', '.join(parts)}", columns + 1)


class _Brush:
    """Cells with the colors that the terminal has, or letters."""

    def __init__(self, system: str | None) -> None:
        self.shades = system is not None and can_write(_SHADES + _UNUSED["free"])
        self._plain = system == "standard"

    def text(self, text: str) -> Text:
        """Return plain text."""
        from rich.text import Text  # noqa: PLC0415

        return Text(text)

    def cell(self, sums: dict[str, int], size: int) -> Text:
        """Return the character for a block: of its most frequent kind besides free memory, by the part in use."""
        used = {kind: held for kind, held in sums.items() if kind not in _UNUSED}
        if not used:
            return self.swatch(max(sums, key=lambda kind: sums[kind])) if sums else self.text(" ")
        kind = max(used, key=lambda kind: used[kind])
        share = sum(used.values()) / size
        if self.shades:
            return self._styled(kind, _SHADES[min(3, int(share * 4))])
        return self.text(KINDS[kind].letter if share >= 0.5 else KINDS[kind].letter.lower())

    def swatch(self, kind: str, length: int = 1) -> Text:
        """Return a sample of a kind, or a bar."""
        if self.shades:
            return self._styled(kind, _UNUSED.get(kind, _SHADES[-1]) * length)
        return self.text(KINDS[kind].letter * length)

    def _styled(self, kind: str, text: str) -> Text:
        from rich.text import Text  # noqa: PLC0415

        ink = KINDS[kind]
        return Text(text, style=ink.plain if self._plain else ink.color)


def _legend(kinds: dict[str, int], huge: dict[str, int], brush: _Brush, columns: int) -> list[Text]:
    total = sum(kinds.values()) or 1
    room = min(60, columns - 38)
    shown = {kind: kinds.get(kind, 0) - (huge.get(kind, 0) if kind in MOVABLE else 0) for kind in KINDS}
    shown["huge"] = sum(huge.get(kind, 0) for kind in MOVABLE)
    lines = []
    for kind, held in shown.items():
        if held:
            line = brush.swatch(kind).append(
                f" {KINDS[kind].word:14}{format_size(held):>10} {held * 100 / total:5.1f} %"
            )
            if room >= _BARS:
                line.append("  ").append_text(brush.swatch(kind, round(held * room / total)))
            lines.append(line)
    return lines
