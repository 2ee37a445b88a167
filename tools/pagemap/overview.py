"""The first screen: a summary, and a row for each group of areas, largest first, as many as fit the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd.cli.color import can_write, painter
from iobmd.cli.folding import folded, terminal_height, terminal_width
from iobmd.printable import printable

from .columns import COLUMNS, brief, cells, column, fitting, heading, ranked
from .look import Hidden, Look
from .process import facts_of
from .summary import counts, lines, physical
from .table import shortened, show_hidden, show_restless, show_unmatched

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from .columns import Column
    from .groups import Groups
    from .total import Total

DEFAULT = (
    "rss", "rss%", "pss", "uss", "anon", "file", "shmem", "swap", "huge", "huge%", "locked", "size", "areas"
)  # fmt: skip
"""Columns on a terminal; with --columns, or in a file or a pipe, there may be more."""
_LEAST_NAME = 8
_LEAST_ROWS = 5
_PROMPT = 1
"""Lines of the terminal below the output."""


def run(arguments: argparse.Namespace) -> None:
    """Print the screen."""
    look = Look(arguments)
    width = terminal_width()
    facts = None if look.criteria else facts_of(look)
    groups = grouped(look)
    total = groups.total
    columns = chosen_columns(arguments, width, total)
    shown = {one.name for one in columns}
    hidden = [one for one in look.hidden if width is None or not one.columns or shown & set(one.columns)]
    head = folded(f"{look.title}: {counts(total, facts)}", width).splitlines()
    head += lines(total, facts, width)
    if shown & {"runs", "largest", "mthp"}:
        head += physical(total, width)
    restless = look.restless()
    if omitted := [name for name in arguments.columns or () if column(name) not in columns]:
        hidden.insert(
            0, Hidden(f"columns {', '.join(omitted)}", "the terminal is too narrow", "fewer --columns, or a pipe")
        )
    below = [*(str(one) for one in hidden), *([f"  {restless}"] if restless else [])]
    below_lines = sum(len(folded(line, width).splitlines()) for line in below)
    rows = [(group.name if width is None else group.label, group.total) for group in ranked(groups, arguments.sort)]
    most = most_rows(arguments, len(head) + 2 + below_lines)
    print("\n".join(head))
    show_rows(rows, columns, total, width, most)
    show_hidden(hidden, width)
    show_restless(look, width)
    show_unmatched(look)
    look.require_task()


def grouped(look: Look) -> Groups:
    """Return the selected areas of a process by their groups, as many as could be read before it exited."""
    groups = look.make_groups()
    for area in look.until_gone(look.areas()):
        groups.counted(area)
    return groups


def chosen_columns(arguments: argparse.Namespace, width: int | None, total: Total) -> list[Column]:
    """Return the requested columns, or all of them, as far as they fit the terminal."""
    if width is None:
        return [column(name) for name in arguments.columns or COLUMNS]
    if not arguments.columns:
        return fitting((COLUMNS[name] for name in DEFAULT), width - 3 - max(14, width * 3 // 8), total)
    columns = [column(name) for name in arguments.columns]
    while len(columns) > 1 and len(heading(columns)) > width - 3 - _LEAST_NAME:
        columns.pop()
    return columns


def most_rows(arguments: argparse.Namespace, others: int) -> int | None:
    """Return how many rows are shown, with `others` lines around them; None: all of them."""
    if arguments.top:
        return int(arguments.top)
    height = terminal_height()
    if height is None or arguments.all:
        return None
    return max(_LEAST_ROWS, height - others - _PROMPT)


def show_rows(
    rows: Sequence[tuple[str, Total]], columns: Sequence[Column], total: Total, width: int | None, most: int | None
) -> None:
    """Print the first rows, and a line on the others: (name, sums) each."""
    paint = painter()
    print(paint(f"{heading(columns)}  mapping", "bold"))
    most = len(rows) if most is None or most >= len(rows) else most - 1  # a line for the others
    for name, sums in rows[:most]:
        text, shown = f"{cells(columns, sums, total)}  ", printable(name)
        print(text + (shortened(shown, width - 1 - len(text)) if width else shown))
    if rest := rows[most:]:
        dots = "…" if can_write("…") else "..."
        size = brief(sum(sums.resident for _name, sums in rest))
        print(paint(f"{dots} {len(rest):,} more, {size}: --all", "dim"))
