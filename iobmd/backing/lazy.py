"""Lazy copies: memory whose contents are fetched from a snapshot, when touched and in the background.

A snapshot is a child process that has the source's memory copy-on-write (fork(2)). A native thread
(`cython_ext/fetcher.h`) serves the page faults of the copy, and ends when everything is fetched. From then on the
copy is memory like any other.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd._internal import log, pidns
from iobmd._internal.weak_registry import WeakRegistry
from iobmd._native import fetcher as native
from iobmd._native import mman
from iobmd._native import pagemap as pages
from iobmd.backing.anonymous import AnonymousBacking
from iobmd.backing.contents import CopyOf, FrozenCopyOf
from iobmd.errors import NotOpenError, VMError
from iobmd.host.pages import huge_pages_enabled
from iobmd.memory import numa
from iobmd.pagemap.self import own_pagemap
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping
    from iobmd._native.pagemap import RunTable
    from iobmd.backing import Contents

_QUICK = 16
"""A snapshot takes at most this part of the time in which its memory is copied (measured: 1/15 in small pages)."""

_PRESENT = 1 << 63  # proc_pid_pagemap(5)
_PRIVATE = "[heap", "[stack", "[anon:"
_USERFAULT = "anon_inode:[userfaultfd]"

_fetching: WeakRegistry[Fetch] = WeakRegistry()


class LazyCopyOf(CopyOf):
    """The bytes of a task as of the moment of `begin`, or of `fill` if they cannot be fetched later."""

    def begin(self, mapping: Mapping) -> Fetch | None:
        """Begin to fetch the bytes to absent memory of this process; None if they must be copied by `fill`."""
        if why := self._why_not():
            log.debug("the lazy copy from task %d is made at once: %s", self.task.pid, why)
            return None
        for other in _fetching.all():
            if other.overlaps(self.address, self.size):
                other.all()
        fetch = Fetch(mapping, self.address, _samples(self.address, self.address + self.size))
        if why := fetch.begin():
            fetch.stop()
            log.debug("the lazy copy from task %d is made at once: %s", self.task.pid, why)
            return None
        return fetch

    def fill(self, destination: int, *, huge: int = 0, sparse: bool = False) -> bool:
        """As `Contents.fill`, as of one moment if the source is another task."""
        if self.task.is_current:
            return super().fill(destination, huge=huge, sparse=sparse)
        frozen = FrozenCopyOf(
            self.task, self.address, self.size, skip=self._skip, timeout=self._timeout, progress=self._progress
        )
        left_zero = frozen.fill(destination, huge=huge, sparse=sparse)
        self.holes, self.stopped_ns = frozen.holes, frozen.stopped_ns
        return left_zero

    def _why_not(self) -> str:
        """Return why the bytes cannot be fetched later, empty if they can."""
        if self._skip:
            return "unreadable bytes must be found"
        try:
            if not self.task.is_current or pidns.is_foreign():
                return "it is in another task"
            if self.size * _QUICK < procfs.status_bytes("VmRSS"):
                return "it is a small part of the memory that a snapshot contains"
            return _why_not_inherited(self.address, self.address + self.size) or _why_watched()
        except (OSError, KeyError) as error:
            return str(error)


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
    """

    def __init__(self, mapping: Mapping, source: int, samples: list[int]) -> None:
        self._start, self._end = mapping.address, mapping.address + mapping.size
        self._native = native.Fetcher(
            mapping,
            mapping.address,
            mapping.size,
            source,
            samples=samples,
            moves=huge_pages_enabled() and not numa.is_wanted(),
        )
        self._mapping = mapping

    def begin(self) -> str:
        """Create the snapshot and begin; return why that is not possible, empty if it is."""
        mman.advise(self._start, self._end - self._start, mman.MADV_DONTFORK)
        self._mapping.withhold(True)
        _fetching.add(self)
        try:
            self._native.start()
        except OSError as error:
            return error.strerror
        except BaseException:
            self.stop()
            raise
        if self._native.state == native.REFUSED and self._native.error == errno.ENODATA:
            return "forked children do not inherit it (MADV_DONTFORK or MADV_WIPEONFORK)"
        if self._native.state == native.REFUSED:
            return os.strerror(self._native.error)
        if self._native.state == native.LOST and not self._native.is_lazy:
            return "some of it cannot be read"
        return ""

    @property
    def is_over(self) -> bool:
        """Whether everything is fetched, and the snapshot has ended."""
        if self._native.state != native.COMPLETE:
            return False
        self.stop()
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
        self.require(0, self._end - self._start)

    def stop(self) -> None:
        """End the fetch: neither a thread nor a process remains. Idempotent."""
        self._native.stop()


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

    def __init__(self, size: int, contents: LazyCopyOf) -> None:
        super().__init__(size, wired=False, contents=contents)

    def _fill(self, contents: Contents | None, *, populated: bool) -> None:
        assert isinstance(contents, LazyCopyOf)
        numa.place(self.address, self.size)
        self._fetch = contents.begin(self.mapping)
        if self._fetch is None:
            mman.advise(self.address, self.size, mman.MADV_DONTNEED)  # what was fetched before it was found
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
        """Wait until everything is fetched. Raises as `Fetch.require`."""
        if fetch := self._pending():
            fetch.all()
            self._pending()

    def _pending(self) -> Fetch | None:
        """Return the fetch if something may still have to be fetched, or is lost."""
        fetch = self._fetch  # read once: another thread may find that it is over
        if fetch and fetch.is_over:
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

    def exported(self) -> tuple[Mapping, int]:
        """As `Backing.exported`; waits for everything if the page faults of system calls cannot be served."""
        if fetch := self._pending():
            if fetch.serves_kernel:
                fetch.require(0, 0)  # not in a forked child
            else:
                fetch.all()
        return super().exported()

    def close(self) -> None:
        """As `Backing.close`; ends the fetch."""
        self.seal()
        if fetch := self._pending():
            fetch.stop()
            self._fetch = None
        super().close()


def _why_not_inherited(address: int, end: int) -> str:
    """Return why a range of this process is not private memory that forked children inherit; empty if it may be."""
    at = address
    for area in procfs.areas("self", address, end):
        if area.start > at or not area.perms.startswith("r"):
            break
        if area.inode or area.perms[3] != "p" or (area.name and not area.name.startswith(_PRIVATE)):
            return f"it is not private anonymous memory ({area})"
        at = area.end
    return "" if at >= end else f"{at:#x} is not readable"


def _why_watched() -> str:
    """Return why missing pages of this process may not be zero; empty if they are.

    Another userfaultfd(2) may deliver them, but not to a snapshot. Which memory it serves is shown only by smaps,
    which takes half as long as the snapshot.
    """
    if not any(map(_is_userfault, Path("/proc/self/fd").iterdir())):
        return ""
    for area, flags in procfs.vm_flags():
        if flags & {"um", "ui"} and not any(one.overlaps(area.start, 1) for one in _fetching.all()):
            return f"a userfaultfd serves page faults of this process ({area})"
    return ""


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


def _is_userfault(descriptor: Path) -> bool:
    try:
        return str(descriptor.readlink()) == _USERFAULT
    except OSError:  # another thread has closed it
        return False
