"""Moving bytes between this process and another: which call, in what pieces, on how many threads.

First the pages that the task has are moved, as its pagemap shows them: by one process_vm_readv or process_vm_writev
while it is little, and in pieces (`iobmd._internal.chunked`) handed to several threads when it is much, because
faulting in and clearing the destination costs more than the copy itself and runs on every processor. Where the pages
are is looked at once to cut the pieces, so that each has as many of them, and once more, a thousand pages at a time,
right before they are moved: by then a task may have returned some, and a read would make them again. Then the absent
ones are read from where their bytes are (`iobmd.task.extents`), so that a task has no more pages afterwards than
before. What only a page fault can answer is left to a child process that can be killed (`iobmd.task.attempt`). Where
the calls are refused or missing (a seccomp profile), /proc/PID/mem stands in.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd._internal import chunked, pidns
from iobmd._native import crosstask, mman
from iobmd.host import headroom
from iobmd.task import attempt, extents
from iobmd.task.extents import Origin
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, round_down

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from iobmd._native.crosstask import Ranges
    from iobmd.task.attempt import File, Range
    from iobmd.task.extents import Absent

TIMEOUT = 10.0
"""Seconds for which a transfer waits for another program before it gives up, unless the caller says otherwise."""

WOULD_WAIT = errno.EDEADLK
"""The error number of a transfer that may not wait for another program and would have to."""

QUICK = 64 << 10
"""Bytes that `move_present` moves."""

_MOST_MARKED = 1024  # separate ranges of the destination for huge pages: each costs two of vm.max_map_count
_CALL_REFUSED = (errno.EPERM, errno.ENOSYS)


class Transfer(NamedTuple):
    """What is to be moved.

    Attributes
    ----------
    pid, pidfd
        The task, and its pidfd or -1. Bytes go to no other task that has the number by now: the pidfd is looked at
        right before each call.
    theirs, ours, size
        The address there, the address here, and the size in bytes.
    write
        From here into the task, instead of from the task to here.
    huge
        Size of the huge pages that the destination may get; 0 when it is not fresh.
    fresh
        The destination is zero: where the source is absent and zero, it is not touched.
    sparse
        The destination is to stay as sparse as the source: of its ranges only those that are copied whole are given
        MADV_HUGEPAGE.
    skip
        Go on behind what cannot be read, and set it to zero.
    resident_only
        Wait for no other program: the task stands still, and may be the one to wait for.
    timeout
        Seconds to wait for another program that delivers nothing.
    progress
        Called in this thread, now and then, with the number of bytes moved so far.
    outline
        What of it was absent a while ago, where that is known already: it says how to divide the work, no more.
    """

    pid: int
    pidfd: int
    theirs: int
    ours: int
    size: int
    write: bool = False
    huge: int = 0
    fresh: bool = False
    sparse: bool = False
    skip: bool = False
    resident_only: bool = False
    timeout: float = TIMEOUT
    progress: chunked.Progress | None = None
    outline: Ranges | None = None

    @property
    def end(self) -> int:
        """The address in the task where it ends."""
        return self.theirs + self.size

    def here(self, address: int) -> int:
        """Return the address here that stands for one in the task."""
        return self.ours + address - self.theirs


class Outcome(NamedTuple):
    """How a transfer ended."""

    done: int
    """Bytes moved from the start, without a gap."""
    error: int
    """The error number that ended it, 0 when all are. `ESRCH` also stands for memory that went away midway, by exit
    or by exec; `ETIMEDOUT` for another program that delivers nothing; `WOULD_WAIT`."""
    unread: Sequence[Range] = ()
    """Addresses in the task that could not be read, ascending (`Transfer.skip`)."""
    left_zero: bool = False
    """Part of a fresh destination was left untouched."""


def number_of(error: OSError) -> int:
    """Return the error number for a task whose files in /proc cannot be opened; without a directory it is gone."""
    return errno.ESRCH if error.errno == errno.ENOENT else error.errno or errno.EACCES


def move_present(
    pid: int, pidfd: int, theirs: int, ours: int, size: int, *, write: bool = False, fresh: bool = False
) -> int:
    """Move at most `QUICK` bytes by one native call, if all of their pages are present.

    Returns
    -------
    int
        The error number: 0 if all was moved, `EFAULT` if nothing is mapped at the first byte, both of a task that
        has not exited since. Anything else: `move` may do it.
    """
    found = pidns.found_before(pid)
    if found is None or (pidfd < 0 and pid != os.getpid()):
        return errno.EAGAIN
    return crosstask.move_present(*found, pid, pidfd, write, fresh, theirs, ours, size, PAGE_SIZE)


def move(job: Transfer) -> Outcome:
    """Move bytes between a task and this process. Raises as `extents.absent`."""
    try:
        pagemap = os.open(f"{pidns.directory(job.pid)}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if job.pid != os.getpid():
            return Outcome(0, number_of(error))
        pagemap = -1  # it is not dumpable, or /proc is missing: all counts as present
    run = _Run(job, pagemap)
    try:
        outcome = run.all()
        if pagemap >= 0 and not _holds_memory(pagemap):
            return Outcome(outcome.done, errno.ESRCH)
        return outcome
    finally:
        run.close()


class _Run:
    """One transfer under way."""

    def __init__(self, job: Transfer, pagemap: int) -> None:
        self._job = job
        self._pagemap = pagemap
        self._memory = -1  # its /proc/PID/mem in place of the calls that are refused
        self._awaited = -1  # and for the children that wait
        self._absent: list[Ranges] = []
        self._unread: list[Range] = []
        self._left_zero = False

    def close(self) -> None:
        for descriptor in (self._memory, self._awaited, self._pagemap):
            if descriptor >= 0:
                os.close(descriptor)

    def all(self) -> Outcome:
        job = self._job
        if job.size <= chunked.PIECE:
            done, error = self._present(0, job.size)
        else:
            done, error = chunked.run(self._present, job.size, job.progress, self._cuts())
        if error in _CALL_REFUSED:  # also behind absent pages, for which nothing was called
            done, error = self._through_memory_file()
        # Below the place where that failed, if it did, bytes of absent pages may not be obtainable either.
        reached = job.theirs + done
        absent = crosstask.Ranges.joined(self._absent, reached)
        if absent:
            reached, error = self._fetch(absent, reached, error)
        return Outcome(reached - job.theirs, error, joined(self._unread), self._left_zero)

    def _cuts(self) -> list[int] | None:
        """Return where to cut it for pieces with as many pages each, and allow the destination its huge pages."""
        job = self._job
        if job.write or self._pagemap < 0:
            return None
        absent = job.outline or crosstask.absent(self._pagemap, job.theirs, job.size, PAGE_SIZE)
        present = absent.outside(job.theirs, job.end)
        if job.sparse and job.huge:
            # Not piece by piece: each of these calls keeps the page faults of other threads waiting.
            for start, end in present.whole(job.theirs, job.ours, job.huge)[:_MOST_MARKED]:
                with contextlib.suppress(OSError):  # a kernel without transparent huge pages
                    mman.advise(start, end - start, mman.MADV_HUGEPAGE)
        return present.cuts(job.theirs, chunked.PIECE, HUGE_PAGE_SIZE)

    def _present(self, offset: int, size: int) -> tuple[int, int]:
        """Move what is present of a piece, and list what is absent."""
        job = self._job
        reached, error, absent, unread = crosstask.transfer(
            job.pid, self._memory, self._pagemap, job.pidfd, job.write, job.skip,
            job.theirs + offset, job.ours + offset, size, PAGE_SIZE, job.huge,
        )  # fmt: skip
        if absent:
            self._absent.append(absent)
        if unread:
            self._unread += unread
            self._clear(unread)
        return reached - job.theirs - offset, error

    def _present_behind(self, first: int, offset: int, size: int) -> tuple[int, int]:
        return self._present(first + offset, size)

    def _through_memory_file(self) -> tuple[int, int]:
        """Move through /proc/PID/mem, within what the protections of pages allow, which it would ignore."""
        job = self._job
        self._absent.clear()
        self._unread.clear()
        try:
            self._memory = self._opened_memory()
            areas = list(procfs.areas(job.pid, job.theirs, job.end))
        except OSError as error:
            return 0, number_of(error)
        at = job.theirs
        for area in (area for area in areas if ("w" if job.write else "r") in area.perms):
            start, end = max(area.start, at), min(area.end, job.end)
            if start > at:
                self._absent.append(crosstask.Ranges([(at, start)]))
            first = start - job.theirs
            done, failure = chunked.run(functools.partial(self._present_behind, first), end - start)
            if failure:
                return first + done, failure
            at = end
        if at < job.end:
            self._absent.append(crosstask.Ranges([(at, job.end)]))
        return job.size, 0

    # --- absent pages

    def _fetch(self, ranges: Ranges, reached: int, error: int) -> tuple[int, int]:
        """Move absent pages; returns the lowest address that is not moved, and the error number."""
        job = self._job
        small = not job.resident_only and ranges.size <= extents.SMALL
        files = extents.Files(job.pid, job.timeout, may_wait=not job.resident_only)
        permission = "w" if job.write else "r"
        for absent in extents.absent(job.pid, ranges, files, permission=permission, small=small):
            stopped, failure = self._write(absent) if job.write else self._read(absent)
            if failure and not (job.skip and failure == errno.EFAULT):
                return stopped, failure
        return reached, error

    def _read(self, absent: Absent) -> tuple[int, int]:
        job = self._job
        if absent.origin is Origin.NOWHERE:
            return self._unreadable(list(absent.ranges))
        if absent.origin is Origin.ZERO:
            self._clear(absent.ranges)
            return job.end, 0
        if absent.waits and job.resident_only:
            return absent.ranges[0][0], WOULD_WAIT
        if absent.origin is Origin.SILENT:
            return absent.ranges[0][0], errno.ETIMEDOUT
        if absent.file and absent.origin is Origin.OBJECT:
            return self._from_object(absent, absent.file)
        return self._attempted(absent)

    def _write(self, absent: Absent) -> tuple[int, int]:
        job = self._job
        if absent.origin is Origin.NOWHERE:
            return absent.ranges[0][0], errno.EFAULT
        if absent.origin is Origin.SILENT:
            return absent.ranges[0][0], errno.ETIMEDOUT
        headroom.require(absent.ranges.size, swappable=True, pid=job.pid)
        if absent.waits or absent.origin in (Origin.FILE, Origin.FAULT):
            return self._attempted(absent)
        for start, end in absent.ranges:
            reached, error = self._faulting(start, end)
            if error:
                return reached, error
        return job.end, 0

    def _faulting(self, start: int, end: int) -> Range:
        """Move a range by faulting in what is absent; returns the address that was reached, and the error number."""
        job = self._job
        reached, error, *_ = crosstask.transfer(
            job.pid, self._memory, -1, job.pidfd, job.write, False, start, job.here(start), end - start, PAGE_SIZE
        )
        return reached, error

    def _clear(self, ranges: Iterable[Range]) -> None:
        if self._job.fresh:
            self._left_zero = True
            return
        for start, end in ranges:
            if end - start <= chunked.PIECE:
                crosstask.zero(self._job.here(start), end - start)
            else:  # ends on Ctrl-C
                chunked.run(functools.partial(_zero, self._job.here(start)), end - start)

    def _unreadable(self, ranges: Sequence[Range]) -> tuple[int, int]:
        if self._job.skip:
            self._unread += ranges
            self._clear(ranges)
        return ranges[0][0], errno.EFAULT

    def _from_object(self, absent: Absent, file: File) -> tuple[int, int]:
        """Read from a file of a memory file system, on several threads when it is much."""
        job = self._job
        ranges = list(absent.ranges)
        starts = [0, *itertools.accumulate(end - start for start, end in ranges)]
        ends = attempt.Ends(job.theirs, job.ours, write=False, shift=absent.shift)
        holes = absent.page == PAGE_SIZE  # hugetlbfs has no SEEK_DATA
        self._left_zero |= job.fresh
        failed: list[Range] = []

        def work(offset: int, size: int) -> tuple[int, int]:
            done = 0
            left = _part(ranges, starts, offset, size)
            while left:
                batch = left[: crosstask.MOST_RANGES]
                moved, error = attempt.read(ends, file, batch, job.timeout, fresh=job.fresh, holes=holes)
                left = attempt.behind(left, moved)
                done += moved
                if error == errno.EFAULT and job.skip and left:  # it was truncated
                    start, end = left.pop(0)
                    failed.append((start, end))
                    done += end - start
                elif error:
                    return done, error
            return done, 0

        done, error = chunked.run(work, starts[-1])
        if failed:
            self._unreadable(sorted(failed))
        if not error:
            return job.end, 0
        index = bisect_right(starts, done) - 1
        return ranges[index][0] + done - starts[index], error

    def _attempted(self, absent: Absent) -> tuple[int, int]:
        """Move what another program may have to deliver."""
        job = self._job
        if absent.file and not job.write:
            ends = attempt.Ends(job.theirs, job.ours, write=False, file=absent.file, shift=absent.shift)
        else:
            ends = attempt.Ends(job.theirs, job.ours, job.write, job.pid, job.pidfd, self._memory)
        left: Sequence[Range] = list(absent.ranges)
        while left:
            moved, error = attempt.move(ends, left, job.timeout)
            left = attempt.behind(left, moved)
            if not left:
                break
            at, until = left[0]
            if error == errno.EPERM and not ends.file and ends.memory < 0:
                ends = ends._replace(memory=self._awaited_memory())
                continue
            if error in attempt.NO_CHILD:
                # This thread waits, for as long as it takes.
                until, error = self._faulting(at, until)
                if error:
                    return until, error
            elif error == errno.EFAULT and job.skip:
                until = min(until, round_down(at, PAGE_SIZE) + PAGE_SIZE)
                self._unreadable([(at, until)])
            else:
                return at, error
            left = attempt.behind(left, until - at)
        return job.end, 0

    def _awaited_memory(self) -> int:
        # Yama lets a process read from its descendants, not a child of that process, and asks only as the file is
        # opened (Documentation/admin-guide/LSM/Yama.rst).
        if self._awaited < 0:
            self._awaited = self._opened_memory()
        return self._awaited

    def _opened_memory(self) -> int:
        flags = (os.O_RDWR if self._job.write else os.O_RDONLY) | os.O_CLOEXEC
        memory = os.open(f"{pidns.directory(self._job.pid)}/mem", flags)
        if crosstask.has_exited(self._job.pidfd):  # else it is the task's, whoever has the number later
            os.close(memory)
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        return memory


def _zero(ours: int, offset: int, size: int) -> tuple[int, int]:
    crosstask.zero(ours + offset, size)
    return size, 0


def _part(ranges: Sequence[Range], starts: Sequence[int], offset: int, size: int) -> list[Range]:
    """Return what of the ranges lies in `offset`…`offset + size` of their bytes, in which they begin at `starts`."""
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


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Return ranges in ascending order, and those as one that overlap or adjoin."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and found[-1][1] >= start:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def _holds_memory(pagemap: int) -> bool:
    """Say whether the address space behind an open pagemap is still in use (reads of it end at 0 if not)."""
    try:
        return bool(os.pread(pagemap, 8, 0))
    except OSError:
        return False
