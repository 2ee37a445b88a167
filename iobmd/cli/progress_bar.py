"""A progress bar on the terminal, for work on many bytes."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iobmd._internal.chunked import Progress

_FROM = 256 << 20
"""Bytes of memory from which a progress bar is shown."""


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show a progress bar if stderr is a terminal; it is called with the bytes that are done, and their total."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415 (loaded only if it is shown)
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn  # noqa: PLC0415

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(job, completed=done, total=total)


@contextlib.contextmanager
def progress_of(what: str, size: int) -> Iterator[Progress | None]:
    """Show a progress bar for large memory; it is called with the bytes that are done."""
    with progress_bar(what) if size >= _FROM else contextlib.nullcontext() as show_done:
        yield (lambda done: show_done(done, size)) if show_done else None
