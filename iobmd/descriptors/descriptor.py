"""`IOMemoryDescriptor`: the operations common to all memory descriptors."""

from __future__ import annotations

import itertools
from array import array
from operator import index
from typing import TYPE_CHECKING, SupportsIndex, cast, overload

from iobmd._internal.arguments import check_integers, integers, offset_of
from iobmd.backing.bus import BusBacking
from iobmd.backing.device import DeviceBacking
from iobmd.constants import (
    IOMapOptions,
    IOOptionBits,
    IOPurgeable,
    IOReturn,
    kIOMemoryIncoherentIOFlush,
    kIOReturnSuccess,
)
from iobmd.descriptors import address_ranges, driverkit, mapping_cache, memory_map
from iobmd.descriptors.handle import Handle
from iobmd.descriptors.options import (
    CACHE_MODES,
    DIRECTION_MASK,
    check_complete,
    check_direction,
    check_existing,
    check_operation,
    check_prepare,
    check_remote,
    check_types,
)
from iobmd.descriptors.purge_control import NonVolatile
from iobmd.device.physical import PhysicalRegion
from iobmd.errors import BadArgumentError, NotReadyError, UnsupportedError
from iobmd.physical.layout import Layout, layout
from iobmd.purgeable import parse
from iobmd.task.task import as_task, kernel_task
from iobmd.units import PAGE_SIZE, round_down

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer

    from iobmd._native.pagemap import PhysicalSegment
    from iobmd.backing import Backing
    from iobmd.descriptors.memory_map import IOMemoryMap
    from iobmd.descriptors.ownership import MemoryOwner
    from iobmd.memory.mlock import Wiring
    from iobmd.task.task import AnyTask

_IN = int(IOOptionBits.kIODirectionIn)

_STATES = {int(state): state for state in (
    IOPurgeable.kIOMemoryPurgeableNonVolatile,
    IOPurgeable.kIOMemoryPurgeableVolatile,
    IOPurgeable.kIOMemoryPurgeableEmpty,
)}  # fmt: skip


_descriptor_ids = itertools.count(1)


class IOMemoryDescriptor(Handle):
    """A range of memory with a length, a direction and a task, created by `withAddressRange` or a subclass.

    Methods may be called from any thread. Memory is never freed during a copy: `free` is refused, and memory that is
    mapped in no task is freed at the end of the copy. In a forked child a wired descriptor is unusable, because
    mlock(2) is not inherited and the child's copy of the memory is not wired. A pageable descriptor works in the
    child, with its copy-on-write memory, or with the same memory if it is a shared object.
    """

    vm_tags = (0, 0)
    """The `kernTag` and `userTag` of its creation, or those of `setVMTags`."""

    _tag = 0
    _context: object = None
    _mapper_options = 0
    _descriptor_id = 0
    _initializer = ""
    """The initializer of a class that does not describe ranges of addresses."""

    # --- existing memory

    @classmethod
    def withAddressRange(cls, address: int, length: int, options: int, task: AnyTask | None) -> IOMemoryDescriptor:
        """Describe `length` bytes of existing memory at `address` of a task, like `withAddressRanges`."""
        return cls.withAddressRanges([(address, length)], options, task)

    @classmethod
    def withAddressRanges(
        cls, ranges: Iterable[tuple[int, int]], options: int, task: AnyTask | None
    ) -> IOMemoryDescriptor:
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
            The task to which the addresses belong. None: they are physical addresses, as of `withPhysicalAddress`.
            None, with `kIOMemoryRemote`: they are addresses of another bus, which the descriptor only carries:
            segments contain them unchanged, and no bytes can be accessed.

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
        descriptor = IOMemoryDescriptor()
        descriptor._describe(ranges, check_existing(options), task)
        return descriptor

    @classmethod
    def CreateMemoryDescriptorFromClient(
        cls, memoryDescriptorCreateOptions: int, segments: Iterable[tuple[int, int]], client: AnyTask
    ) -> IOMemoryDescriptor:
        """Describe ranges of a client's memory, as DriverKit's IOUserClient does: maps are copies, unless disabled.

        Parameters
        ----------
        memoryDescriptorCreateOptions : int
            `IOMemoryCreateOptions`: the direction, and `kIOMemoryDisableCopyOnWrite` for maps of the memory itself.
        segments, client
            The ranges and the task of `withAddressRanges`. Raises the same errors, and `kIOReturnBadArgument`.
        """
        options = driverkit.create_options(memoryDescriptorCreateOptions)
        return cls.withAddressRanges(segments, options, as_task(client))

    @classmethod
    def withOptions(
        cls,
        buffers: Iterable[tuple[int, int]],
        count: int,
        offset: int,
        task: AnyTask | None,
        options: int,
        mapper: None = None,
    ) -> IOMemoryDescriptor:
        """Describe existing memory, like `initWithOptions`."""
        descriptor = IOMemoryDescriptor()
        descriptor.initWithOptions(buffers, count, offset, task, options, mapper)
        return descriptor

    def initWithOptions(
        self,
        buffers: Iterable[tuple[int, int]],
        count: int,
        offset: int,
        task: AnyTask | None,
        options: int,
        mapper: None = None,
    ) -> bool:
        """Describe existing memory: the designated initializer of IOKit. Returns True.

        It may be called again, for other memory; the previous memory is released as by `free`.

        Parameters
        ----------
        buffers : iterable of (int, int)
            Addresses and lengths in bytes.
        count : int
            How many of them to use.
        offset : int
            Must be 0, as in IOKit for all but UPLs.
        task : Task, int or psutil.Process
            The task to which the addresses belong. None: they are physical addresses, or those of another bus.
        options : int
            The direction, options of `IOOptionBits`, and one of `IOMemoryTypes`: `kIOMemoryTypeVirtual` with a task,
            or `kIOMemoryTypePhysical` without. `kIOMemoryAsReference` and `kIOMemoryPersistent` have no effect,
            because references are counted by Python, nor has `kIOMemoryBufferPageable`.
        mapper : None
            Must be None (`kIOMapperSystem`): `IOMapper.prepare` maps memory for a device.

        Raises
        ------
        IOReturnError
            As `withAddressRanges`; `kIOReturnUnsupported` for UPLs, uios and persistent descriptors, and for classes
            with another initializer; `kIOReturnBusy` if the previous memory cannot be released.
        """
        if self._initializer:
            raise UnsupportedError(f"an {type(self).__name__} is initialized by {self._initializer}()")
        check_integers(count=count, offset=offset, options=options)
        ranges = list(buffers)
        if offset or not 0 <= count <= len(ranges):
            message = f"{count} of {len(ranges)} ranges from offset {offset}: the offset must be 0"
            raise BadArgumentError(message)
        if mapper is not None:
            raise UnsupportedError("descriptors have no mapper: IOMapper.prepare() maps memory for a device")
        self._describe(ranges[:count], check_types(options, has_task=task is not None), task)
        return True

    def _describe(self, ranges: Iterable[tuple[int, int]], options: int, task: AnyTask | None) -> None:
        kind = type(self).__name__
        if check_remote(options, task):
            backing: Backing = BusBacking(ranges)
            length = backing.size
        elif task is None:
            backing, length = address_ranges.describe_physical(ranges, kind)
        else:
            where = as_task(task)
            where = kernel_task if where.is_current else where
            backing, length = address_ranges.describe(where, ranges, kind, writable=bool(options & _IN))
        self._hold(backing, options, length)

    @classmethod
    def withPhysicalAddress(cls, address: int, length: int, direction: int) -> IOMemoryDescriptor:
        """Describe `length` bytes at a physical address, which are mapped by /dev/mem where the kernel permits it.

        The bytes have no page frames and are not pinned, like those of `IODeviceMemory`: `segments` returns the
        address at any time. The caller must know which device is there.

        Parameters
        ----------
        address, length : int
            The first address, and the size in bytes.
        direction : IOOptionBits
            The direction of transfers.

        Raises
        ------
        IOReturnError
            As `IODeviceMemory.withRange`.
        """
        address, length = integers(address=address, length=length)
        direction = check_direction(direction)
        return IOMemoryDescriptor()._hold(DeviceBacking(PhysicalRegion(address, length)), direction, length)

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

    def getVMTag(self, map: AnyTask) -> int:  # noqa: A002 (IOKit's)
        """Return the tag of mappings in a task: `kernTag` in `kernel_task`, `userTag` in others; 0 if none is set."""
        return self.vm_tags[as_task(map) is not kernel_task]

    def getDescriptorID(self) -> int:
        """Return a number that no other descriptor of this process has, above 0."""
        self._descriptor_id = self._descriptor_id or next(_descriptor_ids)
        return self._descriptor_id

    def getMapperOptions(self) -> int:
        """Return the options set by `setMapperOptions`, 0 at first."""
        return self._mapper_options

    def setMapperOptions(self, options: int) -> None:
        """Store options for mappers, 16 bits: 0, or `kIOMapperUncached`, which `IOMapper.prepare` refuses."""
        check_integers(options=options)
        if not 0 <= options < 1 << 16:
            raise BadArgumentError(f"mapper options {options:#x} exceed 16 bits")
        self._mapper_options = index(options)

    # --- its bytes

    def readBytes(self, offset: int, length: int) -> bytes:
        """Return `length` bytes, starting at `offset`.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument` if the range exceeds the descriptor's length.
        """
        if not type(offset) is type(length) is int:
            offset, length = integers(offset=offset, length=length)
        return self._memory().read(offset, length)

    def readBytesInto(self, offset: int, buffer: Buffer) -> int:
        """Fill the writable `buffer` with the bytes at `offset`; return its size in bytes. Raises as `readBytes`."""
        if type(offset) is not int:
            (offset,) = integers(offset=offset)
        return self._memory().read_into(offset, buffer)

    def writeBytes(self, offset: int, data: Buffer) -> int:
        """Copy all of `data` to `offset`; return its size in bytes. Raises as `readBytes`, before writing."""
        if type(offset) is not int:
            (offset,) = integers(offset=offset)
        return self._memory().write(offset, data)

    @property
    def cache_mode(self) -> tuple[IOMapOptions, IOMapOptions]:
        """The requested and the effective cache mode.

        The effective mode is `kIOMapCopybackCache`, the only one that Linux offers for main memory. Reads and writes
        through the descriptor nevertheless honor the requested mode, by cache line instructions; accesses through a
        view do not. Memory of a device is mapped `kIOMapInhibitCache` or `kIOMapWriteCombineCache`.
        """
        backing = self._usable_memory().require_backing()
        return IOMapOptions(self._options & CACHE_MODES), backing.cache_mode

    def performOperation(self, options: int, offset: int, length: int) -> IOReturn:
        """Make the processor caches and the memory of a range consistent, for a device that does not snoop them.

        Parameters
        ----------
        options : int
            `kIOMemoryIncoherentIOStore`: write lines back, before a device reads. `kIOMemoryIncoherentIOFlush`: also
            invalidate them, before data that a device wrote is read. `kIOMemoryClearEncrypted` and
            `kIOMemorySetEncrypted` are refused, because Linux does not encrypt single pages.
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
        check_operation(options)
        offset, length = integers(offset=offset, length=length)
        owner.write_back(offset, length, drop=options == kIOMemoryIncoherentIOFlush)
        return kIOReturnSuccess

    # --- pins

    def prepare(self, forDirection: int = 0) -> IOReturn:
        """Pin the memory for a transfer, so that its physical addresses are valid until `complete`.

        Calls are counted, in pairs with `complete`, from any thread. For memory that is pinned by its options, only
        the count changes. A descriptor cannot be freed while it is prepared, or while a DMA command, a mapper or a
        descriptor of a part of it has prepared its memory.

        Parameters
        ----------
        forDirection : int
            0 for the descriptor's own direction, or directions of the transfer, with `kIODirectionPrepareNoFault`
            (fail instead of faulting in pages), `kIODirectionPrepareToPhys32` (fail for memory above 4 GiB) and
            `kIODirectionPrepareNonCoherent` (write the cache lines of the memory back and drop them, for a device
            that does not snoop the caches; `performOperation` does so later). `kIODirectionPrepareReserved1`, which
            permits pages that are not zeroed, has no effect.

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
            `withAddressRanges`; with `kIODirectionPrepareNonCoherent` also as `performOperation`. After an error,
            nothing is prepared.
        """
        self._pin(forDirection, count=1)
        return kIOReturnSuccess

    def _pin(self, direction: int = 0, *, count: int = 0) -> MemoryOwner:
        """Pin the memory, as `prepare`; return its owner, whose `unpin` undoes it unless it counts for `complete`."""
        owner = self._memory()
        check_prepare(direction)
        with owner.guard:
            if not owner.has_handle:  # another thread has released it
                self._memory()
            owner.pin(direction)
            self._prepared += count
        return owner

    def complete(self, forDirection: int = 0) -> IOReturn:
        """Undo one `prepare`; after the last one the kernel may move the memory again.

        Parameters
        ----------
        forDirection : int
            The directions of the transfer, with the flags of `prepare`, `kIODirectionCompleteWithError` and
            `kIODirectionCompleteWithDataValid`. They have no effect: the processor and the device mark the pages that
            they write, and pages are zeroed before they are prepared, so that completion makes no page valid.

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady` if this descriptor is not prepared: what DMA commands, mappers and descriptors of
            parts of it have prepared, they complete; `kIOReturnBadArgument` for unknown flags.
        """
        owner = self._memory()
        check_complete(forDirection)
        with owner.guard:
            if not owner.has_handle:  # as above
                self._memory()
            if not self._prepared:
                others = " by its own prepare(): DMA commands, mappers and descriptors of parts complete their own"
                raise NotReadyError(f"{self!r} is not prepared{others if owner.pins else ': nothing to complete'}")
            owner.unpin()
            self._prepared -= 1
        return kIOReturnSuccess

    @property
    def wiring(self) -> Wiring:
        """Whether the memory is pageable, resident or pinned."""
        return self._memory().wiring

    def getPreparationID(self) -> int:
        """Return a number that identifies the present preparation, `kIOPreparationIDUnprepared` (0) without one.

        It remains the same while the memory is prepared, by this descriptor or another of the same memory, and is
        never used again. Drivers that cache what they derived from `segments()` compare it. Memory that is pinned by
        its options has one from its allocation to its release; a concatenation only while it is itself prepared.
        """
        owner = self._memory()
        with owner.guard:
            return owner.preparation_id()

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
        if type(offset) is not int:
            (offset,) = integers(offset=offset)
        if length is None:
            length = owner.length - offset
        elif type(length) is not int:
            (length,) = integers(length=length)
        return owner.segments(offset, length)

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
            the map; `kIOMapGuardedSmall` or `Large` for an inaccessible page or 64 KiB on each side;
            `kIOMapReference` to refer to an existing map or fail; `kIOMapOverwrite` to replace address space at
            `atAddress` that this process has reserved (private anonymous memory without access), which is reserved
            again at the end.
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
            mode other than copyback, private memory at a second address, or kIOMapOverwrite in another task;
            `kIOReturnNotReady`: there is no map for `kIOMapReference`; `kIOReturnNoMemory`. For another task also
            `kIOReturnNotPermitted`, `kIOReturnNotFound` and `kIOReturnTimeout`: it cannot be stopped.

        Notes
        -----
        A map of a descriptor with `kIOMemoryMapCopyOnWrite` shows the bytes at the time of its creation, and later
        writes to the map do not reach the source. The bytes are copied at once, private memory too: pages that do
        not exist remain absent, and bytes that another thread changes during the call are the old or the new ones.
        Memory of another task is copied as of one moment: the task is stopped for the copy, or a snapshot is made
        (see `iobmd.copy`).

        One thread of another task is stopped for about a tenth of a millisecond (ptrace(2)), and then resumes.
        """
        atAddress, options, offset, length = integers(  # noqa: N806 (IOKit's)
            atAddress=atAddress, options=options, offset=offset, length=length
        )
        task = as_task(intoTask)
        owner = self._usable_memory()
        length = length or owner.length - offset
        owner.require_range(offset, length)
        with owner.guard:
            self._memory()  # read again: another thread may have released it
            in_page = owner.require_backing().in_page(offset)
            request = mapping_cache.MapRequest(
                atAddress, options, offset, length, in_page, copies=self._copies_when_mapped
            )
            return memory_map.open_map(self, owner, task, request)

    def CreateMapping(
        self, options: int, address: int = 0, offset: int = 0, length: int = 0, alignment: int = 0
    ) -> IOMemoryMap:
        """Map the memory in this process, with the options of DriverKit.

        Parameters
        ----------
        options : int
            `IOMemoryMapOptions`. A descriptor whose direction is only out is mapped read-only. Without a guard option
            there are no guard pages, and the cache mode is the default or copyback, for main memory.
        address : int
            The address, with `kIOMemoryMapFixedAddress`.
        offset, length : int
            The part to map, in bytes; `length` 0: to the end.
        alignment : int
            Must be 0, as in DriverKit.

        Raises
        ------
        IOReturnError
            As `createMappingInTask`.
        """
        check_integers(alignment=alignment)
        if alignment:
            raise BadArgumentError(f"alignment {alignment} of a mapping: only 0 is supported, as in DriverKit")
        converted = driverkit.map_options(options, self.getDirection())
        return self.createMappingInTask(kernel_task, address, converted, offset, length)

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
            contents. `kIOMemoryPurgeableFaultOnAccess`, with Volatile or Empty, finds accesses to memory that may be
            lost: until its state is set again, every access of this process through the buffer's addresses, views or
            arrays raises SIGSEGV, and reads and writes of descriptors raise `kIOReturnVMError`.

        Returns
        -------
        IOPurgeable
            The previous state: NonVolatile, Volatile or Empty. If a change to NonVolatile returns Volatile, every
            byte is intact and remains so. Empty: the memory was reclaimed, and every byte reads zero until it is
            written to; the state remains Empty until it is set again.

        Raises
        ------
        IOReturnError
            `kIOReturnUnsupported`: not allocated as purgeable, not supported by the kernel, or FaultOnAccess for
            memory that this process does not map. `kIOReturnBusy`: it is prepared and cannot become Volatile or
            Empty, or it is mapped at other addresses, where FaultOnAccess would have no effect.
            `kIOReturnCannotWire`: a change from Volatile must lock at least a page (RLIMIT_MEMLOCK).
            `kIOReturnBadArgument`. After an error the state is unchanged.

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
        same time, also by descriptors of parts and concatenations of the memory; the last to leave makes the memory
        volatile. Until one that received False has left without an exception, all receive False; use a separate lock
        to decide which of them refills it. All of this applies to the processes that share the memory too: while
        one is inside, the others cannot make the memory volatile or empty (`kIOReturnBusy`). The block of a
        process that is killed ends; if it was to fill the memory again, the memory is Empty.

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
