"""Lines folded at the width of the terminal; in a file or a pipe, they are not folded."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterable


def terminal_width(file: TextIO | None = None) -> int | None:
    """Return the number of columns of the terminal to which a file is connected (default: stdout), or None."""
    file = file or sys.stdout
    if not file or not file.isatty():
        return None
    chosen = os.environ.get("COLUMNS", "")
    with contextlib.suppress(OSError):
        return int(chosen) if chosen.isdecimal() and int(chosen) else os.get_terminal_size(file.fileno()).columns
    return None


def terminal_height() -> int | None:
    """Return the number of lines of the terminal to which stdout is connected, or None."""
    if not sys.stdout or not sys.stdout.isatty():
        return None
    chosen = os.environ.get("LINES", "")
    with contextlib.suppress(OSError):
        return int(chosen) if chosen.isdecimal() and int(chosen) else os.get_terminal_size(sys.stdout.fileno()).lines
    return None


def flowed(items: Iterable[str], width: int | None) -> list[str]:
    """Return lines of items, two spaces apart, as many on each as fit a terminal; items are not split."""
    lines: list[str] = []
    for item in items:
        if lines and (not width or len(lines[-1]) + 2 + len(item) < width):
            lines[-1] += f"  {item}"
        else:
            lines.append(item)
    return lines


def folded(line: str, width: int | None, indent: str = "  ") -> str:
    """Return a line, folded between words to fewer than `width` columns; all lines but the first are indented."""
    if not width or len(line) < width:
        return line
    import textwrap  # noqa: PLC0415 (not for output to a file)

    start = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line, max(width - 1, 20), subsequent_indent=start + indent, break_long_words=False, break_on_hyphens=False
    )


def show(line: str, width: int | None, indent: str = "  ", file: TextIO | None = None) -> None:
    """Print a line, folded at the width of the terminal."""
    print(folded(line, width, indent), file=file, flush=True)
