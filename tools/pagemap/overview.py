"""The first screen: a summary, and a row for each group of areas, largest first, as many as fit the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iobmd.cli.color import painter
from iobmd.cli.folding import folded, terminal_height, terminal_width
from iobmd.printable import printable

from .columns import COLUMNS, OF_AREAS, SYNONYMS, brief, cells, column, fitting, heading, ranked
from .look import Hidden, Look
from .process import facts_of
from .sharers import Sharers
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
"""Columns on a terminal; with --columns, on a wide one, or in a file or a pipe, there may be more."""
_WIDE, _ON_WIDE = 200, ("shared", "eligible", "mthp", "lazyfree")
"""Columns of a wide terminal, and what it shows besides the default."""
WITH_SHARERS = ("rss", "pss", "shared")
"""Columns with --sharers, to leave room for the names of processes."""
_NAME, _LEAST_NAME = 14, 8
"""Columns that a name has at least, and with --columns."""
_LEAST_ROWS = 5
_FEW = 5
_PROMPT = 1
"""Lines of the terminal below the output."""


def run(arguments: argparse.Namespace) -> None:
    """Print the screen."""
    look = Look(arguments)
    width = terminal_width()
    facts = None if look.criteria else facts_of(look)
    groups = grouped(look)
    total = groups.total
    names = OF_AREAS if width is None else WITH_SHARERS if arguments.sharers else _default(look, width)
    columns = chosen_columns(arguments, width, total, names)
    shown = {one.name for one in columns}
    hidden = [one for one in look.hidden if width is None or not one.columns or shown & set(one.columns)]
    head = folded(f"{look.title}: {counts(total, facts)}", width).splitlines()
    head += lines(total, facts, width)
    if shown & {"runs", "largest", "mthp"}:
        head += physical(total, width)
    restless = look.restless()
    hidden += omitted(arguments, columns)
    sharers = Sharers(look) if arguments.sharers else None
    hidden += sharers.hidden() if sharers else []
    rows = [
        Row(
            "",
            group.name if width is None else group.label,
            group.total,
            sharers.note(group.name) if sharers else "",
        )
        for group in ranked(groups, arguments.sort)
    ]
    below = [*(str(one) for one in hidden), *([f"  {restless}"] if restless else [])]
    below_lines = sum(len(folded(line, width).splitlines()) for line in below)
    most = most_rows(arguments, len(head) + 2 + below_lines, len(rows))
    print("\n".join(head))
    show_rows(rows, columns, total, width, most, Row("", "mapping", total))
    show_hidden(hidden, width)
    show_restless(look, width)
    show_unmatched(look)
    look.require_task()


def _default(look: Look, width: int) -> tuple[str, ...]:
    """Return the columns of a terminal of this width; a wide one has others, unless they are hidden."""
    hidden = {name for one in look.hidden for name in one.columns}
    return DEFAULT if width < _WIDE else (*DEFAULT, *(name for name in _ON_WIDE if name not in hidden))


def grouped(look: Look) -> Groups:
    """Return the selected areas of a process by their groups, as many as could be read before it exited."""
    groups = look.make_groups()
    for area in look.until_gone(look.areas()):
        groups.counted(area)
    return groups


def chosen_columns(
    arguments: argparse.Namespace, width: int | None, total: Total, names: Sequence[str] = DEFAULT, start: int = 0
) -> list[Column]:
    """Return the requested columns, or the named ones, as far as they fit the terminal behind a text."""
    if width is None:
        return [column(name) for name in arguments.columns or names]
    room = width - start - 3
    if not arguments.columns:
        first = SYNONYMS.get(arguments.sort, arguments.sort)
        shown = [*names, *([first] if first in COLUMNS and first not in names else [])]
        wanted = [COLUMNS[name] for name in shown]
        return fitting(wanted, room - max(_NAME, (width - start) * 3 // 8), total, first)
    columns = [column(name) for name in arguments.columns]
    while len(columns) > 1 and len(heading(columns)) > room - _LEAST_NAME:
        columns.pop()
    return columns


def omitted(arguments: argparse.Namespace, columns: Sequence[Column]) -> list[Hidden]:
    """Return the requested columns that do not fit."""
    found = [name for name in arguments.columns or () if column(name) not in columns]
    what = f"columns {', '.join(found)}" if len(found) < _FEW else f"{len(found)} of the columns"
    return [Hidden(what, "the terminal is too narrow", "fewer --columns, or a pipe")] if found else []


def most_rows(arguments: argparse.Namespace, others: int, count: int) -> int:
    """Return how many of `count` rows are shown, with `others` lines around them."""
    if arguments.top:
        return min(int(arguments.top), count)
    height = terminal_height()
    if height is None or arguments.all:
        return count
    room = max(_LEAST_ROWS, height - others - _PROMPT)
    return count if count <= room else room - 1  # a line for the others


def ended(text: str, length: int) -> str:
    """Cut a text to a length at its end."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


class Row(NamedTuple):
    """A row of a table of sums."""

    start: str
    """The text before the columns."""
    name: str
    total: Total
    note: str = ""
    """The text after the name."""


def show_rows(
    rows: Sequence[Row], columns: Sequence[Column], total: Total, width: int | None, most: int, head: Row
) -> None:
    """Print the first rows, and a line on the others. `head` contains the headings of the texts."""
    paint = painter()
    print(paint(f"{head.start}{heading(columns)}  {head.name}", "bold"))
    for row in rows[:most]:
        text, name = f"{row.start}{cells(columns, row.total, total)}  ", printable(row.name)
        if row.note:
            name = f"{name}  {printable(row.note)}"
            print(text + (ended(name, width - 1 - len(text)) if width else name))
            continue
        print(text + (shortened(name, width - 1 - len(text)) if width else name))
    if rest := rows[most:]:
        size = brief(sum(row.total.resident for row in rest))
        print(paint(f"… {len(rest):,} more, {size} of rss: --all", "dim"))
