"""The options of a run."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd.cli.arguments import duration

from . import events
from .board import THREADS

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Options:
    """The options of a run, and its duration."""

    seconds: float
    events: int
    faults: int
    seed: int
    kinds: list[str]
    workers: int
    threads: int
    patience: float
    calm: bool
    spare_workers: bool
    json: Path | None


def parse(argv: Sequence[str]) -> Options:
    """Return the options of a command line."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    kinds = list(events.KINDS) if arguments.kinds is None else arguments.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in events.KINDS | events.PLANTED_FAULTS]:
        parser.error(f"--kinds: no such kind: {', '.join(unknown)}")
    if min(arguments.workers, arguments.threads) < 1 or arguments.workers * arguments.threads > THREADS:
        parser.error(f"--workers times --threads must be within 1 and {THREADS}")
    if min(arguments.events, arguments.faults) < 0 or arguments.patience < 1:
        parser.error("--events and --faults must not be negative, and --patience at least 1")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no directory {arguments.json.absolute().parent}")
    seed = time.time_ns() // 1000 % (1 << 32) if arguments.seed is None else arguments.seed
    return Options(
        arguments.seconds,
        arguments.events,
        arguments.faults,
        seed,
        kinds,
        arguments.workers,
        arguments.threads,
        arguments.patience,
        arguments.calm,
        arguments.spare_workers,
        arguments.json,
    )


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `iobmd soak`."""
    parser = argparse.ArgumentParser(
        prog="iobmd soak",
        description="Use iobmd in many threads and processes while the kernel moves and reclaims memory, processes "
        "are killed and limits are reached, and check each event against the kernel. Exit code 1: a fault was found.",
        epilog=f"kinds of events: {', '.join(events.KINDS)}",
    )
    parser.add_argument("--seconds", type=duration, default=60, help="duration in seconds (default: 60)")
    parser.add_argument(
        "--events", type=int, default=0, metavar="N", help="end after this number of events (default: none)"
    )
    parser.add_argument(
        "--faults", type=int, default=0, metavar="N", help="end after this number of faults (default: none)"
    )
    parser.add_argument("--seed", type=int, help="seed of all random choices (default: the clock)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to a file")
    parser.add_argument("--kinds", metavar="NAMES", help="comma-separated kinds of events (default: all)")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="worker processes (default: 4)")
    parser.add_argument("--threads", type=int, default=3, metavar="N", help="threads in each worker (default: 3)")
    parser.add_argument(
        "--patience",
        type=duration,
        default=60,
        metavar="S",
        help="seconds after which an event counts as hanging (default: 60)",
    )
    parser.add_argument(
        "--calm", action="store_true", help="no compaction, pressure, kills or pauses, for comparison"
    )
    parser.add_argument("--spare-workers", action="store_true", help="kill and pause only targets, not workers")
    return parser
