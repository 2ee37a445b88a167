"""The open pagemap of a task, which is walked in steps."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

from iobmd import host
from iobmd._native import mman
from iobmd._native import pagemap as native
from iobmd._native.pagemap import AHEAD, Tally, Walk
from iobmd.errors import NotPrivilegedError
from iobmd.host.fact import scratch
from iobmd.host.pages import has_swap, hugetlb_sizes
from iobmd.pagemap.file import PagemapFile, no_entries
from iobmd.task import diagnosis
from iobmd.task.task import kernel_task
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, round_down, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd.task.task import Task


class Reader:
    """The pagemap of a task, read in steps that each block the task for a tenth of a millisecond.

    A step after huge pages may take four times as long.

    Parameters
    ----------
    task : Task
        The task to read.
    whole : bool
        Whether no range that is read begins or ends inside a huge page. Parts of huge pages are recognized only if it
        is False, at a higher cost.

    Attributes
    ----------
    page : int
        Page size in bytes.
    reach : int
        Maximum size of the address range that is read ahead, in bytes.
    visible : bool
        Whether the kernel shows frame numbers (CAP_SYS_ADMIN).
    scans : bool
        Whether PAGEMAP_SCAN is available (Linux 6.7). Without it, huge pages are not recognized here.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound`, `kIOReturnUnsupported` (a kernel thread),
        `kIOReturnNoResources`.
    """

    def __init__(self, task: Task, *, whole: bool = True) -> None:
        self.task = task
        self.page = PAGE_SIZE
        self.reach = AHEAD * self.page
        self._opened = PagemapFile(task)
        self.visible, zero = _zero_frame()
        self.scans = _has_scan(self._opened.fd)
        huge, huge_zero = _smallest_huge_page(), 0 if self.scans else _huge_zero_frame()
        thorough = not (whole and self.visible)
        self._walk = Walk(self._opened.fd, self.page, huge, zero, huge_zero, thorough, self.scans)
        self._walk.swapless = not (self.visible or has_swap())

    def total(self, start: int, end: int) -> Tally:
        """Return the tally of the pages between two addresses. Raises as `steps`."""
        return self.totals([(start, end)])[0]

    def totals(self, ranges: list[tuple[int, int]]) -> list[Tally]:
        """Return the tally of each of several ranges, read together as far as possible. Raises as `steps`."""
        try:
            return self._walk.totals(ranges)
        except OSError:
            raise no_entries(self.task, ranges[0][0], ranges[-1][1]) from None

    def has_small_pages(self, start: int, end: int, size: int) -> bool:
        """Return whether at least `size` bytes between two addresses are mapped page by page."""
        if end - start < size:
            return False
        if not self.scans:  # huge pages are not recognized
            tally = self.total(start, end)
            return tally.present - tally.huge >= size
        try:
            present, huge = native.PAGE_IS_PRESENT, native.PAGE_IS_HUGE
            return native.amount(self._opened.fd, start, end, present, huge, size) >= size
        except OSError:
            raise no_entries(self.task, start, end) from None

    def read_ahead(self, ranges: list[tuple[int, int]]) -> None:
        """Read the pages of several small ranges at once, before they are walked by `steps`."""
        self._walk.read_ahead(ranges)

    def steps(self, start: int, end: int) -> Iterator[Walk]:
        """Walk from `start` to `end`; yield after each step, with its spans.

        Raises
        ------
        IOReturnError
            `kIOReturnNotFound`: the task exited during the walk. `kIOReturnBadArgument`: the address space ends
            before `end`.
        """
        start, end = round_down(start, self.page), round_up(end, self.page)
        while start < end:
            self._walk.clear()
            try:
                start = self._walk.step(start, end)
                if start >= end:
                    self._walk.finish()
            except OSError:
                raise no_entries(self.task, start, end) from None
            yield self._walk

    def keep_within(self, low: int, high: int) -> None:
        """Limit `steps` to spans that overlap the physical addresses `low`…`high`."""
        self._walk.within(low, high)

    def require_task(self) -> None:
        """Raise `kIOReturnNotFound` if the memory no longer exists; lists of areas then end early, without error."""
        if not os.pread(self._opened.fd, 8, 0):
            raise no_entries(self.task, 0, self.page)

    def collect(self) -> Tally:
        """Return the tally of the pages walked since the last call."""
        return self._walk.collect()

    def close(self) -> None:
        """Close the pagemap."""
        self._opened.__exit__()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def require_frames() -> None:
    """Raise `kIOReturnNotPrivileged` if frame numbers are hidden."""
    try:
        visible = host.pfns_visible()
    except OSError as error:
        raise diagnosis.own_pagemap(error) from None
    if not visible:
        message = f"frame numbers are hidden from this process: {host.capability_remedy().splitlines()[0]}"
        raise NotPrivilegedError(message)


def _zero_frame() -> tuple[bool, int]:
    """Return whether frame numbers are visible, and the frame number of the zero page, 0 if unknown."""
    frames = _frames_after_read(PAGE_SIZE)
    return bool(frames and frames[0]), frames[0] or 0 if frames else 0


def _huge_zero_frame() -> int:
    """Return the first frame number of the huge zero page, 0 if it is unknown or not used."""
    frames = _frames_after_read(HUGE_PAGE_SIZE)
    # If the small zero page is used, it is mapped at every address.
    return frames[0] if frames and frames[0] and frames[0] != frames[-1] else 0


def _frames_after_read(size: int) -> list[int | None]:
    """Return the frame numbers of new memory that was only read."""
    try:
        with scratch(size) as mapping, PagemapFile(kernel_task) as descriptor:
            if size > PAGE_SIZE:
                mman.advise(mapping.address, size, mman.MADV_HUGEPAGE)
            mapping.read(0, 1)
            entries = native.read_entries(descriptor.fd, mapping.address // PAGE_SIZE, size // PAGE_SIZE)
            return [entry[2] for entry in entries]
    except OSError:
        return []


def _has_scan(fd: int) -> bool:
    try:
        native.scan(fd, 0, PAGE_SIZE, native.PAGE_IS_PRESENT, 0)
    except OSError:
        return False
    return True


def _smallest_huge_page() -> int:
    return next(iter(hugetlb_sizes()), 0) or HUGE_PAGE_SIZE
