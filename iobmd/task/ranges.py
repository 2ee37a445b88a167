"""Lists of ranges of addresses, or of offsets in a file."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Range = tuple[int, int]
"""Start and end."""


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Return ranges in ascending order, with overlapping and adjacent ones joined."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and found[-1][1] >= start:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def behind(ranges: Sequence[Range], size: int) -> list[Range]:
    """Return the ranges without their first `size` bytes."""
    for index, (start, end) in enumerate(ranges):
        if size < end - start:
            return [(start + size, end), *ranges[index + 1 :]]
        size -= end - start
    return []


def part(ranges: Sequence[Range], starts: Sequence[int], offset: int, size: int) -> list[Range]:
    """Return the parts with the bytes `offset`…`offset + size` of the ranges; `starts`: the offset of each range."""
    found = []
    index = bisect_right(starts, offset) - 1
    while size:
        start, end = ranges[index]
        start += offset - starts[index]
        end = min(end, start + size)
        found.append((start, end))
        offset += end - start
        size -= end - start
        index += 1
    return found
