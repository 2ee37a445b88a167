"""`--processes`: the memory of many processes, one row each, or one for each user, name, cgroup or container."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from iobmd import procfs
from iobmd.cli.folding import folded, terminal_width
from iobmd.printable import printable
from iobmd.units import format_count

from .columns import OF_PROCESSES, brief, cells, column, percent, share
from .document import VERSION, hidden_member, members, write_list
from .overview import Row, chosen_columns, most_rows, omitted, show_rows
from .progress import show_progress
from .summary import lines
from .table import show_hidden
from .total import Total
from .usage import Processes, Usage

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

DEFAULT = ("pss", "pss%", "rss", "uss", "swap", "anon", "file", "shmem", "huge", "huge%", "locked", "size")
_USER = 8
"""Columns of a user's name, which is cut."""
_NARROW = 60
_KEYS: dict[str, Callable[[Usage], str]] = {
    "user": lambda usage: usage.user,
    "name": lambda usage: usage.name,
    "cgroup": lambda usage: usage.cgroup or "/",
    "container": lambda usage: usage.container or "[none]",
}


def run(arguments: argparse.Namespace) -> None:
    """Print the processes."""
    processes = Processes(arguments)
    with show_progress("processes") as progress:
        found = list(processes.usages(progress))
    total = Total()
    for usage in found:
        _add(total, usage.total)
    rows = _grouped(found, arguments.by) if arguments.by else found
    if arguments.openmetrics:
        from .openmetrics import write_processes  # noqa: PLC0415 (not for the other formats)

        write_processes(arguments.by, processes, _sorted(rows, arguments.sort))
        return
    write = _write if arguments.json else _write_lines if arguments.csv else _show
    write(arguments, processes, _sorted(rows, arguments.sort), total)
    sys.stdout.flush()


def _add(total: Total, one: Total) -> None:
    """Add a process; an unknown PSS is at least its USS."""
    least = total.pss or 0
    total.add(one)
    total.pss = least + _least_pss(one)
    total.processes += 1


def _least_pss(total: Total) -> int:
    return total.uss if total.pss is None else total.pss


def _grouped(found: list[Usage], key: str) -> list[Usage]:
    """Return the sums of processes with the same key, as if each were a process."""
    groups: dict[str, Total] = {}
    for usage in found:
        _add(groups.setdefault(_KEYS[key](usage), Total()), usage.total)
    return [Usage(0, name, "", "", "", total) for name, total in groups.items()]


def _sorted(rows: list[Usage], sort: str) -> list[Usage]:
    if sort == "name":
        return sorted(rows, key=lambda row: (row.name, row.pid))
    value = column(sort).value

    def rank(row: Usage) -> tuple[float, int]:
        number = value(row.total)
        if number is None:
            number = _least_pss(row.total) if sort.startswith("pss") else -1
        return number, row.total.resident

    return sorted(rows, key=rank, reverse=True)


def _show(arguments: argparse.Namespace, processes: Processes, rows: list[Usage], total: Total) -> None:
    width = terminal_width()
    if not rows:
        show_hidden(processes.hidden(), width)
        if not processes.refused and not processes.busy:
            print("iobmd pagemap: no process matches", file=sys.stderr)
        return
    head = _heading(arguments, width)
    names = ("procs", *DEFAULT) if arguments.by else DEFAULT
    if width is None:
        names = (*(("procs",) if arguments.by else ()), *OF_PROCESSES)
    columns = chosen_columns(arguments, width, total, names, len(head.start))
    shown = {one.name for one in columns}
    hidden = [one for one in processes.hidden() if not one.columns or shown & set(one.columns)]
    hidden += omitted(arguments, columns)
    above = folded(_title(total), width).splitlines() + lines(total, None, width)
    below = sum(len(folded(str(one), width).splitlines()) for one in hidden)
    print("\n".join(above))
    most = most_rows(arguments, len(above) + below + 2, len(rows))
    table = [Row(_start(usage, arguments, width), usage.name, usage.total) for usage in rows]
    show_rows(table, columns, total, width, most, head)
    print(f"{'':{len(head.start)}}{cells(columns, total, total)}  total")
    show_hidden(hidden, width)


def _title(total: Total) -> str:
    """Return the number of processes, and their share of the memory of the host."""
    number = format_count(total.processes, "process", "processes")
    with contextlib.suppress(OSError, KeyError):
        memory = procfs.meminfo()["MemTotal"]
        return f"{number}: PSS is {percent(share(total.pss, memory))} % of {brief(memory)}"
    return number


def _heading(arguments: argparse.Namespace, width: int | None) -> Row:
    if arguments.by:
        return Row("", arguments.by, Total())
    user = f" {'user':{_USER}}" if width is None or width >= _NARROW else ""
    return Row(f"{'pid':>7}{user}", "name", Total())


def _start(usage: Usage, arguments: argparse.Namespace, width: int | None) -> str:
    if arguments.by:
        return ""
    if width is None:
        return f"{usage.pid:7} {usage.user:{_USER}}"
    name = printable(usage.user)
    name = name if len(name) <= _USER else f"{name[: _USER - 1]}+"
    return f"{usage.pid:7} {name:{_USER}}" if width >= _NARROW else f"{usage.pid:7}"


def _row(usage: Usage, by: str | None) -> dict[str, Any]:
    if by:
        return {by: usage.name, "processes": usage.total.processes} | _sizes(usage.total)
    about = {"pid": usage.pid, "name": usage.name, "user": usage.user}
    return about | {"cgroup": usage.cgroup, "container": usage.container} | _sizes(usage.total)


def _sizes(total: Total) -> dict[str, int | None]:
    return {
        "size_bytes": total.size,
        "resident_bytes": total.resident,
        "pss_bytes": total.pss,
        "uss_bytes": total.uss,
        "shared_bytes": total.shared,
        "anonymous_bytes": total.anonymous,
        "file_bytes": total.file,
        "shmem_bytes": total.shmem,
        "swapped_bytes": total.swapped,
        "huge_bytes": total.huge,
        "locked_bytes": total.locked,
        "lazy_free_bytes": total.lazy_free,
    }


def _write(arguments: argparse.Namespace, processes: Processes, rows: list[Usage], total: Total) -> None:
    head = {"version": VERSION, "time": round(processes.time), "kernel": os.uname().release}
    head |= {"not_visible": processes.refused, "not_visible_bytes": processes.refused_bytes}
    print("{" + members(head | hidden_member(processes.hidden())) + ',\n"processes": [', end="")
    write_list(_row(usage, arguments.by) for usage in rows)
    print(f'],\n"summary": {json.dumps({"processes": total.processes} | _sizes(total))}}}')


def _write_lines(arguments: argparse.Namespace, processes: Processes, rows: list[Usage], _total: Total) -> None:
    for hidden in processes.hidden():
        print(hidden, file=sys.stderr)  # not on stdout, which programs read
    out = csv.writer(sys.stdout, lineterminator="\n")
    for index, usage in enumerate(rows):
        row = _row(usage, arguments.by)
        if not index:
            out.writerow(row)
        out.writerow(printable(value) if isinstance(value, str) else value for value in row.values())
