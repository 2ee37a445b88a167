"""`--csv`: a line for each area, run or segment."""

from __future__ import annotations

import csv
import sys
from io import StringIO
from typing import TYPE_CHECKING

from iobmd.cli.printable import printable
from iobmd.pagemap.frame import require_frames
from iobmd.pagemap.segment import Segment
from iobmd.pagemap.span import Run

from .document import FIELDS, row
from .look import Look
from .runs import chosen_descriptions, chosen_runs, chosen_segments

if TYPE_CHECKING:
    import argparse

    from iobmd.pagemap.area import Area


def run(arguments: argparse.Namespace) -> None:
    """Print the lines."""
    look = Look(arguments)
    lines = csv.writer(sys.stdout, lineterminator="\n")
    if arguments.flags:
        require_frames()
        lines.writerow((*Run._fields, "flags", "some_flags", "mapped_least", "mapped_most", "cgroups", "node"))
        for found, facts in chosen_descriptions(look):
            words = " ".join(facts.flags), " ".join(facts.some_flags)
            lines.writerow((*found, *words, *(facts.mapped or ("", "")), " ".join(facts.cgroups or ()), facts.node))
    elif arguments.runs:
        require_frames()
        lines.writerow(Run._fields)
        lines.writerows(chosen_runs(look))
    elif arguments.segments:
        require_frames()
        lines.writerow(Segment._fields)
        lines.writerows(chosen_segments(look))
    else:
        lines.writerow(FIELDS)
        sys.stdout.writelines(look.rows(_line))
    sys.stdout.flush()
    if restless := look.restless():  # not among the lines, which programs read
        print(f"iobmd pagemap: {look.title}: {restless}", file=sys.stderr)
    look.require_task()


def _line(area: Area) -> str:
    fields = row(area)
    fields["name"] = printable(area.vma.name)
    sizes = fields["folio_bytes"] or {}
    fields["folio_bytes"] = " ".join(f"{size}:{held}" for size, held in sorted(sizes.items()))
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields.values())
    return text.getvalue()
