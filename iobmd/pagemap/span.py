"""Spans of pages in one state, and physically contiguous runs of them."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from iobmd._native import pagemap
from iobmd.pagemap.range import Target, resolve
from iobmd.pagemap.reader import Reader, require_frames


class Span(NamedTuple):
    """Contiguous pages in one state, in contiguous page frames; all sizes in bytes."""

    virtual: int
    """The first virtual address."""
    length: int
    """The length."""
    physical: int | None
    """Physical address of the first page; None if it has none, or the kernel hides it. All zero pages share it."""
    flags: int
    """The state as bits of the native module; the properties below name them."""

    @property
    def end(self) -> int:
        """The end address."""
        return self.virtual + self.length

    @property
    def present(self) -> bool:
        """Whether its pages are mapped to page frames."""
        return bool(self.flags & pagemap.PRESENT)

    @property
    def swapped(self) -> bool:
        """Whether it is in swap."""
        return bool(self.flags & pagemap.SWAPPED)

    @property
    def file_or_shared(self) -> bool:
        """Whether its pages belong to a file or to shared memory; False: anonymous."""
        return bool(self.flags & pagemap.FILE)

    @property
    def zero(self) -> bool:
        """Whether it maps the kernel's zero page, as memory does that was only read."""
        return bool(self.flags & pagemap.ZERO)

    @property
    def guard(self) -> bool:
        """Whether its pages are guard pages (MADV_GUARD_INSTALL, Linux 6.13)."""
        return bool(self.flags & pagemap.GUARD)

    @property
    def marker(self) -> bool:
        """Whether it is neither memory nor swap: pages under migration, poisoned pages, userfaultfd markers."""
        return bool(self.flags & pagemap.MARKER)

    @property
    def huge(self) -> bool:
        """Whether huge pages map it in the page tables; split ones, and those smaller than a PMD, do not count."""
        return bool(self.flags & pagemap.HUGE)

    @property
    def state(self) -> str:
        """The state as one word: huge, present, file, zero, swapped, guard, marker."""
        return state_of(self.flags)


def state_of(flags: int) -> str:
    """Return the word for the flags of a span: the first that applies."""
    for flag, word in _STATES:
        if flags & flag:
            return word
    return "present"


_STATES = (
    (pagemap.SWAPPED, "swapped"),
    (pagemap.GUARD, "guard"),
    (pagemap.MARKER, "marker"),
    (pagemap.ZERO, "zero"),
    (pagemap.HUGE, "huge"),
    (pagemap.FILE, "file"),
)


class Run(NamedTuple):
    """Pages that are contiguous both virtually and physically; all sizes in bytes."""

    virtual: int
    """The first virtual address."""
    physical: int
    """The first physical address."""
    length: int
    """The length of both."""


def spans(target: Target, address: int | None = None, size: int | None = None) -> Iterator[Span]:
    """Iterate over the spans of an address space, ascending; addresses without a span are empty.

    Parameters
    ----------
    target : Task, int, psutil.Process, a buffer or a map of iobmd, or anything with the buffer protocol
        The task, or the buffer, whose memory is reported.
    address, size : int, optional
        A range of the task in bytes, extended to whole pages; by default all of it.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound` (also if the task exits during the iteration),
        `kIOReturnBadArgument`, `kIOReturnUnsupported` (a kernel thread), `kIOReturnBusy` (the task moves its memory
        to higher addresses faster than it is read; reading ends after twice the number of areas that it had shortly
        after the start).

    Notes
    -----
    The pagemap is read in steps (proc_pid_pagemap(5), PAGEMAP_SCAN), which use little memory however large the target
    is, and never block it for long. Concurrent changes are seen before or after the change.
    """
    where = resolve(target, address, size)
    with Reader(where.task, whole=where.cuts_no_huge_page) as reader:
        for start, end in where.ranges():
            for step in reader.steps(start, end):
                for index in range(len(step)):
                    virtual, physical, length, flags = step[index]
                    yield Span(virtual, length, physical or None, flags)
        reader.require_task()


def runs(target: Target, address: int | None = None, size: int | None = None) -> Iterator[Run]:
    """Iterate over the physically contiguous runs, ascending by virtual address.

    Absent pages belong to no run. Parameters, errors and notes as `spans`; also `kIOReturnNotPrivileged`: the kernel
    hides frame numbers (CAP_SYS_ADMIN).
    """
    where = resolve(target, address, size)
    require_frames()
    with Reader(where.task) as reader:
        yield from read_runs(reader, where.ranges())
        reader.require_task()


def read_runs(reader: Reader, ranges: Iterable[tuple[int, int]]) -> Iterator[Run]:
    """Iterate over the runs of ascending ranges; contiguous runs are also joined across adjacent ranges."""
    return _joined(_parts(reader, ranges))


def _parts(reader: Reader, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    for start, end in ranges:
        for step in reader.steps(start, end):
            for index in range(len(step)):
                virtual, physical, length, flags = step[index]
                if not physical:
                    continue
                if flags & pagemap.ZERO and not flags & pagemap.HUGE:  # the same frame repeatedly
                    for offset in range(0, length, reader.page):
                        yield virtual + offset, physical, reader.page
                else:
                    yield virtual, physical, length


def _joined(parts: Iterable[tuple[int, int, int]]) -> Iterator[Run]:
    """Join contiguous parts to runs; each part is (virtual, physical, length)."""
    start = frame = length = 0
    for virtual, physical, more in parts:
        if length and start + length == virtual and frame + length == physical:
            length += more
            continue
        if length:
            yield Run(start, frame, length)
        start, frame, length = virtual, physical, more
    if length:
        yield Run(start, frame, length)
