"""The columns of tables of memory: the same for areas, groups of areas, and processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .groups import Group, Groups
    from .total import Total

    Value = Callable[[Total], float | None]


class Column(NamedTuple):
    """A column of numbers."""

    name: str
    """The heading, and the name in --columns and --sort."""
    rank: int
    """Its importance: of the columns that do not fit, those with the highest rank are left out."""
    value: Value
    """The number in a row, by which rows are sorted; None if unknown."""
    write: Callable[[Total, Total], str]
    """The text in a row, whose second argument is the sum of all rows."""
    meaning: str
    width: int = 6

    @property
    def cell_width(self) -> int:
        """Its width with the space before it."""
        return max(self.width, len(self.name) + 1)


def ranked(groups: Groups, sort: str) -> list[Group]:
    """Return groups in the order of --sort; that of addresses is of areas, and groups are then sorted by rss."""
    return groups.ranked("name" if sort == "name" else column("rss" if sort == "address" else sort).value)


def brief(size: int | None) -> str:
    """Format a size in at most five characters, in binary units: 1008K, 19.8M; "-" for 0, "?" if unknown."""
    if not size:
        return "?" if size is None else "-"
    amount = float(size)
    for unit in "BKMGTP":
        if amount < 1023.5 or unit == "P":
            break
        amount /= 1024
    number = f"{amount:.1f}" if amount < 99.95 else f"{amount:.0f}"
    return number.removesuffix(".0") + unit


def share(part: int | None, whole: int | None) -> float | None:
    """Return a share in percent; None if unknown."""
    return None if part is None or whole is None else part * 100 / whole if whole else 0.0


def percent(share: float | None) -> str:
    """Format a share in percent: "-" for none, "?" if unknown."""
    if not share:
        return "?" if share is None else "-"
    return f"{share:.0f}" if share >= 0.95 else f"{share:.1f}" if share >= 0.05 else "0"


def _sizes(name: str, rank: int, value: Callable[[Total], int | None], meaning: str) -> Column:
    return Column(name, rank, value, lambda row, _total: brief(value(row)), meaning)


def _numbers(name: str, rank: int, value: Callable[[Total], int | None], meaning: str) -> Column:
    def write(row: Total, _total: Total) -> str:
        number = value(row)
        return "?" if number is None else f"{number:,}"

    return Column(name, rank, value, write, meaning, 7)


def _huge_share(row: Total) -> float | None:
    return share(row.huge, row.resident)


def _in_large_folios(row: Total) -> int | None:
    if row.folios is None:  # hidden
        return None if row.resident else 0
    return sum(held for size, held in row.folios.items() if size > PAGE_SIZE)


def _of_runs(row: Total, number: int) -> int | None:
    return None if row.resident and not row.in_runs else number  # frame numbers are hidden


COLUMNS = {
    one.name: one
    for one in (
        _sizes("size", 12, lambda row: row.size, "addresses"),
        _sizes("rss", 0, lambda row: row.resident, "in memory"),
        Column(
            "rss%", 3, lambda row: row.resident, lambda row, total: percent(share(row.resident, total.resident)),
            "the share of the rss of all rows", 5,
        ),
        _sizes("pss", 1, lambda row: row.pss, "in memory, each page divided by the number of its mappings"),
        Column(
            "pss%", 3, lambda row: row.pss, lambda row, total: percent(share(row.pss, total.pss)),
            "the share of the pss of all rows", 5,
        ),
        _sizes("uss", 2, lambda row: row.uss, "in memory, mapped by nothing else"),
        _sizes("shared", 10, lambda row: row.shared, "in memory, mapped more than once"),
        _sizes("anon", 6, lambda row: row.anonymous, "in memory, anonymous"),
        _sizes("file", 7, lambda row: row.file, "in memory, of files"),
        _sizes("shmem", 8, lambda row: row.shmem, "in memory, shared memory and tmpfs"),
        _sizes("swap", 4, lambda row: row.swapped, "in swap"),
        _sizes("huge", 5, lambda row: row.huge, "mapped by huge pages"),
        Column(
            "huge%", 9, _huge_share, lambda row, _total: percent(_huge_share(row)),
            "the share of rss that is mapped by huge pages", 6,
        ),
        _sizes("eligible", 17, lambda row: row.thp_eligible, "addresses where the kernel may use huge pages"),
        _sizes("mthp", 16, _in_large_folios, "mapped page by page, in folios above the page size"),
        _sizes("locked", 11, lambda row: row.locked, "locked"),
        _sizes("lazyfree", 14, lambda row: row.lazy_free, "lazily freed: lost if memory is short"),
        _numbers("procs", 3, lambda row: row.processes, "number of processes, with --by"),
        _numbers("areas", 13, lambda row: row.areas, "number of areas"),
        _numbers("runs", 15, lambda row: _of_runs(row, row.runs), "number of physically contiguous runs"),
        _sizes("largest", 18, lambda row: _of_runs(row, row.largest), "the largest of them"),
    )
}  # fmt: skip
OF_PROCESSES = (
    "rss", "rss%", "pss", "pss%", "uss", "shared", "anon", "file", "shmem", "swap", "huge", "huge%", "locked",
    "lazyfree", "size",
)  # fmt: skip
"""Columns of processes: the kernel keeps no other sums."""
OF_AREAS = tuple(name for name in COLUMNS if name != "procs")
SYNONYMS = {"resident": "rss", "swapped": "swap"}
"""Former names of columns, which --sort and --columns still accept."""


def column(name: str) -> Column:
    """Return a column by its name, or its former name. Raises KeyError."""
    return COLUMNS[SYNONYMS.get(name, name)]


def fitting(wanted: Iterable[Column], room: int, total: Total | None = None, first: str = "") -> list[Column]:
    """Return the most important columns that fit into `room` columns of a terminal, in their order.

    Columns that are empty in all rows, as `total` shows, are less important than the others, whatever their rank.
    `first` is the name of the most important one, if any.
    """
    columns = list(wanted)
    chosen = set()

    def rank(one: Column) -> tuple[bool, bool, int]:
        return one.name != first, total is not None and one.value(total) == 0, one.rank

    for one in sorted(columns, key=rank):
        room -= one.cell_width
        if room < 0:
            break
        chosen.add(one.name)
    return [one for one in columns if one.name in chosen]


def heading(columns: Iterable[Column]) -> str:
    """Return the line above the columns."""
    return "".join(f"{one.name:>{one.cell_width}}" for one in columns)


def cells(columns: Sequence[Column], row: Total, total: Total) -> str:
    """Return the text of a row, aligned to the right."""
    return "".join(f"{one.write(row, total):>{one.cell_width}}" for one in columns)
