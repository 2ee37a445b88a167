"""Labels that fit: the width of a text, and shortening it."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def letters(text: str) -> int:
    """Return the width of a text in letters of a fixed pitch; Chinese characters, for example, are twice as wide."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text
    )


def shortened(text: str, room: float, width: Callable[[str], float] = letters) -> str:
    """Return a text that fits the room, with "…" at the end if it was cut; empty if little would remain."""
    if width(text) <= room:
        return text
    while len(text) > 2 and width(f"{text}…") > room:
        text = text[:-1]
    return f"{text}…" if len(text) > 2 else ""
