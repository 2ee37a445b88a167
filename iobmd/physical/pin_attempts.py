"""Attempts to pin memory in the frames that a search has chosen.

Before the kernel pins pages for an unlimited time, it moves those of CMA and of ZONE_MOVABLE elsewhere (mm/gup.c,
FOLL_LONGTERM): the memory is then no longer contiguous, or not within its mask. It decides by page block, and no
interface shows the type of a block. Blocks are therefore remembered whose pages have moved, and later searches omit
them. Compaction moves pages too: if a search finds nothing, all are considered again.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, pages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from iobmd._native.pagemap import RunTable

TRIES = 4
"""Maximum number of attempts that fail without showing another block whose pages the kernel moves."""
_MOST = 64
"""Maximum number of attempts: one for each block of 2 MiB in 64 MiB of CMA, and those on a busy host."""
_moved: set[int] = set()
"""Numbers of the blocks, of the size of a huge page, whose pages the kernel has moved when they were pinned."""


class PinAttempts:
    """Iterates over the attempts to obtain one buffer."""

    def __init__(self) -> None:
        self.made = 0
        self._left = TRIES
        self._chosen: tuple[Sequence[int], int, int] = ((), PAGE_SIZE, 0)

    def __iter__(self) -> Iterator[None]:
        while self._left and self.made < _MOST:
            self.made += 1
            yield

    def expect(self, chosen: Sequence[int], block: int, size: int) -> None:
        """Record the first `size` bytes of blocks at physical addresses, which are to be pinned."""
        self._chosen = chosen, block, size

    def failed(self, runs: RunTable | None) -> None:
        """Remember the blocks that pages have left, given the runs of the pinned memory (None: hidden)."""
        known = len(_moved)
        if runs is not None:
            pinned = (runs[index] for index in range(runs.count))
            now = {frame for _, start, length in pinned for frame in range(start, start + length, PAGE_SIZE)}
            _moved.update(frame // HUGE_PAGE_SIZE for frame in self._frames() - now)
        self._left -= len(_moved) == known

    def _frames(self) -> set[int]:
        chosen, block, size = self._chosen
        frames = (frame for start in chosen for frame in range(start, start + block, PAGE_SIZE))
        return set(itertools.islice(frames, pages(size)))


def may_be_pinned(start: int, size: int) -> bool:
    """Return whether the kernel has not moved any page from the blocks of a physical range."""
    return _moved.isdisjoint(range(start // HUGE_PAGE_SIZE, (start + size - 1) // HUGE_PAGE_SIZE + 1))


def any_moved() -> bool:
    """Return whether blocks are known whose pages the kernel has moved."""
    return bool(_moved)


def forget() -> bool:
    """Consider all blocks again; return whether any were omitted."""
    omitted = bool(_moved)
    _moved.clear()
    return omitted
