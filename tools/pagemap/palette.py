"""The representation of page states in pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .grid import Sums


class Ink(NamedTuple):
    """A state of pages in a picture."""

    color: str
    letter: str
    """The letter if there are no colors."""
    word: str
    meaning: str


INKS = {
    # Distinguishable without red or green vision (after Okabe and Ito).
    "huge": Ink("#0b5fa5", "H", "huge", "mapped by huge pages"),
    "present": Ink("#6cb9ee", "A", "anonymous", "anonymous"),
    "file": Ink("#1c9c6c", "F", "file or shared", "of files, or shared"),
    "zero": Ink("#b9b9b9", "Z", "zero page", "the zero page"),
    "swapped": Ink("#e8751a", "S", "swapped", "swapped"),
    "guard": Ink("#3a3a3a", "G", "guard pages", "guard pages"),
    "marker": Ink("#c76bb0", "M", "markers", "migrating, poisoned or marked"),
}
"""Inks by the state of a span, in the order of the legend."""

_PALEST = 0.4


def main_state(sums: Sums) -> str:
    """Return the most frequent state in a block."""
    return max(sums, key=lambda state: sums[state])


def tinted(color: str, share: float) -> str:
    """Return a color that is paler for a smaller share; the smallest is still visible."""
    strength = _PALEST + (1 - _PALEST) * min(1.0, share)
    parts = (int(color[index : index + 2], 16) for index in (1, 3, 5))
    return "#" + "".join(f"{round(255 - (255 - part) * strength):02x}" for part in parts)
