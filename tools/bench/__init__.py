"""`iobmd bench`: every figure is a ratio against a named floor or peer, measured in the same run."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from typing import TYPE_CHECKING

from iobmd._version import __version__
from iobmd.cli import EXIT_OK
from iobmd.cli.arguments import size
from iobmd.cli.folding import folded, terminal_width

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .result import Result

_WIDTH = 80
"""Columns of the table in a file or a pipe."""
BENCHMARKS = {
    "copy": ("iobmd.tools.bench.copy", "withCopy from another process, and the startup time"),
    "wired": ("iobmd.tools.bench.wired", "pins, segments, small wired buffers"),
    "allocator": ("iobmd.tools.bench.allocator", "small wired buffers, which share pages"),
    "contiguous": (
        "iobmd.tools.bench.contiguous",
        "contiguous memory without a pool; as root also with enlarged pools, and DPDK",
    ),
    "pools": ("iobmd.tools.bench.pools", "large wired memory, also where free memory is fragmented"),
    "purgeable": (
        "iobmd.tools.bench.purgeable",
        "round trips of purgeable memory; as root also a cache under a memory limit",
    ),
    "pagemap": (
        "iobmd.tools.bench.pagemap",
        "walking the pages of a process, and the cost to that process",
    ),
    "host": ("iobmd.tools.bench.host", "the memory of the host, of its processes, and the page cache"),
    "mpi": ("iobmd.tools.bench.mpi", "messages, collectives and windows of MPI over iobmd memory"),
    "maps": ("iobmd.tools.bench.maps", "maps at other addresses, in parts, and copy-on-write"),
    "cachemode": ("iobmd.tools.bench.cachemode", "the costs of cache modes, and the gain of write-combine"),
    "remote": ("iobmd.tools.bench.remote", "for how long another task is stopped, and the speed of shared memory"),
}


def main(argv: Sequence[str]) -> int:
    """Run `iobmd bench NAME`."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    benchmark = importlib.import_module(BENCHMARKS[arguments.benchmark][0])
    results = benchmark.run(arguments.size, arguments.rounds)
    host = f"Linux {platform.release()}, {platform.machine()}, {len(os.sched_getaffinity(0))} processors"
    if arguments.json:
        rows = [result._asdict() for result in results]
        print(json.dumps({"version": 1, "iobmd": __version__, "host": host, "results": rows}, indent=2))
        return EXIT_OK
    show(f"iobmd {__version__}, {host}, medians of {arguments.rounds}", results)
    return EXIT_OK


def show(title: str, results: Sequence[Result]) -> None:
    """Print two lines for each result: a row of a table with all texts in columns would be 150 columns wide."""
    width = terminal_width() or _WIDTH
    print(folded(title, width))
    goals = max(len(result.goal) for result in results)
    print(f"\nratio  {'goal':{goals}}          measured")
    for result in results:
        verdict = "MISSED" if not result.met else "" if result.goal == "reported" else "met"
        start = f"{result.ratio:5.2f}  {result.goal:{goals}}  {verdict:6}  "
        texts = " " * len(start)
        print(start + folded(texts + result.what, width)[len(start) :])
        print(folded(f"{texts}  {result.figure}; {result.against}", width))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `iobmd bench`."""
    parser = argparse.ArgumentParser(
        prog="iobmd bench",
        description="Compare iobmd with the bare system calls. Figures are medians; memory is warmed up first.",
        epilog="benchmarks: " + "; ".join(f"{name}: {what}" for name, (_, what) in BENCHMARKS.items()),
    )
    parser.add_argument("benchmark", choices=[*BENCHMARKS], metavar="NAME", help="one of those listed below")
    parser.add_argument("--size", type=size, default=512 << 20, help="size of the large copies (default: 512M)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each figure (default: 7)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser
