"""The options for memory that does not belong to one process: `--host` and `--file`."""

from __future__ import annotations

import argparse

from iobmd.cli.arguments import size
from iobmd.units import HUGE_PAGE_SIZE

_MODULES = {"host": "host", "file": "files"}
_FORMATS = {"host": ("json", "csv", "openmetrics"), "file": ("json", "csv")}
"""By way: the options for the format of the output; at most one may be given."""
_OF_TABLE = {"host": (), "file": ("sort", "top")}
"""By way: the options for its table, without effect on other formats."""
OF_FILES = ("cached", "size", "name")
"""The values of `--sort` for files."""
WIDEST = 1 << 30
"""The largest size of contiguous memory that `--host` explains."""


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add the options."""
    group.add_argument(
        "--host",
        nargs="?",
        type=_window,
        const=0,
        metavar="SIZE",
        help="physical memory by kind, and the obstacles to contiguous memory of this size, rounded up to 2^n",
    )
    group.add_argument("--file", nargs="+", metavar="PATH", help="the part of files or directories in the page cache")


def chosen_way(arguments: argparse.Namespace) -> str | None:
    """Return which of the options was given."""
    return next((way for way in _MODULES if getattr(arguments, way) is not None), None)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace, way: str) -> None:
    """Refuse what cannot be combined with an option, and determine the output module."""
    if arguments.pid is not None:
        parser.error(f"--{way} is not about one process: omit the PID")
    given = [name for name, value in vars(arguments).items() if value != parser.get_default(name)]
    formats = [name for name in given if name in _FORMATS[way]]
    permitted = (way, *(formats or _OF_TABLE[way]))
    if wrong := [*(name for name in given if name not in permitted), *formats[1:]]:
        parser.error(f"--{wrong[0].replace('_', '-')} cannot be combined with --{' --'.join((way, *formats[:1]))}")
    if arguments.sort not in (None, *OF_FILES):
        parser.error(f"{arguments.sort!r} is no column of files: {', '.join(OF_FILES)}")
    arguments.way = _MODULES[way]


def _window(text: str) -> int:
    """Return the size of the aligned windows that contain memory of the requested size."""
    wanted = size(text)
    if wanted > WIDEST:
        raise argparse.ArgumentTypeError(f"windows of at most {WIDEST >> 30} GiB can be examined, not {text}")
    return max(HUGE_PAGE_SIZE, 1 << (wanted - 1).bit_length())
