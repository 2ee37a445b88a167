"""`iobmd core`: an ELF core file of a running process, which is stopped only while a snapshot of it is made."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, TextIO

from iobmd.api import snapshot
from iobmd.cli import EXIT_OK
from iobmd.cli.arguments import STANDARD_OUTPUT, output, size
from iobmd.cli.folding import show, terminal_width
from iobmd.cli.progress_bar import progress_bar
from iobmd.cli.signals import terminable
from iobmd.task.task import Task
from iobmd.units import format_size, format_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iobmd.remote.core_summary import CoreSummary


def main(argv: Sequence[str]) -> int:
    """Run `iobmd core`."""
    arguments = make_parser().parse_args(argv)
    task = Task(arguments.pid)
    name = arguments.output or f"core.{task.pid}"
    path = "/dev/stdout" if name == STANDARD_OUTPUT else name
    limits = {"limit": arguments.limit, "freeze_shared": arguments.freeze_shared}
    with terminable(), snapshot(task, **limits) as held, progress_bar("core") as progress:
        summary = held.core(path, progress=progress, filter=arguments.filter)
    stream = sys.stderr if name == STANDARD_OUTPUT else sys.stdout
    if arguments.json:
        print(json.dumps(_document(task, name, summary), indent=2), file=stream)
    else:
        _show(name, summary, stream)
    return EXIT_OK


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `iobmd core`."""
    parser = argparse.ArgumentParser(
        prog="iobmd core",
        description="Write a core file of a running process, for gdb, lldb, drgn and other debuggers. The process is "
        "stopped only while a snapshot of its memory is made.",
        epilog="Sizes: decimal, 0x hexadecimal, or with a suffix k, M, G, T.",
    )
    parser.add_argument("pid", type=int, help="the process; all of its threads are stopped briefly")
    parser.add_argument(
        "-o", "--output", type=output, metavar="FILE", help="the core file (-: standard output; default: core.PID)"
    )
    parser.add_argument(
        "--filter",
        type=_bits,
        metavar="BITS",
        help="kinds of memory to write, hexadecimal as in /proc/PID/coredump_filter (default: that of the process)",
    )
    parser.add_argument(
        "--limit",
        type=size,
        metavar="SIZE",
        help="fail if more than SIZE is copied because the process writes to its memory",
    )
    parser.add_argument(
        "--freeze-shared",
        type=size,
        metavar="SIZE",
        help="copy shared memory during the stop, at most SIZE (default: write its contents at the time of writing)",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON document")
    return parser


def _bits(text: str) -> int:
    return int(text, 16)


_bits.__name__ = "hexadecimal number"  # in the message of argparse


def _document(task: Task, name: str, summary: CoreSummary) -> dict[str, object]:
    return {
        "version": 1,
        "pid": task.pid,
        "output": name,
        "size": summary.size,
        "written": summary.written,
        "omitted": summary.omitted,
        "areas": summary.areas,
        "threads": summary.threads,
        "stopped_ms": round(summary.stopped_ns / 1e6, 3),
        "seconds": round(summary.seconds, 6),
    }


def _show(name: str, summary: CoreSummary, stream: TextIO) -> None:
    width = terminal_width(stream)
    where = "standard output" if name == STANDARD_OUTPUT else name
    threads = f"{summary.threads} thread{'s' * (summary.threads != 1)}"
    show(
        f"{where}: {format_size(summary.written)} of memory in {summary.areas} areas, {threads}, in "
        f"{format_time(summary.seconds)}",
        width,
        file=stream,
    )
    if summary.omitted:
        why = "coredump_filter, MADV_DONTDUMP, MADV_DONTFORK"
        show(f"left out: {format_size(summary.omitted)} ({why})", width, file=stream)
    print(f"the process was stopped for {format_time(summary.stopped_ns / 1e9)}", file=stream)
