"""`IODMACommand`: a transfer between memory and a device."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Self

from iobmd._internal import process_local, with_block
from iobmd._internal.arguments import check_integers, check_type, integers
from iobmd._internal.uncopyable import Uncopyable
from iobmd.constants import (
    IODMACommandOperation,
    IOReturn,
    kIODirectionIn,
    kIODirectionInOut,
    kIODirectionOut,
    kIOReturnSuccess,
)
from iobmd.descriptors.options import DIRECTION_MASK, check_descriptor, check_within
from iobmd.dma.device_transfer import DeviceTransfer
from iobmd.dma.segment_format import SegmentFormat
from iobmd.dma.specification import MappingOptions, Specification
from iobmd.errors import BadArgumentError, BusyError, IOReturnError, NotReadyError
from iobmd.iommu import IOMapper

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from typing_extensions import Buffer

    from iobmd._native.pagemap import PhysicalSegment
    from iobmd.descriptors.descriptor import IOMemoryDescriptor

    SegmentFunction: TypeAlias = "Callable[[IODMACommand, PhysicalSegment, object, int], bool] | SegmentFormat"


_ZEROED = 1 << 20  # bytes that are zeroed at once


class IODMACommand(Uncopyable):
    """Segments of a descriptor's memory within the limits of a device, with bounce buffers where necessary.

    A command serves consecutive transfers, with the same or different memory. While the command is prepared, so is
    its memory, which therefore cannot be freed. Methods may be called from any thread, one at a time. In a forked
    child a prepared command is unusable, like its wired memory. Leaving a `with` block calls
    `clearMemoryDescriptor()`.

    Source: IOKit's IODMACommand.h. Without a mapper, addresses are physical, and valid for a device behind an IOMMU
    only if the IOMMU passes them through.
    """

    kMapped = MappingOptions.kMapped
    """Addresses of the mapper, if there is one."""
    kBypassed = MappingOptions.kBypassed
    """Physical addresses, also with a mapper."""
    kNonCoherent = MappingOptions.kNonCoherent
    """As `kMapped`; the device does not snoop the caches."""
    kUnmapped = MappingOptions.kUnmapped
    """Physical addresses, also with a mapper."""
    kTypeMask = MappingOptions.kTypeMask
    """The bits of the four options above."""
    kNoCacheStore = MappingOptions.kNoCacheStore
    """Accepted, without effect."""
    kOnChip = MappingOptions.kOnChip
    """Accepted, without effect."""
    kIterateOnly = MappingOptions.kIterateOnly
    """Only generate segments: do not use bounce buffers."""
    kForceDoubleBuffer = 0x01000000
    """`synchronize`: use bounce buffers even where the device reaches the memory."""

    OutputHost32 = SegmentFormat(32, "=")
    """Segments of 32-bit addresses and lengths, in the byte order of this processor."""
    OutputBig32 = SegmentFormat(32, ">")
    """The same, big endian."""
    OutputLittle32 = SegmentFormat(32, "<")
    """The same, little endian."""
    OutputHost64 = SegmentFormat(64, "=")
    """Segments of 64-bit addresses and lengths, in the byte order of this processor."""
    OutputBig64 = SegmentFormat(64, ">")
    """The same, big endian."""
    OutputLittle64 = SegmentFormat(64, "<")
    """The same, little endian."""

    def __init__(
        self,
        specification: Specification = Specification(),  # noqa: B008 (immutable)
        mapper: IOMapper | None = None,
        outSegFunc: SegmentFunction | None = None,
    ) -> None:
        self._limits = specification.checked()
        if mapper is not None:
            check_type(IOMapper, mapper=mapper)
        self._mapper = mapper
        self._output = outSegFunc
        self._memory: IOMemoryDescriptor | None = None
        self._transfer: DeviceTransfer | None = None
        self._active = 0
        self._maker = os.getpid()
        self._guard = process_local.Guard()

    @classmethod
    def withSpecification(
        cls,
        numAddressBits: int = 64,
        maxSegmentSize: int = 0,
        mappingOptions: int = 0,
        maxTransferSize: int = 0,
        alignment: int = 1,
        mapper: IOMapper | None = None,
        outSegFunc: SegmentFunction | None = None,
        *,
        boundary: int = 0,
        alignmentLength: int = 1,
        alignmentInternalSegments: int = 0,
    ) -> Self:
        """Create a command for a device with these limits; 0: no limit.

        Parameters
        ----------
        numAddressBits : int
            The device can access addresses below 1 << numAddressBits, those of the mapper if there is one.
        maxSegmentSize : int
            Maximum size of a segment in bytes.
        mappingOptions : int
            `kMapped`: the addresses are those of the mapper. `kBypassed`, `kUnmapped`: physical addresses.
            `kNonCoherent`: as `kMapped`, and the device is not cache-coherent, so that `prepare` and `complete` flush
            the processor caches. `kIterateOnly`: never use a bounce buffer.
        maxTransferSize : int
            Maximum number of bytes that can be prepared.
        alignment : int
            Every segment starts at a multiple of this power of two.
        mapper : IOMapper, optional
            The mapper of the device. It maps the memory as one range while the command is prepared; that is one
            segment, if no other limit divides it.
        outSegFunc : callable, optional
            Called by `genIOVMSegments`: one of the six `Output…` formats, which store segments in a buffer, or a
            function as described there. A 32-bit format requires at most 32 address bits.
        boundary : int
            No segment crosses a multiple of this power of two (wider than IOKit).
        alignmentLength, alignmentInternalSegments : int
            Powers of two: the length of every segment is a multiple of the former, and all but the first start at a
            multiple of the latter (0: of `alignment`). They are members of IOKit's `SegmentOptions`.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: a limit that no transfer can satisfy, or an unknown option.
        """
        limits = (numAddressBits, maxSegmentSize, mappingOptions, maxTransferSize, alignment, boundary)
        specification = Specification(*limits, alignmentLength, alignmentInternalSegments)
        if isinstance(outSegFunc, SegmentFormat) and outSegFunc.bits == 32:
            specification = specification.for_32_bits()
        return cls(specification, mapper, outSegFunc)

    def getNumAddressBits(self) -> int:
        """Return the number of address bits of the device."""
        return self._limits.address_bits

    def getAlignment(self) -> int:
        """Return the alignment of segment addresses."""
        return self._limits.alignment

    def getAlignmentLength(self) -> int:
        """Return the unit of segment lengths: every length is a multiple of it."""
        return self._limits.length_unit

    def getAlignmentInternalSegments(self) -> int:
        """Return the alignment of the addresses of all segments but the first."""
        return self._limits.internal_alignment

    # --- its memory

    def getMemoryDescriptor(self) -> IOMemoryDescriptor | None:
        """Return the descriptor that is set, or None."""
        return self._memory

    def getIOMemoryDescriptor(self) -> IOMemoryDescriptor | None:
        """Return the descriptor that the device accesses: the bounce buffer if it contains the whole transfer."""
        transfer = self._transfer
        return transfer.bounce if transfer and transfer.double else self._memory

    def setMemoryDescriptor(self, mem: IOMemoryDescriptor | None, autoPrepare: bool = True) -> IOReturn:
        """Set the memory of the next transfer, and prepare all of it unless `autoPrepare` is False.

        As in IOKit, the caller must first call the descriptor's own `prepare()`. If the descriptor is already set and
        `autoPrepare` is False, the command is completed.

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy`: prepared with other memory; `kIOReturnNotOpen`: the memory was freed; or as `prepare`.
            After an error, no new memory is set.
        """
        if mem is not None:
            check_descriptor(mem=mem)
        with self._guard:
            fresh = mem is not self._memory
            if fresh and self._active:
                raise self._has_other_memory()
            if fresh and mem is not None:
                mem.getLength()  # raises if it was freed
            if not autoPrepare:
                self._complete_all()
            self._memory = mem
            if mem is None or not autoPrepare:
                return kIOReturnSuccess
            if self._transfer is not None:
                self._require_same(mem, self._transfer)
                return kIOReturnSuccess
            try:
                self._prepare(0, 0, flush=True, synchronize=True)
            except BaseException:
                self._memory = None if fresh else mem
                raise
        return kIOReturnSuccess

    def clearMemoryDescriptor(self, autoComplete: bool = True) -> IOReturn:
        """Release the memory, after completing the command unless `autoComplete` is False.

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: it is prepared and `autoComplete` is False; or as `complete`.
        """
        with self._guard:
            if self._active and not autoComplete:
                raise NotReadyError(f"{self!r} is prepared: call complete() for each prepare() first")
            self._complete_all()
            self._memory = None
        return kIOReturnSuccess

    def free(self) -> None:
        """Release the memory; idempotent.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while it is prepared.
        """
        with self._guard:
            if self._active:
                raise BusyError(f"{self!r} is prepared: call complete() for each prepare() first")
            self._memory = None

    release = free

    # --- transfers

    def prepare(
        self, offset: int = 0, length: int = 0, flushCache: bool = True, synchronize: bool = True
    ) -> IOReturn:
        """Make a range of the memory ready for the device.

        Calls are counted, in pairs with `complete`; while it is prepared, only the same range can be prepared again.
        Memory that the device cannot reach, or a range with a part whose alignment is unsuitable, is replaced by
        zeroed bounce buffers.

        Parameters
        ----------
        offset, length : int
            The range in bytes; `length` 0: to the end.
        flushCache : bool
            With `kNonCoherent`: write the processor caches back.
        synchronize : bool
            Copy the memory to its bounce buffers if its direction is out (or none).

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: no memory is set, it is not pinned (its `prepare()` comes first), or another range is
            prepared. `kIOReturnNoSpace`: longer than the device's largest transfer. `kIOReturnBadArgument`: past the
            end. `kIOReturnNoResources`: no bounce buffer within reach of the device is available (`iobmd.policy`
            limits the search). `kIOReturnNotPrivileged`: physical addresses are hidden. `kIOReturnNotOpen`: the
            memory was freed. After an error, nothing is prepared.
        """
        with self._guard:
            self._prepare(offset, length, flush=flushCache, synchronize=synchronize)
        return kIOReturnSuccess

    def complete(self, invalidateCache: bool = True, synchronize: bool = True) -> IOReturn:
        """Undo one `prepare`; the last one ends the transfer.

        Parameters
        ----------
        invalidateCache : bool
            With `kNonCoherent`: invalidate the memory's lines in the processor caches.
        synchronize : bool
            Copy the bounce buffers back to the memory if its direction is in (or none).

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: it is not prepared. Errors of copying bytes back are raised after the transfer has
            ended.
        """
        with self._guard:
            self._prepared()
            self._complete(invalidate=invalidateCache, synchronize=synchronize)
        return kIOReturnSuccess

    def getPreparedOffsetAndLength(self) -> tuple[int, int]:
        """Return the prepared range, in bytes; raise `kIOReturnNotReady` if none is prepared."""
        transfer = self._prepared()
        return transfer.offset, transfer.length

    def genIOVMSegments(
        self,
        offset: int = 0,
        numSegments: int | None = None,
        segmentFunction: SegmentFunction | None = None,
        segments: object = None,
    ) -> list[PhysicalSegment]:
        """Return the segments for the device, in order, within its limits.

        Parameters
        ----------
        offset : int
            Where to begin, in bytes, relative to the prepared offset. For the next call, add the lengths of all
            returned segments.
        numSegments : int, optional
            Maximum number of segments to return; None: all.
        segmentFunction : callable, optional
            Called with the command, a segment, `segments` and the number of the segment from 0 on, for each segment;
            if it returns False, that segment and the following are not returned. Default: `outSegFunc` of the
            command, if `segments` is passed.
        segments : optional
            For the function: a writable buffer if that is one of the `Output…` formats, otherwise any object.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: it is not prepared. `kIOReturnOverrun`: `offset` is at the end.
            `kIOReturnBadArgument`: a negative offset, or no segments. `kIOReturnNotAligned`: the address has an
            unsuitable alignment. `kIOReturnMessageTooLarge`: with `kIterateOnly`, memory that it cannot reach.
        """
        transfer = self._prepared()
        (offset,) = integers(offset=offset)
        if numSegments is not None:
            (numSegments,) = integers(numSegments=numSegments)  # noqa: N806 (IOKit's)
        if offset < 0 or (numSegments is not None and numSegments < 1):
            message = f"cannot generate {numSegments} segments from offset {offset}"
            raise BadArgumentError(message)
        if offset >= transfer.length:
            message = f"offset {offset} is at the end of the {transfer.length} prepared bytes"
            raise IOReturnError(IOReturn.kIOReturnOverrun, message)
        most = None if numSegments is None else min(numSegments, transfer.length)  # each has at least one byte
        found = transfer.segments(offset, most)
        function = segmentFunction or (None if segments is None else self._output)
        if function is None:
            return found
        for index, segment in enumerate(found):
            if not function(self, segment, segments, index):  # type: ignore[arg-type]
                return found[:index]
        return found

    def synchronize(self, direction: int, forceDoubleBuffer: bool = False) -> IOReturn:
        """Copy between the memory and its bounce buffers, if any.

        Parameters
        ----------
        direction : int
            `kIODirectionOut`: from the memory to the bounce buffers. `kIODirectionIn`: from the bounce buffers to the
            memory. `kForceDoubleBuffer` may be added.
        forceDoubleBuffer : bool
            Replace the whole prepared range by a new page-aligned contiguous bounce buffer with the bytes that the
            device sees now: one segment, if no limit divides it. Segments must then be generated again, and
            `direction` may be 0.

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: it is not prepared. `kIOReturnBadArgument`: both directions, or unknown bits.
            `kIOReturnNoResources`: no bounce buffer is available, and nothing has changed. `kIOReturnUnsupported`: a
            bounce buffer was requested with `kIterateOnly`.
        """
        with self._guard:
            transfer = self._prepared()
            check_integers(direction=direction)
            both = direction & DIRECTION_MASK == kIODirectionInOut
            if both or direction & ~(DIRECTION_MASK | self.kForceDoubleBuffer):
                message = f"{direction:#x} is neither kIODirectionIn nor kIODirectionOut"
                raise BadArgumentError(message)
            if forceDoubleBuffer or direction & self.kForceDoubleBuffer:
                self._transfer = transfer.doubled()
            elif direction & kIODirectionOut:
                transfer.copy_out()
            elif direction & kIODirectionIn:
                transfer.copy_in()
        return kIOReturnSuccess

    def readBytes(self, offset: int, length: int) -> bytes:
        """Return bytes as the device sees them; `offset` is relative to the prepared one.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: it is not prepared. `kIOReturnBadArgument`: past the end of the prepared range.
        """
        transfer, offset, length = self._within(offset, length)
        return transfer.read(offset, length)

    def writeBytes(self, offset: int, data: Buffer) -> int:
        """Store bytes as the device would; return their number. Raises as `readBytes`, before writing."""
        size = memoryview(data).nbytes
        transfer, offset, _ = self._within(offset, size)
        transfer.write(offset, data)
        return size

    def performOperation(
        self,
        options: int,
        dmaOffset: int,
        length: int,
        dataOffset: int = 0,
        data: IOMemoryDescriptor | None = None,
    ) -> IOReturn:
        """Access the prepared range as the device sees it (DriverKit's PerformOperation).

        Parameters
        ----------
        options : int
            One of `IODMACommandOperation`: `kIODMACommandPerformOperationOptionRead` copies the bytes to `data`,
            `…Write` copies them from `data`, and `…Zero` zeroes them.
        dmaOffset, length : int
            The bytes, relative to the prepared offset.
        dataOffset : int
            Where the bytes are in `data`.
        data : IOMemoryDescriptor, optional
            Memory to read into or to write from.

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: it is not prepared. `kIOReturnBadArgument`: past the end of the prepared range or of
            `data`, no `data`, or not exactly one operation.
        """
        check_integers(options=options)
        transfer, dmaOffset, length = self._within(dmaOffset, length)  # noqa: N806 (IOKit's)
        if options == IODMACommandOperation.kIODMACommandPerformOperationOptionZero:
            for offset in range(0, length, _ZEROED):
                transfer.write(dmaOffset + offset, bytes(min(_ZEROED, length - offset)))
            return kIOReturnSuccess
        if options not in (
            IODMACommandOperation.kIODMACommandPerformOperationOptionRead,
            IODMACommandOperation.kIODMACommandPerformOperationOptionWrite,
        ):
            raise BadArgumentError(f"operation {int(options):#x} is not exactly one of Read, Write and Zero")
        if data is None:
            raise BadArgumentError("Read and Write copy bytes to or from `data`: pass a descriptor")
        check_descriptor(data=data)
        if options == IODMACommandOperation.kIODMACommandPerformOperationOptionRead:
            dataOffset, _ = check_within(dataOffset, length, data.getLength(), data)  # noqa: N806 (IOKit's)
            data.writeBytes(dataOffset, transfer.read(dmaOffset, length))
        else:
            transfer.write(dmaOffset, data.readBytes(dataOffset, length))
        return kIOReturnSuccess

    def _prepare(self, offset: int, length: int, *, flush: bool, synchronize: bool) -> None:
        memory = self._memory
        if memory is None:
            raise NotReadyError(f"{self!r} has no memory: call setMemoryDescriptor() first")
        offset, length = self._range(memory, offset, length)
        if self._transfer is not None:
            self._require_same(memory, self._transfer)
            if (offset, length) != self.getPreparedOffsetAndLength():
                raise NotReadyError(f"{self!r} is prepared with another range: call complete() first")
            self._active += 1
            return
        mapper = self._mapper if self._limits.maps else None
        self._transfer = DeviceTransfer(memory, offset, length, self._limits, mapper)
        try:
            self._transfer.begin(flush=flush, synchronize=synchronize)
        except BaseException:
            self._transfer.release()
            self._transfer = None
            raise
        self._active = 1

    def _require_same(self, descriptor: IOMemoryDescriptor, transfer: DeviceTransfer) -> None:
        """Raise `kIOReturnBusy` if the descriptor was released, and initialized again, since the transfer began."""
        if descriptor._memory() is not transfer.memory:
            raise self._has_other_memory()

    def _has_other_memory(self) -> BusyError:
        return BusyError(f"{self!r} is prepared with other memory: call complete() first")

    def _range(self, memory: IOMemoryDescriptor, offset: int, length: int) -> tuple[int, int]:
        offset, length = integers(offset=offset, length=length)
        whole = memory.getLength()
        length = length or whole - offset
        check_within(offset, length, whole, "the memory")
        if 0 < self._limits.max_transfer < length:
            message = f"{length} bytes exceed the device's maximum transfer of {self._limits.max_transfer} bytes"
            raise IOReturnError(IOReturn.kIOReturnNoSpace, message)
        if length % self._limits.length_unit:
            message = f"{length} bytes are not a multiple of {self._limits.length_unit}, the unit of segment lengths"
            raise IOReturnError(IOReturn.kIOReturnNotAligned, message)
        return offset, length

    def _complete(self, *, invalidate: bool, synchronize: bool) -> None:
        transfer = self._prepared()
        self._active -= 1
        if self._active:
            return
        self._transfer = None
        try:
            transfer.end(invalidate=invalidate, synchronize=synchronize)
        finally:
            transfer.release()

    def _complete_all(self) -> None:
        while self._active:
            self._complete(invalidate=True, synchronize=True)

    def _prepared(self) -> DeviceTransfer:
        if self._transfer is None:
            raise NotReadyError(f"{self!r} is not prepared: call prepare() first")
        return self._transfer

    def _within(self, offset: int, length: int) -> tuple[DeviceTransfer, int, int]:
        transfer = self._prepared()
        return transfer, *check_within(offset, length, transfer.length, "the prepared transfer")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        with_block.leave(self.clearMemoryDescriptor, error)

    def __repr__(self) -> str:
        limits, transfer = self._limits, self._transfer
        state = f"prepare count {self._active}" if transfer else "not prepared"
        # Recorded, because the bounce buffer may be garbage of the same cycle, and already released.
        bounced = f", {transfer.bounced_bytes} bytes bounced" if transfer and transfer.bounced_bytes else ""
        return f"<IODMACommand for {limits.address_bits} address bits, {state}{bounced}>"

    def __del__(self) -> None:
        transfer = getattr(self, "_transfer", None)
        if transfer is None or self._maker != os.getpid():
            return
        message = f"{self!r} was never completed"
        self._transfer = None
        transfer.drop()
        warnings.warn(message, ResourceWarning, stacklevel=2, source=self)


# The macros of IODMACommand.h.
kIODMACommandOutputHost32 = IODMACommand.OutputHost32
kIODMACommandOutputBig32 = IODMACommand.OutputBig32
kIODMACommandOutputLittle32 = IODMACommand.OutputLittle32
kIODMACommandOutputHost64 = IODMACommand.OutputHost64
kIODMACommandOutputBig64 = IODMACommand.OutputBig64
kIODMACommandOutputLittle64 = IODMACommand.OutputLittle64
