"""`--each`: a row for each area, printed as it is read.

On a terminal that is too narrow for all columns, the least important are left out.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from iobmd.cli.folding import folded, show, terminal_width
from iobmd.printable import printable
from iobmd.units import format_size

from .columns import cells, column, fitting, heading
from .look import Hidden, Look, page_line
from .process import facts_of
from .summary import counts, folios, lines, physical
from .total import Total, total_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from iobmd.pagemap.area import Area

    from .columns import Column

NAME_WIDTH = 12
"""Columns of a terminal that the name of an area has at least."""
DEFAULT = (
    "size", "rss", "pss", "uss", "shared", "anon", "file", "shmem", "swap", "huge", "locked", "lazyfree", "runs",
    "largest",
)  # fmt: skip
"""Columns in a file or a pipe, and on a wide terminal."""
_ADDRESSES, _ADDRESS = 29, 12
"""Widths of the addresses of an area: its start and end, or on a narrow terminal, its start."""
_WIDE, _NARROW = 140, 60
"""Widths of a terminal from which both addresses, and the permissions, are shown."""


def run(arguments: argparse.Namespace) -> None:
    """Print a row for each area, and the summary below it, which a terminal still shows after a long list."""
    look = Look(arguments)
    width = terminal_width()
    columns = [column(name) for name in arguments.columns or DEFAULT]
    if width is not None:
        columns = fitting(columns, width - len(_start(None, width)) - 2 - NAME_WIDTH)
    total = Total()
    show_head(look, width)
    print(_start(None, width) + heading(columns) + "  mapping")
    for row in look.rows(lambda area: _row(look, total.counted(area), columns, width)):
        print(row)
    show_total(look, total, width)
    show_restless(look, width)
    show_unmatched(look)
    look.require_task()


def show_head(look: Look, width: int | None = None) -> None:
    """Print the subject, and what is hidden."""
    show(page_line(look), width)
    show_hidden(look.hidden, width)


def show_hidden(found: Iterable[Hidden], width: int | None = None) -> None:
    """Print what is not shown, the reason, and the remedy."""
    for hidden in found:
        show(str(hidden), width)


def amount(size: int | None) -> str:
    """Format a size: a dash for 0, a question mark if unknown."""
    return "?" if size is None else format_size(size) if size else "-"


def _row(look: Look, area: Area, columns: list[Column], width: int | None) -> str:
    row = total_of(area)
    text = f"{_start(area, width)}{cells(columns, row, row)}  "
    name, notes = printable(look.names.name_of(area.vma)), _notes(area)
    if width and len(text) + len(name) + len(notes) >= width:
        name = shortened(name, width - 1 - len(text))
        notes = "\n" + folded(f"    {notes.lstrip()}", width, "") if notes else ""
    return f"{text}{name}{notes}"


def _start(area: Area | None, width: int | None) -> str:
    """Return the addresses and permissions of an area, or the heading above them."""
    if width is None or width >= _WIDE:
        return f"{f'{area.start:x}-{area.end:x}' if area else 'addresses':>{_ADDRESSES}} {_perms(area)}"
    address = f"{f'{area.start:x}' if area else 'address':>{_ADDRESS}}"
    return f"{address} {_perms(area)}" if width >= _NARROW else address


def _perms(area: Area | None) -> str:
    return area.perms if area else "perms"[:4]


def shortened(name: str, length: int) -> str:
    """Cut a path to a length: at its start, or if the file's name alone is too long, at the end of that."""
    if len(name) <= length:
        return name
    base = name.rpartition("/")[2]
    return f"…{name[1 - length :]}" if len(base) < length else f"{base[: length - 1]}…"


def _notes(area: Area) -> str:
    notes = []
    if area.hugetlb_page:
        notes.append(f"hugetlb pages of {format_size(area.hugetlb_page)}")
    elif area.folios and (large := folios(area.folios)):
        notes.append(large)
    for what, size in (
        ("zero page", area.tally.zero),
        ("guard pages", area.tally.guard),
        ("of markers", area.marker),
        ("device memory", area.device),
    ):
        if size:
            notes.append(f"{format_size(size)} {what}")
    return f" [{'; '.join(notes)}]" if notes else ""


def show_total(look: Look, total: Total, width: int | None = None) -> None:
    """Print the summary."""
    facts = None if look.criteria else facts_of(look)
    print()
    show(counts(total, facts), width)
    print("\n".join((*lines(total, facts, width), *physical(total, width))))


def show_restless(look: Look, width: int | None = None) -> None:
    """Print whether the process changed while it was read."""
    if restless := look.restless():
        show(f"  {restless}", width, "    ")
    sys.stdout.flush()


def show_unmatched(look: Look) -> None:
    """Report on stderr that no area was selected."""
    if not look.matched:
        print("iobmd pagemap: no area matches " + " ".join(look.criteria), file=sys.stderr)
