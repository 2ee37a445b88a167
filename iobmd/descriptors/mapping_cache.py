"""Mappings of an owner's memory, which several maps may share."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from iobmd._internal.weak_registry import WeakRegistry
from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.constants import IOMapOptions
from iobmd.descriptors.mapped_pages import pages
from iobmd.descriptors.options import CACHE_MASK
from iobmd.errors import BadArgumentError, BusyError, CannotWireError, NoMemoryError, UnsupportedError
from iobmd.memory import pinning, residency, shmem
from iobmd.memory.mlock import Wiring
from iobmd.memory.populate import populate
from iobmd.remote.mapping import RemoteMapping, touch
from iobmd.units import PAGE_SIZE, round_up

if TYPE_CHECKING:
    from iobmd.backing import Backing
    from iobmd.descriptors.descriptor import IOMemoryDescriptor
    from iobmd.descriptors.ownership import MemoryOwner
    from iobmd.memory.shmem import FileExtent
    from iobmd.task.task import Task

ANYWHERE = int(IOMapOptions.kIOMapAnywhere)
_READ_ONLY = int(IOMapOptions.kIOMapReadOnly)
_UNIQUE = int(IOMapOptions.kIOMapUnique)
_PREFAULT = int(IOMapOptions.kIOMapPrefault)
_SMALL, _LARGE = int(IOMapOptions.kIOMapGuardedSmall), int(IOMapOptions.kIOMapGuardedLarge)
_GUARDS = {0: 0, _SMALL: PAGE_SIZE, _LARGE: round_up(64 << 10, PAGE_SIZE)}
_REFERENCE, _OVERWRITE = int(IOMapOptions.kIOMapReference), int(IOMapOptions.kIOMapOverwrite)
_STATIC = int(IOMapOptions.kIOMapStatic)
_KNOWN = ANYWHERE | _READ_ONLY | _REFERENCE | _UNIQUE | _PREFAULT | _OVERWRITE | CACHE_MASK | _SMALL | _LARGE


class MapRequest:
    """A checked request to map a part of an owner's memory.

    Offsets are relative to the memory's first byte, which need not be the first of a page. `first`, the offset of the
    first byte of the first page, may therefore be negative. `in_page` is the position of the byte at `offset` in its
    page. `copies`: whether to map a copy of the bytes instead of the memory.
    """

    def __init__(
        self, at_address: int, options: int, offset: int, length: int, in_page: int, *, copies: bool = False
    ) -> None:
        self.options, self.offset, self.length, self.copies = int(options), offset, length, copies
        if self.options & _STATIC:
            raise UnsupportedError(
                "kIOMapStatic records a mapping that exists: describe it with withAddressRange() instead"
            )
        if self.options & ~_KNOWN:
            raise BadArgumentError(f"map options {self.options:#x} have unknown bits {self.options & ~_KNOWN:#x}")
        if (mode := self.options & CACHE_MASK) > int(IOMapOptions.kIOMapPostedCombinedReordered):
            raise BadArgumentError(f"unknown cache mode {mode:#x}")
        if not length:
            raise BadArgumentError("the length of a mapping must be positive")
        guarded = self.options & (_SMALL | _LARGE)
        if guarded not in _GUARDS or (guarded and not self.anywhere):
            raise BadArgumentError("kIOMapGuardedSmall and Large exclude each other, and require kIOMapAnywhere")
        if self.overwrites and self.anywhere:
            raise BadArgumentError("kIOMapOverwrite replaces memory at an address, and excludes kIOMapAnywhere")
        if self.refers and (self.unique_by_option or self.overwrites or copies):
            raise BadArgumentError("kIOMapReference refers to an existing map: it excludes new addresses and copies")
        self.guard = _GUARDS[guarded]
        self.first = offset - in_page
        self.size = round_up(in_page + length, PAGE_SIZE)
        self.at = 0 if self.anywhere else at_address - in_page
        if not self.anywhere and not at_address:
            raise BadArgumentError("nothing can be mapped at address 0; use kIOMapAnywhere")
        if not self.anywhere and (self.at <= 0 or self.at % PAGE_SIZE or self.at + self.size > 1 << 63):
            raise BadArgumentError(
                f"offset {offset:#x} and address {at_address:#x} differ in their page offset; use kIOMapAnywhere"
            )

    def require_cache(self, backing: Backing) -> None:
        """Raise `kIOReturnUnsupported` if the memory, or its copy, is not mapped with the requested cache mode.

        Processes can map main memory only as cached memory, because the kernel and other processes map it cached.
        """
        mode = self.options & CACHE_MASK
        available = IOMapOptions.kIOMapCopybackCache if self.copies else backing.cache_mode
        if mode in (int(IOMapOptions.kIOMapDefaultCache), int(available)):
            return
        remedy = (
            "allocate the buffer with that mode, so that its copies use cache line instructions"
            if available == IOMapOptions.kIOMapCopybackCache
            else "describe it with that mode (IODeviceMemory.ofPCI, write_combine)"
        )
        raise UnsupportedError(
            f"Linux maps this memory only with {available.name}, not with mode {mode:#x}: {remedy}"
        )

    @property
    def anywhere(self) -> bool:
        """Whether any address will do."""
        return bool(self.options & ANYWHERE)

    @property
    def unique_by_option(self) -> bool:
        """Whether its options require separate addresses."""
        return bool(self.options & (_UNIQUE | _SMALL | _LARGE))

    @property
    def unique(self) -> bool:
        """Whether it must have separate addresses."""
        return self.unique_by_option or self.copies

    @property
    def refers(self) -> bool:
        """Whether it must be an additional reference to an existing map."""
        return bool(self.options & _REFERENCE)

    @property
    def overwrites(self) -> bool:
        """Whether it replaces reserved address space."""
        return bool(self.options & _OVERWRITE)

    @property
    def writable(self) -> bool:
        """Whether it is writable."""
        return not self.options & _READ_ONLY

    @property
    def prefaults(self) -> bool:
        """Whether its pages are populated."""
        return bool(self.options & _PREFAULT)

    def uses_addresses_of(self, backing: Backing, task: Task) -> bool:
        """Return whether the memory's own addresses satisfy it (IOKit's static mapping)."""
        accessible = not (self.writable and backing.mapped_read_only)
        return self.anywhere and not self.unique and backing.task == task and accessible


class CachedMapping:
    """Pages of an owner's memory mapped in a task: at the owner's own addresses, or by a separate mapping.

    It holds the descriptor only for `IOMemoryMap.getMemoryDescriptor`. Views do not hold this object, but `keeper`, a
    list that contains only the owner, which `show` replaces. The reason is that the garbage collector does not
    traverse what a view holds, and could not collect a descriptor that refers to such a view.
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
        self.is_copy = False
        self.source_stopped_ns = 0
        self.first = request.first if own_mapping else 0
        """Offset in the memory of the byte at `address`, like `MapRequest.first`."""
        _mappings.add(self)

    @classmethod
    def open(
        cls, descriptor: IOMemoryDescriptor, owner: MemoryOwner, task: Task, request: MapRequest
    ) -> CachedMapping:
        """Map pages of the memory or of a copy, or use its own addresses if they satisfy the request."""
        if request.overwrites and not task.is_current:
            message = (
                f"kIOMapOverwrite replaces address space of this process, not of task {task.pid}: its threads could "
                "map memory there at the same time, which would be lost; omit it, and unmap the reservation there"
            )
            raise UnsupportedError(message)
        if request.uses_addresses_of(owner.require_backing(), task):
            return cls(descriptor, owner, task, request, None)
        with pages(owner, request, task) as source:
            if task.is_current:
                own: Mapping | RemoteMapping = shmem.show(
                    source.extents,
                    request.at,
                    writable=request.writable,
                    guard=request.guard,
                    overwrite=request.overwrites,
                )
            else:
                own = RemoteMapping(
                    task, source.extents, at=request.at, writable=request.writable, guard=request.guard
                )
        mapping = cls(descriptor, owner, task, request, own)
        mapping.is_copy, mapping.source_stopped_ns = request.copies, source.stopped_ns
        return mapping

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
        stopped = self.own.stopped_ns if isinstance(self.own, RemoteMapping) else 0
        return max(stopped, self.source_stopped_ns)

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
        if not self.users or self.request.unique or request.unique or self.task != task:
            return False
        if self.own is None:
            return request.uses_addresses_of(self.owner.require_backing(), task)
        if self.request.writable != request.writable:
            return False
        if not self.first <= request.first or request.first + request.size > self.first + self.own.size:
            return False
        return request.anywhere or request.at == self.own.address + request.first - self.first

    def end_use(self, user: int) -> None:
        """End one use. It is unmapped at the end of its last use, or of the last view if views remain."""
        if self.own and self.users <= {user}:
            try:
                self.own.close()
            except BusyError:  # of another task
                raise
            except BufferError:  # the views hold it
                pass
        self.users.discard(user)

    def show(self, descriptor: IOMemoryDescriptor, owner: MemoryOwner, further: int, *, copies: bool) -> None:
        """Map other memory, or a copy of it; the offset of each byte increases by `further`."""
        assert self.own
        offset, length = self.offset + further, self.request.length
        backing = owner.require_backing()
        if offset < 0 or offset + length > owner.length:
            raise BadArgumentError(f"the new memory has fewer than {length} bytes at offset {offset}")
        if backing.in_page(offset) != self.offset - self.first:
            raise BadArgumentError(f"offset {offset} has another position in a page than the mapped memory")
        if backing.has_guard_pages(offset, length):
            raise UnsupportedError("a map that may be viewed cannot be redirected to memory with guard pages")
        request = MapRequest(0, ANYWHERE, offset, length, self.offset - self.first, copies=copies)
        with pages(owner, request, self.task) as source:
            if isinstance(self.own, RemoteMapping):
                self.own.redirect(source.extents)
            else:
                shmem.show_in(self.own, source.extents)
        self.owner.remove_mapping(self)
        owner.add_mapping(self)
        self.descriptor, self.keeper[0] = descriptor, owner
        self.is_copy, self.source_stopped_ns = copies, source.stopped_ns
        self.offset, self.first = offset, self.first + further

    def prefault(self, request: MapRequest) -> None:
        """Populate the pages of a request with `kIOMapPrefault`, except guard pages."""
        if not request.prefaults or (not self.is_copy and self.owner.require_backing().wiring is Wiring.DEVICE):
            return  # reading memory of a device may have effects, and its page tables are complete
        address, size = self.address + request.first - self.first, request.size
        extents = None if self.is_copy else self._extents(request)
        if not (self.task.is_current or self.is_copy):
            self._populate_here(extents, address, size)
        for start, length in shmem.accessible(extents, address) if extents else [(address, size)]:
            if self.task.is_current:
                self._populate(start, length, written=request.writable)
            else:
                touch(self.task, start, length)

    def _extents(self, request: MapRequest) -> list[FileExtent] | None:
        """Return the pages of a request; None for private memory at its own addresses."""
        try:
            return self.owner.require_backing().file_extents(request.offset, request.length)
        except UnsupportedError:
            return None

    def _populate_here(self, extents: list[FileExtent] | None, address: int, size: int) -> None:
        """Populate pages in this process, which is charged for them, so that the other task only maps them."""
        if extents is None:  # memory of the task itself
            residency.require(address, size, swappable=True, task=self.task, written=False)
        elif files := [extent for extent in extents if extent.fd]:
            here = shmem.show(files)
            try:
                residency.require(here.address, here.size, swappable=True)
                populate(here.address, here.size)
            finally:
                here.close()

    def _populate(self, address: int, size: int, *, written: bool) -> None:
        residency.require(address, size, swappable=True, written=written)
        advice = mman.MADV_POPULATE_WRITE if written else mman.MADV_POPULATE_READ
        try:
            mman.advise(address, size, advice)
        except OSError as error:
            if error.errno == errno.EINVAL:  # before Linux 5.14
                self._touch(address, size, written=written)
                return
            message = f"cannot populate {size} bytes ({error}); omit kIOMapPrefault"
            raise NoMemoryError(message, error.errno or 0) from None

    def _touch(self, address: int, size: int, *, written: bool) -> None:
        """Populate as many pages as possible, without losing a concurrent write of another thread."""
        if written and self.own is None:
            # It may be private: a pin allocates each page, whereas a read maps the kernel's zero page.
            with contextlib.suppress(CannotWireError):
                pinning.Pin(address, size).release()
        touch(self.task, address, size)


_mappings: WeakRegistry[CachedMapping] = WeakRegistry()


def all_mappings() -> list[CachedMapping]:
    """Return the mappings that exist, of every owner."""
    return _mappings.all()
