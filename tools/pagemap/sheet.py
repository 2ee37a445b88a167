"""`--csv`: a line for each area, group of areas, run or segment."""

from __future__ import annotations

import csv
import sys
from io import StringIO
from typing import TYPE_CHECKING

from iobmd.pagemap.segment import Segment
from iobmd.pagemap.span import Run
from iobmd.printable import printable

from .columns import ranked
from .document import FIELDS, grouped_row, row, summary
from .look import Look
from .runs import chosen_descriptions, chosen_runs, chosen_segments

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable
    from typing import Protocol

    from iobmd.pagemap.area import Area
    from iobmd.pagemap.frame import FrameFacts

    class _Writer(Protocol):
        def writerow(self, row: Iterable[object], /) -> object: ...


def run(arguments: argparse.Namespace) -> None:
    """Print the lines."""
    look = Look(arguments)
    for hidden in look.hidden:
        print(hidden, file=sys.stderr)  # not on stdout, which programs read
    lines = csv.writer(sys.stdout, lineterminator="\n")
    if arguments.segments:
        lines.writerow(Segment._fields)
        lines.writerows(chosen_segments(look))
    elif arguments.flags:
        lines.writerow((*Run._fields, "flags", "some_flags", "mapped_least", "mapped_most", "cgroups", "node"))
        lines.writerows(_described(*found) for found in chosen_descriptions(look))
    elif arguments.runs:
        lines.writerow(Run._fields)
        lines.writerows(chosen_runs(look))
    elif arguments.grouped:
        _write_groups(look, lines)
    else:
        lines.writerow(FIELDS)
        sys.stdout.writelines(look.rows(_line))
    sys.stdout.flush()
    if restless := look.restless():
        print(f"iobmd pagemap: {look.title}: {restless}", file=sys.stderr)
    look.require_task()


def _described(found: Run, facts: FrameFacts) -> tuple[object, ...]:
    words = " ".join(facts.flags), " ".join(facts.some_flags)
    return (*found, *words, *(facts.mapped or ("", "")), " ".join(map(printable, facts.cgroups or ())), facts.node)


def _write_groups(look: Look, lines: _Writer) -> None:
    groups = look.make_groups()
    for area in look.until_gone(look.areas()):
        groups.counted(area)
    lines.writerow(("name", "label", *summary(groups.total, look.frames)))
    for group in ranked(groups, look.arguments.sort):  # one at a time: there may be thousands
        one = grouped_row(group, look.frames)
        one |= {"name": printable(one["name"]), "label": printable(one["label"])}
        lines.writerow((one | {"folio_bytes": _folios(one["folio_bytes"])}).values())


def _folios(sizes: dict[int, int] | None) -> str:
    return " ".join(f"{size}:{held}" for size, held in sorted((sizes or {}).items()))


def _line(area: Area) -> str:
    fields = row(area)
    fields["name"] = printable(area.name)
    fields["folio_bytes"] = _folios(fields["folio_bytes"])
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields.values())
    return text.getvalue()
