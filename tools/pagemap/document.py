"""`--json`: one document, written incrementally, so that it may exceed the size of memory."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from iobmd.units import PAGE_SIZE

from .columns import ranked
from .look import Look
from .process import facts_of
from .runs import chosen_descriptions, chosen_runs, chosen_segments
from .sharers import Sharers

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Iterator

    from iobmd.pagemap.area import Area
    from iobmd.pagemap.span import Run

    from .groups import Group
    from .look import Hidden
    from .process import ProcessFacts
    from .total import Total

VERSION = 1


def run(arguments: argparse.Namespace) -> None:
    """Print the document."""
    look = Look(arguments)
    print("{" + members(_head(look)) + ',\n"vmas": [', end="")
    groups = look.make_groups()
    write_lines(look.rows(lambda area: json.dumps(row(groups.counted(area)))))
    print(f'],\n"summary": {json.dumps(summary(groups.total, look.frames))}', end="")
    print(f',\n"process": {json.dumps(process(facts_of(look)))},\n"groups": [', end="")
    sharers = Sharers(look) if arguments.sharers else None
    write_list(
        grouped_row(group, look.frames) | _sharers(sharers, group.name) for group in ranked(groups, arguments.sort)
    )
    print("]", end="")
    if arguments.runs or arguments.flags:
        _write_found("runs", _runs(look, arguments.flags))
    if arguments.segments:
        _write_found("segments", (found._asdict() for found in chosen_segments(look)))
    restless = look.restless()
    print(f',\n"changed_while_read": {json.dumps(restless and restless._asdict())}}}')
    sys.stdout.flush()
    look.require_task()


def _write_found(name: str, found: Iterator[dict[str, Any]]) -> None:
    print(f',\n"{name}": [', end="")
    write_list(found)
    print("]", end="")


def members(document: dict[str, Any]) -> str:
    """Return the members of an object as JSON, without the braces around them."""
    return json.dumps(document)[1:-1]


def write_list(rows: Iterable[dict[str, Any]]) -> None:
    """Print the elements of a list as JSON, one per line, as they arrive."""
    write_lines(map(json.dumps, rows))


def write_lines(rows: Iterable[str]) -> None:
    """Print the elements of a list, which are already JSON."""
    for index, one in enumerate(rows):
        print("," if index else "", one, sep="\n", end="")


def _head(look: Look) -> dict[str, Any]:
    return {
        "version": VERSION,
        "pid": look.task.pid,
        "name": look.name,
        "time": round(look.time),
        "kernel": look.kernel,
        "page_bytes": PAGE_SIZE,
        "capabilities": {
            "frames": look.frames,
            "kpageflags": look.flags,
            "smaps": look.details,
            "pagemap_scan": look.scans,
        },
    } | hidden_member(look.hidden)


def hidden_member(found: Iterable[Hidden]) -> dict[str, Any]:
    """Return the member of a document that lists hidden data."""
    return {"hidden": [hidden._asdict() for hidden in found]}


def row(area: Area) -> dict[str, Any]:
    """Return an area as data: sizes in bytes, null if unknown."""
    return {name: value(area) for name, value in FIELDS.items()}


FIELDS: dict[str, Callable[[Area], Any]] = {
    "start": lambda area: area.start,
    "end": lambda area: area.end,
    "perms": lambda area: area.perms,
    "offset": lambda area: area.vma.offset,
    "device": lambda area: area.vma.device,
    "inode": lambda area: area.vma.inode,
    "name": lambda area: area.name,
    "size_bytes": lambda area: area.size,
    "resident_bytes": lambda area: area.resident,
    "anonymous_bytes": lambda area: area.anonymous,
    "file_or_shared_bytes": lambda area: area.file_or_shared,
    "exclusive_bytes": lambda area: area.tally.exclusive,
    "shared_bytes": lambda area: area.shared,
    "swapped_bytes": lambda area: area.swapped,
    "huge_bytes": lambda area: area.huge,
    "hugetlb_page_bytes": lambda area: area.hugetlb_page,
    "folio_bytes": lambda area: area.folios,
    "locked_bytes": lambda area: area.locked,
    "lazy_free_bytes": lambda area: area.lazy_free,
    "zero_bytes": lambda area: area.tally.zero,
    "guard_bytes": lambda area: area.tally.guard,
    "marker_bytes": lambda area: area.marker,
    "device_bytes": lambda area: area.device,
    "run_count": lambda area: area.tally.runs if area.visible else None,
    "largest_run_bytes": lambda area: area.tally.largest if area.visible else None,
    "file_bytes": lambda area: area.file,
    "shmem_bytes": lambda area: area.shmem,
    "uss_bytes": lambda area: area.uss,
    "pss_bytes": lambda area: area.pss,
    "thp_eligible": lambda area: area.thp_eligible,
}


def _sharers(sharers: Sharers | None, name: str) -> dict[str, Any]:
    if sharers is None:
        return {}
    return {"sharers": [{"pid": sharer.pid, "name": sharer.name} for sharer in sharers.of(name)]}


def grouped_row(group: Group, visible: bool) -> dict[str, Any]:
    """Return a group of areas as data."""
    return {"name": group.name, "label": group.label} | summary(group.total, visible)


def process(facts: ProcessFacts) -> dict[str, Any]:
    """Return the data of the whole process."""
    return {
        "threads": facts.threads,
        "page_tables_bytes": facts.page_tables,
        "pss_bytes": facts.pss,
        "node_bytes": facts.nodes,
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
        "shared_bytes": total.shared,
        "swapped_bytes": total.swapped,
        "huge_bytes": total.huge,
        "folio_bytes": None if total.folios is None else dict(total.folios),
        "locked_bytes": total.locked,
        "lazy_free_bytes": total.lazy_free,
        "zero_bytes": total.zero,
        "guard_bytes": total.guard,
        "marker_bytes": total.marker,
        "device_bytes": total.device,
        "run_count": total.runs if visible else None,
        "largest_run_bytes": total.largest if visible else None,
        "ascending": total.ascending if visible else None,
        "descending": total.descending if visible else None,
        "file_bytes": total.file,
        "shmem_bytes": total.shmem,
        "uss_bytes": total.uss,
        "pss_bytes": total.pss,
        "thp_eligible_bytes": total.thp_eligible,
    }


def _runs(look: Look, flags: bool) -> Iterator[dict[str, Any]]:
    if not flags:
        yield from map(_run, chosen_runs(look))
        return
    for found, facts in chosen_descriptions(look):
        yield _run(found) | facts._asdict()


def _run(found: Run) -> dict[str, Any]:
    return found._asdict() | {"frame": found.physical // PAGE_SIZE}
