"""`--watch` on a terminal: a table that is drawn anew at each look, with what changed in colour."""

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
from .watch import line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from iobmd.pagemap.area import Area
    from iobmd.procfs import VMA

    from .look import Look
    from .watch import Tick

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
_AROUND = 8
"""Lines of the screen that are no rows of the table."""


def show(look: Look, looks: Iterator[Tick]) -> None:
    """Show the looks until they end."""
    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for tick in looks:
            live.update(_view(look, tick, console.height), refresh=True)


def _view(look: Look, tick: Tick, height: int) -> RenderableType:
    hidden = [Text(f"not shown: {one.what} ({one.why})", style="dim") for one in look.hidden]
    table = Table(box=None, padding=(0, 1), expand=True, header_style="dim")
    for heading in ("addresses", "size", "resident", "swapped", "huge"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("changed", ratio=3, no_wrap=True)
    table.add_column("name", ratio=1, no_wrap=True)
    for row in islice(_rows(tick), max(4, height - _AROUND - len(hidden))):
        table.add_row(*row)
    return Group(Text(page_line(look), style="bold"), *hidden, Text(line(tick)), Text(), table)


def _rows(tick: Tick) -> Iterator[tuple[RenderableType, ...]]:
    """Iterate over what changed, most first, and then the other areas, the largest in memory first."""
    for vma, area, sums in sorted(tick.changed, key=lambda one: -one.sums.total()):
        yield _row(area, sums) if area else _gone(vma, sums)
    for area in tick.largest:
        yield _row(area, Counter())


def _row(area: Area, sums: Counter[Kind]) -> tuple[RenderableType, ...]:
    sizes = [amount(size) for size in (area.size, area.resident, area.swapped, area.huge)]
    return Text(f"{area.start:x}-{area.end:x}"), *sizes, _words(sums), _name(area.vma)


def _gone(vma: VMA, sums: Counter[Kind]) -> tuple[RenderableType, ...]:
    addresses = Text(f"{vma.start:x}-{vma.end:x}", style="dim")
    return addresses, amount(vma.end - vma.start), "-", "-", "-", _words(sums), _name(vma)


def _name(vma: VMA) -> Text:
    return Text(short(vma.name), style="dim")


def _words(sums: Counter[Kind]) -> Text:
    words = [Text(f"{format_size(size)} {kind}", style=_STYLES[kind]) for kind, size in sums.most_common()]
    return Text(", ").join(words)
