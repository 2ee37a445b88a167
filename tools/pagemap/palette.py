"""The representation of page states in pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .grid import Sums


class Ink(NamedTuple):
    """A state of pages in a picture."""

    color: str
    terminal: str
    """One of the 16 colors of terminals; they differ between states."""
    letter: str
    """The letter if there are no colors."""
    word: str
    meaning: str
    is_memory: bool
    """Whether the pages occupy memory or swap space of the process."""


INKS = {
    # Distinguishable without red or green vision (after Okabe and Ito), on white and on black.
    "huge": Ink("#2f6fd0", "bright_blue", "H", "huge", "in huge pages", True),
    "present": Ink("#6cb9ee", "bright_cyan", "A", "anonymous", "anonymous", True),
    "file": Ink("#1c9c6c", "green", "F", "file", "of files", True),
    "shmem": Ink("#a6d96a", "bright_green", "T", "shmem", "shared memory and tmpfs", True),
    "swapped": Ink("#e8751a", "yellow", "S", "swapped", "swapped", True),
    "zero": Ink("#b4b4b4", "white", "Z", "zero page", "the zero page", False),
    "guard": Ink("#6b6b6b", "bright_black", "G", "guard pages", "guard pages", False),
    "marker": Ink("#c76bb0", "magenta", "M", "markers", "migrating, poisoned or marked", False),
    "device": Ink("#b79b00", "red", "D", "device", "device memory", False),
}
"""Inks by the state of pages, in the order of the legend."""


def main_state(sums: Sums) -> str:
    """Return the most frequent state in a block."""
    return max(sums, key=lambda state: sums[state])
