"""The command line of `iobmd pagemap`."""

from __future__ import annotations

import argparse
import os
import re
from functools import partial
from typing import TYPE_CHECKING

from iobmd.cli.arguments import size
from iobmd.units import PAGE_SIZE, parse_size, round_down, round_up

from . import system_options
from .columns import COLUMNS, OF_AREAS, OF_PROCESSES, SYNONYMS

if TYPE_CHECKING:
    from collections.abc import Sequence

STATES = ("resident", "anonymous", "file", "huge", "swapped", "locked", "lazy", "zero", "guard", "device")
KEYS = tuple(dict.fromkeys(("address", "name", *COLUMNS, *SYNONYMS, *system_options.OF_FILES)))
BY_SMAPS = ("locked", "lazy", "lazyfree", "eligible")
"""Columns and states that only smaps provides."""
METHODS = ("accessed", "written", "damon", "referenced")
"""`iobmd.pagemap.sampling.Method`, which is not loaded for other outputs."""

_FILTERS = ("name", "min_size", "only")
_WAYS = (
    "frame",
    "processes",
    "watch",
    "heat",
    "diff",
    "save",
    "map",
    "svg",
    "png",
    "html",
    "json",
    "csv",
    "openmetrics",
)
"""Options that select another output than the table."""
_AS_JSON = {
    "frame": ["json"],
    "processes": ["json", "csv", "openmetrics"],
    "watch": ["json"],
    "heat": ["json", "svg", "png"],
    "diff": ["json"],
}
"""Those of them that have several formats."""
BY = ("user", "name", "cgroup", "container")
_OF_PROCESSES = ("user", "cgroup", "container", "by")
_WITHOUT_CHOICE = {
    "frame": ("name", "min_size", "range", "only"),
    "processes": ("min_size", "range", "only"),
    "heat": ("only",),
    "diff": _FILTERS,
    "save": _FILTERS,
}
ALL = "all"
"""The name for all columns."""
_OF_TABLE = ("all", "top", "columns")
_WITHOUT_PID = ("frame", "processes")
_LISTS = ("table", "json", "csv")
"""Outputs that list the selected areas in the requested order."""
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
    """Parse the command line; `way` of the result is the name of the output module."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if without_process := system_options.chosen_way(arguments):
        system_options.check(parser, arguments, without_process)
        return arguments
    arguments.within = None
    if arguments.pid is not None and (arguments.runs or arguments.flags):
        arguments.within, arguments.frame = arguments.frame, None
    chosen = [way for way in _WAYS if getattr(arguments, way) not in (None, False)]
    way = chosen[0] if chosen else "table"
    arguments.segments = bool(arguments.max_segment or arguments.boundary)
    of_runs = arguments.runs or arguments.flags or arguments.segments
    excluded = [other for other in chosen[1:] if other not in _AS_JSON.get(way, ())]
    excluded = [way, *excluded] if excluded else chosen[1:]
    for is_wrong, message in (
        (way == "heat" and arguments.html, "--html does not draw --heat: use --svg FILE or --png FILE"),
        (len(excluded) > 1, f"--{' and --'.join(excluded[:2])} cannot be combined"),
        (arguments.pid is None and way not in _WITHOUT_PID, "missing process: give a PID, self, or --processes"),
        (arguments.pid is not None and way == "processes", "--processes reads all processes: omit the PID"),
        (
            arguments.pid is not None and way == "frame",
            "--frame and --physical search all processes: omit the PID, or add --runs or --flags",
        ),
        (arguments.count is not None and way not in ("watch", "heat"), "--count requires --watch or --heat"),
        (arguments.method is not None and way != "heat", "--method requires --heat"),
        (of_runs and way not in _LISTS, f"--runs, --flags and segment limits cannot be combined with --{way}"),
        (arguments.segments and arguments.flags, "--flags cannot be combined with segment limits"),
        (
            arguments.smaps is False and needs_smaps(arguments),
            f"{', '.join(BY_SMAPS)} require smaps: omit --no-smaps",
        ),
        (
            way == "csv" and arguments.segments and arguments.runs,
            "--csv lists either runs or segments: --runs cannot be combined with segment limits",
        ),
        (_has_two_bits(arguments.boundary or 0), "--boundary must be a power of two"),
        (
            of_runs and way == "table" and arguments.sort not in (None, "address"),
            "runs and segments are sorted by address: omit --sort",
        ),
        (
            way == "table" and arguments.sort == "address" and not (of_runs or arguments.each),
            "--sort address requires a row for each area: add --each",
        ),
        (arguments.each and (way != "table" or of_runs), "--each lists areas in the table, and nothing else"),
        (
            arguments.sharers and (way not in ("table", "json") or arguments.each or of_runs),
            "--sharers is for the table of mappings, and --json",
        ),
        (arguments.grouped and way != "csv", "--grouped is for --csv: the table is grouped, and --json has both"),
        (arguments.grouped and of_runs, "--grouped cannot be combined with --runs, --flags or segment limits"),
        (arguments.all and arguments.top, "--all cannot be combined with --top"),
        (arguments.each and arguments.top, "--each lists all areas: omit --top"),
    ):
        if is_wrong:
            parser.error(message)
    if of_runs and way == "table":
        way = "runs"
    _refuse_without_effect(parser, arguments, way)
    _check_columns(parser, arguments, way)
    of_areas = arguments.each or way in ("json", "csv", "runs")
    arguments.sort = arguments.sort or ("address" if of_areas else "pss" if way == "processes" else "rss")
    arguments.of_areas = way in (*_LISTS, "watch", "html", "openmetrics") or arguments.only in BY_SMAPS
    if arguments.smaps is not None and not (arguments.of_areas or way == "processes"):
        parser.error(f"--smaps and --no-smaps have no effect with --{way}")
    if way == "table" and not arguments.each:
        way = "overview"
    arguments.way = _MODULES.get(way, way)
    return arguments


def _check_columns(parser: argparse.ArgumentParser, arguments: argparse.Namespace, way: str) -> None:
    """Refuse columns that the rows do not have."""
    of_rows = OF_PROCESSES if way == "processes" else OF_AREAS
    if arguments.by:
        of_rows = ("procs", *of_rows)
    names = arguments.columns or []
    if names == [ALL]:
        names = arguments.columns = list(of_rows)
    for name in filter(None, (*names, arguments.sort)):
        if SYNONYMS.get(name, name) not in (*of_rows, "name", "address"):
            parser.error(
                f"{name!r} is no column of {'processes' if way == 'processes' else 'areas'}: {', '.join(of_rows)}"
            )
    if way == "processes" and arguments.sort == "address":
        parser.error("--sort address cannot be combined with --processes")


def needs_smaps(arguments: argparse.Namespace) -> bool:
    """Return whether the selection or the order of areas requires smaps."""
    return arguments.only in BY_SMAPS or arguments.sort in BY_SMAPS


def _has_two_bits(number: int) -> bool:
    return bool(number & (number - 1))


def _refuse_without_effect(parser: argparse.ArgumentParser, arguments: argparse.Namespace, way: str) -> None:
    """Refuse options that have no effect on the selected output."""
    without = [name for name in _WITHOUT_CHOICE.get(way, ()) if getattr(arguments, name) is not None]
    if arguments.sort is not None and way not in (*_LISTS, "runs", "processes"):
        without.append("sort")
    if way not in ("table", "processes") or (arguments.json or arguments.csv or arguments.openmetrics):
        without += [name for name in _OF_TABLE if getattr(arguments, name)]
    if way != "processes":
        without += [name for name in _OF_PROCESSES if getattr(arguments, name) is not None]
    if without:
        parser.error(f"--{without[0].replace('_', '-')} cannot be combined with --{way}")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `iobmd pagemap`."""
    parser = argparse.ArgumentParser(
        prog="iobmd pagemap",
        usage="%(prog)s PID|self [options]\n       %(prog)s --processes [options]\n"
        "       %(prog)s --frame PFN[-PFN] | --physical A[-B] [--json]\n"
        "       %(prog)s --host [SIZE] | --file PATH... [options]",
        description="Show how much memory a process has, and where: a summary, and a row for each mapping.",
        epilog="Sizes and addresses: decimal, 0x hexadecimal, or with a suffix k, M, G, T. Ranges of 8 digits or "
        "more may also be as in /proc/PID/maps, hexadecimal without 0x, unless the digits could be decimal. Frame "
        "numbers and results derived from them (runs, folio sizes) require CAP_SYS_ADMIN; the rest requires "
        "permission to trace the process.",
        # One formatter for all options, because each one loads shutil to determine the terminal's width.
        formatter_class=partial(argparse.HelpFormatter, width=80),
    )
    parser.add_argument("pid", nargs="?", type=_pid, metavar="PID", help="the process; self: this command")
    _add_choices(parser.add_argument_group("areas"))
    meanings = "; ".join(f"{column.name}: {column.meaning}" for column in COLUMNS.values())
    _add_table(parser.add_argument_group("table", f"Columns: {meanings}."))
    _add_processes(parser.add_argument_group("many processes"))
    _add_details(parser.add_argument_group("details"))
    system_options.add_options(parser.add_argument_group("host and files"))
    _add_ways(parser.add_argument_group("output"))
    parser.formatter_class = argparse.HelpFormatter
    return parser


def _add_choices(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--name", metavar="TEXT", help="areas, or processes, whose name contains this text")
    group.add_argument("--min-size", type=size, metavar="SIZE", help="areas of at least this size")
    group.add_argument("--range", type=_addresses, metavar="A-B", help="the part between two addresses")
    group.add_argument(
        "--only", choices=STATES, metavar="STATE", help=f"areas with pages in the state {', '.join(STATES)}"
    )


def _add_table(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--each", action="store_true", help="a row for each area (VMA) instead of each mapping")
    group.add_argument("--all", action="store_true", help="all rows, even if they do not fit the terminal")
    group.add_argument("--top", type=_count, metavar="N", help="the first N rows")
    group.add_argument(
        "--sort",
        choices=KEYS,
        metavar="KEY",
        help="sort by a column (default: rss; of processes, pss), by name, or areas by address; files by "
        f"{', '.join(system_options.OF_FILES)}",
    )
    group.add_argument(
        "--sharers", action="store_true", help="the other processes that map each file or shared memory"
    )
    group.add_argument(
        "--columns", type=_columns, metavar="LIST", help="columns, separated by commas; all: all of them"
    )


def _add_processes(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--processes", action="store_true", help="a row for each process, and their sum")
    group.add_argument("--user", type=_uid, metavar="USER", help="processes of this user, by name or UID")
    group.add_argument("--cgroup", metavar="TEXT", help="processes whose memory cgroup contains this text")
    group.add_argument("--container", metavar="ID", help="processes of this container")
    group.add_argument("--by", choices=BY, metavar="KEY", help=f"a row for each {', '.join(BY)}")


def _add_details(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--runs", action="store_true", help="physically contiguous runs, and a histogram of them")
    group.add_argument("--max-segment", type=size, metavar="SIZE", help="DMA segments of at most this size")
    group.add_argument("--boundary", type=size, metavar="SIZE", help="DMA segments that cross no multiple of this")
    group.add_argument("--flags", action="store_true", help="kpageflags, map counts, cgroups, NUMA node of each run")
    within = group.add_mutually_exclusive_group()
    within.add_argument(
        "--frame",
        type=_frames,
        metavar="PFN[-PFN]",
        help="all processes that map these page frames; with a PID and --runs or --flags, its runs in these frames",
    )
    within.add_argument(
        "--physical", type=_physical, dest="frame", metavar="A[-B]", help="the same, by physical addresses"
    )
    group.add_argument(
        "--smaps",
        action=argparse.BooleanOptionalAction,
        help="locked and lazily freed memory, from smaps; the default unless it would block the process",
    )


def _add_ways(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--json", action="store_true", help="one JSON document")
    group.add_argument("--csv", action="store_true", help="comma-separated values: a line for each area")
    group.add_argument("--grouped", action="store_true", help="with --csv: a line for each mapping")
    group.add_argument("--openmetrics", action="store_true", help="Prometheus text format, for node_exporter")
    group.add_argument("--map", action="store_true", help="a map in the terminal, a cell for each block of addresses")
    group.add_argument("--svg", metavar="FILE", help="a picture of addresses and physical memory")
    group.add_argument("--png", metavar="FILE", help="the same picture (requires the extra iobmd[plot])")
    group.add_argument("--html", metavar="FILE", help="the same picture as a self-contained page")
    group.add_argument("--watch", type=_seconds, metavar="SECONDS", help="read repeatedly, and show the changes")
    group.add_argument(
        "--heat",
        type=_seconds,
        metavar="SECONDS",
        help="sample which memory is used, and draw it; also as --svg, --png",
    )
    group.add_argument(
        "--method", choices=METHODS, metavar="METHOD", help=f"with --heat: how use is detected ({', '.join(METHODS)})"
    )
    group.add_argument("--count", type=_count, metavar="N", help="with --watch or --heat: number of times to read")
    group.add_argument("--save", metavar="FILE", help="save a snapshot")
    group.add_argument("--diff", metavar="FILE", help="show the changes since a saved snapshot")


def _pid(text: str) -> int:
    if text == "self":
        return os.getpid()
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a PID nor self: --processes --name TEXT shows PIDs")
    return int(text)


def _uid(text: str) -> int:
    import pwd  # noqa: PLC0415 (for --user only)

    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError:
        if text.isascii() and text.isdecimal():
            return int(text)
    raise argparse.ArgumentTypeError(f"no user has the name {text!r}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds up to a day")
    return seconds


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a count of at least 1")
    return int(text)


def _columns(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))


def _addresses(text: str) -> tuple[int, int]:
    first, separator, last = text.partition("-")
    # /proc/PID/maps contains at least eight digits, hexadecimal without 0x; --json contains decimal numbers.
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
"""The end of user addresses, unless a program requests more (x86-64: four levels of page tables)."""
_IN_MAPS = r"[0-9a-f]{8,16}-[0-9a-f]{8,16}"


def _frames(text: str) -> tuple[int, int]:
    """Return the physical range of frame numbers: its start, and its length in bytes."""
    first, separator, last = text.partition("-")
    try:
        low = int(first, 0)
        high = int(last, 0) if separator else low
    except ValueError:
        if re.fullmatch(r"[0-9a-f]+(-[0-9a-f]+)?", text):
            as_numbers = "-".join(f"0x{part}" for part in text.split("-"))
            raise argparse.ArgumentTypeError(
                f"{text!r} lacks 0x: write {as_numbers} if it is a frame number, --physical {as_numbers} if it is a "
                "physical address"
            ) from None
        low, high = 1, 0
    if "_" in text or not 0 <= low <= high < 1 << 40:  # of 52 bits of address
        raise argparse.ArgumentTypeError(f"{text!r} is neither a frame number nor a range such as 0x1a000-0x1a0ff")
    return low * PAGE_SIZE, (high - low + 1) * PAGE_SIZE


def _physical(text: str) -> tuple[int, int]:
    """Return a physical range in bytes, extended to whole frames: its start and length."""
    first, separator, last = text.partition("-")
    try:
        low = _address(first)
        high = _address(last) if separator else low + 1
    except ValueError:
        low, high = 1, 0
    if "_" in text or not 0 <= low < high <= 1 << 52:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a physical address nor a range such as 0x1a000-0x1c000"
        )
    low = round_down(low, PAGE_SIZE)
    return low, round_up(high, PAGE_SIZE) - low


def _address(text: str) -> int:
    # As --runs prints it, hexadecimal without 0x, unless it could be decimal.
    return int(text, 16) if re.fullmatch(r"[0-9a-f]*[a-f][0-9a-f]*", text) else parse_size(text)
