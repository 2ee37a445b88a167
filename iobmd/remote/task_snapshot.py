"""`Snapshot`: the memory of a whole task as of one moment, while the task continues to run."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, Self, TypeVar

from iobmd import procfs
from iobmd._internal import chunked, log, pidns
from iobmd._internal.arguments import optional_integers
from iobmd._internal.weak_registry import WeakRegistry
from iobmd.errors import (
    BadArgumentError,
    IOReturnError,
    NoMemoryError,
    NotFoundError,
    NotOpenError,
    UnsupportedError,
    VMError,
)
from iobmd.host import headroom
from iobmd.remote import areas as areas_of
from iobmd.remote.core_notes import ProcessState
from iobmd.remote.shared_memory import Part, SharedMemory
from iobmd.remote.snapshot_child import SnapshotChild
from iobmd.task import attempt, diagnosis, extents, userfault
from iobmd.task.job import TIMEOUT, Outcome
from iobmd.task.task import Task, kernel_task
from iobmd.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from iobmd._native.crosstask import Ranges
    from iobmd.remote.core_file import CoreProgress
    from iobmd.remote.core_summary import CoreSummary
    from iobmd.task.ranges import Range

_T = TypeVar("_T")
_known: WeakRegistry[Snapshot] = WeakRegistry()

_RESERVE = 16 << 20
"""Bytes that must remain free for the task in its memory cgroup and on the host."""
_INTERVAL = 0.05
"""Seconds between two checks of the limits. A check takes at most a fifth of the time."""
_OOM_FIRST = b"1000"
"""The value of oom_score_adj for which the kernel ends a process before any other (proc_pid_oom_score_adj(5))."""
_TRIES = 3
_RINGS = ("anon_inode:[io_uring]", "/[aio] (deleted)", "anon_inode:[perf_event]")


class Missing(NamedTuple):
    """Memory of a task that its snapshot does not contain. Addresses are in bytes."""

    start: int
    """The first address."""
    end: int
    """The end address."""
    name: str
    """The path of the file, or a name such as ``[heap]``; empty for anonymous memory."""
    why: str
    """``"dontfork"`` (MADV_DONTFORK): it cannot be read. ``"wipeonfork"`` (MADV_WIPEONFORK): it cannot be read.
    ``"userfaultfd"``: pages that were absent cannot be read: only the task's fault handler has their contents.
    ``"ring"`` (io_uring, AIO, perf): it is not frozen, or cannot be read."""


class Snapshot(Task):
    """A whole task as of one moment, from `iobmd.snapshot`. It can be read wherever a task is accepted.

    Attributes
    ----------
    pid : int
        The process that holds the snapshot: a child of the task that never runs.
    task : Task
        The task.
    stopped_ns : int
        Upper bound of the time for which the task was stopped, in nanoseconds.
    missing : list[Missing]
        The memory of the task that the snapshot does not contain.
    shared : list[procfs.VMA]
        Shared memory of the task that is not frozen (`freeze_shared`): reading it returns its present contents.

    Notes
    -----
    The snapshot and the task share their memory until the task writes to it. Each page that it then writes to for the
    first time is copied by the kernel, charged to the task's memory cgroup: `copied_bytes`. If the host or the cgroup
    runs out of memory, the kernel ends the snapshot first, and reads raise `kIOReturnNotFound`.

    The process is in the task's session and cgroups. It has no file descriptors, receives no signals, and is killed
    when this process ends. A wait of the task finds it with `__WALL` or `__WCLONE` only. It keeps the files that the
    task has mapped, and their file systems, in use.

    Snapshots may be used from any thread. A forked child of this process can read them, and does not end them.
    """

    task: Task
    stopped_ns: int
    missing: list[Missing]
    shared: list[procfs.VMA]
    is_snapshot = True

    def __init__(self, task: Task, *, limit: int | None = None, freeze_shared: int | None = None) -> None:
        if isinstance(task, Snapshot):
            raise UnsupportedError(f"process {task.pid} is a snapshot already, of task {task.task.pid}")
        if task.is_current:
            message = "a process cannot stop itself for a snapshot: copy its memory by iobmd.copy(…, lazy=True)"
            raise UnsupportedError(message)
        limit, freeze_shared = optional_integers(limit=limit, freeze_shared=freeze_shared)
        if limit is not None and limit <= 0:
            raise BadArgumentError(f"limit must be positive, not {limit}")
        if freeze_shared is not None and freeze_shared < 0:
            raise BadArgumentError(f"freeze_shared must not be negative, but is {freeze_shared}")
        self.task = task
        self._closed = False
        self._maker = os.getpid()
        self._ended_for: IOReturnError | None = None
        self._finish: weakref.finalize[..., Snapshot] | None = None
        attempt.require_unlocked(task.pid, TIMEOUT)
        for _ in range(_TRIES):
            self._begin(None if freeze_shared is None else SharedMemory(task, freeze_shared))
            if not self._frozen or self._frozen.covers(self.shared):
                break
            self._child.end()
        else:
            raise UnsupportedError(f"task {task.pid} has changed its mappings of shared memory before each stop")
        if self._frozen:
            self.shared = []
        self._limit = limit
        self._finish = weakref.finalize(self, self._child.end)
        _known.add(self)
        log.debug("a snapshot of task %d was made, which stopped it for %d ns", task.pid, self.stopped_ns)
        prefer_as_victim(self)
        threading.Thread(target=_watch, args=(weakref.ref(self),), name="iobmd-snapshot", daemon=True).start()

    def _begin(self, frozen: SharedMemory | None) -> None:
        resident = require_room(self.task)
        before = _ranges(self.task)
        self._frozen = frozen
        objects = frozen.objects if frozen else ()
        self._child = child = SnapshotChild(self.task, resident, records=True, objects=objects)
        self._close_pidfd()  # of a previous attempt
        try:
            super().__init__(child.begin())
            self.stopped_ns = child.stopped_ns
            self._state = ProcessState.of(self.task)
            self._describe(before)
        except BaseException:
            child.end()
            raise

    def _describe(self, before: dict[tuple[int, int], procfs.VMA]) -> None:
        """Determine what the snapshot lacks. The task was stopped between the two times its areas were listed."""
        after = _ranges(self.task) if self.task.alive else before
        own = list(procfs.vm_flags(self.pid))
        inherited = {(vma.start, vma.end) for vma, _ in own}
        found = [_lacking(vma, "dontfork") for key, vma in before.items() if key in after and key not in inherited]
        found = [one for one in found if not any(low < one.end and one.start < high for low, high in inherited)]
        self.shared = []
        for vma, flags in own:
            if "wf" in flags:
                found.append(_lacking(vma, "wipeonfork"))
            elif vma.name in _RINGS:
                found.append(_lacking(vma, "ring"))
            elif "sh" in flags and not flags & {"io", "pf"}:
                self.shared.append(vma)
        with contextlib.suppress(OSError, KeyError):  # it has exited, with its handler
            served = userfault.supplied(self.task.pid)
            found += [_lacking(vma, "userfaultfd") for vma in served if (vma.start, vma.end) in inherited]
        self.missing = sorted(found)

    @property
    def is_open(self) -> bool:
        """Whether it can be read: it was not closed, and was not ended by its limit or by the kernel."""
        return not self._closed and not self._ended_for and super().alive

    @property
    def copied_bytes(self) -> int:
        """Memory that exists only for snapshots, in bytes: pages that the task has since written to or unmapped.

        Pages that several snapshots of the task share count for each. An earlier one then counts at most as much less
        as the task's memory has grown before the latest.

        Raises
        ------
        IOReturnError
            As `read`.

        Notes
        -----
        The kernel is asked for each page (pagemap): this takes 2 to 10 ms for 1 GiB of small pages, and twice as long
        if several snapshots of the task are open, because the pages of the task are then compared.
        """
        from iobmd.pagemap import area  # noqa: PLC0415 (half of the time of the rest of `import iobmd`)

        self._require_open()
        found = self._asked(lambda: [one.tally for one in area.areas(self, details=False)])
        alone = sum(min(one.exclusive, one.present - one.file) for one in found)
        if not any(one is not self and one.task.pid == self.task.pid and one.is_open for one in _known.all()):
            return alone
        # No page of it is exclusive if another snapshot shares it. At most as much as the task itself shares with
        # other processes, including all snapshots, is memory that the task still has.
        try:
            kept = sum(
                max(0, one.present - one.file - one.zero - one.exclusive)
                for one in (found.tally for found in area.areas(self.task, details=False))
            )
        except NotFoundError:
            kept = 0
        return max(alone, sum(one.present - one.file - one.zero for one in found) - kept)

    def areas(self) -> list[procfs.VMA]:
        """Return the areas of the task at the moment of the snapshot, ascending. Raises as `read`."""
        self._require_open()
        return self._asked(lambda: list(procfs.maps(self.pid)))

    def _asked(self, ask: Callable[[], list[_T]]) -> list[_T]:
        """Return what /proc reports of the process, if it still held the memory afterwards."""
        try:
            found = ask()
        except OSError:
            if self.is_open:
                raise
            found = []
        if not self.is_open:
            raise self._gone()
        return found

    def read(self, address: int, size: int, *, timeout: float | None = None) -> bytes:
        """Return the `size` bytes at `address` as of the moment of the snapshot.

        Parameters and errors are those of `Task.read`.

        Raises
        ------
        IOReturnError
            `kIOReturnNotOpen`: it was closed. `kIOReturnNotFound`: the process that held it was killed.
            `kIOReturnNoMemory`: its limit was exceeded, or the task's memory ran out. `kIOReturnVMError`: it does
            not contain this memory (`missing`).
        """
        self._require_open()
        return super().read(address, size, timeout=timeout)

    def readinto(self, address: int, buffer: Buffer, *, timeout: float | None = None) -> int:
        """Fill the writable `buffer` with the bytes at `address`; return its size in bytes. Raises as `read`."""
        self._require_open()
        return super().readinto(address, buffer, timeout=timeout)

    def write(self, address: int, data: Buffer, *, timeout: float | None = None) -> NoReturn:  # noqa: ARG002
        """Raise `kIOReturnUnsupported`: a snapshot cannot be written to."""
        raise UnsupportedError(f"{self!r} cannot be written to; write to the task itself")

    def copy_in(
        self,
        source: int,
        destination: int,
        size: int,
        *,
        huge: int = 0,
        fresh: bool = False,
        sparse: bool = False,
        skip: bool = False,
        resident_only: bool = False,
        timeout: float | None = None,
        progress: chunked.Progress | None = None,
        outline: Ranges | None = None,
    ) -> Outcome:
        """As `Task.copy_in`. Raises as `read`."""
        self._require_open()
        self._require_contained(source, size)
        return self._copied_in(
            source, destination, size,
            huge=huge, fresh=fresh, sparse=sparse, skip=skip, resident_only=resident_only,
            timeout=timeout, progress=progress, outline=outline,
        )  # fmt: skip

    def _copied_in(self, source: int, destination: int, size: int, **how: Any) -> Outcome:
        """As `Task.copy_in`, whether or not the snapshot contains all of it."""
        memory = self._frozen  # read once: another thread may close the snapshot, which releases its copies
        frozen = list(memory.parts(source, size)) if memory else []
        if not frozen:
            return super().copy_in(source, destination, size, **how)
        how |= {"outline": None, "progress": None}
        at, left_zero = source, False
        unread: list[Range] = []
        for start, end, here in (*frozen, Part(source + size, source + size, 0)):
            pieces = (super().copy_in, at, at, start), (kernel_task.copy_in, here, start, end)
            for copy, address, low, high in pieces:
                if low < high:
                    outcome = copy(address, destination + low - source, high - low, **how)
                    unread += outcome.unread
                    left_zero |= outcome.left_zero
            at = end
        return Outcome(size, 0, unread, left_zero)

    def _require_contained(self, address: int, size: int) -> None:
        """Raise `kIOReturnVMError` for a range with pages that read as zeros although the task has other contents."""
        for one in self.missing:
            start, end = max(one.start, address), min(one.end, address + size)
            if start >= end or one.why in ("dontfork", "ring"):
                continue
            absent = [(start, end)] if one.why == "wipeonfork" else self._absent(start, end)
            if absent:
                first = absent[0][0]
                message = f"the snapshot of task {self.task.pid} does not contain {first:#x} ({one.why})"
                raise VMError(message, address=first)

    def _absent(self, start: int, end: int) -> list[Range]:
        return self._asked(lambda: list(extents.outline(self.pid, start, end - start, TIMEOUT) or ()))

    def core(
        self,
        file: str | Path | BinaryIO,
        *,
        progress: CoreProgress | None = None,
        filter: int | None = None,  # noqa: A002 (the kernel's name)
    ) -> CoreSummary:
        """Write an ELF core file of the task as of this moment, which gdb, lldb, drgn and other debuggers read.

        Parameters
        ----------
        file : path or binary file
            A path: the file is replaced when it is complete, and only its owner can read it. An object: it is written
            to from its present position. A pipe gets zeros instead of holes, as does any object with `write` and
            `flush` that is not a regular file.
        progress : callable, optional
            Called repeatedly with the number of bytes of memory that have been written, and their total.
        filter : int, optional
            The kinds of memory to write, as bits of coredump_filter (core(5)); by default those of the task.

        Returns
        -------
        CoreSummary
            Sizes and times.

        Raises
        ------
        IOReturnError
            As `read`. `kIOReturnBadArgument`: `filter` has unknown bits.
        OSError
            The file cannot be written; no incomplete file is left at a path. `BlockingIOError`: it is non-blocking,
            and accepts no bytes now.

        Notes
        -----
        The registers of all threads were saved when the snapshot was made. The file has no signal. As in a core file
        of the kernel, memory with MADV_DONTDUMP is left out, and so are unmodified pages of files, except for ELF
        headers.
        """
        from iobmd.remote import core_file  # noqa: PLC0415 (rarely used)

        self._require_open()
        fetch = functools.partial(self._copied_in, skip=True)
        report = chunked.carrying(progress) if progress else None
        try:
            return core_file.write(self, fetch, self._child.registers, self._state, file, report, filter)
        except chunked.Carried as carried:
            raise carried.error from None

    def close(self) -> None:
        """End the process that holds the snapshot; the task reaps it. Idempotent."""
        self._closed = True
        self._frozen = None
        self._end()

    def _end(self) -> None:
        if self._finish:
            self._finish()

    def _end_for(self, reason: IOReturnError) -> None:
        self._ended_for = reason
        self._end()

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        finish = getattr(self, "_finish", None)
        if finish and finish.alive and os.getpid() == self._maker:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2, source=self)
        super().__del__()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "held" if self.is_open else "ended"
        return f"<Snapshot of task {self.task.pid} {state}, in process {getattr(self, 'pid', None)}>"

    def _require_open(self) -> None:
        if self._closed:
            raise NotOpenError(f"the snapshot of task {self.task.pid} is closed")
        if self._ended_for:
            raise self._gone()

    def _gone(self) -> IOReturnError:
        if self._closed:
            return NotOpenError(f"the snapshot of task {self.task.pid} was closed")
        if self._ended_for:
            return NoMemoryError(self._ended_for.strerror or "")
        message = (
            f"the snapshot of task {self.task.pid} was ended: process {self.pid} was killed, by the kernel if memory "
            "was short, or with the process group or cgroup of the task"
        )
        return diagnosis.gone(message)

    def _check_limit(self) -> None:
        """End the snapshot if it exceeds its limit, or the free memory of the task."""
        try:
            headroom.require(_RESERVE, swappable=True, pid=self.task.pid if self.task.alive else self.pid)
        except NoMemoryError as error:
            held = format_size(self.copied_bytes)
            message = f"the snapshot of task {self.task.pid} was ended, because it held {held}: {error.strerror}"
            self._end_for(NoMemoryError(message))
            return
        if self._limit is not None and (copied := self.copied_bytes) > self._limit:
            message = (
                f"the snapshot of task {self.task.pid} was ended, because {format_size(copied)} were copied for it: "
                f"more than its limit of {format_size(self._limit)}; pass a larger limit=, or read it sooner"
            )
            self._end_for(NoMemoryError(message))


def _watch(reference: weakref.ref[Snapshot]) -> None:
    """Check the limits of a snapshot while it exists."""
    pause = _INTERVAL
    while True:
        time.sleep(pause)
        snapshot = reference()
        if snapshot is None or not snapshot.is_open:
            return
        begin = time.monotonic()
        with contextlib.suppress(OSError):  # it was closed or killed
            snapshot._check_limit()
        pause = max(_INTERVAL, 4 * (time.monotonic() - begin))
        del snapshot


def _ranges(task: Task) -> dict[tuple[int, int], procfs.VMA]:
    return {(vma.start, vma.end): vma for vma in areas_of.overlapping(task, 0, procfs.USER_END)}


def _lacking(vma: procfs.VMA, why: str) -> Missing:
    return Missing(vma.start, vma.end, vma.name, "ring" if vma.name in _RINGS else why)


def require_room(task: Task) -> int:
    """Check that the page tables of a snapshot fit the task's memory limits; return its resident bytes."""
    try:
        resident, tables = (procfs.status_bytes(field, task.pid) for field in ("VmRSS", "VmPTE"))
    except (OSError, KeyError):
        raise diagnosis.without_memory(task.pid) from None
    headroom.require(tables + _RESERVE, swappable=True, pid=task.pid)
    return resident


def prefer_as_victim(task: Task) -> None:
    """Cause the kernel to end the snapshot before the task, which it would otherwise find equally large."""
    with (
        contextlib.suppress(OSError),
        Path(pidns.directory(task.pid), "oom_score_adj").open("wb", buffering=0) as file,
    ):
        if task.alive:  # after the file was opened: it is that of another process if the pid was reused
            file.write(_OOM_FIRST)
