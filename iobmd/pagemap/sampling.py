"""Which memory of a process is used: samples of it, taken at intervals.

A sampler (`tracker`, `referenced`, `damon`) reports which memory was used since the last sample; this module repeats
that, and evaluates the samples.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from iobmd import procfs
from iobmd._internal.arguments import check_integers, check_numbers
from iobmd.errors import BadArgumentError, IOReturnError, NotFoundError, UnsupportedError
from iobmd.pagemap.range import resolve
from iobmd.units import format_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from iobmd.pagemap.range import Target, Where
    from iobmd.procfs import VMA

SHORTEST = 0.05
"""Seconds of the shortest interval. In shorter ones most accesses would be missed: referenced bits of pages whose
translation the processor still caches (TLB) are set only after about a time slice."""


_LATEST = 2
"""Multiple of the requested time after which no other interval begins."""


class Method(StrEnum):
    """Ways to detect which memory is used."""

    ACCESSED = "accessed"
    """Reads and writes of each page: userfaultfd(2) with read-write protection (UFFD_FEATURE_RWP, Linux 7.3)."""
    WRITTEN = "written"
    """Writes to each page, not reads: userfaultfd(2) with write protection (UFFD_FEATURE_WP_ASYNC, Linux 6.7)."""
    DAMON = "damon"
    """Reads and writes of regions that the kernel adapts, each judged by samples of its pages (DAMON_VADDR)."""
    REFERENCED = "referenced"
    """Referenced bytes of each area: /proc/PID/clear_refs, and Referenced in smaps."""


class Unseen(NamedTuple):
    """Resident memory whose use a method cannot see."""

    what: str
    """The memory, and why its use is not seen."""
    size: int | None
    """In bytes; None if unknown."""


class Sample:
    """The memory that was used in one interval.

    Parameters
    ----------
    time : float
        Seconds from the beginning to the end of the interval.
    seconds : float
        The length of the interval.
    took : float
        Seconds that the sampling took.
    used : iterable of (int, int, int)
        Ranges, ascending and not overlapping: the start and end address, and how many bytes of it were used.
    """

    def __init__(self, time: float, seconds: float, took: float, used: Iterable[tuple[int, int, int]]) -> None:
        from array import array  # noqa: PLC0415 (not needed to allocate memory)

        self.time, self.seconds, self.took = time, seconds, took
        self._starts, self._ends, self._sums = array("Q"), array("Q"), array("Q", [0])
        for start, end, length in used:
            self._starts.append(start)
            self._ends.append(end)
            self._sums.append(self._sums[-1] + length)

    @property
    def used(self) -> int:
        """Bytes that were used."""
        return self._sums[-1]

    def used_in(self, start: int, end: int) -> int:
        """Return how many bytes between two addresses were used; in proportion, if they cut a range."""
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        if first >= last:
            return 0
        used = self._sums[last] - self._sums[first]
        for index, inside in ((first, start - self._starts[first]), (last - 1, self._ends[last - 1] - end)):
            if inside > 0:
                length = self._sums[index + 1] - self._sums[index]
                used -= length * inside // (self._ends[index] - self._starts[index])
        return used

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Iterate over the ranges, ascending."""
        return zip(self._starts, self._ends, strict=True)


class Part(NamedTuple):
    """The memory of an area whose use a method can see."""

    vma: VMA
    """The area."""
    resident: Sample
    """The resident ranges, at the end of the sampling."""


class Heat(NamedTuple):
    """Which memory of a process was used."""

    method: Method
    """How that was detected."""
    resolution: int | None
    """The smallest range that is distinguished, in bytes; None: an area, or a region that the kernel adapts."""
    samples: list[Sample]
    """The intervals."""
    parts: list[Part]
    """The memory that was observed, by area, ascending."""
    unseen: list[Unseen]
    """Other resident memory."""
    page_faults: int
    """Page faults of the process during this time."""
    has_ended: bool
    """Whether the process exited, or executed another program."""

    @property
    def resident(self) -> int:
        """Resident bytes that were observed."""
        return sum(part.resident.used for part in self.parts)

    @property
    def is_exact(self) -> bool:
        """Whether a sample shows which pages were used, not only how many."""
        return self.method != Method.REFERENCED

    def working_set(self, percentile: float) -> int:
        """Return a percentile (nearest rank) of the bytes used in an interval."""
        sizes = sorted(sample.used for sample in self.samples)
        return sizes[max(0, -(-int(percentile * len(sizes)) // 100) - 1)] if sizes else 0

    def counted(self) -> Iterator[tuple[int, int, int]]:
        """Iterate over the ranges that were used in any interval, ascending: start, end, and in how many intervals.

        Without `is_exact`, the ranges are areas in which any page was used.
        """
        edges: Counter[int] = Counter()
        for sample in self.samples:
            for start, end in sample.ranges():
                edges[start] += 1
                edges[end] -= 1
        count = start = 0
        for address in sorted(edges):
            if not edges[address]:
                continue
            if count:
                yield start, address, count
            count += edges[address]
            start = address

    def used_ever(self) -> Sample:
        """Return the memory that was used in any interval.

        Without `is_exact`, it is a lower bound: of each area the largest number of bytes used in one interval.
        """
        if self.is_exact:
            return _sample(_joined((start, end) for start, end, _count in self.counted()))
        most: dict[tuple[int, int], int] = {}
        for part in self.parts:
            bounds = part.vma.start, part.vma.end
            most[bounds] = max((sample.used_in(*bounds) for sample in self.samples), default=0)
        return Sample(0, 0, 0, ((start, end, used) for (start, end), used in most.items() if used))

    def by_frequency(self) -> dict[int, int]:
        """Return the resident bytes by the number of intervals in which they were used.

        Raises
        ------
        IOReturnError
            `kIOReturnUnsupported`: not `is_exact`.
        """
        if not self.is_exact:
            raise UnsupportedError(
                f"the method {self.method.value} shows how many pages of an area were used, not which: use another"
            )
        found: Counter[int] = Counter()
        counts = list(self.counted())
        ends = [end for _start, end, _count in counts]
        for part in self.parts:
            for low, high in part.resident.ranges():
                used = 0
                for index in range(bisect_right(ends, low), len(counts)):
                    start, end, count = counts[index]
                    if start >= high:
                        break
                    both = min(end, high) - max(start, low)
                    found[count] += both
                    used += both
                found[0] += high - low - used
        return dict(found)


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join adjacent ascending ranges."""
    low = high = 0
    for start, end in ranges:
        if start != high:
            if low < high:
                yield low, high
            low = start
        high = end
    if low < high:
        yield low, high


def _sample(ranges: Iterable[tuple[int, int]]) -> Sample:
    return Sample(0, 0, 0, ((start, end, end - start) for start, end in ranges))


def resident_part(vma: VMA, ranges: Iterable[tuple[int, int]]) -> Part:
    """Return the part of an area with these resident ranges, ascending."""
    return Part(vma, _sample(_joined(ranges)))


Chooses: TypeAlias = "Callable[[VMA], bool]"
"""Returns whether an area is sampled."""


def every_area(_vma: VMA) -> bool:
    """Choose each area."""
    return True


class Sampler(Protocol):
    """A method, in use for a task from `begin` to `close`. Its errors are IOReturnErrors."""

    method: Method
    resolution: int | None

    def begin(self) -> None:
        """Begin the first interval."""

    def sample(self) -> list[tuple[int, int, int]]:
        """End an interval, begin the next, and return what was used in it, as for `Sample`."""

    def parts(self) -> tuple[list[Part], list[Unseen]]:
        """Return the resident memory that this method sees, and what it does not see."""

    def close(self) -> None:
        """Undo all changes to the task."""


def check_interval(seconds: float, intervals: int) -> float:
    """Return the length of an interval in seconds; raise `kIOReturnBadArgument` if it is shorter than `SHORTEST`."""
    check_numbers(seconds=seconds)
    check_integers(intervals=intervals)
    if intervals < 1 or not 0 <= seconds < math.inf:
        raise BadArgumentError(f"{seconds} seconds cannot be divided into {intervals} intervals")
    interval = seconds / intervals
    if interval < SHORTEST:
        message = (
            f"intervals of {format_time(interval)} are shorter than {format_time(SHORTEST)}: sample for at least "
            f"{format_time(SHORTEST * intervals)}, or in fewer intervals"
        )
        raise BadArgumentError(message)
    return interval


def sampled(
    sampler: Sampler,
    target: Target,
    seconds: float,
    intervals: int,
    *,
    progress: Callable[[float], None] | None = None,
) -> Heat:
    """Sample a task, and close the sampler.

    Parameters
    ----------
    sampler : Sampler
        The method.
    target : Task, int, psutil.Process, a buffer or a map of iobmd, or anything with the buffer protocol
        What the sampler observes.
    seconds : float
        The duration of the sampling.
    intervals : int
        The number of intervals into which that is divided.
    progress : callable, optional
        Called after each interval, with the seconds since the beginning. If it raises KeyboardInterrupt, or one
        arrives, the sampling ends, and the result has the intervals until then.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: the intervals are too short. As the sampler; if the task exits after the first
        interval, the result has the intervals until then.
    """
    interval = check_interval(seconds, intervals)
    where = resolve(target)
    samples: list[Sample] = []
    try:
        found, ended = _intervals(sampler, where, interval, intervals, samples, progress)
        faults = found[2]
        return Heat(sampler.method, sampler.resolution, samples, found[0], found[1], faults, ended)
    finally:
        sampler.close()


def _intervals(
    sampler: Sampler,
    where: Where,
    interval: float,
    intervals: int,
    samples: list[Sample],
    progress: Callable[[float], None] | None,
) -> tuple[tuple[list[Part], list[Unseen], int], bool]:
    """Append the samples; return the parts and the unseen memory, the page faults, and whether the task has ended."""
    sampler.begin()
    begin = last = time.monotonic()
    before = _page_faults(where)
    parts, unseen = sampler.parts()
    faults = 0
    try:
        for number in range(intervals):
            time.sleep(max(0.0, begin + (number + 1) * interval - time.monotonic()))
            now = time.monotonic()
            used = sampler.sample()
            samples.append(Sample(now - begin, now - last, time.monotonic() - now, used))
            faults, last = _page_faults(where) - before, now
            if progress:
                progress(now - begin)
            if now - begin > _LATEST * interval * intervals:
                break  # reading takes longer than an interval
        parts, unseen = sampler.parts()
    except KeyboardInterrupt:
        if not samples:
            raise
        parts, unseen = sampler.parts()
    except NotFoundError:
        if not samples:
            raise
        return (parts, unseen, faults), True
    return (parts, unseen, faults), False


def _page_faults(where: Where) -> int:
    try:
        return procfs.page_faults(where.task.pid)
    except IOReturnError:
        raise
    except OSError:  # it has exited: sampling it reports that
        return 0
