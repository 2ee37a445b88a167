"""Taking lazily freed memory back, in windows no larger than what may be locked.

Each window is locked on fault, so that reclaim takes nothing from there on, looked at, made dirty, which cancels the
lazy free, and unlocked. No bytes of the user's serve as a marker. How a page that was lost is told from one that is
there, even when it was read or written to since:

- where writes are tracked (userfaultfd, Linux 6.7) by PAGEMAP_SCAN: it is absent, the zero page, or written to;
- elsewhere by smaps: what is there is clean, for MADV_FREE made it so; what is absent or the zero page does not
  count, and what was written to is dirty. The lock makes a window an area of its own, which smaps tells from others.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from functools import partial

from iobmd import own, procfs
from iobmd._native import lazyfree, memory
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.units import PAGE_SIZE, format_size, round_up
from iobmd.wiring import cannot_lock

Range = tuple[int, int]
"""Start and end address, whole pages."""

_Look = Callable[[int, int], bool]
"""Looks at a window, from its start to its end address; raises OSError when it cannot be locked."""

_TRIES = 100  # of a millisecond each, where other threads hold all that may be locked
_alone = own.Locks()  # two windows of smaps that touch would be one area


def take_back(ranges: list[Range], tracker: int) -> bool:
    """Make ranges safe if every page is there. What is done leaves the list, also on an error.

    Parameters
    ----------
    ranges
        What is lazily freed.
    tracker
        The userfaultfd that tracks writes to it, -1: none does.

    Returns
    -------
    bool
        Whether all was there. Where not, some of it may have been made safe.

    Raises
    ------
    IOReturnError
        `kIOReturnCannotWire`: not even a page may be locked. `kIOReturnNoMemory`.
    """
    if tracker < 0:
        with _alone.here():
            return _each(ranges, _take_back_by_smaps)
    pagemap = own.pagemap()
    return _each(ranges, partial(_take_back_tracked, tracker, pagemap))


def all_there(ranges: list[Range], tracker: int) -> bool:
    """Say whether every page was there as the call began, and change nothing. Parameters and errors as above."""
    if tracker < 0:
        with _alone.here():
            return _each(ranges.copy(), _look_by_smaps)
    pagemap = own.pagemap()
    return all(lazyfree.first_lost(pagemap, start, end) is None for start, end in ranges)


def _each(ranges: list[Range], look: _Look) -> bool:
    largest, tries = 1 << 62, _TRIES
    while ranges:
        start, end = ranges[-1]
        window = min(largest, end - start)
        try:
            if not look(start, start + window):
                return False
        except OSError as error:
            if isinstance(error, IOReturnError):
                raise
            tries -= window <= PAGE_SIZE
            if error.errno == errno.EPERM or not tries:
                raise cannot_lock(window, error) from None
            if window <= PAGE_SIZE:
                time.sleep(0.001)
            largest = max(PAGE_SIZE, round_up(window // 2, PAGE_SIZE))
            continue
        if start + window < end:
            ranges[-1] = start + window, end
        else:
            ranges.pop()
    return True


def _take_back_tracked(tracker: int, pagemap: int, start: int, end: int) -> bool:
    there, step, number = lazyfree.take_back(tracker, pagemap, start, end)
    if step == lazyfree.LOCK:
        raise OSError(number, "mlock2")
    if step:
        message = f"cannot make {format_size(end - start)} of volatile memory safe: the kernel has no memory for it"
        raise IOReturnError(IOReturn.kIOReturnNoMemory, message, number)
    return there


def _take_back_by_smaps(start: int, end: int) -> bool:
    memory.lock_on_fault(start, end - start)
    try:
        if not _clean(start, end):
            return False
        # Not by MADV_POPULATE_WRITE: it marks a huge page dirty as a whole, with the pages of windows to come.
        lazyfree.rewrite(start, end - start, PAGE_SIZE)
        return True
    finally:
        memory.unlock(start, end - start)


def _look_by_smaps(start: int, end: int) -> bool:
    memory.lock_on_fault(start, end - start)
    try:
        return _clean(start, end)
    finally:
        memory.unlock(start, end - start)


def _clean(start: int, end: int) -> bool:
    inside = (counters for area, counters in procfs.smaps() if start <= area.start and area.end <= end)
    return sum(counters["Private_Clean"] + counters["Shared_Clean"] for counters in inside) == end - start
