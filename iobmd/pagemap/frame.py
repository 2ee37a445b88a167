"""Page frames: their properties (/proc/kpageflags, kpagecount, kpagecgroup), and the processes that map them."""

import contextlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Self

from iobmd import procfs
from iobmd._internal import pidns, relay
from iobmd._native import pagemap as native
from iobmd.errors import (
    BusyError,
    IOReturnError,
    NotFoundError,
    NotPermittedError,
    NotPrivilegedError,
    TaskTimeoutError,
    UnsupportedError,
)
from iobmd.host import cgroup, limits
from iobmd.pagemap.range import Target, name_of, resolve
from iobmd.pagemap.reader import Reader, require_frames
from iobmd.pagemap.span import Run, runs
from iobmd.task.task import Task, check_range
from iobmd.units import PAGE_SIZE

FLAGS = {
    0: "LOCKED", 1: "ERROR", 2: "REFERENCED", 3: "UPTODATE", 4: "DIRTY", 5: "LRU", 6: "ACTIVE", 7: "SLAB",
    8: "WRITEBACK", 9: "RECLAIM", 10: "BUDDY", 11: "MMAP", 12: "ANON", 13: "SWAPCACHE", 14: "SWAPBACKED",
    15: "COMPOUND_HEAD", 16: "COMPOUND_TAIL", 17: "HUGE", 18: "UNEVICTABLE", 19: "HWPOISON", 20: "NOPAGE",
    21: "KSM", 22: "THP", 23: "OFFLINE", 24: "ZERO_PAGE", 25: "IDLE", 26: "PGTABLE", 32: "RESERVED",
    33: "MLOCKED", 34: "MAPPEDTODISK", 35: "PRIVATE", 36: "PRIVATE_2", 37: "OWNER_PRIVATE", 38: "ARCH",
    39: "UNCACHED", 40: "SOFTDIRTY", 41: "ARCH_2", 42: "ARCH_3",
}  # fmt: skip
"""Names of the bits of /proc/kpageflags (linux/kernel-page-flags.h; from 32 on: fs/proc/page.c, for developers)."""

_NODES = 4096
"""Number of pages whose nodes are queried in one call."""

_READ = 256 << 10
"""Bytes of kpageflags that are read at once."""

_PATIENCE = 5.0
"""Seconds for one step of the search of a process."""


class FrameFacts(NamedTuple):
    """Properties of a range of page frames."""

    flags: tuple[str, ...]
    """Names of the kpageflags that all frames have."""
    some_flags: tuple[str, ...]
    """Names of the kpageflags that only some frames have."""
    mapped: tuple[int, int] | None
    """The minimum and maximum map count (kpagecount); None if unknown."""
    cgroups: tuple[str, ...] | None
    """Paths of memory cgroups to which they are charged, at most a few; None if unknown."""
    node: int | None
    """The NUMA node of the first frame; None if unknown."""


class DescribedRun(NamedTuple):
    """A physically contiguous run, and the properties of its frames."""

    run: Run
    """The run."""
    facts: FrameFacts
    """The properties that its frames share, or that some of them have."""


# linux/kernel-page-flags.h
_UPTODATE, _BUDDY, _ANON, _SWAPBACKED, _HEAD = 3, 10, 12, 14, 15
_UNTOUCHED = 1 << _SWAPBACKED | 1 << _HEAD


def _is_untouched(word: int) -> bool:
    return word & (_UNTOUCHED | 1 << _UPTODATE | 1 << _ANON) == _UNTOUCHED


class Frames:
    """The open page frame tables of the kernel.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPrivileged`: /proc/kpageflags cannot be read.
    """

    def __init__(self) -> None:
        self._flags = self._count = self._cgroup = -1
        self._names: dict[int, str] | None = None
        try:
            self._flags = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            message = f"cannot read the flags of page frames: /proc/kpageflags: {error.strerror}; run as root"
            raise NotPrivilegedError(message, error.errno or 0) from None
        with contextlib.suppress(OSError):
            self._count = os.open("/proc/kpagecount", os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # CONFIG_MEMCG
            self._cgroup = os.open("/proc/kpagecgroup", os.O_RDONLY | os.O_CLOEXEC)

    def add_folios(self, raw: bytes, present: int, excluded: int, sizes: dict[int, int]) -> None:
        """Add up the folio sizes of raw spans; the parameters are those of the native function."""
        native.folios(self._flags, raw, present, excluded, PAGE_SIZE, sizes)

    def describe(self, physical: int, length: int, node: int | None = None) -> FrameFacts:
        """Return the properties of the frames of a physical range, in bytes."""
        first, many = physical // PAGE_SIZE, -(-length // PAGE_SIZE)
        every, some, least, most, groups = native.describe(self._flags, self._count, self._cgroup, first, many)
        mapped = None if least is None or most is None else (least, most)
        cgroups = None if self._cgroup < 0 else tuple(sorted(self._cgroup_name(inode) for inode in groups if inode))
        return FrameFacts(flag_names(every), flag_names(some & ~every), mapped, cgroups, node)

    def census(self, block: int, cells: int, cell: int) -> native.Census:
        """Return a reader of all flags; the parameters are those of the native class."""
        return native.Census(self._flags, block, cells, cell)

    def is_unused(self, frame: int) -> bool:
        """Return whether a frame has no user: it is free, or in a processor's list of free pages."""
        (word,) = self._words([frame])
        return not word & ~(1 << _BUDDY)

    def free(self, frames: Sequence[int]) -> bytes:
        """Return a byte for each of some frames, 1 if it is free."""
        return bytes(word >> _BUDDY & 1 for word in self._words(frames))

    def untouched(self, frames: Sequence[int]) -> int:
        """Return how many of some frames, up to the first other one, begin a huge page that was never used.

        Such a page was allocated in a tmpfs, but is not cleared yet.
        """
        found = map(_is_untouched, self._words(frames))
        return next((index for index, is_untouched in enumerate(found) if not is_untouched), len(frames))

    def freed_with(self, frames: Sequence[int], file: int, offset: int, size: int) -> list[int]:
        """Return which of some untouched frames are in a part of a file in memory, which is freed temporarily."""
        raw = native.flag_words_without(self._flags, frames, file, offset, size)
        words = array("Q", bytes(raw))
        return [frame for frame, word in zip(frames, words, strict=True) if not _is_untouched(word)]

    def _words(self, frames: Sequence[int]) -> "array[int]":
        return array("Q", bytes(native.flag_words(self._flags, frames)))

    def end_of_flags(self, start: int, end: int) -> int:
        """Return the end of the last frame that has a flag between two physical addresses; `start` if none has."""
        while start < end:
            first = max(start, end - _READ // 8 * PAGE_SIZE)
            raw = os.pread(self._flags, (end - first) // PAGE_SIZE * 8, first // PAGE_SIZE * 8).rstrip(b"\0")
            if raw:
                return first + -(-len(raw) // 8) * PAGE_SIZE
            end = first
        return start

    def _cgroup_name(self, inode: int) -> str:
        if self._names is None:
            self._names = _memory_cgroups()
        return self._names.get(inode, f"inode {inode}")

    def close(self) -> None:
        """Close the tables."""
        for fd in (self._flags, self._count, self._cgroup):
            if fd >= 0:
                os.close(fd)
        self._flags = self._count = self._cgroup = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def flag_names(flags: int) -> tuple[str, ...]:
    """Return the names of bits of kpageflags."""
    return tuple(FLAGS.get(bit, f"BIT_{bit}") for bit in range(64) if flags >> bit & 1)


def _memory_cgroups() -> dict[int, str]:
    """Return the paths of visible memory cgroups by the inode numbers of their directories."""
    found: dict[int, str] = {}
    for mount in sorted(cgroup.mounts("memory"), key=lambda mount: not mount.unified):
        for directory, _names, _files in os.walk(mount.place):
            with contextlib.suppress(OSError):
                found.setdefault(os.stat(directory).st_ino, directory.removeprefix(mount.place) or "/")
    return found


def described(target: Target, address: int | None = None, size: int | None = None) -> Iterator[DescribedRun]:
    """Iterate over the physically contiguous runs, with the properties of their frames.

    The parameters are those of `runs`.

    Raises
    ------
    IOReturnError
        As `runs`; `kIOReturnNotPrivileged`: frames or their flags are hidden (CAP_SYS_ADMIN, root).
    """
    where = resolve(target, address, size)
    require_frames()
    yield from describe_runs(where.task, runs(where))


def describe_runs(task: Task, found: Iterable[Run]) -> Iterator[DescribedRun]:
    """Iterate over runs of a task, with the properties of their frames."""
    with Frames() as frames:
        for batch in _batches(found):
            nodes = _nodes(task, batch)
            for run, node in zip(batch, nodes, strict=True):
                yield DescribedRun(run, frames.describe(run.physical, run.length, node))


def _batches(found: Iterable[Run]) -> Iterator[list[Run]]:
    batch: list[Run] = []
    for run in found:
        batch.append(run)
        if len(batch) == _NODES:
            yield batch
            batch = []
    if batch:
        yield batch


def _nodes(task: Task, batch: list[Run]) -> list[int | None]:
    try:
        found = native.nodes(procfs.memory_id(task.pid), [run.virtual for run in batch])
    except OSError:  # no CONFIG_NUMA, or refused
        return [None] * len(batch)
    return [node if node >= 0 else None for node in found]


class FrameMapping(NamedTuple):
    """Page frames that a process maps; all sizes in bytes."""

    pid: int
    """The process."""
    process: str
    """The name of the process."""
    area: procfs.VMA
    """The area that maps the frames."""
    virtual: int
    """The first virtual address."""
    physical: int
    """The first physical address."""
    length: int
    """The length of both."""


def users(
    physical: int,
    length: int,
    *,
    progress: Callable[[int, int], object] | None = None,
    refused: Callable[[int, IOReturnError], object] | None = None,
) -> Iterator[FrameMapping]:
    """Iterate over the processes that map frames of a physical range, by scanning all processes.

    Parameters
    ----------
    physical, length : int
        The range in bytes.
    progress : callable, optional
        Called with the number of processes scanned and their total number.
    refused : callable, optional
        Called with the pid of each process that may not be inspected and is skipped, and the error with the reason.
        Also called for a process that was not searched completely, because it keeps moving its memory
        (`kIOReturnBusy`) or makes the kernel wait (`kIOReturnTimeout`).

    Raises
    ------
    IOReturnError
        `kIOReturnNotPrivileged`: frame numbers are hidden (CAP_SYS_ADMIN). `kIOReturnBadArgument`: the range is
        invalid. `kIOReturnNoResources`: no file descriptor is free.

    Notes
    -----
    A process that exits during the scan is skipped. Threads are not listed separately.
    """
    physical, length = check_range(physical, length)
    require_frames()
    try:
        pids = pidns.pids()
    except OSError as error:
        raise limits.from_oserror(error, "cannot list the processes") from None
    for index, pid in enumerate(pids):
        if progress:
            progress(index, len(pids))
        try:
            yield from _mapped_patiently(pid, physical, physical + length)
        except (NotPermittedError, BusyError, TaskTimeoutError) as error:
            if refused:
                refused(pid, error)
        except (NotFoundError, UnsupportedError):  # it has exited, or is a kernel thread
            pass
    if progress:
        progress(len(pids), len(pids))


def _mapped_patiently(pid: int, low: int, high: int) -> Iterator[FrameMapping]:
    try:
        yield from relay.relayed(lambda: _mapped_frames(pid, low, high), _PATIENCE)
    except TimeoutError as error:
        if isinstance(error, IOReturnError):
            raise
        message = (
            f"process {pid} makes the kernel wait: it has been changing its mappings for {_PATIENCE:g} s, perhaps "
            "because the server of a file (FUSE) does not answer"
        )
        raise TaskTimeoutError(message) from None


def _mapped_frames(pid: int, low: int, high: int) -> Iterator[list[FrameMapping]]:
    """Iterate over the steps of a scan of a process; each yields the mappings that it found."""
    task = Task(pid)
    with Reader(task) as reader:
        name = name_of(task)
        reader.keep_within(low, high)
        for area in resolve(task).areas():
            for step in reader.steps(area.start, area.end):
                found = []
                for virtual, frame, length, _flags in (step[index] for index in range(len(step))):
                    first, last = max(low, frame), min(high, frame + length)
                    # The zero page is one frame mapped at many addresses.
                    at = virtual + (first - frame)
                    found.append(FrameMapping(pid, name, area, at, first, min(length, last - first)))
                yield found
