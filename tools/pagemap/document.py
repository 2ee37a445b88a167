"""`--json`: one document, written as it is found, so that it may be longer than memory is large."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from iobmd.pagemap.frame import require_frames
from iobmd.units import PAGE_SIZE

from .look import Look
from .runs import chosen_descriptions, chosen_runs
from .total import Total

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator

    from iobmd.pagemap.area import Area

VERSION = 1


def run(arguments: argparse.Namespace) -> None:
    """Print the document."""
    look = Look(arguments)
    if arguments.flags:
        require_frames()
    print("{" + members(_head(look)) + ',\n"vmas": [', end="")
    total = Total()
    write_list(_rows(look, total))
    print(f'],\n"summary": {json.dumps(summary(total, look.frames))}', end="")
    if arguments.runs or arguments.flags:
        print(',\n"runs": [', end="")
        if look.frames:
            write_list(_runs(look, arguments.flags))
        print("]", end="")
    restless = look.restless()
    print(f',\n"changed_while_read": {json.dumps(restless and restless._asdict())}}}')
    sys.stdout.flush()


def members(document: dict[str, Any]) -> str:
    """Return the members of an object as JSON, without the braces around them."""
    return json.dumps(document)[1:-1]


def write_list(rows: Iterable[dict[str, Any]]) -> None:
    """Print the elements of a list as JSON, each on a line of its own, as they come."""
    for index, row in enumerate(rows):
        print("," if index else "", json.dumps(row), sep="\n", end="")


def _head(look: Look) -> dict[str, Any]:
    return {
        "version": VERSION,
        "pid": look.task.pid,
        "name": look.name,
        "time": round(look.time, 3),
        "kernel": look.kernel,
        "page_bytes": PAGE_SIZE,
        "capabilities": {
            "frames": look.frames,
            "kpageflags": look.flags,
            "smaps": look.details,
            "pagemap_scan": look.scans,
        },
        "hidden": [hidden._asdict() for hidden in look.hidden],
    }


def _rows(look: Look, total: Total) -> Iterator[dict[str, Any]]:
    for area in look.areas():
        total.add(area)
        yield row(area)


def row(area: Area) -> dict[str, Any]:
    """Return an area as data: sizes in bytes, null for what is not known."""
    vma, tally = area.vma, area.tally
    return {
        "start": area.start,
        "end": area.end,
        "perms": vma.perms,
        "offset": vma.offset,
        "device": vma.device,
        "inode": vma.inode,
        "name": vma.name,
        "size_bytes": area.size,
        "resident_bytes": area.resident,
        "anonymous_bytes": area.anonymous,
        "file_or_shared_bytes": area.file_or_shared,
        "exclusive_bytes": tally.exclusive,
        "swapped_bytes": area.swapped,
        "huge_bytes": area.huge,
        "hugetlb_page_bytes": area.hugetlb_page,
        "folio_bytes": area.folios,
        "locked_bytes": area.locked,
        "lazy_free_bytes": area.lazy_free,
        "zero_bytes": tally.zero,
        "guard_bytes": tally.guard,
        "marker_bytes": tally.marker,
        "device_bytes": area.device,
        "run_count": tally.runs if area.visible else None,
        "largest_run_bytes": tally.largest if area.visible else None,
    }


def summary(total: Total, visible: bool) -> dict[str, Any]:
    """Return the sums as data."""
    return {
        "vmas": total.areas,
        "size_bytes": total.size,
        "resident_bytes": total.resident,
        "anonymous_bytes": total.anonymous,
        "file_or_shared_bytes": total.file_or_shared,
        "exclusive_bytes": total.exclusive,
        "swapped_bytes": total.swapped,
        "huge_bytes": total.huge,
        "folio_bytes": dict(total.folios),
        "locked_bytes": total.locked,
        "lazy_free_bytes": total.lazy_free,
        "zero_bytes": total.zero,
        "guard_bytes": total.guard,
        "device_bytes": total.device,
        "run_count": total.runs if visible else None,
        "largest_run_bytes": total.largest if visible else None,
        "ascending": total.ascending if visible else None,
        "descending": total.descending if visible else None,
    }


def _runs(look: Look, flags: bool) -> Iterator[dict[str, Any]]:
    if not flags:
        yield from (found._asdict() for found in chosen_runs(look))
        return
    for found, facts in chosen_descriptions(look):
        yield found._asdict() | facts._asdict()
