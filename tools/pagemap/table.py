"""The table: plain text in columns of fixed width, printed row by row.

In a file or a pipe it has every column. On a terminal that is too narrow for them, the least important are left out.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from iobmd.cli.folding import show, terminal_width
from iobmd.cli.printable import printable
from iobmd.units import PAGE_SIZE, format_count, format_size

from .look import Hidden, Look, page_line
from .total import Total

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

    from iobmd.pagemap.area import Area

NAME_WIDTH = 16
"""Columns of a terminal that the name of an area has at least."""


class Column(NamedTuple):
    """A column of the table, of fixed width."""

    heading: str
    width: int
    rank: int
    """Its importance: of the columns that do not fit, those with the highest rank are left out."""
    cell: Callable[[Area], str]

    def padded(self, text: str) -> str:
        """Align the text: to the right, except permissions."""
        return f"{text:{self.width}}" if self.heading == "perms" else f"{text:>{self.width}}"


_START = Column("address", 12, 0, lambda area: f"{area.start:x}")
COLUMNS = (
    Column("addresses", 29, 0, lambda area: f"{area.start:x}-{area.end:x}"),
    Column("perms", 5, 7, lambda area: area.perms),
    Column("size", 9, 1, lambda area: amount(area.size)),
    Column("resident", 9, 2, lambda area: amount(area.resident)),
    Column("file/shm", 9, 8, lambda area: amount(area.file_or_shared)),
    Column("shared", 9, 3, lambda area: amount(area.shared)),
    Column("swapped", 9, 5, lambda area: amount(area.swapped)),
    Column("huge", 9, 4, lambda area: amount(area.huge)),
    Column("locked", 9, 6, lambda area: amount(area.locked)),
    Column("lazyfree", 9, 11, lambda area: amount(area.lazy_free)),
    Column("runs", 7, 9, lambda area: f"{area.tally.runs:,}" if area.visible else "?"),
    Column("largest", 9, 10, lambda area: amount(area.tally.largest) if area.visible else "?"),
)


def fitting(width: int | None) -> tuple[Column, ...]:
    """Return the columns that fit on a terminal of this width, in order; all of them if it is None."""
    if width is None or width >= sum(column.width + 1 for column in COLUMNS) + 1 + NAME_WIDTH:
        return COLUMNS
    chosen = {_START.heading}
    left = width - _START.width - 2 - NAME_WIDTH
    for column in sorted(COLUMNS[1:], key=lambda column: column.rank):
        if column.width + 1 > left:
            break
        chosen.add(column.heading)
        left -= column.width + 1
    return tuple(column for column in (_START, *COLUMNS[1:]) if column.heading in chosen)


def run(arguments: argparse.Namespace) -> None:
    """Print the table."""
    look = Look(arguments)
    width = terminal_width()
    columns = fitting(width)
    show_head(look, width)
    if omitted := [column.heading for column in COLUMNS[1:] if column not in columns]:
        show(f"columns left out: {', '.join(omitted)}; they fit on a wider terminal, or in a file", width)
    print(" ".join(column.padded(column.heading) for column in columns) + "  name")
    total = Total()
    for row in look.rows(lambda area: _row(total.counted(area), columns, width)):
        print(row)
    show_total(look, total, width)
    show_restless(look, width)
    show_unmatched(look)
    look.require_task()


def show_head(look: Look, width: int | None = None) -> None:
    """Print the subject, and what is hidden."""
    print(page_line(look))
    show_hidden(look.hidden, width)


def show_hidden(found: Iterable[Hidden], width: int | None = None) -> None:
    """Print what is not shown, the reason, and the remedy."""
    for hidden in found:
        show(str(hidden), width)


def amount(size: int | None) -> str:
    """Format a size: a dash for 0, a question mark if unknown."""
    return "?" if size is None else format_size(size) if size else "-"


def folios(sizes: dict[int, int]) -> str:
    """Format the amounts of memory by folio size, if any are larger than a page."""
    large = {size: held for size, held in sorted(sizes.items()) if size > PAGE_SIZE}
    return ", ".join(f"{format_size(held)} in folios of {format_size(size)}" for size, held in large.items())


def _row(area: Area, columns: Iterable[Column], width: int | None) -> str:
    cells = " ".join(column.padded(column.cell(area)) for column in columns) + "  "
    name, notes = printable(area.name), _notes(area)
    if width and len(cells) + len(name) + len(notes) >= width:
        name = shortened(name, width - 1 - len(cells))
        notes = f"\n    {notes.lstrip()}" if notes else ""
    return f"{cells}{name}{notes}"


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
    print(f"\n{format_count(total.areas, 'area')}, {format_size(total.size)} of addresses")
    huge = f", {share(total.huge, total.resident)} by huge pages" if total.huge is not None else ""
    show(
        f"  resident {format_size(total.resident)}: {format_size(total.anonymous)} anonymous, "
        f"{format_size(total.file_or_shared)} of files or shared; {format_size(total.exclusive)} mapped by it "
        f"alone{huge}",
        width,
        "    ",
    )
    show(
        f"  swapped {amount(total.swapped)}, locked {amount(total.locked)}, lazily free {amount(total.lazy_free)}, "
        f"zero page {amount(total.zero)}, guard pages {amount(total.guard)}",
        width,
        "    ",
    )
    if look.frames and total.runs:
        mean = format_size(total.in_runs // total.runs)
        show(
            f"  {format_count(total.runs, 'physical run')}, largest {format_size(total.largest)}, {mean} on average; "
            f"{total.ascending:,} ascend, {total.descending:,} descend",
            width,
            "    ",
        )
    if large := folios(total.folios):
        show(f"  mapped page by page: {large}", width, "    ")


def show_restless(look: Look, width: int | None = None) -> None:
    """Print whether the process changed while it was read."""
    if restless := look.restless():
        show(f"  {restless}", width, "    ")
    sys.stdout.flush()


def show_unmatched(look: Look) -> None:
    """Report on stderr that no area was selected."""
    if not look.matched:
        print("iobmd pagemap: no area matches " + " ".join(look.criteria), file=sys.stderr)


def share(part: int, whole: int) -> str:
    """Format a part with its share of a whole."""
    return f"{format_size(part)} ({part * 100 / whole:.0f} %)" if whole else format_size(part)
