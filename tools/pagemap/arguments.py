"""The command line of `iobmd pagemap`."""

from __future__ import annotations

import argparse
import os
import re
from functools import partial
from typing import TYPE_CHECKING

from iobmd.cli.arguments import size
from iobmd.units import PAGE_SIZE, parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

STATES = ("resident", "anonymous", "file", "huge", "swapped", "locked", "lazy", "zero", "guard", "device")
KEYS = ("address", "size", "resident", "swapped", "huge", "locked", "runs", "largest", "name")
BY_SMAPS = ("locked", "lazy")
"""Those that smaps alone tells."""

_FILTERS = ("name", "min_size", "only")
_WAYS = ("frame", "watch", "diff", "save", "map", "svg", "png", "html", "json", "csv")
"""Options that choose what is shown instead of the table."""
_AS_JSON = ("frame", "watch", "diff")
"""Those of them that --json gives as data."""
_WITHOUT_CHOICE = {"frame": ("name", "min_size", "range", "only"), "diff": _FILTERS, "save": _FILTERS}
_LISTS = ("table", "json", "csv")
"""Ways that list what was chosen, in the order that was asked for."""
_MODULES = {
    "json": "document",
    "csv": "sheet",
    "diff": "snapshots",
    "save": "snapshots",
    "svg": "picture",
    "png": "picture",
    "html": "picture",
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; `way` of what it returns is the module that shows what was asked for."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    chosen = [way for way in _WAYS if getattr(arguments, way) not in (None, False)]
    way = chosen[0] if chosen else "table"
    arguments.segments = bool(arguments.max_segment or arguments.boundary)
    of_runs = arguments.runs or arguments.flags or arguments.segments
    together = " and --".join(chosen)
    for is_wrong, message in (
        (chosen[1:] and not (way in _AS_JSON and chosen[1:] == ["json"]), f"--{together} do not go together"),
        (arguments.pid is None and way != "frame", "a process is needed: its PID, or self"),
        (arguments.pid is not None and way == "frame", "--frame looks in all processes: it takes no PID"),
        (arguments.count is not None and way != "watch", "--count goes with --watch"),
        (of_runs and way not in _LISTS, f"--runs, --flags and limits of segments do not go together with --{way}"),
        (arguments.segments and arguments.flags, "--flags is of runs: it does not go together with segments' limits"),
        (
            arguments.smaps is False and (arguments.only in BY_SMAPS or arguments.sort in BY_SMAPS),
            f"smaps alone tells what is {' or '.join(BY_SMAPS)}: --no-smaps does not go with it",
        ),
        (
            way == "csv" and arguments.segments and arguments.runs,
            "--csv is of runs or of segments: --runs does not go together with segments' limits",
        ),
        (_has_two_bits(arguments.boundary or 0), "--boundary must be a power of two"),
        (
            of_runs and way == "table" and arguments.sort != "address",
            "runs and segments are shown by address: --sort does not go with them",
        ),
    ):
        if is_wrong:
            parser.error(message)
    if of_runs and way == "table":
        way = "runs"
    _refuse_without_effect(parser, arguments, way)
    arguments.of_areas = way in (*_LISTS, "watch") or arguments.only in BY_SMAPS
    if arguments.smaps is not None and not arguments.of_areas:
        parser.error(f"--smaps and --no-smaps do nothing with --{way}")
    arguments.way = _MODULES.get(way, way)
    return arguments


def _has_two_bits(number: int) -> bool:
    return bool(number & (number - 1))


def _refuse_without_effect(parser: argparse.ArgumentParser, arguments: argparse.Namespace, way: str) -> None:
    """Refuse options that would do nothing in the way that was chosen."""
    without = [name for name in _WITHOUT_CHOICE.get(way, ()) if getattr(arguments, name) is not None]
    if arguments.sort != "address" and way not in (*_LISTS, "runs"):
        without.append("sort")
    if without:
        parser.error(f"--{without[0].replace('_', '-')} does not go together with --{way}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="iobmd pagemap",
        usage="%(prog)s PID|self [options]\n       %(prog)s --frame PFN[-PFN] [--json]",
        description="Show where a process's memory lies: a row for each of its areas (VMAs), and a summary.",
        epilog="Sizes and addresses: decimal, 0x hexadecimal, or with a suffix k, M, G, T; a range of 8 digits or "
        "more also as /proc/PID/maps has it, hexadecimal without 0x, where that cannot be decimal. Frame numbers and "
        "what follows from them (runs, folio sizes) are shown to holders of CAP_SYS_ADMIN; the rest to anyone who "
        "may trace the process.",
        # Each option of its own has one made, which would ask for the terminal's width and load shutil for it.
        formatter_class=partial(argparse.HelpFormatter, width=80),
    )
    parser.add_argument("pid", nargs="?", type=_pid, metavar="PID", help="the process, or self: this command")
    _add_choices(parser.add_argument_group("which areas"))
    _add_details(parser.add_argument_group("what of them"))
    _add_ways(parser.add_argument_group("shown how"))
    parser.formatter_class = argparse.HelpFormatter
    return parser


def _add_choices(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--name", metavar="TEXT", help="those whose name has this text in it")
    group.add_argument("--min-size", type=size, metavar="SIZE", help="those that are so large, or larger")
    group.add_argument("--range", type=_addresses, metavar="A-B", help="what lies between two addresses")
    group.add_argument("--only", choices=STATES, metavar="STATE", help=f"those with such pages: {', '.join(STATES)}")
    group.add_argument("--sort", choices=KEYS, metavar="KEY", default="address", help=f"by {', '.join(KEYS)}")


def _add_details(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--runs", action="store_true", help="physically contiguous runs, and a histogram of them")
    group.add_argument("--max-segment", type=size, metavar="SIZE", help="DMA segments of at most so many bytes")
    group.add_argument("--boundary", type=size, metavar="SIZE", help="DMA segments that cross no multiple of this")
    group.add_argument("--flags", action="store_true", help="kpageflags, map counts, cgroup, NUMA node of each run")
    group.add_argument("--frame", type=_frames, metavar="PFN[-PFN]", help="who maps these frames, of all processes")
    group.add_argument(
        "--smaps",
        action=argparse.BooleanOptionalAction,
        help="locked and lazily free memory, which smaps alone tells; by default unless that holds up the process",
    )


def _add_ways(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", action="store_true", help="one JSON document")
    group.add_argument("--csv", action="store_true", help="comma-separated values with a heading")
    group.add_argument("--map", action="store_true", help="a map in the terminal, a cell for each block of addresses")
    group.add_argument("--svg", metavar="FILE", help="a picture: addresses against physical memory")
    group.add_argument("--png", metavar="FILE", help="the same (needs the extra iobmd[plot])")
    group.add_argument("--html", metavar="FILE", help="the same as a page that needs nothing else")
    group.add_argument(
        "--watch", type=_seconds, metavar="SECONDS", help="look again and again, and show what changes"
    )
    group.add_argument("--count", type=_count, metavar="N", help="watch: look so many times")
    group.add_argument("--save", metavar="FILE", help="keep a snapshot")
    group.add_argument("--diff", metavar="FILE", help="what changed since that snapshot was saved")


def _pid(text: str) -> int:
    if text == "self":
        return os.getpid()
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a process id nor self")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, more than none, a day at most")
    return seconds


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of looks, 1 or more")
    return int(text)


def _addresses(text: str) -> tuple[int, int]:
    first, separator, last = text.partition("-")
    # /proc/PID/maps writes eight digits or more, hexadecimal and without 0x; --json writes decimal numbers.
    as_in_maps = re.fullmatch(_IN_MAPS, text)
    if as_in_maps and text[0] != "0" and text.replace("-", "").isdecimal():
        as_in_maps = None
        if int(last, 16) <= _TOP:
            raise argparse.ArgumentTypeError(
                f"{text!r} may be hexadecimal or decimal: write 0x{first}-0x{last}, or {int(first):#x}-{int(last):#x}"
            )
    read = _hexadecimal if as_in_maps else parse_size
    try:
        start, end = read(first), read(last)
    except ValueError:
        start = end = 0
    if not separator or start >= end:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a range of addresses such as 0x7f0000000000-0x7f0000200000"
        )
    return start, end


def _hexadecimal(text: str) -> int:
    return int(text, 16)


_TOP = 1 << 47
"""Where the addresses of programs end, unless these ask for more (x86-64: four levels of page tables)."""
_IN_MAPS = r"[0-9a-f]{8,16}-[0-9a-f]{8,16}"


def _frames(text: str) -> tuple[int, int]:
    """Return the physical range of frame numbers: its start, and its length in bytes."""
    first, separator, last = text.partition("-")
    try:
        low = int(first, 0)
        high = int(last, 0) if separator else low
    except ValueError:
        low, high = 1, 0
    if "_" in text or not 0 <= low <= high < 1 << 40:  # of 52 bits of address
        raise argparse.ArgumentTypeError(f"{text!r} is not a frame number, or two such as 0x1a000-0x1a0ff")
    return low * PAGE_SIZE, (high - low + 1) * PAGE_SIZE
