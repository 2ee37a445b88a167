"""The rows and lines of `--watch` on a terminal."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Group
from rich.text import Text

from iobmd.cli.encoding import can_write
from iobmd.cli.folding import folded
from iobmd.pagemap.change import Kind
from iobmd.printable import printable
from iobmd.units import format_count, format_time

from .columns import brief
from .survey import short

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import ConsoleDimensions, RenderableType

    from iobmd.pagemap.area import Area

    from .live import View
    from .ticks import Tick
    from .total import Total

SORTS = ("changes", "since", "rss", "pss", "swap", "huge", "size", "name")
"""Orders of the rows, the default first."""


class _Mark(NamedTuple):
    """How a kind of changes is shown."""

    sign: str
    plain: str
    """The sign if the encoding lacks the other."""
    style: str


_MARKS = {
    Kind.NEWLY_RESIDENT: _Mark("+", "+", "green"),
    Kind.RELEASED: _Mark("\N{MINUS SIGN}", "-", "magenta"),
    Kind.SWAPPED_OUT: _Mark("↓", "o", "bold red"),
    Kind.SWAPPED_IN: _Mark("↑", "i", "cyan"),
    Kind.COPIED: _Mark("≠", "c", "bright_green"),
    Kind.MIGRATED: _Mark("→", "m", "yellow"),
    Kind.SPLIT: _Mark("÷", "s", "bright_red"),
    Kind.COLLAPSED: _Mark("■", "h", "blue"),
    Kind.MAPPED: _Mark("▣", "M", "bold"),
    Kind.UNMAPPED: _Mark("□", "U", "bold dim"),
    Kind.OTHER: _Mark("~", "~", "dim"),
}
_KEYS = (("q", "quit"), ("s", "sort"), ("/", "filter"), ("p", "pause"), ("g", "group"), ("r", "reset"), ("?", "help"))
_HELP = (
    ("q, Ctrl-C", "quit; Ctrl-Z suspends"),
    ("s, S", f"sort by {', '.join(SORTS)}"),
    ("/", "type a part of a name to show; Enter keeps it, Esc removes it"),
    ("p, space", "pause: nothing is read until it is pressed again"),
    ("g", "a row for each mapping, or for each area (VMA)"),
    ("r", "reset the changes since the start"),
    ("arrows, j, k", "scroll; also Page Up and Page Down"),
)


class Row(NamedTuple):
    """A row: an area, or the areas that map the same thing. Sizes are in bytes, None if unknown."""

    address: int | None
    """The first address of an area."""
    name: str
    values: dict[str, int | None]
    """The sizes by the names of their columns; empty if it no longer exists."""
    tick: Counter[Kind]
    """The changes in the last tick."""
    since: Counter[Kind]
    """The changes since the start."""

    def key(self, sort: str) -> tuple[float, float]:
        """Return what the row is sorted by, largest first."""
        resident = float(self.values.get("rss") or 0)
        if sort in ("changes", "since"):
            return float((self.tick if sort == "changes" else self.since).total()), resident
        value = self.values.get(sort)
        return -1.0 if value is None else float(value), resident


def rows(view: View, tick: Tick) -> list[Row]:
    """Return the rows that pass the filter, in their order."""
    found = [row for row in (_areas if view.each else _groups)(view, tick) if view.accepts(row.name)]
    if view.sort == "name":
        return sorted(found, key=lambda row: (row.name, row.address or 0))
    return sorted(found, key=lambda row: row.key(view.sort), reverse=True)


def _groups(view: View, tick: Tick) -> Iterator[Row]:
    since = dict(view.history.groups)
    changed = dict(tick.changed_groups)
    for name, label, total in tick.groups.ranked():
        found = changed.pop(name, Counter()), since.pop(name, Counter())
        yield Row(None, printable(label), _values(total), *found)
    for name, sums in since.items():  # all of their areas were unmapped
        yield Row(None, short(name), {}, changed.pop(name, Counter()), sums)


def _areas(view: View, tick: Tick) -> Iterator[Row]:
    since = view.history.areas
    changed = {vma.start: (vma, area, sums) for vma, area, sums in tick.changed}
    present = [(area.vma, area, Counter[Kind]()) for area in tick.largest]
    for vma, area, sums in (*changed.values(), *present):
        name = short(tick.groups.name_of(vma))
        yield Row(vma.start, name, _values(area) if area else {}, sums, since.get(vma.start, Counter()))


def _values(of: Area | Total) -> dict[str, int | None]:
    return {"rss": of.resident, "pss": of.pss, "swap": of.swapped, "huge": of.huge, "size": of.size}


def draw(view: View, tick: Tick, screen: ConsoleDimensions) -> RenderableType:
    """Return the whole screen."""
    if view.helping:
        return _help(view, screen)
    width = screen.width
    head = _head(view, tick, width)
    foot = [*_legend(view, tick, width), _key_line(view, width)]
    found = rows(view, tick)
    view.page = max(1, screen.height - len(head) - len(foot) - 2)
    view.offset = min(view.offset, max(0, len(found) - view.page))
    shown = found[view.offset : view.offset + view.page]
    columns = _columns(view, width, found)
    body = [_heading(columns), *(_line(row, columns) for row in shown)]
    body += [Text()] * (view.page - len(shown))
    below = len(found) - view.offset - len(shown)
    body.append(Text(f"… {format_count(below, 'row')} below" if below else "", style="dim"))
    return _fitted([*head, *body, *foot], width)


def _fitted(found: Iterable[Text], width: int) -> Group:
    for line in (found := list(found)):
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return Group(*found)


def _head(view: View, tick: Tick, width: int) -> list[Text]:
    when = time.strftime("%T", time.localtime(tick.time))
    states = ["paused"] if view.paused else [f"read in {format_time(tick.took)}"] if width >= _WIDE else []
    title = Text(f"{view.look.title}", style="bold").append("  ".join(["", when, *states]), style="not bold dim")
    total = tick.total
    parts = [f"{name} {brief(size)}" for name, size in _values(total).items() if name != "size"]
    if total.huge and total.resident:
        parts[-1] += f" ({total.huge * 100 // total.resident} %)"
    lines = [title, Text("  ".join([*parts, format_count(total.areas, "area")]))]
    start = time.strftime("%T", time.localtime(view.history.start))
    for words, sums in (("this tick", tick.sums), (f"since {start}", view.history.sums)):
        lines.append(Text(f"{words + ':':15} ").append_text(_changes(sums, width - 16, words=width >= _WIDE)))
    if view.look.hidden:
        lines.append(Text(f"{format_count(len(view.look.hidden), 'fact')} not shown: press ?", style="dim"))
    lines.append(Text())
    return lines


_WIDE = 70
"""Columns of a terminal where kinds of changes are named."""


def _changes(sums: Counter[Kind], width: int, *, words: bool = False) -> Text:
    """Write changes, the largest first, as many as fit."""
    text = Text()
    for kind, size in sums.most_common():
        mark = _MARKS[kind]
        word = f"{_sign(mark)}{brief(size)}" + (f" {kind}" if words else "")
        if len(text) + bool(text) + len(word) > width:
            return text.append("…") if len(text) < width else text
        text.append(" " if text else "").append(word, style=mark.style)
    return text or Text("-", style="dim")


def _sign(mark: _Mark) -> str:
    return mark.sign if can_write("".join(one.sign for one in _MARKS.values())) else mark.plain


def _columns(view: View, width: int, found: list[Row]) -> list[tuple[str, int]]:
    """Return the names and widths of the columns; the name of the row has the rest."""
    changes = 7 if width < 60 else 14 if width < 110 else 24
    columns = [
        ("rss", 6),
        ("pss", 6),
        ("swap", 6),
        ("huge", 6),
        ("size", 6),
        ("changes", changes),
        ("since", changes),
    ]
    if not any(row.values.get("swap") for row in found) and view.sort != "swap":
        columns.remove(("swap", 6))
    if view.each:
        columns.insert(0, ("address", 12))
    for name in ("pss", "size", "huge", "address", "swap"):
        if width - sum(1 + one for _name, one in columns) < (18 if width >= 60 else 12) and view.sort != name:
            columns = [one for one in columns if one[0] != name]
    return [*columns, ("name", max(4, width - sum(1 + one for _name, one in columns) - 1))]


def _heading(columns: list[tuple[str, int]]) -> Text:
    line = Text(style="bold")
    for name, width in columns:
        title = {"changes": "tick", "name": "mapping", "since": "since"}.get(name, name)
        line.append(f" {title:<{width}}" if name in ("changes", "since", "name") else f" {title:>{width}}"[1:] + " ")
    return line


def _line(row: Row, columns: list[tuple[str, int]]) -> Text:
    line = Text(style="" if row.values else "dim")
    for name, width in columns:
        if name in ("changes", "since"):
            cell = _changes(row.tick if name == "changes" else row.since, width)
            line.append(" ").append_text(cell).append(" " * (width - len(cell)))
        elif name == "name":
            line.append(f" {row.name if len(row.name) <= width else row.name[: width - 1] + '…'}")
        else:
            text = f"{row.address:x}" if name == "address" else brief(row.values.get(name)) if row.values else "-"
            line.append(f"{text:>{width}} ")
    return line


def _legend(view: View, tick: Tick, width: int) -> list[Text]:
    """Explain the marks that are shown."""
    lines: list[Text] = []
    for kind in Kind:
        if not (view.history.sums[kind] or tick.sums[kind]):
            continue
        mark = _MARKS[kind]
        word = f"{_sign(mark)} {kind}"
        if not lines or len(lines[-1]) + 2 + len(word) > width:
            if len(lines) == _LEGEND:
                break
            lines.append(Text())
        lines[-1].append("  " if lines[-1] else "").append(word, style=mark.style)
    return lines


_LEGEND = 2
"""Maximum number of lines of the legend."""


def _key_line(view: View, width: int) -> Text:
    if view.typing:
        return Text("filter: ").append(printable(view.filter), style="bold").append("▏" if can_write("▏") else "_")
    line = Text()
    values = {
        "sort": f"sort:{view.sort}" if width >= _WIDE else view.sort,
        "filter": f"{printable(view.filter)}" if view.filter else "filter",
        "group": f"group:{'each' if view.each else 'mapping'}",
    }
    for key, word in _KEYS:
        line.append(" " if line else "").append(key, style="reverse")
        if width >= _WIDE or word in ("quit", "sort", "help") or (word == "filter" and view.filter):
            line.append(f" {values.get(word, word)}{' ' * (width >= _WIDE)}")
    return line


def _help(view: View, screen: ConsoleDimensions) -> RenderableType:
    lines = [Text("keys", style="bold")]
    for keys, meaning in _HELP:
        lines += [Text(line) for line in folded(f"  {keys}: {meaning}", screen.width).splitlines()]
    lines.append(Text("changes", style="bold"))
    signs = Text()
    for kind, mark in _MARKS.items():
        word = f"{_sign(mark)} {kind}"
        if signs and len(signs) + 4 + len(word) > screen.width:
            lines.append(signs)
            signs = Text()
        signs.append("  ").append(word, style=mark.style)
    lines.append(signs)
    for hidden in view.look.hidden:
        lines += [Text(line, style="dim") for line in folded(str(hidden), screen.width).splitlines()]
    lines = lines[: screen.height - 1]
    return _fitted([*lines, Text("any key: back", style="reverse")], screen.width)
