"""`iobmd pagemap`: where a process's memory lies, how contiguous, how huge, locked, swapped, shared."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from iobmd.cli import EXIT_OK
from iobmd.cli.signals import interruptible, terminable

from .arguments import parse

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run `iobmd pagemap`."""
    arguments = parse(argv)
    # Each way to show it is loaded when it is asked for: most runs print a table.
    way = importlib.import_module(f"{__name__}.{arguments.way}")
    with interruptible(), terminable():  # there may be drafts and folders to remove
        way.run(arguments)
    return EXIT_OK
