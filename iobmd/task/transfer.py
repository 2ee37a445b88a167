"""Transfers between this process and another: the choice of system calls, chunks and threads.

First the present pages of the task are transferred, according to its pagemap: a small range by one process_vm_readv
or process_vm_writev call, a large one in chunks (`iobmd._internal.chunked`) on several threads, because faulting in
and clearing the destination costs more than the copy and can be done in parallel. Pagemap is read once to determine
chunks with equal numbers of pages, and again, for a thousand pages at a time, directly before their transfer: the
task may have freed pages in between, and a read would create them again. Pages that the task shares since a fork are
read through /proc/PID/mem (`iobmd.task.shared_pages`). Then the absent pages are read from their sources
(`iobmd.task.extents`), so that the task has no more pages than before. Pages that only a page fault can supply are
left to a child process that can be killed (`iobmd.task.attempt`). If the calls are refused or missing (a seccomp
profile), /proc/PID/mem is used for all pages.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
from bisect import bisect_right
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd._internal import chunked, pidns
from iobmd._internal.arguments import check_timeout
from iobmd._native import crosstask, mman
from iobmd.errors import NO_DESCRIPTOR
from iobmd.host import headroom
from iobmd.task import attempt, clearing, extents
from iobmd.task.extents import Absent, Origin
from iobmd.task.job import WOULD_WAIT, Outcome, Transfer
from iobmd.task.ranges import behind, joined, part
from iobmd.task.shared_pages import SharedPages, open_memory
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, round_down

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from iobmd._native.crosstask import Ranges
    from iobmd.task.attempt import File
    from iobmd.task.ranges import Range

QUICK = 64 << 10
"""Maximum number of bytes for `move_present`."""

_MOST_MARKED = 1024  # separate huge page ranges of the destination: each uses two mappings of vm.max_map_count
_WINDOW = 16 << 20  # bytes whose present pages one child transfers, which another child has determined before
_CALL_REFUSED = (errno.EPERM, errno.ENOSYS)


def number_of(error: OSError) -> int:
    """Return the error number for a task whose /proc files cannot be opened; without a directory it has exited.

    Raises an error without a number again: a signal handler has raised it (TimeoutError), not a system call.
    """
    if error.errno is None:
        raise error
    return errno.ESRCH if error.errno == errno.ENOENT else error.errno or errno.EACCES


def move_present(
    pid: int, pidfd: int, theirs: int, ours: int, size: int, *, write: bool = False, fresh: bool = False
) -> int:
    """Transfer at most `QUICK` bytes by one native call, if all their pages are present.

    Returns
    -------
    int
        The error number: 0 if all bytes were transferred, `EFAULT` if nothing is mapped at the first byte; in both
        cases the task has not exited since. For any other number, use `move`.
    """
    found = pidns.found_before(pid)
    if found is None or (pidfd < 0 and pid != os.getpid()):
        return errno.EAGAIN
    return crosstask.move_present(*found, pid, pidfd, write, fresh, theirs, ours, size, PAGE_SIZE)


def move(job: Transfer) -> Outcome:
    """Transfer bytes between a task and this process. Raises as `extents.absent`."""
    check_timeout(job.timeout)
    attempt.require_unlocked(job.pid, job.patience)
    try:
        pagemap = os.open(f"{pidns.directory(job.pid)}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if job.pid != os.getpid():
            return Outcome(0, number_of(error))
        pagemap = -1  # it is not dumpable, or /proc is missing: all pages count as present
    run = _Run(job, pagemap)
    try:
        outcome = run.all()
        if pagemap >= 0 and not run.holds_memory():
            return Outcome(outcome.done, errno.ESRCH)
        return outcome
    finally:
        run.close()


class _Run:
    """A transfer in progress."""

    def __init__(self, job: Transfer, pagemap: int) -> None:
        self._job = job
        self._pagemap = pagemap
        self._memory = -1  # its /proc/PID/mem, if the calls are refused
        self._awaited = -1  # the same for the children that wait
        self._absent: list[Ranges] = []
        self._unread: list[Range] = []
        self._left_zero = False
        # A thread of this process can hold its lock only while it waits for others, as any program can.
        self.is_bounded = job.timeout is not None and pagemap >= 0 and job.pid != os.getpid()
        self._shared = SharedPages(job, pagemap, is_bounded=self.is_bounded)

    def close(self) -> None:
        self._shared.close()
        for descriptor in (self._memory, self._awaited, self._pagemap):
            if descriptor >= 0:
                os.close(descriptor)

    def all(self) -> Outcome:
        job = self._job
        if job.by_file:
            done, error = self._by_file()
        elif self.is_bounded:
            done, error = self._present_by_children()
            if error == errno.ETIMEDOUT:
                raise attempt.locked(f"task {job.pid}", job.patience)
        else:
            done, error = self._by_calls()
        if error in _CALL_REFUSED:  # also after absent pages, for which no call was made
            done, error = self._through_memory_file()
        # If that failed, absent pages below the failed address may be unobtainable as well.
        reached = job.theirs + done
        absent = crosstask.Ranges.joined(self._absent, reached)
        if absent:
            reached, error = self._fetch(absent, reached, error)
        return Outcome(reached - job.theirs, error, joined(self._unread), self._left_zero)

    def _by_calls(self) -> tuple[int, int]:
        job = self._job
        if job.size <= chunked.PIECE:
            return self._present(0, job.size)
        return chunked.run(self._present, job.size, job.progress, self._cuts())

    def _by_file(self) -> tuple[int, int]:
        """Like `_by_calls`, through /proc/PID/mem, as far as the protections permit, which it ignores."""
        job = self._job
        try:
            self._memory = open_memory(job)
            is_readable = all("r" in area.perms for area in procfs.areas(job.pid, job.theirs, job.end))
        except OSError as error:
            return 0, number_of(error)
        return self._by_calls() if is_readable else self._through_memory_file()

    def _cuts(self) -> list[int] | None:
        """Return the bounds of chunks with equal numbers of pages, and permit huge pages in the destination."""
        job = self._job
        if job.write or self._pagemap < 0:
            return None
        absent = job.outline or crosstask.absent(self._pagemap, job.theirs, job.size, PAGE_SIZE)
        present = absent.outside(job.theirs, job.end)
        # Not chunk by chunk, because each of these calls blocks the page faults of other threads.
        self._permit_huge_pages(present, _MOST_MARKED)
        return present.cuts(job.theirs, chunked.PIECE, HUGE_PAGE_SIZE)

    def _permit_huge_pages(self, present: Ranges, most: int) -> None:
        """Permit huge pages in a sparse destination where the task has all pages, in at most this many ranges."""
        job = self._job
        for start, end in present.whole(job.theirs, job.ours, job.huge)[:most] if job.sparse and job.huge else ():
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages
                mman.advise(start, end - start, mman.MADV_HUGEPAGE)

    def _present(self, offset: int, size: int) -> tuple[int, int]:
        """Transfer the present pages of a chunk, and record the absent ones."""
        job = self._job
        memory, readable = self._shared.access if self._memory < 0 else (self._memory, None)
        reached, error, absent, unread = crosstask.transfer(
            job.pid, memory, self._pagemap, job.pidfd, job.write, job.skip,
            job.theirs + offset, job.ours + offset, size, PAGE_SIZE, job.huge, readable,
        )  # fmt: skip
        if absent:
            self._absent.append(absent)
        if unread:
            self._unread += unread
            self._clear(unread)
        done = reached - job.theirs - offset
        if error != crosstask.NEEDS_FILE:
            return done, error
        self._shared.prepare()
        more, error = self._present(offset + done, size - done)  # which does not end in this way again
        return done + more, error

    def _present_by_children(self) -> tuple[int, int]:
        """Like `_present`, for all of it: this thread makes no call that the lock of the address space can stop."""
        job = self._job
        at = job.theirs
        while at < job.end:
            entries, error = attempt.entries(self._pagemap, at, min(at + _WINDOW, job.end), job.patience)
            end = min(round_down(at, PAGE_SIZE) + len(entries) // 8 * PAGE_SIZE, job.end)
            if not entries:  # past the end of all address spaces, or the memory is gone
                gone = error == errno.EFAULT and not self.holds_memory()
                return at - job.theirs, errno.ESRCH if gone else error
            present, swapped, absent, shared = crosstask.by_kind(entries, at, end, job.write, PAGE_SIZE)
            if absent:
                self._absent.append(absent)
            if present:
                self._permit_huge_pages(present, _MOST_MARKED * _WINDOW // max(job.size, _WINDOW))
                reached, error = self._present_by_child(present, shared=shared)
                if swapped and job.pidfd >= 0 and not job.write:
                    attempt.page_out(job.pidfd, list(swapped), job.patience)
                if error:
                    return reached - job.theirs, error
            if job.progress:
                job.progress(end - job.theirs)
            at = end
        return job.size, 0

    def _present_by_child(self, present: Ranges, *, shared: bool) -> tuple[int, int]:
        if not shared or self._memory >= 0:
            return self._attempted(Absent(present, Origin.FAULT))
        self._shared.prepare()
        for pages, memory in self._shared.divide(present):
            reached, error = self._attempted(Absent(pages, Origin.FAULT), memory)
            if error:
                return reached, error
        return self._job.end, 0

    def holds_memory(self) -> bool:
        """Return whether the address space of the open pagemap still exists (if not, reads return 0 bytes)."""
        if self.is_bounded:
            entries, error = attempt.entries(self._pagemap, 0, PAGE_SIZE, self._job.patience)
            if error not in (*attempt.NO_CHILD, *NO_DESCRIPTOR):
                return bool(entries)
        try:  # for lack of a child, this thread waits instead, without a limit
            return bool(os.pread(self._pagemap, 8, 0))
        except OSError:
            return False

    def _present_behind(self, first: int, offset: int, size: int) -> tuple[int, int]:
        return self._present(first + offset, size)

    def _through_memory_file(self) -> tuple[int, int]:
        """Transfer through /proc/PID/mem, which ignores page protections, as far as the protections permit."""
        job = self._job
        self._absent.clear()
        self._unread.clear()
        try:
            if self._memory < 0:
                self._memory = open_memory(job)
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
        """Transfer absent pages; return the lowest address that was not transferred, and the error number."""
        job = self._job
        small = not job.resident_only and ranges.size <= extents.SMALL
        files = extents.Files(job.pid, job.patience, may_wait=not job.resident_only, is_bounded=self.is_bounded)
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
        if self.is_bounded or absent.waits or absent.origin in (Origin.FILE, Origin.FAULT):
            return self._attempted(absent)
        for start, end in absent.ranges:
            reached, error = self._faulting(start, end)
            if error:
                return reached, error
        return job.end, 0

    def _faulting(self, start: int, end: int) -> Range:
        """Transfer a range by faulting in absent pages; return the address that was reached, and the error number."""
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
            first, last = self._job.here(start), self._job.here(end)
            if self._job.sparse:
                first = clearing.discard(first, last)
            clearing.clear(first, last - first)

    def _unreadable(self, ranges: Sequence[Range]) -> tuple[int, int]:
        if self._job.skip:
            self._unread += ranges
            self._clear(ranges)
        return ranges[0][0], errno.EFAULT

    def _from_object(self, absent: Absent, file: File) -> tuple[int, int]:
        """Read from a file of an in-memory file system, on several threads if it is large."""
        job = self._job
        ranges = list(absent.ranges)
        starts = [0, *itertools.accumulate(end - start for start, end in ranges)]
        ends = attempt.Ends(job.theirs, job.ours, write=False, shift=absent.shift)
        holes = absent.page == PAGE_SIZE  # hugetlbfs has no SEEK_DATA
        self._left_zero |= job.fresh
        failed: list[Range] = []

        def work(offset: int, size: int) -> tuple[int, int]:
            done = 0
            left = part(ranges, starts, offset, size)
            while left:
                batch = left[: crosstask.MOST_RANGES]
                moved, error = attempt.read(ends, file, batch, job.patience, fresh=job.fresh, holes=holes)
                left = behind(left, moved)
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

    def _attempted(self, absent: Absent, memory: int = -1) -> tuple[int, int]:
        """Transfer pages that another program may have to supply, or shared pages through `memory`."""
        job = self._job
        if absent.file and not job.write:
            ends = attempt.Ends(job.theirs, job.ours, write=False, file=absent.file, shift=absent.shift)
        else:
            ends = attempt.Ends(
                job.theirs, job.ours, job.write, job.pid, job.pidfd, self._memory if memory < 0 else memory
            )
        left: Sequence[Range] = list(absent.ranges)
        while left:
            moved, error = attempt.move(ends, left, job.patience)
            left = behind(left, moved)
            if not left:
                break
            at, until = left[0]
            if error == errno.EFAULT and memory >= 0:
                # The page has disappeared since. The call waits for a new one, or returns the reason.
                until = min(until, round_down(at, PAGE_SIZE) + PAGE_SIZE)
                stopped, error = self._attempted(Absent(crosstask.Ranges([(at, until)]), Origin.FAULT))
                if error:
                    return stopped, error
                left = behind(left, until - at)
                continue
            if error == errno.EPERM and not ends.file and ends.memory < 0:
                ends = ends._replace(memory=self._awaited_memory())
                continue
            if error in attempt.NO_CHILD:
                # This thread waits instead, without a limit.
                until, error = self._faulting(at, until)
                if error:
                    return until, error
            elif error == errno.EFAULT and job.skip:
                until = min(until, round_down(at, PAGE_SIZE) + PAGE_SIZE)
                self._unreadable([(at, until)])
            else:
                return at, error
            left = behind(left, until - at)
        return job.end, 0

    def _awaited_memory(self) -> int:
        # Yama permits a process, but not its children, to read from its descendants, and only checks when the file is
        # opened (Documentation/admin-guide/LSM/Yama.rst).
        if self._awaited < 0:
            self._awaited = open_memory(self._job)
        return self._awaited
