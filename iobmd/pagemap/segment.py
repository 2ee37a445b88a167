"""Segments for the scatter/gather list of a device, split from runs."""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from iobmd.pagemap.span import Run


class Segment(NamedTuple):
    """Physically contiguous bytes that a device can access as one segment."""

    physical: int
    """The physical address."""
    length: int
    """The length in bytes."""


def segments(runs: Iterable[Run], max_segment: int | None = None, boundary: int | None = None) -> Iterator[Segment]:
    """Split runs to the limits of a device.

    Parameters
    ----------
    runs
        The runs, as yielded by `pagemap.runs`.
    max_segment : int, optional
        Maximum size of a segment in bytes.
    boundary : int, optional
        A power of two: no segment crosses a multiple of it.

    Raises
    ------
    ValueError
        A limit is not positive, or the boundary is not a power of two.
    """
    if max_segment is not None and index(max_segment) <= 0:
        raise ValueError(f"max_segment {max_segment} is not positive")
    if boundary is not None and (index(boundary) <= 0 or boundary & (boundary - 1)):
        raise ValueError(f"the boundary {boundary} is not a power of two")
    return _cut(runs, max_segment, boundary)


def _cut(runs: Iterable[Run], most: int | None, boundary: int | None) -> Iterator[Segment]:
    for run in runs:
        yield from cut(run.physical, run.length, most, boundary)


def cut(
    at: int, length: int, most: int | None, boundary: int | None, alignment: int = 1, unit: int = 1
) -> Iterator[Segment]:
    """Split one range of physical memory, like `segments`, without its checks.

    No segment is longer than `most` or crosses a multiple of `boundary`. Unless these limits prevent it, every
    segment but the first starts at a multiple of `alignment`, and every length but the last is a multiple of `unit`.
    """
    end = at + length
    while at < end:
        stop = min(end, at + most) if most else end
        if boundary:
            stop = min(stop, at - at % boundary + boundary)
        if stop < end and (stop - at) % unit < stop - at:
            stop -= (stop - at) % unit
        if stop < end and stop - stop % alignment > at:
            stop -= stop % alignment
        yield Segment(at, stop - at)
        at = stop
