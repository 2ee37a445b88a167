"""Mappings of an owner's memory, which several maps may share."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from iobmd._internal.weak_registry import WeakRegistry
from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.constants import IOMapOptions
from iobmd.descriptors.options import CACHE_MASK
from iobmd.errors import BadArgumentError, BusyError, CannotWireError, NoMemoryError, UnsupportedError
from iobmd.memory import pinning, residency, shmem
from iobmd.memory.populate import populate
from iobmd.remote.mapping import RemoteMapping, touch
from iobmd.units import PAGE_SIZE, round_up

if TYPE_CHECKING:
    from iobmd.descriptors.descriptor import IOMemoryDescriptor
    from iobmd.descriptors.ownership import MemoryOwner
    from iobmd.task.task import Task

ANYWHERE = int(IOMapOptions.kIOMapAnywhere)
_READ_ONLY = int(IOMapOptions.kIOMapReadOnly)
_UNIQUE = int(IOMapOptions.kIOMapUnique)
_PREFAULT = int(IOMapOptions.kIOMapPrefault)
_SMALL, _LARGE = int(IOMapOptions.kIOMapGuardedSmall), int(IOMapOptions.kIOMapGuardedLarge)
_GUARDS = {0: 0, _SMALL: PAGE_SIZE, _LARGE: round_up(64 << 10, PAGE_SIZE)}
_KNOWN = (
    ANYWHERE | _READ_ONLY | int(IOMapOptions.kIOMapReference) | _UNIQUE | _PREFAULT | CACHE_MASK | _SMALL | _LARGE
)


_CACHED = (int(IOMapOptions.kIOMapDefaultCache), int(IOMapOptions.kIOMapCopybackCache))
"""The cache modes of main memory: a process cannot map it otherwise, because the kernel and others map it cached."""


class MapRequest:
    """A checked request to map a part of an owner's memory.

    Offsets are relative to the memory's first byte, which need not be the first of a page. `first`, the offset of the
    first byte of the first page, may therefore be negative. `in_page` is the position of the byte at `offset` in its
    page.
    """

    def __init__(self, at_address: int, options: int, offset: int, length: int, in_page: int) -> None:
        self.options, self.offset, self.length = int(options), offset, length
        if self.options & ~_KNOWN:
            raise BadArgumentError(f"map options {self.options:#x} have unknown bits {self.options & ~_KNOWN:#x}")
        _check_cache_mode(self.options & CACHE_MASK)
        if not length:
            raise BadArgumentError("the length of a mapping must be positive")
        guarded = self.options & (_SMALL | _LARGE)
        if guarded not in _GUARDS or (guarded and not self.anywhere):
            raise BadArgumentError("kIOMapGuardedSmall and Large exclude each other, and require kIOMapAnywhere")
        self.guard = _GUARDS[guarded]
        self.first = offset - in_page
        self.size = round_up(in_page + length, PAGE_SIZE)
        self.at = 0 if self.anywhere else at_address - in_page
        if not self.anywhere and (self.at <= 0 or self.at % PAGE_SIZE or self.at + self.size > 1 << 63):
            raise BadArgumentError(
                f"offset {offset:#x} and address {at_address:#x} differ in their page offset; use kIOMapAnywhere"
            )

    @property
    def anywhere(self) -> bool:
        """Whether any address will do."""
        return bool(self.options & ANYWHERE)

    @property
    def unique(self) -> bool:
        """Whether it must have separate addresses."""
        return bool(self.options & _UNIQUE) or self.guard > 0

    @property
    def writable(self) -> bool:
        """Whether it is writable."""
        return not self.options & _READ_ONLY


class CachedMapping:
    """Pages of an owner's memory mapped in a task: at the owner's own addresses, or by a separate mapping.

    It holds the descriptor only for `IOMemoryMap.getMemoryDescriptor`. Views hold `keeper`, a list of only the owner,
    which `show` replaces, and not this object: the garbage collector does not traverse what a view holds, and could
    not collect a descriptor that refers to such a view.
    """

    def __init__(
        self,
        descriptor: IOMemoryDescriptor,
        owner: MemoryOwner,
        task: Task,
        request: MapRequest,
        own_mapping: Mapping | RemoteMapping | None,
    ) -> None:
        self.descriptor = descriptor
        self.keeper = [owner]
        self.task = task
        self.request = request
        self.offset = request.offset
        self.own = own_mapping
        self.users: set[int] = set()
        self.first = request.first if own_mapping else 0
        """Offset in the memory of the byte at `address`, like `MapRequest.first`."""
        _mappings.add(self)

    @classmethod
    def open(
        cls, descriptor: IOMemoryDescriptor, owner: MemoryOwner, task: Task, request: MapRequest
    ) -> CachedMapping:
        """Map pages of the memory, or use its own addresses if they satisfy the request (IOKit's static mapping)."""
        backing = owner.require_backing()
        accessible = not (request.writable and backing.mapped_read_only)
        if request.anywhere and not request.unique and backing.task == task and accessible:
            return cls(descriptor, owner, task, request, None)
        extents = backing.file_extents(request.offset, request.length)
        if task.is_current:
            here = shmem.show(extents, request.at, writable=request.writable, guard=request.guard)
            return cls(descriptor, owner, task, request, here)
        there = RemoteMapping(task, extents, at=request.at, writable=request.writable, guard=request.guard)
        return cls(descriptor, owner, task, request, there)

    @property
    def owner(self) -> MemoryOwner:
        """The owner of its memory."""
        return self.keeper[0]

    @property
    def address(self) -> int:
        """Its start address in its task."""
        return self.own.address if self.own else self.owner.require_backing().address

    @property
    def stopped_ns(self) -> int:
        """Upper bound of the time for which a thread of another task was stopped, in nanoseconds."""
        return self.own.stopped_ns if isinstance(self.own, RemoteMapping) else 0

    @property
    def mapping(self) -> tuple[Mapping, int]:
        """The mapping in this process, and the position of `first` in it.

        Raises `kIOReturnUnsupported` if it is in another task.
        """
        if isinstance(self.own, RemoteMapping):
            message = (
                f"this map is in task {self.task.pid}, and cannot be viewed here: use map() for a view of the memory"
            )
            raise UnsupportedError(message)
        return (self.own, 0) if self.own else self.owner.require_backing().exported()

    def serves(self, task: Task, request: MapRequest) -> bool:
        """Return whether it satisfies a request, by the rules of IOKit."""
        if self.own is None or not self.users or self.request.unique or request.unique or self.task != task:
            return False
        if self.request.writable != request.writable:
            return False
        if not self.first <= request.first or request.first + request.size > self.first + self.own.size:
            return False
        return request.anywhere or request.at == self.own.address + request.first - self.first

    def let_go(self, user: int) -> None:
        """End one use; the last one unmaps it, or the last view, if views exist that its maps have left."""
        if self.own and self.users <= {user}:
            try:
                self.own.close()
            except BusyError:  # of another task
                raise
            except BufferError:  # the views hold it
                pass
        self.users.discard(user)

    def show(self, descriptor: IOMemoryDescriptor, owner: MemoryOwner, further: int) -> None:
        """Map other memory; the offset of each byte increases by `further`."""
        assert self.own
        offset, length = self.offset + further, self.request.length
        backing = owner.require_backing()
        if offset < 0 or offset + length > owner.length:
            raise BadArgumentError(f"the new memory has fewer than {length} bytes at offset {offset}")
        if backing.in_page(offset) != self.offset - self.first:
            raise BadArgumentError(f"offset {offset} has another position in a page than the mapped memory")
        extents = backing.file_extents(offset, length)
        if isinstance(self.own, RemoteMapping):
            self.own.redirect(extents)
        else:
            shmem.show_in(self.own, extents)
        self.owner.remove_mapping(self)
        owner.add_mapping(self)
        self.descriptor, self.keeper[0] = descriptor, owner
        self.offset, self.first = offset, self.first + further

    def prefault(self, request: MapRequest) -> None:
        """Populate the pages of a request with `kIOMapPrefault`."""
        if not request.options & _PREFAULT:
            return
        address = self.address + request.first - self.first
        if not self.task.is_current:
            self._populate_here(address, request)
            touch(self.task, address, request.size)
            return
        residency.require(address, request.size, swappable=True, written=request.writable)
        advice = mman.MADV_POPULATE_WRITE if request.writable else mman.MADV_POPULATE_READ
        try:
            mman.advise(address, request.size, advice)
        except OSError as error:
            if error.errno == errno.EINVAL:  # before Linux 5.14
                self._touch(address, request)
                return
            message = f"cannot populate {request.size} bytes ({error}); omit kIOMapPrefault"
            raise NoMemoryError(message, error.errno or 0) from None

    def _populate_here(self, address: int, request: MapRequest) -> None:
        """Populate the pages in this process, which is charged for them, so that the other task only maps them."""
        try:
            extents = self.owner.require_backing().file_extents(request.offset, request.length)
        except UnsupportedError:  # memory of the task itself
            residency.require(address, request.size, swappable=True, task=self.task, written=False)
            return
        here = shmem.show(extents)
        try:
            residency.require(here.address, here.size, swappable=True)
            populate(here.address, here.size)
        finally:
            here.close()

    def _touch(self, address: int, request: MapRequest) -> None:
        """Populate as many pages as possible, without losing a concurrent write of another thread."""
        if request.writable and self.own is None:
            # It may be private: a pin allocates each page, whereas a read maps the kernel's zero page.
            with contextlib.suppress(CannotWireError):
                pinning.Pin(address, request.size).release()
        touch(self.task, address, request.size)


def _check_cache_mode(mode: int) -> None:
    if mode > int(IOMapOptions.kIOMapPostedCombinedReordered):
        raise BadArgumentError(f"unknown cache mode {mode:#x}")
    if mode not in _CACHED:
        message = (
            f"Linux maps main memory only with kIOMapCopybackCache, not with cache mode {mode:#x}: allocate the "
            "buffer with that mode, so that its copies use cache line instructions"
        )
        raise UnsupportedError(message)


_mappings: WeakRegistry[CachedMapping] = WeakRegistry()


def all_mappings() -> list[CachedMapping]:
    """Return the mappings that exist, of every owner."""
    return _mappings.all()
