"""`--csv`: a line for each area, or with `--runs` for each run."""

from __future__ import annotations

import csv
import sys
from typing import TYPE_CHECKING

from iobmd.pagemap.frame import require_frames
from iobmd.pagemap.span import Run

from .document import row
from .look import Look
from .runs import chosen_descriptions, chosen_runs

if TYPE_CHECKING:
    import argparse


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
    else:
        for index, area in enumerate(look.areas()):
            fields = row(area)
            sizes = fields.pop("folio_bytes") or {}
            fields["folio_bytes"] = " ".join(f"{size}:{held}" for size, held in sorted(sizes.items()))
            if not index:
                lines.writerow(fields)
            lines.writerow(fields.values())
    sys.stdout.flush()
