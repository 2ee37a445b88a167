"""`IOMemoryMap`: a descriptor's memory at additional addresses in this process or another."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn, Self, SupportsIndex

from iobmd._internal import process_local, with_block
from iobmd._internal.arguments import check_integers, integers
from iobmd._native.mapping import Exporter, FaultError
from iobmd.constants import IOMapOptions, IOReturn, kIOReturnSuccess
from iobmd.descriptors.mapping_cache import CachedMapping, MapRequest, all_mappings
from iobmd.descriptors.options import check_descriptor
from iobmd.errors import (
    BadArgumentError,
    BusyError,
    IOReturnError,
    NotOpenError,
    NotReadyError,
    UnsupportedError,
)
from iobmd.task import diagnosis

if TYPE_CHECKING:
    from iobmd._native.mapping import Mapping
    from iobmd.descriptors.descriptor import IOMemoryDescriptor
    from iobmd.descriptors.ownership import MemoryOwner
    from iobmd.task.task import Task

_NUMBERS = {width: 1 << 8 * width for width in (1, 2, 4, 8)}
"""The number of values of an unsigned integer of this width in bytes."""

_changes = process_local.Guard()  # protects the users of mappings


def open_map(descriptor: IOMemoryDescriptor, owner: MemoryOwner, task: Task, request: MapRequest) -> IOMemoryMap:
    """Map a part of an owner's memory, with its guard held, by an existing or a new mapping."""
    request.require_cache(owner.require_backing())
    # Separate addresses are mapped without the guard of all maps, because a copy of the memory takes long.
    fresh = CachedMapping.open(descriptor, owner, task, request) if request.unique else None
    with _changes:
        known = [] if fresh else [mapping for mapping in owner.mappings() if mapping.serves(task, request)]
        if request.refers and not known:
            raise NotReadyError("kIOMapReference refers to an existing map, but no map satisfies the request")
        mapping = fresh or next(iter(known), None) or CachedMapping.open(descriptor, owner, task, request)
        owner.add_mapping(mapping)
        mapping.prefault(request)
        return IOMemoryMap(mapping, request)


def uses(owner: MemoryOwner) -> int:
    """Return the number of maps of an owner's memory."""
    if not owner.has_mappings:
        return 0
    with _changes:
        return sum(len(mapping.users) for mapping in owner.mappings())


def uses_by_owner() -> list[tuple[MemoryOwner, int]]:
    """Return the owner of the memory of every mapping, and the number of its maps."""
    with _changes:
        return [(mapping.owner, len(mapping.users)) for mapping in all_mappings()]


def further_mappings(owner: MemoryOwner) -> list[CachedMapping]:
    """Return the mappings of an owner's memory other than its own addresses. Copies are not its memory."""
    with _changes:
        return [mapping for mapping in owner.mappings() if mapping.own and not mapping.is_copy]


class IOMemoryMap(Exporter):
    """A descriptor's memory, or a part of it, mapped in a task, until `unmap` or the end of `with`.

    Created by `IOMemoryDescriptor.map` and `createMappingInTask`. It retains its descriptor, which cannot be freed
    before the map is unmapped. In this process it supports the buffer protocol, read-only if it is mapped read-only.
    `unmap` is refused while a view of it exists; leaving `with` ends the map, and its addresses are unmapped with the
    last view.

    Source: IOKit's IOMemoryMap (IOMemoryDescriptor.h).
    """

    def __init__(self, mapping: CachedMapping, request: MapRequest) -> None:
        self._mapping: CachedMapping | None = mapping
        self._options = request.options
        self._length = request.length
        self._writable = request.writable
        self._within = request.offset - mapping.first
        self._window: tuple[Mapping, int] | None = None
        mapping.users.add(id(self))

    def getAddress(self) -> int:
        """Return the address of its first byte."""
        return self._open().address + self._within

    getVirtualAddress = getAddress

    def getLength(self) -> int:
        """Return its length in bytes."""
        self._open()
        return self._length

    getSize = getLength

    def getOffset(self) -> int:
        """Return the offset in bytes of its first byte in the descriptor's memory (DriverKit's GetOffset)."""
        return self._open().first + self._within

    def getAddressTask(self) -> Task:
        """Return the task in which it is mapped."""
        return self._open().task

    def _mapped_range(self) -> tuple[Task, int, int]:
        start = self.getAddress()
        return self.getAddressTask(), start, start + self.getLength()

    @property
    def task_stopped_ns(self) -> int:
        """Upper bound of the time for which a thread of its task was stopped, in nanoseconds; 0 in this process."""
        return self._open().stopped_ns

    def getMemoryDescriptor(self) -> IOMemoryDescriptor:
        """Return the `IOMemoryDescriptor` whose memory is mapped."""
        return self._open().descriptor

    def getMapOptions(self) -> IOMapOptions:
        """Return the options of its creation."""
        return IOMapOptions(self._options)

    def getPhysicalSegment(self, offset: int, options: int = 0) -> tuple[int, int]:  # noqa: ARG002 (IOKit's)
        """Return the physical address of the byte at `offset`, and the number of contiguous bytes from there.

        `(0, 0)` past its end. Raises as `IOMemoryDescriptor.segments`; `kIOReturnUnsupported` for a copy-on-write
        map, whose pages are not those of the memory.
        """
        mapping = self._open()
        if mapping.is_copy:
            raise UnsupportedError("a copy-on-write map has separate pages, which are not pinned")
        (offset,) = integers(offset=offset)
        address, length = mapping.owner.segment(mapping.first + self._within + offset)
        if not 0 <= offset < self._length:
            return 0, 0
        return address, min(length, self._length - offset)

    def getPhysicalAddress(self) -> int:
        """Return the physical address of its first byte. Raises as `IOMemoryDescriptor.segments`."""
        return self.getPhysicalSegment(0)[0]

    # --- registers

    def read8(self, offset: int) -> int:
        """Return the byte at `offset`, by one load of exactly 8 bits. Raises as `read32`."""
        return self._load(offset, 1)

    def read16(self, offset: int) -> int:
        """Return the 16-bit number at `offset`, by one load of exactly that width. Raises as `read32`."""
        return self._load(offset, 2)

    def read32(self, offset: int) -> int:
        """Return the 32-bit number at `offset`, by one load of exactly that width.

        Numbers are little-endian, like the registers of PCI devices. As with the kernel's readl, later reads of
        memory return the bytes that the device wrote to it before.

        Parameters
        ----------
        offset : int
            In bytes, from the start of the map.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: the address is not a multiple of the width, or past the end.
            `kIOReturnUnsupported`: the map is in another task. `kIOReturnVMError`: existing memory was unmapped.
        """
        return self._load(offset, 4)

    def read64(self, offset: int) -> int:
        """Return the 64-bit number at `offset`, by one load of exactly that width. Raises as `read32`."""
        return self._load(offset, 8)

    def write8(self, offset: int, value: int) -> None:
        """Store a byte at `offset`, by one store of exactly 8 bits. Raises as `write32`."""
        self._store(offset, 1, value)

    def write16(self, offset: int, value: int) -> None:
        """Store a 16-bit number at `offset`, by one store of exactly that width. Raises as `write32`."""
        self._store(offset, 2, value)

    def write32(self, offset: int, value: int) -> None:
        """Store a 32-bit number at `offset`, little-endian, by one store of exactly that width.

        As with the kernel's writel, earlier stores to memory become visible to the device first: a descriptor may be
        written by `writeBytes`, and then announced by this method. In a write-combined map, stores have no order.

        Parameters
        ----------
        offset : int
            In bytes, from the start of the map.
        value : int
            The number, without a sign.

        Raises
        ------
        IOReturnError
            As `read32`; `kIOReturnBadArgument`: the number does not fit. `kIOReturnNotWritable`: a read-only map.
        """
        self._store(offset, 4, value)

    def write64(self, offset: int, value: int) -> None:
        """Store a 64-bit number at `offset`, by one store of exactly that width. Raises as `write32`."""
        self._store(offset, 8, value)

    # An access that is repeated uses the position of the first one: determining it takes ten times as long.

    def _load(self, offset: int, width: int) -> int:
        window = self._window  # read once: another thread may unmap it
        try:
            if window and type(offset) is int and 0 <= offset <= self._length - width:
                return window[0].load(window[1] + offset, width)
        except ValueError:  # misaligned, or unmapped by another thread
            pass
        except FaultError as error:
            raise diagnosis.unreachable(error) from None
        mapping, position = self._register(offset, width)
        try:
            return mapping.load(position, width)
        except FaultError as error:
            raise diagnosis.unreachable(error) from None

    def _store(self, offset: int, width: int, value: int) -> None:
        if type(value) is not int:  # a call costs as much as the access
            check_integers(value=value)
        if not 0 <= value < _NUMBERS[width]:
            raise BadArgumentError(f"{value:#x} is not a number of {8 * width} bits")
        if not self._writable:
            raise IOReturnError(IOReturn.kIOReturnNotWritable, "this map is read-only: omit kIOMapReadOnly")
        window = self._window
        try:
            if window and type(offset) is int and 0 <= offset <= self._length - width:
                window[0].store(window[1] + offset, width, value)
                return
        except ValueError:
            pass
        except FaultError as error:
            raise diagnosis.unreachable(error) from None
        mapping, position = self._register(offset, width)
        try:
            mapping.store(position, width, value)
        except FaultError as error:
            raise diagnosis.unreachable(error) from None

    def _register(self, offset: int, width: int) -> tuple[Mapping, int]:
        """Return the mapping, and the position of a register in it."""
        (offset,) = integers(offset=offset)
        if not 0 <= offset <= self._length - width:
            message = f"{width} bytes at offset {offset:#x} are not within the {self._length} bytes of the map"
            raise BadArgumentError(message)
        mapping, first = self._open().mapping
        first += self._within
        if (mapping.address + first + offset) % width:
            raise BadArgumentError(
                f"offset {offset:#x} is not aligned to {width} bytes: an access of that width would be split"
            )
        self._window = mapping, first
        return mapping, first + offset

    def redirect(self, newBackingMemory: IOMemoryDescriptor, options: int = 0, offset: int = 0) -> IOReturn:
        """Replace the memory at the map's addresses, atomically and for all maps that share the addresses.

        Parameters
        ----------
        newBackingMemory : IOMemoryDescriptor
            Shared memory (`kIOMemoryKernelUserShared`), or memory with `kIOMemoryMapCopyOnWrite`, which is copied. It
            cannot be freed before the map is unmapped; the previous memory can be freed afterwards.
        options : int
            Must be 0; no options are defined.
        offset : int
            Offset in bytes of the memory to map at the map's first address; both must have the same offset in a page.

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`; `kIOReturnUnsupported`: private memory, or a map with the addresses of its own
            descriptor (use `kIOMapUnique`).
        """
        mapping = self._open()
        check_descriptor(newBackingMemory=newBackingMemory)
        options, offset = integers(options=options, offset=offset)
        if options:
            raise BadArgumentError(f"unknown redirect options {options:#x}")
        if mapping.own is None:
            raise UnsupportedError(
                "this map has the addresses of its descriptor, whose memory cannot be replaced: use kIOMapUnique"
            )
        owner = newBackingMemory._usable_memory()
        if offset < 0 or offset + self._length > owner.length:
            raise BadArgumentError(f"the new memory has fewer than {self._length} bytes at offset {offset}")
        with owner.guard, _changes:
            newBackingMemory._memory()  # read again: another thread may have released it
            further, copies = offset - mapping.first - self._within, newBackingMemory._copies_when_mapped
            mapping.show(newBackingMemory, owner, further, copies=copies)
        return kIOReturnSuccess

    def unmap(self) -> IOReturn:
        """End the map; idempotent. The addresses are unmapped with the last map that shares them.

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while a view of it exists.
        """
        self._end(in_use=False)
        return kIOReturnSuccess

    def _end(self, *, in_use: bool) -> None:
        """End the map as `unmap`; `in_use`: even while it is viewed, by views that hold the addresses."""
        if self._mapping is None:
            return
        with _changes:
            if mapping := self._mapping:  # read again: another thread may have unmapped it
                if self.exports and not in_use:
                    raise BusyError(
                        f"{self!r} is in use (view count {self.exports}): release its memoryviews and arrays first"
                    )
                mapping.end_use(id(self))
                self._mapping = self._window = None

    def _open(self) -> CachedMapping:
        mapping = self._mapping  # read once, as above
        if mapping is None:
            raise NotOpenError("this IOMemoryMap is unmapped")
        return mapping

    def _exported(self) -> tuple[list[MemoryOwner], Mapping, int, int, bool]:
        mapping = self._open()
        shown, first = mapping.mapping
        if shown.holes:
            raise UnsupportedError(
                "this map contains guard pages, which a view would access: map the parts between them, by offset and "
                "length"
            )
        return mapping.keeper, shown, first + self._within, self._length, self._writable

    def __len__(self) -> int:
        return self.getLength()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        with_block.leave(lambda: self._end(in_use=True), error)

    def __del__(self) -> None:
        # Without the guard, because a destructor must not wait for it. The mapping ends with the last of its maps and
        # their views, which alone refer to it.
        if mapping := getattr(self, "_mapping", None):
            mapping.users.discard(id(self))

    def __reduce_ex__(self, _protocol: SupportsIndex) -> NoReturn:
        raise TypeError("an IOMemoryMap belongs to its process and cannot be copied or pickled")

    def __repr__(self) -> str:
        mapping = self._mapping
        if mapping is None:
            return "<IOMemoryMap unmapped>"
        how = "read-write" if self._writable else "read-only"
        address = mapping.address + self._within
        return f"<IOMemoryMap at {address:#x}, length {self._length}, {how}, of {mapping.descriptor!r}>"
