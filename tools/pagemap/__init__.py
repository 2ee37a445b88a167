"""`iobmd pagemap`: the physical layout of a process's memory: contiguity, huge pages, locks, swap, sharing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from iobmd.cli import EXIT_OK
from iobmd.cli.signals import interruptible, terminable

from .arguments import make_parser, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "make_parser"]


def main(argv: Sequence[str]) -> int:
    """Run `iobmd pagemap`."""
    arguments = parse(argv)
    # Each output module is loaded when it is needed: most runs print a table.
    way = importlib.import_module(f"{__name__}.{arguments.way}")
    with interruptible(), terminable():  # temporary files and directories must be removed
        way.run(arguments)
    return EXIT_OK
