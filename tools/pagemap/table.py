"""The table: plain text in columns of fixed width, printed row by row."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from iobmd.cli.printable import printable
from iobmd.units import PAGE_SIZE, format_count, format_size

from .look import Hidden, Look, page_line
from .total import Total

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from iobmd.pagemap.area import Area

HEADING = (
    f"{'addresses':>29} {'perms':5} {'size':>9} {'resident':>9} {'file/shm':>9} {'shared':>9} {'swapped':>9} "
    f"{'huge':>9} {'locked':>9} {'lazyfree':>9} {'runs':>7} {'largest':>9}  name"
)


def run(arguments: argparse.Namespace) -> None:
    """Print the table."""
    look = Look(arguments)
    show_head(look)
    print(HEADING)
    total = Total()
    for row in look.rows(lambda area: _row(total.counted(area))):
        print(row)
    show_total(look, total)
    show_restless(look)
    look.require_task()


def show_head(look: Look) -> None:
    """Print the subject, and what is hidden."""
    print(page_line(look))
    show_hidden(look.hidden)


def show_hidden(found: Iterable[Hidden], file: TextIO | None = None) -> None:
    """Print what is not shown, the reason, and the remedy."""
    for hidden in found:
        print(f"not shown: {hidden.what} ({hidden.why}); remedy: {hidden.remedy.splitlines()[0]}", file=file)


def amount(size: int | None) -> str:
    """Format a size: a dash for 0, a question mark if unknown."""
    return "?" if size is None else format_size(size) if size else "-"


def folios(sizes: dict[int, int]) -> str:
    """Format the amounts of memory by folio size, if any are larger than a page."""
    large = {size: held for size, held in sorted(sizes.items()) if size > PAGE_SIZE}
    return ", ".join(f"{format_size(held)} in folios of {format_size(size)}" for size, held in large.items())


def _row(area: Area) -> str:
    addresses = f"{area.start:x}-{area.end:x}"
    runs = f"{area.tally.runs:,}" if area.visible else "?"
    largest = amount(area.tally.largest) if area.visible else "?"
    notes = _notes(area)
    return (
        f"{addresses:>29} {area.vma.perms:5} {amount(area.size):>9} {amount(area.resident):>9} "
        f"{amount(area.file_or_shared):>9} {amount(area.shared):>9} {amount(area.swapped):>9} "
        f"{amount(area.huge):>9} {amount(area.locked):>9} {amount(area.lazy_free):>9} {runs:>7} {largest:>9}  "
        f"{printable(area.vma.name)}{notes}"
    )


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


def show_total(look: Look, total: Total) -> None:
    """Print the summary."""
    print(f"\n{format_count(total.areas, 'area')}, {format_size(total.size)} of addresses")
    huge = f", {share(total.huge, total.resident)} by huge pages" if total.huge is not None else ""
    print(
        f"  resident {format_size(total.resident)}: {format_size(total.anonymous)} anonymous, "
        f"{format_size(total.file_or_shared)} of files or shared; {format_size(total.exclusive)} mapped by it "
        f"alone{huge}"
    )
    print(
        f"  swapped {amount(total.swapped)}, locked {amount(total.locked)}, lazily free {amount(total.lazy_free)}, "
        f"zero page {amount(total.zero)}, guard pages {amount(total.guard)}"
    )
    if look.frames and total.runs:
        mean = format_size(total.in_runs // total.runs)
        print(
            f"  {format_count(total.runs, 'physical run')}, largest {format_size(total.largest)}, {mean} on average; "
            f"{total.ascending:,} ascend, {total.descending:,} descend"
        )
    if large := folios(total.folios):
        print(f"  mapped page by page: {large}")


def show_restless(look: Look) -> None:
    """Print whether the process changed while it was read."""
    if restless := look.restless():
        print(f"  {restless}")
    sys.stdout.flush()


def share(part: int, whole: int) -> str:
    """Format a part with its share of a whole."""
    return f"{format_size(part)} ({part * 100 / whole:.0f} %)" if whole else format_size(part)
