"""A progress bar on stderr for long operations; rich, which is slow to load, is loaded only for these."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress

_LONG = 0.7
"""Seconds until the bar appears."""


@contextlib.contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int], object]]:
    """Yield a function that reports the number of steps done, and of all of them."""
    if not sys.stderr or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    begin = time.monotonic()
    bar: Progress | None = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and time.monotonic() - begin > _LONG and done < total:
            bar = _bar()
            bar.start()
            bar.add_task(what)
        if bar:
            bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield report
    finally:
        if bar:
            bar.stop()


def _bar() -> Progress:
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    # Output during the search is printed above the bar if both are on the terminal.
    return Progress(console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty())
