"""`iobmd doctor`: report what this host supports, and how to enable the rest."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from iobmd import host
from iobmd.cli.folding import show, terminal_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

_STYLES = {host.Status.YES: "green", host.Status.LIMITED: "yellow", host.Status.NO: "red", host.Status.INFO: "dim"}
_MAIN_JOB = "copying another process's memory into a wired buffer"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `iobmd doctor`."""
    parser = argparse.ArgumentParser(
        prog="iobmd doctor",
        description="Report what this host supports, the purpose of each feature, and how to enable missing ones.",
        epilog=f"Exit code: 0 if the main job ({_MAIN_JOB}) can run here, 1 if it cannot, 2 for wrong usage.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run `iobmd doctor` with the arguments `argv`; return 0 if the main job can run here, otherwise 1."""
    arguments = make_parser().parse_args(argv)
    found = host.facts()
    if arguments.json:
        _print_json(found)
    else:
        _print_report(found)
    return 0 if host.can_run_main_job(found) else 1


def _print_json(found: list[host.Fact]) -> None:
    facts = [fact._asdict() for fact in found]
    document = {
        "version": 1,
        "main_job": host.can_run_main_job(found),
        "physical_memory": _physical(found),
        "facts": facts,
    }
    print(json.dumps(document, indent=2))


def _table(found: list[host.Fact]) -> Table:
    from rich import box  # noqa: PLC0415 (slow to import, and not needed for --json)
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("fact", "", "value", "purpose"):
        # "fold": a path longer than its column continues on the next line instead of being cut.
        table.add_column(heading, overflow="fold")
    for fact in found:
        status = "" if fact.status is host.Status.INFO else fact.status.value
        marked = Text(status, style=_STYLES[fact.status])
        table.add_row(Text(fact.name), marked, Text(fact.summary), Text(fact.purpose))
    return table


def _print_report(found: list[host.Fact]) -> None:
    from rich.console import Console  # noqa: PLC0415 (see _table)

    Console().print(_table(found))
    width = terminal_width()
    if remedies := _remedies(found):
        # In a file or a pipe, each is on one line, so that commands can be copied.
        print("\nTo enable (the lines of one entry are alternatives):")
        for line in remedies:
            for part in _commands(line) if width and len(line) >= width else [line]:
                show(part, width)
    print()
    show(_physical(found), width)
    show(_verdict(found), width)


def _commands(line: str) -> list[str]:
    """Split a remedy that is too long for the terminal into its shell commands and its comment."""
    text, separator, comment = line.partition("  # ")
    first, *more = text.replace("; ", ";\n").split("\n")
    return [first, *(f"        {part}" for part in (*more, *([f"# {comment}"] if separator else ())))]


def _remedies(found: list[host.Fact]) -> list[str]:
    names: dict[str, list[str]] = {}
    for fact in found:
        if fact.remedy:
            names.setdefault(fact.remedy, []).append(fact.name)
    lines = []
    for number, (remedy, named) in enumerate(names.items(), 1):
        lines.append(f"{number:2}. {', '.join(named)}")
        lines += [f"      {line}" for line in remedy.splitlines()]
    return lines


def _physical(found: list[host.Fact]) -> str:
    """Return a sentence on the pinning and contiguity that this host supports."""
    usable = {fact.name: fact.usable for fact in found}
    pinned = "Wired memory is pinned." if usable["io_uring"] else "Wired memory is resident, and can move."
    if not usable["io_uring"]:
        return f"{pinned} Contiguous memory: from a hugetlb pool only."
    if not usable["PFN"] and not usable["THP"]:
        return f"{pinned} Contiguous memory: none, because addresses are hidden and there are no huge pages."
    if not usable["PFN"]:
        return f"{pinned} Contiguous memory: up to 2 MiB, in one huge page; addresses are hidden."
    how = "collected huge pages" if usable["THP"] else "a hugetlb pool only"
    return f"{pinned} Contiguous memory: from {how}; addresses are visible."


def _verdict(found: list[host.Fact]) -> str:
    if not (missing := host.obstacles(found)):
        return f"The main job, {_MAIN_JOB}, can run here."
    why = "; ".join(f"{fact.name}: {fact.summary}" for fact in missing)
    return f"The main job, {_MAIN_JOB}, cannot run here: {why}."
