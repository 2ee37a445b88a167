"""The summary above the table: the memory of a process, by kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd.cli.color import painter
from iobmd.cli.encoding import can_write
from iobmd.cli.folding import flowed, folded
from iobmd.units import PAGE_SIZE, format_count, format_size

from .columns import brief, percent, share

if TYPE_CHECKING:
    from .process import ProcessFacts
    from .total import Total

_USUAL_PAGE = 4 << 10
_BAR = 24
"""Maximum length of a bar."""


def lines(total: Total, facts: ProcessFacts | None, width: int | None) -> list[str]:
    """Return the lines of the summary; `facts` is None if only some areas are selected."""
    pss = total.pss if facts is None or facts.pss is None else facts.pss
    found = flowed(
        (
            f"RSS {brief(total.resident)}",
            f"PSS {brief(pss)}",
            f"USS {brief(total.uss)}",
            f"swap {brief(total.swapped)}",
        ),
        width,
    )
    shares = (("anon", total.anonymous), ("file", total.file), ("shmem", total.shmem))
    found += flowed((_with_share(name, size, total.resident) for name, size in shares), width)
    found += flowed(_others(total, facts), width)
    found.append(_huge(total, width))
    return found


def physical(total: Total, width: int | None) -> list[str]:
    """Return lines on the physical runs and the sizes of folios, if they are visible."""
    found = []
    if total.runs:
        mean = brief(total.in_runs // total.runs)
        found.append(
            f"{format_count(total.runs, 'physical run')}, largest {brief(total.largest)}, {mean} on average; "
            f"{total.ascending:,} ascend, {total.descending:,} descend"
        )
    if total.folios and (large := folios(total.folios)):
        found.append(f"mapped page by page: {large}")
    return [part for line in found for part in folded(line, width).splitlines()]


def folios(sizes: dict[int, int]) -> str:
    """Format the amounts of memory by folio size, if any are larger than a page."""
    large = {size: held for size, held in sorted(sizes.items()) if size > PAGE_SIZE}
    return ", ".join(f"{format_size(held)} in folios of {format_size(size)}" for size, held in large.items())


def _with_share(name: str, size: int, whole: int) -> str:
    return f"{name} {brief(size)} ({percent(share(size, whole))} %)" if size else f"{name} -"


def _others(total: Total, facts: ProcessFacts | None) -> list[str]:
    found = [f"locked {brief(total.locked)}"]
    for name, size in (
        ("lazily free", total.lazy_free),
        ("zero page", total.zero),
        ("guard pages", total.guard),
        ("markers", total.marker),
        ("device", total.device),
    ):
        if size:
            found.append(f"{name} {brief(size)}")
    if facts:
        found.append(f"page tables {brief(facts.page_tables)}")
        found += [_with_share(f"node {node}", size, total.resident) for node, size in facts.nodes.items()]
    return found


def _huge(total: Total, width: int | None) -> str:
    """Return the line with a bar of the share of huge pages."""
    text = f"{percent(share(total.huge, total.resident))} %, {brief(total.huge)}" if total.huge else brief(total.huge)
    room = min(_BAR, (width or 80) - len("huge   ") - len(text) - 1)
    return f"huge {bar(total.huge or 0, total.resident, room)} {text}"


def bar(part: int, whole: int, length: int) -> str:
    """Return a bar that is filled by the share of a part."""
    full, empty = "█░" if can_write("█░") else "#-"
    filled = min(length, round(part * length / whole)) if whole else 0
    if part and not filled:
        filled = 1
    paint = painter()
    return paint(full * filled, "green") + paint(empty * (length - filled), "dim")


def counts(total: Total, facts: ProcessFacts | None) -> str:
    """Return the numbers of areas and threads, the size of the areas, and an uncommon page size."""
    threads = f", {format_count(facts.threads, 'thread')}" if facts and facts.threads else ""
    pages = f", pages of {format_size(PAGE_SIZE)}" if PAGE_SIZE != _USUAL_PAGE else ""
    return f"{format_count(total.areas, 'area')}, {brief(total.size)} of addresses{threads}{pages}"
