"""Colors on a terminal, as escape sequences: rich takes longer to load than most commands take to run."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_SEQUENCES = {
    "bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34", "magenta": "35", "cyan": "36",
    "white": "37", "bright_black": "90", "bright_green": "92", "bright_blue": "94", "bright_cyan": "96",
}  # fmt: skip


def has_color() -> bool:
    """Return whether stdout is a terminal with colors, unless the user declined them (NO_COLOR)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def painter() -> Callable[[str, str], str]:
    """Return a function that writes a text in a style of `_SEQUENCES`, or without colors, the text alone."""
    if not has_color():
        return lambda text, _style: text
    return lambda text, style: f"\x1b[{_SEQUENCES[style]}m{text}\x1b[0m"
