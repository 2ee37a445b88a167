"""`iobmd pagemap`: the physical layout of a process's memory: contiguity, huge pages, locks, swap, sharing."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
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
    # A command that stops the process, if only for its --heat, has no second thread.
    with nullcontext() if arguments.heat else interruptible(), terminable():  # temporary files must be removed
        way.run(arguments)
    return EXIT_OK
