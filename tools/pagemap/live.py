"""`--watch` on a terminal: a table that is redrawn after each read, with changes in color."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from iobmd.pagemap.change import Kind
from iobmd.units import format_size

from .look import page_line
from .survey import short
from .table import amount
from .ticks import line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import ConsoleDimensions, RenderableType

    from iobmd.pagemap.area import Area
    from iobmd.procfs import VMA

    from .look import Look
    from .ticks import Tick

_STYLES = {
    Kind.MAPPED: "bold",
    Kind.UNMAPPED: "bold dim",
    Kind.NEWLY_RESIDENT: "green",
    Kind.RELEASED: "dim",
    Kind.SWAPPED_OUT: "bold red",
    Kind.SWAPPED_IN: "cyan",
    Kind.COPIED: "green",
    Kind.MIGRATED: "yellow",
    Kind.SPLIT: "magenta",
    Kind.COLLAPSED: "blue",
    Kind.OTHER: "dim",
}
_SIZES = ("size", "resident", "swapped", "huge")
_SIZES_OF_MEMORY = ("resident", "swapped")
"""Columns that fit a narrow screen."""
_WIDE = 100
_LEAST = 12
"""Minimum width of a column that is never omitted."""
_AROUND = 8
"""Lines of the screen that are not rows of the table."""


def show(look: Look, looks: Iterator[Tick]) -> None:
    """Show the ticks until they end."""
    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop", redirect_stderr=False) as live:
        for tick in looks:
            live.update(_view(look, tick, console.size), refresh=True)


def _view(look: Look, tick: Tick, screen: ConsoleDimensions) -> RenderableType:
    hidden = [Text(f"not shown: {one.what} ({one.why})", style="dim") for one in look.hidden]
    table = Table(box=None, padding=(0, 1), expand=True, header_style="dim")
    sizes = _SIZES if screen.width >= _WIDE else _SIZES_OF_MEMORY
    for heading in ("addresses", *sizes):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("changed", ratio=2, min_width=_LEAST, no_wrap=True)
    table.add_column("name", ratio=1, min_width=_LEAST, no_wrap=True)
    for row in islice(_rows(tick), max(4, screen.height - _AROUND - len(hidden))):
        table.add_row(row["addresses"], *(row[size] for size in sizes), row["changed"], row["name"])
    return Group(Text(page_line(look), style="bold"), *hidden, Text(line(tick)), Text(), table)


def _rows(tick: Tick) -> Iterator[dict[str, RenderableType]]:
    """Iterate over the changed areas, most changes first, and then the others, largest first."""
    for vma, area, sums in sorted(tick.changed, key=lambda one: -one.sums.total()):
        yield _row(area, sums) if area else _gone(vma, sums)
    for area in tick.largest:
        yield _row(area, Counter())


def _row(area: Area, sums: Counter[Kind]) -> dict[str, RenderableType]:
    sizes = (amount(size) for size in (area.size, area.resident, area.swapped, area.huge))
    return _cells(Text(f"{area.start:x}-{area.end:x}"), sizes, sums, area.vma)


def _gone(vma: VMA, sums: Counter[Kind]) -> dict[str, RenderableType]:
    addresses = Text(f"{vma.start:x}-{vma.end:x}", style="dim")
    return _cells(addresses, (amount(vma.end - vma.start), "-", "-", "-"), sums, vma)


def _cells(addresses: Text, sizes: Iterable[str], sums: Counter[Kind], vma: VMA) -> dict[str, RenderableType]:
    found: dict[str, RenderableType] = dict(zip(_SIZES, sizes, strict=True))
    name = Text(short(vma.name), style="dim")
    return found | {"addresses": addresses, "changed": _words(sums), "name": name}


def _words(sums: Counter[Kind]) -> Text:
    words = [Text(f"{format_size(size)} {kind}", style=_STYLES[kind]) for kind, size in sums.most_common()]
    return Text(", ").join(words)
