"""Segments for a device's scatter/gather list, cut from runs."""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from iobmd.pagemap.span import Run


class Segment(NamedTuple):
    """Bytes that a device can reach in one piece."""

    physical: int
    length: int


def segments(runs: Iterable[Run], max_segment: int | None = None, boundary: int | None = None) -> Iterator[Segment]:
    """Cut runs to what a device takes in one segment.

    Parameters
    ----------
    runs
        As `pagemap.runs` yields them.
    max_segment : int, optional
        The most bytes of a segment.
    boundary : int, optional
        A power of two: no segment crosses a multiple of it.

    Raises
    ------
    ValueError
        A limit is not positive, or the boundary not a power of two.
    """
    if max_segment is not None and index(max_segment) <= 0:
        raise ValueError(f"a segment of at most {max_segment} bytes holds nothing")
    if boundary is not None and (index(boundary) <= 0 or boundary & (boundary - 1)):
        raise ValueError(f"the boundary {boundary} is not a power of two")
    return _cut(runs, max_segment, boundary)


def _cut(runs: Iterable[Run], most: int | None, boundary: int | None) -> Iterator[Segment]:
    for run in runs:
        yield from cut(run.physical, run.length, most, boundary)


def cut(at: int, length: int, most: int | None, boundary: int | None, alignment: int = 1) -> Iterator[Segment]:
    """Cut one piece of physical memory; as `segments`, without its checks.

    No segment is longer than `most` or crosses a multiple of `boundary`. Where `at` is a multiple of `alignment`, and
    neither limit is below it, every segment starts at one.
    """
    end = at + length
    while at < end:
        stop = min(end, at + most) if most else end
        if boundary:
            stop = min(stop, at - at % boundary + boundary)
        if stop < end and stop - stop % alignment > at:
            stop -= stop % alignment
        yield Segment(at, stop - at)
        at = stop
