"""Restoring lazily freed memory, in windows no larger than the limit on locked memory.

Each window is locked on fault, so that nothing is reclaimed from then on, inspected, made dirty, which cancels the
lazy free, and unlocked. No bytes of the user serve as a marker. A lost page is distinguished from a present one, even
if it was read or written to since, as follows:

- where writes are tracked (userfaultfd, Linux 6.7) by PAGEMAP_SCAN: it is absent, the zero page, or written to;
- otherwise by smaps: present pages are clean, because MADV_FREE made them so; absent and zero pages do not count, and
  pages that were written to are dirty. With swap, a page that was written to can be clean again, so that only pages
  that smaps counts as lazily freed are considered present; the kernel omits some pages, and then intact memory is
  considered lost.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial

from iobmd import host, procfs
from iobmd._internal import process_local
from iobmd._native import crosstask, mman
from iobmd.errors import IOReturnError, NoMemoryError, NoResourcesError, UnsupportedError
from iobmd.host.fact import scratch
from iobmd.memory.mlock import cannot_lock
from iobmd.pagemap.self import own_pagemap
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size, round_up

Range = tuple[int, int]
"""Start and end address, whole pages."""

_Look = Callable[[int, int], bool]
"""Inspects a window, given its start and end address; raises `_LockError`."""

_TRIES = 100  # of a millisecond each, while other threads use up the limit on locked memory
_alone = process_local.Guard()  # two adjacent windows would be merged to one area in smaps


class _LockError(Exception):
    """A window cannot be locked."""

    def __init__(self, number: int) -> None:
        self.number = number


def restore_all(ranges: list[Range], tracker: int) -> bool:
    """Restore ranges if every page is present. Restored ranges are removed from the list, also on an error.

    Parameters
    ----------
    ranges
        The lazily freed ranges.
    tracker
        The userfaultfd that tracks writes to them, -1 if there is none.

    Returns
    -------
    bool
        Whether every page was present. If not, some ranges may have been restored.

    Raises
    ------
    IOReturnError
        `kIOReturnCannotWire`: not even a page may be locked. `kIOReturnNoMemory`.
    """
    if tracker < 0:
        with _alone:
            return _each(ranges, partial(_by_smaps, rewrite=True))
    return _each(ranges, partial(_restore_tracked, tracker, own_pagemap()))


def all_there(ranges: list[Range], tracker: int) -> bool:
    """Return whether every page was present at the start of the call, without changes. Parameters as above."""
    if tracker < 0:
        with _alone:
            return _each(ranges.copy(), partial(_by_smaps, rewrite=False))
    descriptor = own_pagemap()
    return all(mman.first_lost(descriptor, start, end) is None for start, end in ranges)


def _each(ranges: list[Range], look: _Look) -> bool:
    largest, tries = 1 << 62, _TRIES
    while ranges:
        start, end = ranges[-1]
        window = min(largest, end - start)
        try:
            if not look(start, start + window):
                return False
        except _LockError as error:
            tries -= window <= PAGE_SIZE
            if error.number == errno.EPERM or not tries:
                raise cannot_lock(window, OSError(error.number, "mlock2")) from None
            if window <= PAGE_SIZE:
                time.sleep(0.001)
            largest = max(PAGE_SIZE, round_up(window // 2, PAGE_SIZE))
            continue
        if start + window < end:
            ranges[-1] = start + window, end
            largest *= 2  # other threads may have unlocked memory
        else:
            ranges.pop()
    return True


def _restore_tracked(tracker: int, pagemap: int, start: int, end: int) -> bool:
    there, step, number = mman.restore(tracker, pagemap, start, end)
    if step == mman.LOCKING:
        raise _LockError(number)
    if step:
        message = f"cannot restore {format_size(end - start)} of volatile memory: the kernel has no memory for it"
        raise NoMemoryError(message, number)
    return there


def _by_smaps(start: int, end: int, *, rewrite: bool) -> bool:
    size = end - start
    try:
        mman.advise(
            start, size, mman.MADV_RANDOM
        )  # a flag that adjacent areas lack, so that smaps lists the window separately
        if locking_dirties():
            return _patiently_clean(start, end) and (not rewrite or _is_safe_once_locked(start, end))
        with _locked(start, size):
            there = _patiently_clean(start, end)
            if there and rewrite:
                # Not by MADV_POPULATE_WRITE, which marks a whole huge page dirty, including pages of later windows.
                mman.rewrite(start, size, PAGE_SIZE)
            return there
    except IOReturnError:
        raise
    except OSError as error:
        message = f"cannot inspect volatile memory: {error}"
        raise NoResourcesError(message, error.errno or 0) from None
    finally:
        mman.advise(start, size, mman.MADV_NORMAL)


@contextlib.contextmanager
def _locked(start: int, size: int) -> Iterator[None]:
    try:
        mman.lock_on_fault(start, size)
    except OSError as error:
        raise _LockError(error.errno or errno.ENOMEM) from None
    try:
        yield
    finally:
        mman.unlock(start, size)


@functools.cache
def locking_dirties() -> bool:
    """Return whether mlock2 marks the pages that it finds as written to, as before Linux 5.18.

    In that case the inspection precedes the lock, which cancels the lazy free of present pages and faults in nothing,
    so that pages that were lost in between are absent. Only a page that was lost in between, and that another thread
    wrote to at the same time, would be considered intact.
    """
    with scratch(PAGE_SIZE) as area:
        area.write(0, b"\1")
        mman.advise(area.address, PAGE_SIZE, mman.MADV_RANDOM)
        mman.advise(area.address, PAGE_SIZE, mman.MADV_FREE)
        end = area.address + PAGE_SIZE
        before = _bytes_of(area.address, end, "Private_Dirty")
        with _locked(area.address, PAGE_SIZE):
            return before < _bytes_of(area.address, end, "Private_Dirty")


def _is_safe_once_locked(start: int, end: int) -> bool:
    with _locked(start, end - start):
        if _bytes_of(start, end, "Anonymous") < end - start:  # absent, or the zero page
            return False
        mman.rewrite(start, end - start, PAGE_SIZE)
        return True


def _patiently_clean(start: int, end: int) -> bool:
    """Inspect again if pages are absent: a migrating page is soon present again, a lost one is not.

    Some kernels (6.1) do not count a huge page that NUMA balancing has made inaccessible; reading a byte of each page
    ends that. The read maps the zero page for a lost page, which does not count either.
    """
    for pause in (*[0.002] * 5, 0):
        if _clean(start, end):
            return True
        crosstask.touch(os.getpid(), -1, start, end - start, HUGE_PAGE_SIZE)
        time.sleep(pause)
    return False


def _clean(start: int, end: int) -> bool:
    names = ("LazyFree",) if host.swap_areas() else ("Private_Clean", "Shared_Clean")
    return _bytes_of(start, end, *names) == end - start


def _bytes_of(start: int, end: int, *names: str) -> int:
    """Return the sum of counters of smaps in a window."""
    inside = [(area, counters) for area, counters in procfs.smaps() if start <= area.start and area.end <= end]
    if sum(area.end - area.start for area, _counters in inside) != end - start:
        message = f"smaps does not list {start:#x}…{end:#x} separately from adjacent memory"
        raise UnsupportedError(message)
    return sum(counters[name] for _area, counters in inside for name in names)
