"""`IOMemoryDescriptor`: the operations common to all memory descriptors."""

from __future__ import annotations

import contextlib
import os
import warnings
from array import array
from functools import partial
from operator import index
from typing import TYPE_CHECKING, Self, SupportsIndex, cast, overload

from iobmd._internal import with_block
from iobmd._internal.arguments import check_integers, offset_of
from iobmd.backing.ranges import RangeBacking
from iobmd.constants import (
    IOMapOptions,
    IOOptionBits,
    IOPurgeable,
    IOReturn,
    kIODirectionPrepareNoFault,
    kIODirectionPrepareToPhys32,
    kIOMemoryIncoherentIOFlush,
    kIOMemoryIncoherentIOStore,
    kIOReturnSuccess,
)
from iobmd.descriptors import address_index, mapping_cache, memory_map
from iobmd.descriptors.composite_memory import CompositeBacking
from iobmd.descriptors.options import CACHE_MODES, DIRECTION_MASK, DIRECTION_NAMES, check_existing
from iobmd.descriptors.ownership import MemoryOwner, Part
from iobmd.descriptors.purge_control import NonVolatile
from iobmd.errors import BadArgumentError, BusyError, IOReturnError, NotOpenError, UnsupportedError
from iobmd.physical.layout import Layout, layout
from iobmd.purgeable import parse
from iobmd.task.task import as_task, check_range, kernel_task
from iobmd.units import PAGE_SIZE, round_down

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from typing_extensions import Buffer

    from iobmd._native.pagemap import PhysicalSegment
    from iobmd.backing import Backing
    from iobmd.descriptors.memory_map import IOMemoryMap
    from iobmd.memory.mlock import Wiring
    from iobmd.task.task import AnyTask, Task

_IN = int(IOOptionBits.kIODirectionIn)

_STATES = {int(state): state for state in (
    IOPurgeable.kIOMemoryPurgeableNonVolatile,
    IOPurgeable.kIOMemoryPurgeableVolatile,
    IOPurgeable.kIOMemoryPurgeableEmpty,
)}  # fmt: skip


class IOMemoryDescriptor:
    """A range of memory with a length, a direction and a task, created by `withAddressRange` or a subclass.

    Methods may be called from any thread. Memory is never freed during a copy: `free` is refused, and memory that is
    mapped in no task is freed at the end of the copy. In a forked child a wired descriptor is unusable, because
    mlock(2) is not inherited and the child's copy of the memory is not wired. A pageable descriptor works in the
    child, with its copy-on-write memory, or with the same memory if it is a shared object.
    """

    vm_tags = (0, 0)
    """The `kernTag` and `userTag` of its creation, or those of `setVMTags`."""

    _owner: MemoryOwner | None = None
    _options = 0
    _tag = 0
    _context: object = None
    _prepared = 0  # how often by this handle; its owner counts all pins
    _state = "not initialised"

    # --- existing memory

    @classmethod
    def withAddressRange(cls, address: int, length: int, options: int, task: AnyTask) -> IOMemoryDescriptor:
        """Describe `length` bytes of existing memory at `address` of a task, like `withAddressRanges`."""
        return cls.withAddressRanges([(address, length)], options, task)

    @classmethod
    def withAddressRanges(cls, ranges: Iterable[tuple[int, int]], options: int, task: AnyTask) -> IOMemoryDescriptor:
        """Describe existing memory of a task: ranges of its addresses, in this order.

        It can be read, written, prepared and described. Memory of an iobmd buffer is recognized by its addresses: it
        is retained by this descriptor, read and written as through its own descriptor, and can be mapped if it is
        shared. All other memory belongs to its task, which must keep it mapped.

        Parameters
        ----------
        ranges : iterable of (int, int)
            Addresses and lengths in bytes; ranges of length 0 are ignored.
        options : IOOptionBits
            The direction of transfers. `kIODirectionIn` and `kIODirectionInOut` require writable memory.
        task : Task, int or psutil.Process
            The task to which the addresses belong.

        Returns
        -------
        IOMemoryDescriptor
            Free it, or use it in a `with` block, to release the memory at a definite time.

        Raises
        ------
        IOReturnError
            `kIOReturnVMError`: a byte is not mapped or not accessible (`.address`: the first such byte).
            `kIOReturnBadArgument`, `kIOReturnNotFound`, `kIOReturnNotPermitted`.

        Notes
        -----
        `prepare` pins memory of this process. Memory of another task is pinned through an io_uring that is created
        there and whose descriptor is moved to this process; if that is not possible, it is made resident (mlock(2),
        called there). Memory that the kernel does not pin remains unprepared: `kIOReturnCannotWire` for read-only
        memory and shared mappings of files on a disk (in another task these are locked), `kIOReturnUnsupported` for
        device memory and memfd_secret(2), `kIOReturnVMError` past the end of a file and in guard pages; `.address` is
        the first such byte. Accesses to memory that was unmapped raise `kIOReturnVMError`, and are safe at any time.
        """
        options = check_existing(options)
        where = as_task(task)
        where = kernel_task if where.is_current else where
        found = list(_found(where, ranges, writable=bool(options & _IN)))
        length = sum(one.length for one in found)
        if len(found) == 1 and isinstance(found[0], RangeBacking):
            return IOMemoryDescriptor()._hold(found[0], options, length)
        return IOMemoryDescriptor()._hold(CompositeBacking([_as_part(one) for one in found]), options, length)

    def _hold(self, backing: Backing, options: int, length: int) -> Self:
        """Initialize as the handle of memory."""
        self._owner = MemoryOwner(backing, length, type(self).__name__)
        self._options = options
        self._state = "open"
        return self

    # --- its properties

    def getLength(self) -> int:
        """Return the length in bytes."""
        return self._usable_memory().length

    def getDirection(self) -> IOOptionBits:
        """Return the direction of transfers: `kIODirectionNone`, `In`, `Out` or `InOut`."""
        self._usable_memory()
        return IOOptionBits(self._options & DIRECTION_MASK)

    def getFlags(self) -> IOOptionBits:
        """Return the options of its creation, with the present direction."""
        self._usable_memory()
        return IOOptionBits(self._options)

    def getTag(self) -> int:
        """Return the number set by `setTag`, 0 at first."""
        return self._tag

    def setTag(self, tag: int) -> None:
        """Store a number for the caller."""
        check_integers(tag=tag)
        self._tag = tag

    def setContext(self, obj: object) -> None:
        """Store an object for the caller, replacing the previous one; None removes it."""
        self._context = obj

    def copyContext(self) -> object:
        """Return the object stored by `setContext`, or None."""
        return self._context

    def setVMTags(self, kernTag: int, userTag: int) -> None:
        """Store the tags of later mappings in `kernel_task` and in other tasks. Existing mappings are unchanged."""
        check_integers(kernTag=kernTag, userTag=userTag)
        self.vm_tags = (kernTag, userTag)

    # --- its bytes

    def readBytes(self, offset: int, length: int) -> bytes:
        """Return `length` bytes, starting at `offset`.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument` if the range exceeds the descriptor's length.
        """
        return self._memory().read(offset, length)

    def readBytesInto(self, offset: int, buffer: Buffer) -> int:
        """Fill the writable `buffer` with the bytes at `offset`; return its size in bytes. Raises as `readBytes`."""
        return self._memory().read_into(offset, buffer)

    def writeBytes(self, offset: int, data: Buffer) -> int:
        """Copy all of `data` to `offset`; return its size in bytes. Raises as `readBytes`, before writing."""
        return self._memory().write(offset, data)

    @property
    def cache_mode(self) -> tuple[IOMapOptions, IOMapOptions]:
        """The requested and the effective cache mode.

        The effective mode is `kIOMapCopybackCache`, the only one that Linux offers for main memory. Reads and writes
        through the descriptor nevertheless honor the requested mode, by cache line instructions; accesses through a
        view do not.
        """
        self._usable_memory()
        return IOMapOptions(self._options & CACHE_MODES), IOMapOptions.kIOMapCopybackCache

    def performOperation(self, options: int, offset: int, length: int) -> IOReturn:
        """Make the processor caches and the memory of a range consistent, for a device that does not snoop them.

        Parameters
        ----------
        options : int
            `kIOMemoryIncoherentIOStore`: write lines back, before a device reads. `kIOMemoryIncoherentIOFlush`: also
            invalidate them, before data that a device wrote is read.
        offset, length : int
            The range in bytes; all lines that contain a byte of it are affected.

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: the range exceeds the length. `kIOReturnUnsupported`: another operation, or a
            processor without such instructions. `kIOReturnVMError`: the memory is not mapped, or was unmapped during
            the operation; `.address` is the first such byte. `kIOReturnNoResources`: no child process can be created.

        Notes
        -----
        Uses clwb, clflushopt or clflush, the best that the processor supports, and mfence; on aarch64 DC CVAC or DC
        CIVAC, and DSB. Absent pages are faulted in. Existing memory, and shared memory that cannot be sealed, may be
        unmapped at any time: a child process that shares the address space (clone(2), CLONE_VM) flushes it, which
        takes 23 to 50 µs longer, and a fault ends only the child.
        """
        owner = self._memory()
        check_integers(options=options)
        if options not in (kIOMemoryIncoherentIOFlush, kIOMemoryIncoherentIOStore):
            raise UnsupportedError(f"unknown operation {options:#x}")
        owner.write_back(offset, length, drop=options == kIOMemoryIncoherentIOFlush)
        return kIOReturnSuccess

    # --- pins

    def prepare(self, forDirection: int = 0) -> IOReturn:
        """Pin the memory for a transfer, so that its physical addresses are valid until `complete`.

        Calls are counted, in pairs with `complete`, from any thread. For memory that is pinned by its options, only
        the count changes. A descriptor cannot be freed while it is prepared.

        Parameters
        ----------
        forDirection : int
            0 for the descriptor's own direction, or directions of the transfer, with `kIODirectionPrepareNoFault`
            (fail instead of faulting in pages) and `kIODirectionPrepareToPhys32` (fail for memory above 4 GiB).

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            `kIOReturnCannotWire` if pinning is impossible or exceeds a limit; `kIOReturnBadArgument`;
            `kIOReturnNoResources` for memory above 4 GiB, or an exhausted hugetlb pool; `kIOReturnNotReady` for
            volatile memory; for existing memory `kIOReturnVMError` and `kIOReturnUnsupported`, as
            `withAddressRanges`. After an error, nothing is prepared.
        """
        owner = self._memory()
        check_integers(forDirection=forDirection)
        if forDirection & ~(DIRECTION_MASK | kIODirectionPrepareToPhys32 | kIODirectionPrepareNoFault):
            raise BadArgumentError(f"direction {forDirection:#x} has unknown bits")
        with owner.guard:
            self._memory()  # read again: another thread may have released it
            owner.pin(forDirection)
            self._prepared += 1
        return kIOReturnSuccess

    def complete(self, forDirection: int = 0) -> IOReturn:  # noqa: ARG002 (IOKit's)
        """Undo one `prepare`; after the last one the kernel may move the memory again.

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady` if it is not prepared.
        """
        owner = self._memory()
        with owner.guard:
            self._memory()  # as above
            owner.unpin()
            self._prepared = max(self._prepared - 1, 0)
        return kIOReturnSuccess

    @property
    def wiring(self) -> Wiring:
        """Whether the memory is pageable, resident or pinned."""
        return self._memory().wiring

    # --- its addresses

    def getPhysicalAddress(self) -> int:
        """Return the physical address of the first byte. Raises as `segments`."""
        return self.getPhysicalSegment(0)[0]

    def getPhysicalSegment(self, offset: int, options: int = 0) -> tuple[int, int]:  # noqa: ARG002 (IOKit's)
        """Return the physical address of the byte at `offset`, and the number of contiguous bytes from there.

        `(0, 0)` for an offset past the end. Raises as `segments`.
        """
        return self._memory().segment(offset)

    def segments(self, offset: int = 0, length: int | None = None) -> list[PhysicalSegment]:
        """Return the physically contiguous segments of a range, each with `.address` and `.length` in bytes.

        Parameters
        ----------
        offset, length : int
            The range in bytes; `length` None: to the end.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: the memory is not pinned, so that addresses could change; `prepare()` pins it.
            `kIOReturnNotPrivileged`: the kernel hides the addresses. `kIOReturnBadArgument`: past the end.
        """
        owner = self._memory()
        check_integers(offset=offset)
        return owner.segments(offset, owner.length - offset if length is None else length)

    def page_addresses(self, offset: int = 0, length: int | None = None) -> array[int]:
        """Return the physical address of each page that contains bytes of a range, for devices with page lists.

        Parameters
        ----------
        offset, length : int
            The range in bytes; `length` None: to the end.

        Returns
        -------
        array.array
            Of type "Q" (64 bits, in the byte order of this processor): the addresses of pages of
            sysconf(_SC_PAGESIZE) bytes, in the order of the bytes. The first byte of the range is in the first page,
            at the offset `getPhysicalSegment(offset)[0] % PAGE_SIZE`. If a concatenation leaves a page and returns to
            it, the page occurs twice.

        Raises
        ------
        IOReturnError
            As `segments`.
        """
        addresses = array("Q")
        for start, size in self.segments(offset, length):
            addresses.extend(range(round_down(start, PAGE_SIZE), start + size, PAGE_SIZE))
        return addresses

    def layout(self) -> Layout:
        """Summarize the physical layout: runs, the largest run, contiguity, huge pages. Raises as `segments`."""
        owner = self._memory()
        return layout(owner.runs(), owner.require_backing().huge_bytes())

    def verify(self) -> None:
        """Verify that the memory is still mapped, and that every page is still in its recorded frame.

        Raises
        ------
        IOReturnError
            `kIOReturnVMError`: a page has moved, or the program has unmapped or replaced it; `.address` is the
            virtual address of the first one. Or as `segments`.

        Notes
        -----
        Private memory that was replaced by other private memory is detected only if it is pinned and its frames are
        visible; otherwise the kernel shows no difference. Shared objects are identified by device and inode.
        """
        self._memory().verify()

    def getPageCounts(self) -> tuple[int, int]:
        """Return how many pages are resident, and how many of those are dirty, according to the kernel.

        A dirty page has been written to, and not lazily freed since. All pages of a shared object are dirty, because
        it has no file.
        """
        owner = self._memory()
        with owner.guard:
            return owner.require_backing().page_counts()

    def getDMAMapLength(self) -> tuple[int, int]:
        """Return the size of the pages that contain the memory, and the offset of its first byte in its page.

        Pages are counted range by range: a page that contains bytes of two ranges counts twice.
        """
        owner = self._memory()
        backing = owner.require_backing()
        return backing.span(0, owner.length), backing.in_page(0)

    # --- maps

    def map(self, options: int = 0) -> IOMemoryMap:
        """Map the memory in this process, like `createMappingInTask` with `kIOMapAnywhere`."""
        check_integers(options=options)
        return self.createMappingInTask(kernel_task, 0, options | mapping_cache.ANYWHERE)

    def createMappingInTask(
        self,
        intoTask: AnyTask,
        atAddress: int,
        options: int,
        offset: int = 0,
        length: int = 0,
    ) -> IOMemoryMap:
        """Map the memory, or a part of it, in a task: this process or another.

        Parameters
        ----------
        intoTask : Task, int or psutil.Process
            The task to map it in.
        atAddress : int
            The address, without `kIOMapAnywhere`. Nothing may be mapped there, and its offset in a page must be that
            of `offset`.
        options : IOMapOptions
            `kIOMapAnywhere`; `kIOMapReadOnly`; `kIOMapUnique` for separate addresses; `kIOMapPrefault` to populate
            the map; `kIOMapGuardedSmall` or `Large` for an inaccessible page or 64 KiB on each side.
        offset, length : int
            The part to map, in bytes; `length` 0: to the end.

        Returns
        -------
        IOMemoryMap
            A map with the addresses of the descriptor itself, or of an existing mapping, if those satisfy the request
            (not unique, not guarded, anywhere), as in IOKit.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`; `kIOReturnNoResources`: the address is in use; `kIOReturnUnsupported`: a cache
            mode, or private memory at a second address; `kIOReturnNoMemory`. For another task also
            `kIOReturnNotPermitted`, `kIOReturnNotFound` and `kIOReturnTimeout`: it cannot be stopped.

        Notes
        -----
        One thread of another task is stopped for about a tenth of a millisecond (ptrace(2)), and then resumes.
        """
        check_integers(atAddress=atAddress, options=options, offset=offset, length=length)
        task = as_task(intoTask)
        owner = self._usable_memory()
        length = length or owner.length - offset
        owner.require_range(offset, length)
        with owner.guard:
            self._memory()  # read again: another thread may have released it
            in_page = owner.require_backing().in_page(offset)
            request = mapping_cache.MapRequest(atAddress, options, offset, length, in_page)
            return memory_map.open_map(self, owner, task, request)

    # --- its purgeable state

    def setPurgeable(self, newState: int) -> IOPurgeable:
        """Set the purgeable state of memory allocated with `kIOMemoryPageable | kIOMemoryPurgeable`.

        Parameters
        ----------
        newState : IOPurgeable
            `kIOMemoryPurgeableKeepCurrent`: only return the state. `kIOMemoryPurgeableNonVolatile`: retain the
            contents. `kIOMemoryPurgeableVolatile`: the system may reclaim the memory, all or nothing, when memory is
            short; optionally combined with `…VolatileGroup0` to `7`, `…VolatileBehaviorFifo` or `Lifo`, or
            `…VolatileOrderingObsolete`, which drops private memory immediately. `kIOMemoryPurgeableEmpty`: drop the
            contents.

        Returns
        -------
        IOPurgeable
            The previous state: NonVolatile, Volatile or Empty. If a change to NonVolatile returns Volatile, every
            byte is intact and remains so. Empty: the memory was reclaimed, and every byte reads zero until it is
            written to; the state remains Empty until it is set again.

        Raises
        ------
        IOReturnError
            `kIOReturnUnsupported`: not allocated as purgeable, or not supported by the kernel. `kIOReturnBusy`:
            prepared memory cannot become Volatile or Empty. `kIOReturnCannotWire`: a change from Volatile must lock
            at least a page (RLIMIT_MEMLOCK). `kIOReturnBadArgument`. After an error the state is unchanged.

        Notes
        -----
        Private memory is lazily freed (madvise(2), MADV_FREE, Linux 4.5): the kernel reclaims it page by page, and it
        counts as resident until then (`lazily_freed`). The state of a shared object (`kIOMemoryKernelUserShared`) is
        stored in the object, so that all processes that map it agree; a thread of iobmd purges it under memory
        pressure.

        Volatile memory may be read; reclaimed pages read as zeros. `writeBytes` and `appendBytes` may be used. A
        store through a memoryview or an address makes private memory count as lost, because it cannot be
        distinguished from a store to a reclaimed page. In a forked child, private memory that was volatile counts as
        lost once the parent has made it non-volatile. Calls from several threads are serialized.
        """
        state, modifiers = parse(newState)
        return _STATES[self._memory().set_purgeable(state, modifiers)]

    def nonvolatile(self) -> NonVolatile:
        """Keep purgeable memory non-volatile inside a `with` block; it then becomes volatile again if it was before.

        The block receives True if the contents are intact, and False if they were lost and must be filled again
        inside the block. If that raises an exception, the memory remains Empty. Several threads may be inside at the
        same time; the last to leave makes the memory volatile. Until one that received False has left without an
        exception, all receive False; use a separate lock to decide which of them refills it.

        Raises
        ------
        IOReturnError
            As `setPurgeable`.
        """
        return NonVolatile(self._usable_memory())

    @property
    def lazily_freed(self) -> int:
        """Bytes of volatile private memory that the kernel may reclaim at any time (LazyFree in smaps).

        They still count as resident: RSS shrinks only when the kernel reclaims them.
        """
        return self._memory().lazily_freed()

    # --- its end

    def free(self) -> None:
        """Release the memory; the descriptor is unusable afterwards. Idempotent.

        Leaving a `with` block also releases the descriptor while views or arrays of it exist; the memory is freed
        with the last of them. It raises only if the memory is prepared or mapped and the block has raised nothing:
        the exception of a block is never replaced.

        Memory with dependents (`IOSubMemoryDescriptor`, `IOMultiMemoryDescriptor`, descriptors of ranges of its
        addresses) is freed with the last of them.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while it is prepared or mapped, a `memoryview` of it exists, or a copy is in progress:
            nothing is freed.
        """
        self._release(in_use=False)

    def _release(self, *, in_use: bool) -> None:
        """Release the memory as `free`; `in_use`: even while it is viewed, by views that hold the owner."""
        owner = self._owner
        if owner is None:
            return
        with owner.guard:
            if owner.has_handle:  # otherwise another thread was faster
                if mapped := memory_map.uses(owner):
                    raise BusyError(f"{self!r} is still mapped (map count {mapped}): call unmap() first")
                if not in_use and (views := self._views()):
                    raise BusyError(
                        f"{self!r} is in use (view count {views}): release its memoryviews and arrays first"
                    )
                owner.remove_handle(in_use=in_use)
        self._owner, self._state = None, "released"

    release = free

    def _views(self) -> int:
        """Return the number of existing views of a buffer's memory."""
        return 0

    def _memory(self) -> MemoryOwner:
        """Return its memory, for the modules of this package, `dma` and `iommu`. Raises `kIOReturnNotOpen`."""
        owner = self._owner  # read once: another thread may release it
        if owner is None or not owner.has_handle:
            raise NotOpenError(f"this {type(self).__name__} is {self._state}")
        return owner

    def _usable_memory(self) -> MemoryOwner:
        """Return its memory as `_memory`, and check that this process may use it after a fork."""
        owner = self._memory()
        owner.require_backing()
        return owner

    def __repr__(self) -> str:
        name, owner = type(self).__name__, self._owner  # read once, as above
        if owner is None:
            return f"<{name} {self._state}>"
        direction = DIRECTION_NAMES[self._options & DIRECTION_MASK]
        return f"<{name}, length {owner.length}, direction {direction}, {self._state}>"

    def __reduce_ex__(self, _protocol: SupportsIndex) -> str | tuple[object, ...]:
        owner = self._owner
        if owner and owner.backing and owner.backing.shared:
            remedy = (
                "use iobmd.share to pass it to a process that calls iobmd.attach, or withCopy to copy it; "
                "multiprocessing passes it without further calls"
            )
        else:
            remedy = "use withCopy to copy it; iobmd.share passes shared memory (shared=True) to other processes"
        raise TypeError(f"{type(self).__name__} owns its memory and cannot be copied or pickled; {remedy}")

    def __len__(self) -> int:
        return self.getLength()

    @overload
    def __getitem__(self, key: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> bytes: ...
    def __getitem__(self, key: SupportsIndex | slice) -> int | bytes:
        """Return a byte as an integer, or copy the bytes of a slice, as mmap.mmap does. Raises as `readBytes`."""
        if isinstance(key, slice):
            offsets = range(*key.indices(len(self)))
            if not offsets:
                return b""
            first, last = sorted((offsets[0], offsets[-1]))
            return self.readBytes(first, last - first + 1)[:: offsets.step]
        return self.readBytes(offset_of(key, len(self)), 1)[0]

    @overload
    def __setitem__(self, key: SupportsIndex, value: SupportsIndex) -> None: ...
    @overload
    def __setitem__(self, key: slice, value: Buffer) -> None: ...
    def __setitem__(self, key: SupportsIndex | slice, value: SupportsIndex | Buffer) -> None:
        """Store a byte, or the bytes of a slice. Raises as `writeBytes`; ValueError for a wrong number of bytes."""
        if not isinstance(key, slice):
            self.writeBytes(offset_of(key, len(self)), bytes((index(cast("SupportsIndex", value)),)))
            return
        offsets = range(*key.indices(len(self)))
        with memoryview(cast("Buffer", value)) as view, view.cast("B") as data:
            if len(data) != len(offsets):
                raise ValueError(f"a slice of {len(offsets)} bytes cannot store {len(data)} bytes")
            if offsets.step == 1:
                self.writeBytes(offsets.start, data)
                return
            for place, offset in enumerate(offsets):  # the bytes between them may be changing
                self.writeBytes(offset, data[place : place + 1])

    def __enter__(self) -> Self:
        self._usable_memory()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        try:
            with_block.leave(lambda: self._release(in_use=True), error)
        finally:
            if error is not None and self._owner:  # it could not be released, and cannot be released later
                self._abandon()

    def __del__(self) -> None:
        """Undo every `prepare` that was not completed. Memory is released with its last user, without `free`."""
        if self._owner is None:
            return
        what = repr(self) if self._prepared and self._owner.maker == os.getpid() else ""
        self._abandon()
        if what:
            warnings.warn(f"{what} was never completed", ResourceWarning, stacklevel=2, source=self)

    def _abandon(self) -> None:
        """End the use of the memory where errors cannot be raised, and undo every `prepare`."""
        owner, self._owner, self._state = self._owner, None, "released"
        if owner is None:
            return
        if self._prepared:
            owner.guard.when_free(partial(self._undo_all, owner))
        # Without the guard, which the interrupted thread may hold. The owner releases the memory when it is
        # collected: now, or with the last of its dependents and of the maps and views that are garbage of the same
        # cycle.
        owner.has_handle = False

    def _complete_when_free(self) -> None:
        """Undo one `prepare` for a destructor of `iommu`, which must not wait."""
        if owner := self._owner:  # otherwise its own destructor has undone all
            owner.guard.when_free(partial(self._undo_prepare, owner))

    def _undo_all(self, owner: MemoryOwner) -> None:
        while self._prepared:
            self._undo_prepare(owner)

    def _undo_prepare(self, owner: MemoryOwner) -> None:
        """Undo one `prepare`, if any is left, for a destructor, with the guard held."""
        if self._prepared and owner.maker == os.getpid():  # a forked child inherits no pins
            with contextlib.suppress(IOReturnError):  # it may be garbage of the same cycle, and already released
                owner.unpin(wait=False)
        self._prepared = max(self._prepared - 1, 0)


def _as_part(found: Part | RangeBacking) -> Part:
    if isinstance(found, Part):
        return found
    owner = MemoryOwner(found, found.length, IOMemoryDescriptor.__name__, has_handle=False)
    return Part(owner, 0, found.length)


def _found(task: Task, ranges: Iterable[tuple[int, int]], *, writable: bool) -> Iterator[Part | RangeBacking]:
    """Yield the memory at the nonempty ranges: parts of iobmd descriptors, or ranges (adjacent ones joined)."""
    open_range = (0, 0)
    for address, length in ranges:
        check_range(address, length)
        part = address_index.find(task, address, length) if length else None
        if open_range[1] and (part or (length and sum(open_range) != address)):
            yield RangeBacking(task, *open_range, writable=writable)
            open_range = (0, 0)
        if part:
            yield part
        elif length:
            open_range = (open_range[0] if open_range[1] else address), open_range[1] + length
    if open_range[1]:
        yield RangeBacking(task, *open_range, writable=writable)
