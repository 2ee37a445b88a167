"""ELF core files of a snapshot, as the kernel writes them for a process that crashes (core(5))."""

from __future__ import annotations

import errno
import fcntl
import io
import mmap
import os
import stat
import struct
import time
from contextlib import ExitStack
from functools import partial
from itertools import accumulate, islice
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from iobmd import procfs
from iobmd._internal import chunked, pidns
from iobmd._internal.arguments import check_integers
from iobmd._internal.atomic_file import replacing
from iobmd._native import crosstask
from iobmd._native.crosstask import HeldBuffer
from iobmd._native.tracer import ELF_MACHINE
from iobmd.errors import BadArgumentError
from iobmd.remote import core_notes
from iobmd.remote.core_summary import CoreSummary
from iobmd.task import extents
from iobmd.task.job import TIMEOUT
from iobmd.units import PAGE_SIZE, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from iobmd.remote.task_snapshot import Snapshot

    CoreProgress = Callable[[int, int], None]
    """Called with the bytes of memory that have been written, and their total."""
    Fetch = Callable[[int, int, int], object]

_HEADER, _SEGMENT, _SECTION = 64, 56, 64  # bytes of an ELF header, a program header and a section header
_CORE, _NOTE, _LOAD = 4, 4, 1
_MOST_SEGMENTS = 0xFFFF
"""From this number on, the section header contains the number of segments (PN_XNUM)."""
_GAP = 32 << 10
"""Bytes of absent pages between two present ones that are written rather than skipped, which takes two calls."""
_ANON_PRIVATE, _ANON_SHARED, _MAPPED_PRIVATE, _MAPPED_SHARED, _ELF_HEADERS, _HUGE_PRIVATE, _HUGE_SHARED = range(7)
"""Bits of /proc/PID/coredump_filter."""
_DELETED = " (deleted)"
_VDSO = "[vdso]"
"""Memory of the kernel: a snapshot's page table does not contain its pages until they are read."""
_FILES = ("pagemap", "mem")
_ZEROS = bytes(_GAP)
_BATCH = 4096
"""Pieces that are prepared at once: up to 16 GiB."""


class _Area(NamedTuple):
    """An area, and the part of it that is written."""

    vma: procfs.VMA
    size: int
    """Bytes from its start: all, its first page, or nothing."""
    is_shared: bool

    @property
    def is_anonymous(self) -> bool:
        """Whether it is private memory whose absent pages are zero."""
        return not (self.is_shared or self.vma.inode or self.vma.name == _VDSO)


class _Part(NamedTuple):
    """Consecutive pages of an area that are written. Most of them exist."""

    area: _Area
    start: int
    size: int
    offset: int
    """In the file."""

    def pieces(self) -> Iterator[_Part]:
        """Divide it into pieces of at most `chunked.PIECE` bytes, which are read and written as a whole."""
        for done in range(0, self.size, chunked.PIECE):
            size = min(self.size - done, chunked.PIECE)
            yield self._replace(start=self.start + done, size=size, offset=self.offset + done)


def write(
    snapshot: Snapshot,
    fetch: Fetch,
    threads: list[core_notes.Registers],
    state: core_notes.ProcessState | None,
    file: str | Path | BinaryIO,
    progress: CoreProgress | None,
    dump_filter: int | None,
) -> CoreSummary:
    """Write a core file; other parameters and errors are those of `Snapshot.core`.

    Parameters
    ----------
    fetch : callable
        Copies memory of the snapshot from an address to one of this process, whether or not the snapshot contains all
        of it. The third argument is the size in bytes. Unreadable bytes are zero.
    """
    if dump_filter is not None:
        check_integers(filter=dump_filter)
        if not 0 <= dump_filter < 1 << 9:
            raise BadArgumentError(f"filter {dump_filter:#x} has bits other than those of coredump_filter (core(5))")
    if isinstance(file, (str, os.PathLike)):
        with replacing(file, 0o600) as opened:
            return _Core(snapshot, fetch, threads, state, dump_filter).write(opened, progress)
    return _Core(snapshot, fetch, threads, state, dump_filter).write(file, progress)


class _Core:
    """A core file in preparation."""

    def __init__(
        self,
        snapshot: Snapshot,
        fetch: Fetch,
        threads: list[core_notes.Registers],
        state: core_notes.ProcessState | None,
        dump_filter: int | None,
    ) -> None:
        self._begin = time.monotonic()
        self._snapshot = snapshot
        self._fetch = fetch
        self._threads = threads
        folder = pidns.directory(snapshot.pid)
        if dump_filter is None:
            with open(f"{folder}/coredump_filter") as file:  # noqa: PTH123 (of /proc)
                dump_filter = int(file.read() or "0", 16)  # empty if the snapshot was killed, see below
        self._filter = dump_filter
        lacking = {one.start for one in snapshot.missing if one.why in ("wipeonfork", "ring")}
        supplied = {one.start for one in snapshot.missing if one.why == "userfaultfd"}
        self._omitted = sum(one.end - one.start for one in snapshot.missing if one.why in ("dontfork", "wipeonfork"))
        self._areas: list[_Area] = []
        files = []
        for area, counters, flags in procfs.details(snapshot.pid):
            if area.start >= procfs.USER_END:  # [vsyscall], which is not memory
                continue
            size = 0 if area.start in lacking else self._wanted(area, counters, flags)
            whole = _Area(area, size, "sh" in flags)
            if area.inode:
                files.append(area)
            if area.start in supplied:
                self._areas += self._divided(whole)
                continue
            here = sum(counters.get(name, 0) for name in ("Rss", "Swap", "Private_Hugetlb", "Shared_Hugetlb"))
            if not size and not flags & {"io", "pf"}:
                self._omitted += here
            self._areas.append(whole)
        if not self._areas:
            snapshot.areas()  # raises the reason
        self._notes = core_notes.notes(snapshot.task, snapshot.pid, state or core_notes.UNKNOWN, threads, files)

    def _divided(self, area: _Area) -> Iterator[_Area]:
        """Divide an area at the pages that are absent, whose contents only the task's fault handler has.

        Debuggers report the memory of a segment without contents as inaccessible. Zeros would look like contents.
        """
        vma, at = area.vma, area.vma.start
        end = at + area.size
        absent = extents.outline(self._snapshot.pid, at, area.size, TIMEOUT) or ()
        for start, stop in (*absent, (end, vma.end)):
            if start > at:
                yield area._replace(vma=vma._replace(start=at, end=start), size=start - at)
            if stop > start:
                yield area._replace(vma=vma._replace(start=start, end=stop), size=0)
                self._omitted += stop - start
            at = stop

    def _wanted(self, area: procfs.VMA, counters: dict[str, int], flags: frozenset[str]) -> int:
        """Return the bytes of an area to write, as the kernel decides it (vma_dump_size() in fs/coredump.c)."""
        size = area.end - area.start
        if area.name == _VDSO:
            return size
        if flags & {"dd", "io", "pf"}:
            return 0
        is_shared = "sh" in flags
        if "ht" in flags:
            return size if self._has(_HUGE_SHARED if is_shared else _HUGE_PRIVATE) else 0
        if is_shared:
            return size if self._has(_ANON_SHARED if area.name.endswith(_DELETED) else _MAPPED_SHARED) else 0
        has_pages = counters.get("Anonymous", 0) or counters.get("Swap", 0)
        if (has_pages and self._has(_ANON_PRIVATE)) or (area.inode and self._has(_MAPPED_PRIVATE)):
            return size
        return PAGE_SIZE * (self._has(_ELF_HEADERS) and self._is_header(area))

    def _is_header(self, area: procfs.VMA) -> bool:
        """Return whether an area is the start of a program or library."""
        if not area.inode or area.offset or "r" not in area.perms:
            return False
        data = bytearray(4)
        with HeldBuffer(data, True) as held:
            self._fetch(area.start, held.address, 4)
        return "x" in area.perms or data == b"\x7fELF"

    def _has(self, bit: int) -> bool:
        return bool(self._filter >> bit & 1)

    def write(self, file: BinaryIO, progress: CoreProgress | None) -> CoreSummary:
        head, size = self._head()
        sink = _Sink(file, size)
        sink.put(0, head)
        with ExitStack() as opened:
            reader = _Reader(self._snapshot, self._fetch, opened)
            parts = list(self._parts(reader, round_up(len(head), PAGE_SIZE)))
            written = reader.copy(parts, sink, progress)
        sink.end()
        seconds = time.monotonic() - self._begin
        return CoreSummary(
            size, written, self._omitted, len(self._areas), len(self._threads), self._snapshot.stopped_ns, seconds
        )

    def _head(self) -> tuple[bytes, int]:
        """Return the headers and notes, and the size of the file."""
        count = len(self._areas) + 1
        has_more = count >= _MOST_SEGMENTS
        notes = _HEADER + _SEGMENT * count + _SECTION * has_more
        at = round_up(notes + len(self._notes), PAGE_SIZE)
        sections = _HEADER + _SEGMENT * count if has_more else 0
        header = struct.pack(
            "=4s5B7xHHIQQQIHHHHHH",
            b"\x7fELF", 2, 1, 1, 0, 0, _CORE, ELF_MACHINE, 1, 0, _HEADER, sections, 0,
            _HEADER, _SEGMENT, min(count, _MOST_SEGMENTS), _SECTION if has_more else 0, int(has_more), 0,
        )  # fmt: skip
        parts = [header, _segment(_NOTE, 0, notes, 0, len(self._notes), 0, 4)]
        for area in self._areas:
            vma = area.vma
            access = sum(bit for letter, bit in (("r", 4), ("w", 2), ("x", 1)) if letter in vma.perms)
            parts.append(_segment(_LOAD, access, at, vma.start, area.size, vma.end - vma.start, PAGE_SIZE))
            at += area.size
        if has_more:
            parts.append(struct.pack("=IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, count, 0, 0))
        return b"".join([*parts, self._notes]), at

    def _parts(self, reader: _Reader, offset: int) -> Iterator[_Part]:
        """Divide the memory to write into parts, ascending, without the pages that are absent."""
        for area in self._areas:
            start = area.vma.start
            if area.size:
                for low, high in _combined(reader.existing(area)):
                    yield _Part(area, low, high - low, offset + low - start)
            offset += area.size


def _segment(kind: int, access: int, offset: int, address: int, size: int, length: int, alignment: int) -> bytes:
    return struct.pack("=IIQQQQQQ", kind, access, offset, address, 0, size, length, alignment)


def _combined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Combine neighbouring ranges, up to about `chunked.PIECE` bytes."""
    start = end = 0
    for low, high in ranges:
        if end and (low - end > _GAP or high - start > chunked.PIECE):
            yield start, end
            end = 0
        if not end:
            start = low
        end = high
    if end:
        yield start, end


class _Reader:
    """Reads the memory of a snapshot."""

    def __init__(self, snapshot: Snapshot, fetch: Fetch, opened: ExitStack) -> None:
        self._snapshot = snapshot
        self._fetch = fetch
        folder = pidns.directory(snapshot.pid)
        self._pagemap, self._memory = (os.open(f"{folder}/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in _FILES)
        opened.callback(os.close, self._pagemap)
        opened.callback(os.close, self._memory)
        self._buffers: list[mmap.mmap] = []
        self._failure: BaseException | None = None

    def existing(self, area: _Area) -> Iterable[tuple[int, int]]:
        """Return the ranges of an area to read. Absent pages of private anonymous memory are zero."""
        start, end = area.vma.start, area.vma.start + area.size
        if not area.is_anonymous:
            return [(start, end)]
        return crosstask.absent(self._pagemap, start, area.size, PAGE_SIZE).outside(start, end)

    def copy(self, parts: list[_Part], sink: _Sink, progress: CoreProgress | None) -> int:
        """Copy parts to a file; return the number of their bytes."""
        total, written = sum(part.size for part in parts), 0
        pieces = (piece for part in parts for piece in part.pieces())
        # Not all at once: a task can map a sparse file as large as its address space.
        while batch := list(islice(pieces, _BATCH)):
            report = partial(_report, progress, written, total) if progress else None
            written += self._copy_batch(batch, sink, report)
        return total

    def _copy_batch(self, batch: list[_Part], sink: _Sink, report: Callable[[int], None] | None) -> int:
        starts = [0, *accumulate(piece.size for piece in batch)]
        size = starts.pop()
        by_offset = dict(zip(starts, batch, strict=True))

        def work(offset: int, size: int) -> tuple[int, int]:
            try:
                self._copy(by_offset[offset], sink)
            except BaseException as error:  # of a helping thread too
                self._failure = self._failure or error
                return 0, 1
            return size, 0

        # Files that are written in order are written by this thread alone.
        chunked.run(work, size, report, starts, chunked.MOST_THREADS if sink.is_seekable else 1)
        if self._failure:
            raise self._failure
        return size

    def _copy(self, piece: _Part, sink: _Sink) -> None:
        """Copy a piece to the file, without the pages that are absent, or zero in shared memory."""
        buffer = self._buffers.pop() if self._buffers else mmap.mmap(-1, chunked.PIECE)
        with HeldBuffer(buffer, True) as held, memoryview(buffer) as view:
            if piece.area.is_anonymous:
                holes = self._present(piece, held.address)
            else:
                self._fetch(piece.start, held.address, piece.size)
                holes = _zeros(view[: piece.size]) if piece.area.is_shared else []
            for start, end in _without(holes, piece.size):
                with view[start:end] as part:
                    sink.put(piece.offset + start, part)
        self._buffers.append(buffer)

    def _present(self, piece: _Part, destination: int) -> list[tuple[int, int]]:
        """Read the present pages of a piece; return the offsets of the others, which are zero."""
        snapshot = self._snapshot
        # Only this file shows memory that the task itself may not read; see also `Transfer.by_file`.
        reached, error, absent, bad = crosstask.transfer(
            snapshot.pid, self._memory, self._pagemap, snapshot.pidfd, False, True, piece.start, destination,
            piece.size, PAGE_SIZE,
        )  # fmt: skip
        if error or reached < piece.start + piece.size or not snapshot.is_open:
            snapshot.read(piece.start, PAGE_SIZE)  # raises the reason
            raise OSError(error, f"{os.strerror(error)}: memory of the snapshot at {reached:#x}")
        holes = sorted((low - piece.start, high - piece.start) for low, high in (*absent, *bad))
        for low, high in holes:
            crosstask.zero(destination + low, high - low)
        return holes


def _report(progress: CoreProgress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _zeros(view: memoryview) -> list[tuple[int, int]]:
    """Return the zero parts of memory, in whole multiples of `_GAP`."""
    return [(at, at + _GAP) for at in range(0, len(view) - _GAP + 1, _GAP) if view[at : at + _GAP] == _ZEROS]


def _without(holes: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """Iterate over the ranges between holes that are not shorter than `_GAP`."""
    start = 0
    for low, high in holes:
        if high - low >= _GAP:
            if low > start:
                yield start, low
            start = high
    if start < size:
        yield start, size


class _Sink:
    """The file: regular files get holes, and are written to by several threads; others get zeros, in order."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._at = 0
        self._fd = _regular(file)
        self.is_seekable = self._fd >= 0
        self._base = file.tell() if self.is_seekable else 0
        if self.is_seekable:
            file.flush()
            if os.fstat(self._fd).st_size > self._base:
                os.ftruncate(self._fd, self._base)  # its old bytes would be in the holes

    def put(self, offset: int, data: bytes | memoryview) -> None:
        """Write data at an offset of the core file."""
        if not self.is_seekable:
            self._skip(offset)
            self._write(data)
            return
        at = self._base + offset
        with memoryview(data) as rest:
            done = 0
            while done < len(rest):
                done += os.pwrite(self._fd, rest[done:], at + done)

    def _skip(self, offset: int) -> None:
        while self._at < offset:
            self._write(_ZEROS[: offset - self._at])

    def _write(self, data: bytes | memoryview) -> None:
        with memoryview(data) as rest:
            done = 0
            while done < len(rest):  # an unbuffered file may write less
                done += self._written(rest[done:])
        self._at += len(data)

    def _written(self, data: memoryview) -> int:
        """Write to the file; return how many bytes it has accepted."""
        count: int | None = self._file.write(data)
        if count is None and not isinstance(self._file, io.RawIOBase):  # such as a file of paramiko (SFTP)
            return len(data)
        if not count or count < 0:
            raise BlockingIOError(errno.EAGAIN, f"the file accepts no bytes now: write returned {count}")
        return count

    def end(self) -> None:
        """Write the hole at the end."""
        if self.is_seekable:
            if os.fstat(self._fd).st_size < self._base + self._size:
                os.ftruncate(self._fd, self._base + self._size)
            self._file.seek(self._base + self._size)
        else:
            self._skip(self._size)
            self._file.flush()


def _regular(file: BinaryIO) -> int:
    """Return the descriptor of a regular file that can be written to at any offset; -1 for other objects."""
    try:
        fd = file.fileno()
    except (AttributeError, OSError):
        return -1
    is_regular = stat.S_ISREG(os.fstat(fd).st_mode) and not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
    return fd if is_regular else -1
