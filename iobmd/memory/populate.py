"""Populating new memory with zeroed pages, on all processors if it is large."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import TYPE_CHECKING

from iobmd._internal import chunked
from iobmd._native import mman
from iobmd.errors import NoMemoryError
from iobmd.host import headroom, zoneinfo
from iobmd.memory import numa
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size

if TYPE_CHECKING:
    from iobmd._internal.chunked import Progress

_COLLAPSED = 32 << 20
"""Bytes of a request for huge pages: each waits for all processors (lru_add_drain_all)."""

LARGE = 64 << 20
"""Bytes from which free memory is counted repeatedly: for less memory, counting takes longer than it can save."""

_CHECK_INTERVAL = 0.05  # seconds between two checks of free memory, which take 0.1 ms


def populate(address: int, size: int, huge: int = HUGE_PAGE_SIZE, *, collapse: bool = False) -> None:
    """Fault in a range of this process for writing (MADV_POPULATE_WRITE, Linux 5.14; mlock before that).

    Parameters
    ----------
    address, size : int
        Whole pages, in bytes.
    huge : int
        Size of the huge pages that may be used.
    collapse : bool
        Whether the memory has no huge pages unless they are requested: that of a memfd.

    Raises
    ------
    IOReturnError
        `kIOReturnNoMemory`.
    """

    def work(offset: int, length: int) -> tuple[int, int]:
        return mman.populate(address + offset, length, huge, PAGE_SIZE, collapse)

    cuts = range(0, size, _COLLAPSED) if collapse else None
    _finish(address, size, chunked.run(work, size, cuts=cuts, most_threads=_processors()))


def populate_anonymous(address: int, size: int, *, swappable: bool, progress: Progress | None = None) -> None:
    """Fault in new private memory with huge pages while the kernel has free ones, and with small pages then.

    If MADV_HUGEPAGE applies and no huge page is free, the kernel compacts memory in each page fault: 2 GiB in
    fragmented memory took 18 s, and 3 s in small pages. Chunks for which no huge pages are free are therefore advised
    against them.

    Parameters
    ----------
    address, size : int
        Whole pages, in bytes.
    swappable : bool
        Whether they may be swapped out afterwards.
    progress : callable, optional
        Called repeatedly in this thread with the number of bytes populated so far.

    Raises
    ------
    IOReturnError
        `kIOReturnNoMemory`: also if other processes have used the remaining memory of the host or of a cgroup.
    """
    advise = mman.advise
    if size >= HUGE_PAGE_SIZE:
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages is only slower
            advise(address, size, mman.MADV_HUGEPAGE)
    if size < LARGE:
        populate(address, size)
        if progress:
            progress(size)
        return
    # Parts whose first pages come after the advice on them could not become one area again: each would have its own
    # anon_vma. With one page before, all have the same.
    mman.populate(address, PAGE_SIZE, HUGE_PAGE_SIZE, PAGE_SIZE)
    supply = _FreeHugePages()

    def work(offset: int, length: int) -> tuple[int, int]:
        if not supply.covers(length):
            with contextlib.suppress(OSError):
                advise(address + offset, length, mman.MADV_NOHUGEPAGE)
        return mman.populate(address + offset, length, HUGE_PAGE_SIZE, PAGE_SIZE)

    checked = time.monotonic()

    def report(done: int) -> None:
        nonlocal checked
        if time.monotonic() - checked > _CHECK_INTERVAL:
            headroom.require(size - done, swappable=swappable)
            checked = time.monotonic()
        if progress:
            progress(done)

    try:
        _finish(address, size, chunked.run(work, size, report, most_threads=_processors()))
    finally:
        if supply.was_short:  # the parts with other advice become one area again
            with contextlib.suppress(OSError):
                advise(address, size, mman.MADV_HUGEPAGE)


class _FreeHugePages:
    """The free memory in huge pages, counted again when half of it may be in use.

    Threads share it without a lock: a race only changes which chunks use huge pages.
    """

    def __init__(self) -> None:
        self._left = 0
        self._margin = self._watermark()
        self.was_short = False

    def covers(self, size: int) -> bool:
        """Return whether `size` more bytes of huge pages are free."""
        if self._left < size:
            self._left = (zoneinfo.free_in_blocks(HUGE_PAGE_SIZE, numa.wanted()) - self._margin) // 2
        self._left -= size
        enough = self._left >= 0
        self.was_short |= not enough
        return enough

    @staticmethod
    def _watermark() -> int:
        """Return the free memory that no huge page comes from: the watermarks, and about as much in low zones."""
        try:
            return 2 * sum(zone.high for zone in zoneinfo.zones())
        except OSError:  # hidden in this container
            return 0


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _finish(address: int, size: int, outcome: tuple[int, int]) -> None:
    done, number = outcome
    if number == errno.EINVAL:
        _by_locking(address, size)
    elif number:
        raise _no_memory(size, done, number)


def _by_locking(address: int, size: int) -> None:
    try:
        mman.lock(address, size)
        mman.unlock(address, size)
    except OSError as error:
        raise _no_memory(size, 0, error.errno or 0) from None


def _no_memory(size: int, done: int, number: int) -> NoMemoryError:
    message = f"the kernel has no memory for {format_size(size)}: only {format_size(done)} could be populated"
    return NoMemoryError(message, number)
