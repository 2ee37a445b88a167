"""Lazy copies: memory whose contents are fetched from a snapshot, when touched and in the background.

A snapshot is a child process that has the source's memory copy-on-write (fork(2)). A native thread
(`cython_ext/fetcher.h`) serves the page faults of the copy, and ends when everything is fetched. From then on the
copy is memory like any other.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd._internal import log, pidns
from iobmd._internal.weak_registry import WeakRegistry
from iobmd._native import fetcher as native
from iobmd._native import mman
from iobmd._native import pagemap as pages
from iobmd.backing.anonymous import AnonymousBacking
from iobmd.backing.contents import CopyOf, FrozenCopyOf
from iobmd.errors import (
    IOReturnError,
    NoMemoryError,
    NoResourcesError,
    NotFoundError,
    NotOpenError,
    TaskTimeoutError,
    UnsupportedError,
    VMError,
)
from iobmd.host.pages import huge_pages_enabled
from iobmd.memory import numa
from iobmd.pagemap.self import own_pagemap
from iobmd.task import userfault
from iobmd.task.task import Task
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping
    from iobmd._native.pagemap import RunTable
    from iobmd.backing import Contents
    from iobmd.remote.snapshot_child import SnapshotChild

_QUICK = 16
"""A snapshot takes at most this part of the time in which its memory is copied (measured: 1/15 in small pages)."""

_PRESENT = 1 << 63  # proc_pid_pagemap(5)
_PRIVATE = "[heap", "[stack", "[anon:"

_fetching: WeakRegistry[Fetch] = WeakRegistry()


class LazyCopyOf(CopyOf):
    """The bytes of a task as of the moment of `begin`, or of `fill` if they cannot be fetched later."""

    def begin(self, mapping: Mapping) -> Fetch | None:
        """Begin to fetch the bytes to absent memory of this process; None if they must be copied by `fill`.

        Raises
        ------
        IOReturnError
            `kIOReturnNotPermitted`: the source cannot be stopped. `kIOReturnTimeout`.
        """
        try:
            self._require_private()
            return self._begun(mapping) if self.task.is_current else self._begun_from_other(mapping)
        except _NotLazyError as reason:
            log.debug("the lazy copy from task %d is made at once: %s", self.task.pid, reason)
            return None

    def fill(self, destination: int, *, huge: int = 0, sparse: bool = False, fresh: bool = True) -> bool:
        """As `Contents.fill`, as of one moment if the source is another task."""
        if self.task.is_current:
            return super().fill(destination, huge=huge, sparse=sparse, fresh=fresh)
        frozen = FrozenCopyOf(
            self.task, self.address, self.size, skip=self._skip, timeout=self._timeout, progress=self._progress
        )
        left_zero = frozen.fill(destination, huge=huge, sparse=sparse, fresh=fresh)
        self.holes, self.stopped_ns = frozen.holes, frozen.stopped_ns
        return left_zero

    @property
    def _end(self) -> int:
        return self.address + self.size

    def _require_private(self) -> None:
        """Check that forked children inherit the bytes, and that a snapshot takes less time than a copy."""
        if self._skip:
            raise _NotLazyError("unreadable bytes must be found")
        if self.task.is_snapshot:
            raise _NotLazyError("it is a snapshot, which may be closed earlier")
        try:
            _require_inherited(self.task.pid, self.address, self._end)
            small = self.task.is_current and self.size * _QUICK < procfs.status_bytes("VmRSS")
        except (OSError, KeyError) as error:
            raise _reason(error) from None
        if small:
            raise _NotLazyError("it is a small part of the memory that a snapshot contains")

    def _begun(self, mapping: Mapping) -> Fetch:
        """Begin to fetch from a snapshot of this process."""
        for other in _fetching.all():
            if other.overlaps(self.address, self.size):
                other.all()
        try:
            if pidns.is_foreign():
                raise _NotLazyError("/proc belongs to another pid namespace")
            _require_unserved()
            samples = _samples(self.address, self._end)
        except OSError as error:
            raise _reason(error) from None
        fetch = Fetch(mapping, self.address, samples=samples)
        fetch.begin()
        return fetch

    def _begun_from_other(self, mapping: Mapping) -> Fetch:
        """Begin to fetch from a snapshot of another task."""
        from iobmd.remote import consistent_copy, freezer, snapshot_child, task_snapshot, trust  # noqa: PLC0415 (as FrozenCopyOf)

        if not trust.is_trusted(self.task):
            raise _NotLazyError("another user may kill the snapshot, and accesses would then raise SIGBUS")
        if freezer.switches(self.task.pid) is not None:
            raise _NotLazyError("the task is frozen")
        request = consistent_copy.CopyRequest(self.task, self.address, self.size, lambda _task, _progress: None)
        resident = consistent_copy.worth_a_child(request)
        if not resident:
            raise _NotLazyError("a snapshot would take longer, or lack some of the memory")
        try:
            task_snapshot.require_room(self.task)
        except NoMemoryError as error:  # it would be charged to the task
            raise _NotLazyError(str(error)) from None
        child = snapshot_child.SnapshotChild(self.task, resident)
        try:
            pid = child.begin()
            task_snapshot.prefer_as_victim(Task(pid))
        except (NoResourcesError, TaskTimeoutError, UnsupportedError, VMError, NotFoundError) as error:
            raise _NotLazyError(str(error)) from None
        except OSError as error:  # of the clone
            raise _reason(error) from None
        self.stopped_ns = child.stopped_ns
        try:
            _require_no_userfault(self.task.pid)  # since its memory was inspected
            fetch = Fetch(mapping, self.address, pid=pid, holder=child)
            fetch.begin()
        except OSError as error:
            child.end()
            raise _reason(error) from None
        except BaseException:
            child.end()
            raise
        return fetch


class _NotLazyError(Exception):
    """The reason for which bytes are copied at once."""


def _reason(error: Exception) -> Exception:
    """Return an error of the kernel as the reason to copy at once, and any other error unchanged."""
    return error if isinstance(error, IOReturnError) else _NotLazyError(str(error))


class Fetch:
    """The fetch of the contents of a mapping, whose forked children lack the mapping until its end.

    Parameters
    ----------
    mapping : Mapping
        Absent private anonymous memory.
    source : int
        The address of the contents.
    samples : list of int
        Pages that exist there.
    pid : int
        The process with the contents; 0: a child of this process, which is created.
    holder : SnapshotChild, optional
        The session that created the process, and is ended with the fetch.
    """

    def __init__(
        self,
        mapping: Mapping,
        source: int,
        *,
        samples: Sequence[int] = (),
        pid: int = 0,
        holder: SnapshotChild | None = None,
    ) -> None:
        self._start, self._end = mapping.address, mapping.address + mapping.size
        self._native = native.Fetcher(
            mapping,
            mapping.address,
            mapping.size,
            source,
            pid,
            pidns.directory(pid).encode() if pid else b"",
            samples=samples,
            moves=huge_pages_enabled() and numa.wanted() is None,
        )
        self._mapping = mapping
        self._holder = holder

    def begin(self) -> None:
        """Create the snapshot and begin. Raises `_NotLazyError`: that is not possible, and nothing remains."""
        mman.advise(self._start, self._end - self._start, mman.MADV_DONTFORK)
        self._mapping.withhold(True)
        _fetching.add(self)
        try:
            self._native.start()
            if self._holder:
                waiter = threading.Thread(
                    target=_end_holder, args=(self._native, self._holder), name="iobmd-lazy", daemon=True
                )
                waiter.start()
            self._require_begun()
        except (OSError, RuntimeError) as error:  # no thread can be created
            self.stop()
            raise _NotLazyError(str(error)) from None
        except BaseException:
            self.stop()
            raise

    def _require_begun(self) -> None:
        state, error = self._native.state, self._native.error
        if state == native.REFUSED and error == errno.ENODATA:
            raise _NotLazyError("forked children do not inherit it (MADV_DONTFORK or MADV_WIPEONFORK)")
        if state == native.REFUSED:
            raise _NotLazyError(os.strerror(error))
        if state == native.LOST and not self._native.is_lazy:
            raise _NotLazyError("some of it cannot be read")

    @property
    def is_over(self) -> bool:
        """Whether everything is fetched, and the snapshot has ended."""
        if self._native.state != native.COMPLETE:
            return False
        self.stop(wait=False)
        self._mapping.withhold(False)
        return True

    @property
    def fetched(self) -> int:
        """The number of bytes that are fetched, in whole pages."""
        return self._native.fetched

    @property
    def serves_kernel(self) -> bool:
        """Whether page faults of system calls are served."""
        return self._native.serves_kernel

    def overlaps(self, address: int, size: int) -> bool:
        """Return whether it fetches bytes of a range."""
        return address < self._end and self._start < address + size and self._native.state == native.FETCHING

    def require(self, offset: int, length: int) -> None:
        """Wait until the pages of a range are fetched.

        Raises
        ------
        IOReturnError
            `kIOReturnVMError`: the snapshot ended before. `kIOReturnNotOpen`: this is a forked child.
        """
        lost = self._native.require(offset, length)
        if self._native.is_inherited and self._native.state < native.COMPLETE:
            message = (
                "this lazy copy was not yet fetched when the process was forked, and the child lacks its memory: "
                "call fetch() before the fork"
            )
            raise NotOpenError(message)
        if lost is not None:
            message = (
                f"the contents at {lost:#x} are lost: the process that held the snapshot was killed before they were "
                "fetched, or they cannot be read"
            )
            raise VMError(message, 0, lost)

    def all(self) -> None:
        """Wait until everything is fetched, and the snapshot has ended. Raises as `require`."""
        self._native.wait()
        self.stop()
        self.require(0, self._end - self._start)

    def stop(self, *, wait: bool = True) -> None:
        """End the fetch: neither a thread nor a process remains. Idempotent.

        Without `wait`, for destructors, the snapshot of another task is ended by another thread.
        """
        self._native.stop()
        if self._holder and wait and not self._native.is_inherited:
            self._holder.end()


class LazyBacking(AnonymousBacking):
    """Pageable memory of this process whose contents are still being fetched.

    Its methods wait for the pages that they access. Views access the memory itself, and wait in page faults.

    Parameters
    ----------
    size : int
        Size in bytes, rounded up to whole pages.
    contents : LazyCopyOf
        The contents.
    """

    _fetch: Fetch | None = None
    _over: Fetch | None = None  # complete, but another thread may still have to end its snapshot
    _reusable = False  # the fetch begins with absent pages

    def __init__(self, size: int, contents: LazyCopyOf) -> None:
        super().__init__(size, wired=False, contents=contents)

    def _fill(self, contents: Contents | None, *, populated: bool) -> None:
        assert isinstance(contents, LazyCopyOf)
        numa.place(self.address, self.size)
        self._fetch = contents.begin(self.mapping)
        if self._fetch is None:
            # Pages may have been fetched before `begin` failed.
            mman.advise(self.address, self.size, mman.MADV_DONTNEED)
            with contextlib.suppress(OSError):
                mman.advise(self.address, self.size, mman.MADV_DOFORK)
            self.mapping.withhold(False)
            super()._fill(contents, populated=populated)

    # --- the fetch

    @property
    def fetched(self) -> int:
        """The number of bytes whose contents are here, in whole pages."""
        fetch = self._pending()
        return fetch.fetched if fetch else self.size

    def fetch(self) -> None:
        """Wait until everything is fetched, and the snapshot has ended. Raises as `Fetch.require`."""
        if fetch := self._pending():
            fetch.all()
            self._pending()
        if over := self._over:
            over.stop()
            self._over = None

    def _pending(self) -> Fetch | None:
        """Return the fetch if something may still have to be fetched, or is lost."""
        fetch = self._fetch  # read once: another thread may find that it has ended
        if fetch and fetch.is_over:
            self._over = fetch
            self._fetch = fetch = None
        return fetch

    def _require(self, offset: int, length: int) -> None:
        if fetch := self._pending():
            fetch.require(offset, min(length, self.size - offset))

    # --- the memory

    def here(self, *, populated: bool = False) -> AbstractContextManager[Mapping]:
        """As `Backing.here`."""
        if populated:
            self.fetch()
        return super().here(populated=populated)

    def pin(self) -> None:
        """As `Backing.pin`."""
        self.fetch()
        super().pin()

    def read_runs(self, *, gaps: bool = False) -> RunTable | None:
        """As `Backing.read_runs`."""
        self.fetch()
        return super().read_runs(gaps=gaps)

    def write_back(self, offset: int, length: int, *, drop: bool) -> None:
        """As `Backing.write_back`."""
        self._require(offset, length)
        super().write_back(offset, length, drop=drop)

    def read(self, offset: int, length: int) -> bytes:
        """As `Backing.read`."""
        self._require(offset, length)
        return super().read(offset, length)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """As `Backing.read_into`."""
        self._require(offset, memoryview(buffer).nbytes)
        super().read_into(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        """As `Backing.write`."""
        self._require(offset, memoryview(data).nbytes)
        super().write(offset, data)

    def copy_to(self, offset: int, length: int, destination: int) -> int:
        """As `Backing.copy_to`."""
        self._require(offset, length)
        return super().copy_to(offset, length, destination)

    def exported(self) -> tuple[Mapping, int]:
        """As `Backing.exported`; waits for everything if the page faults of system calls cannot be served."""
        if fetch := self._pending():
            if fetch.serves_kernel:
                fetch.require(0, 0)  # not in a forked child
            else:
                fetch.all()
        return super().exported()

    def drop(self) -> None:
        """As `Backing.drop`; ends the fetch."""
        self._close(wait=False)

    def close(self) -> None:
        """As `Backing.close`; ends the fetch."""
        self._close(wait=True)

    def _close(self, *, wait: bool) -> None:
        self.seal()
        if fetch := self._pending() or self._over:
            fetch.stop(wait=wait)
            self._fetch = self._over = None
        super().close()


def _end_holder(fetcher: native.Fetcher, holder: SnapshotChild) -> None:
    """End the snapshot of another task when everything is fetched."""
    fetcher.wait()
    with contextlib.suppress(OSError):  # the task has exited
        holder.end()


def _require_inherited(pid: int, address: int, end: int) -> None:
    """Check that a range of a task is private anonymous memory, which forked children inherit by default."""
    at = address
    for area in procfs.areas(pid, address, end):
        if area.start > at or not area.perms.startswith("r"):
            break
        if area.inode or area.perms[3] != "p" or (area.name and not area.name.startswith(_PRIVATE)):
            raise _NotLazyError(f"it is not private anonymous memory ({area})")
        at = area.end
    if at < end:
        raise _NotLazyError(f"{at:#x} is not readable")


def _require_unserved() -> None:
    """Check that the missing pages of this process are zero. Raises OSError.

    Another userfaultfd(2) may deliver them, but not to a snapshot. Which memory it serves is shown only by smaps,
    which takes half as long as the snapshot.
    """
    if not userfault.is_open("self"):
        return
    for area, flags in procfs.vm_flags():
        if flags & {"um", "ui"} and not any(one.overlaps(area.start, 1) for one in _fetching.all()):
            raise _NotLazyError(f"a userfaultfd serves page faults of this process ({area})")


def _samples(address: int, end: int) -> list[int]:
    """Return the number of a present page of each area of a range of this process that has any."""
    pagemap = own_pagemap()
    found = []
    for area in procfs.areas("self", address, end):
        first, last = max(area.start, address) // PAGE_SIZE, -(-min(area.end, end) // PAGE_SIZE)
        page = pages.first_entry(pagemap, first, last, _PRESENT, _PRESENT)
        if page is not None:
            found.append(page)
    return found


def _require_no_userfault(pid: int) -> None:
    if userfault.is_open(pid):
        raise _NotLazyError("the task has a userfaultfd, which may serve its page faults")
