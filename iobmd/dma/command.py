"""`IODMACommand`: a transfer between memory and a device."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from typing import TYPE_CHECKING, Self

from iobmd._internal import process_local
from iobmd.constants import IOReturn, kIODirectionIn, kIODirectionInOut, kIODirectionOut
from iobmd.descriptors.options import DIRECTION_MASK, check_within
from iobmd.dma.device_transfer import DeviceTransfer
from iobmd.dma.specification import MappingOptions, Specification
from iobmd.errors import BadArgumentError, BusyError, IOReturnError, NotReadyError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from iobmd._native.pagemap import PhysicalSegment
    from iobmd.descriptors.descriptor import IOMemoryDescriptor


class IODMACommand:
    """What a device is told about a descriptor's memory: segments within its limits, bounce buffers where it must be.

    One command serves one transfer after another, with the same memory or others. While it is prepared its memory is
    too, so that nobody can free it. Methods may be called from any thread, one at a time. In a forked child a
    prepared command refuses to work, like the wired memory below it. Leaving `with` is `clearMemoryDescriptor()`.

    Source: IOKit's IODMACommand.h. There is no mapper here: a device behind an IOMMU takes these addresses only where
    that passes them through.
    """

    kMapped = MappingOptions.kMapped
    kBypassed = MappingOptions.kBypassed
    kNonCoherent = MappingOptions.kNonCoherent
    kUnmapped = MappingOptions.kUnmapped
    kTypeMask = MappingOptions.kTypeMask
    kNoCacheStore = MappingOptions.kNoCacheStore
    kOnChip = MappingOptions.kOnChip
    kIterateOnly = MappingOptions.kIterateOnly
    kForceDoubleBuffer = 0x01000000

    def __init__(self, specification: Specification = Specification()) -> None:  # noqa: B008 (immutable)
        self._limits = specification.checked()
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
        *,
        boundary: int = 0,
    ) -> Self:
        """Make a command for a device with these limits; 0: no limit.

        Parameters
        ----------
        numAddressBits : int
            The device reaches physical addresses below 1 << numAddressBits.
        maxSegmentSize : int
            The most bytes of one segment.
        mappingOptions : int
            `kMapped`, `kBypassed` and `kUnmapped` are one, there being no mapper. `kNonCoherent`: the device does not
            see the processors' caches, which `prepare` and `complete` flush for it. `kIterateOnly`: never a bounce
            buffer.
        maxTransferSize : int
            The most bytes that can be prepared.
        alignment : int
            Every segment starts at a multiple of this power of two.
        boundary : int
            No segment crosses a multiple of this power of two (wider than IOKit).

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: a limit that no transfer can keep, or an option that is not known.
        """
        limits = (numAddressBits, maxSegmentSize, mappingOptions, maxTransferSize, alignment, boundary)
        return cls(Specification(*limits))

    def getNumAddressBits(self) -> int:
        """Return how many address bits the device has."""
        return self._limits.address_bits

    def getAlignment(self) -> int:
        """Return what every segment's address is a multiple of."""
        return self._limits.alignment

    # --- its memory

    def getMemoryDescriptor(self) -> IOMemoryDescriptor | None:
        """Return the descriptor that is set, None when none is."""
        return self._memory

    def getIOMemoryDescriptor(self) -> IOMemoryDescriptor | None:
        """Return the descriptor that the device uses: the bounce buffer where all of the transfer is in one."""
        transfer = self._transfer
        return transfer.bounce if transfer and transfer.double else self._memory

    def setMemoryDescriptor(self, mem: IOMemoryDescriptor | None, autoPrepare: bool = True) -> None:
        """Set the memory of the next transfer, and prepare all of it unless `autoPrepare` is False.

        The descriptor's own `prepare()` comes first, and is the caller's, as in IOKit. With the descriptor that is
        set already and `autoPrepare` False the command is completed.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy`: prepared with other memory; `kIOReturnNotOpen`: that was freed; or as `prepare`. Then no
            new memory is set.
        """
        with self._guard:
            fresh = mem is not self._memory
            if fresh and self._active:
                raise BusyError(f"{self!r} is prepared with other memory: call complete() first")
            if fresh and mem is not None:
                mem.getLength()  # raises when it was freed
            if not autoPrepare:
                self._complete_all()
            self._memory = mem
            if mem is None or not autoPrepare or self._active:
                return
            try:
                self._prepare(0, 0, flush=True, synchronize=True)
            except BaseException:
                self._memory = None if fresh else mem
                raise

    def clearMemoryDescriptor(self, autoComplete: bool = True) -> None:
        """Let go of the memory, completing the command first unless `autoComplete` is False.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: it is prepared, and `autoComplete` is False; or as `complete`.
        """
        with self._guard:
            if self._active and not autoComplete:
                raise NotReadyError(f"{self!r} is prepared: call complete() as often first")
            self._complete_all()
            self._memory = None

    def free(self) -> None:
        """Let go of the memory; idempotent.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while it is prepared.
        """
        with self._guard:
            if self._active:
                raise BusyError(f"{self!r} is prepared: call complete() as often first")
            self._memory = None

    release = free

    # --- transfers

    def prepare(self, offset: int = 0, length: int = 0, flushCache: bool = True, synchronize: bool = True) -> None:
        """Make a range of the memory ready for the device.

        Calls are counted, in pairs with `complete`; while it is prepared only the same range can be prepared again.
        What the device cannot reach, or a range with a piece that it cannot start at, gets bounce buffers, zeroed.

        Parameters
        ----------
        offset, length : int
            The range in bytes; `length` 0: to the end.
        flushCache : bool
            With `kNonCoherent`: write the processors' caches back.
        synchronize : bool
            Copy the memory to its bounce buffers, if its direction is out (or none).

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: no memory is set, it is not pinned (its `prepare()` comes first), or another range is
            prepared. `kIOReturnNoSpace`: longer than the device's largest transfer. `kIOReturnBadArgument`: past the
            end. `kIOReturnNoResources`: no bounce buffer is to be had where the device reaches it (`iobmd.policy`
            bounds the search). `kIOReturnNotPrivileged`: physical addresses are hidden. `kIOReturnNotOpen`: the
            memory was freed. Nothing is prepared then.
        """
        with self._guard:
            self._prepare(offset, length, flush=flushCache, synchronize=synchronize)

    def complete(self, invalidateCache: bool = True, synchronize: bool = True) -> None:
        """Undo one `prepare`; the last one ends the transfer.

        Parameters
        ----------
        invalidateCache : bool
            With `kNonCoherent`: drop what the processors' caches hold of the memory.
        synchronize : bool
            Copy the bounce buffers back to the memory, if its direction is in (or none).

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: it is not prepared. What keeps bytes from being copied back is raised too, and the
            transfer has ended.
        """
        with self._guard:
            self._prepared()
            self._complete(invalidate=invalidateCache, synchronize=synchronize)

    def getPreparedOffsetAndLength(self) -> tuple[int, int]:
        """Return the range that is prepared, in bytes. Raises `kIOReturnNotReady` when none is."""
        transfer = self._prepared()
        return transfer.offset, transfer.length

    def genIOVMSegments(self, offset: int = 0, numSegments: int | None = None) -> list[PhysicalSegment]:
        """Return the segments to give to the device, in order, within its limits.

        Parameters
        ----------
        offset : int
            Where to begin, in bytes, counted from the prepared offset. The sum of the lengths of all segments before
            is where the next call goes on.
        numSegments : int, optional
            The most segments to return; None: all.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: it is not prepared. `kIOReturnOverrun`: nothing is left at `offset`.
            `kIOReturnBadArgument`: a negative offset, or no segments. `kIOReturnNotAligned`: the device cannot start
            there. `kIOReturnMessageTooLarge`: with `kIterateOnly`, memory that it cannot reach.
        """
        transfer = self._prepared()
        if offset < 0 or (numSegments is not None and numSegments < 1):
            message = f"{numSegments} segments from offset {offset} on cannot be had"
            raise BadArgumentError(message)
        if offset >= transfer.length:
            message = f"offset {offset} is at the end of the {transfer.length} bytes prepared"
            raise IOReturnError(IOReturn.kIOReturnOverrun, message)
        most = None if numSegments is None else min(numSegments, transfer.length)  # each has a byte at least
        return list(itertools.islice(transfer.segments(offset), most))

    def synchronize(self, direction: int, forceDoubleBuffer: bool = False) -> None:
        """Copy between the memory and its bounce buffers; nothing where there are none.

        Parameters
        ----------
        direction : int
            `kIODirectionOut`: from the memory to the bounce buffers. `kIODirectionIn`: back. `kForceDoubleBuffer` may
            be added.
        forceDoubleBuffer : bool
            Go on with all of the prepared range in a new page-aligned bounce buffer, with the bytes that the device
            sees now; segments have to be asked for again. Then `direction` may be 0.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: it is not prepared. `kIOReturnBadArgument`: both directions, or unknown bits.
            `kIOReturnNoResources`: no bounce buffer is to be had, and all is as before. `kIOReturnUnsupported`: a
            bounce buffer asked for with `kIterateOnly`.
        """
        with self._guard:
            transfer = self._prepared()
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

    def readBytes(self, offset: int, length: int) -> bytes:
        """Return bytes as the device sees them, `offset` counted from the prepared one.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: it is not prepared. `kIOReturnBadArgument`: past the end of what is.
        """
        transfer = self._within(offset, length)
        return transfer.read(offset, length)

    def writeBytes(self, offset: int, data: Buffer) -> int:
        """Store bytes where the device would; return how many. Raises as `readBytes`, with nothing written."""
        size = memoryview(data).nbytes
        self._within(offset, size).write(offset, data)
        return size

    def _prepare(self, offset: int, length: int, *, flush: bool, synchronize: bool) -> None:
        memory = self._memory
        if memory is None:
            raise NotReadyError(f"{self!r} has no memory: call setMemoryDescriptor() first")
        offset, length = self._range(memory, offset, length)
        if self._transfer is not None:
            if (offset, length) != self.getPreparedOffsetAndLength():
                raise NotReadyError(f"{self!r} is prepared with another range: complete() that first")
            self._active += 1
            return
        self._transfer = DeviceTransfer(memory, offset, length, self._limits)
        try:
            self._transfer.begin(flush=flush, synchronize=synchronize)
        except BaseException:
            self._transfer.release()
            self._transfer = None
            raise
        self._active = 1

    def _range(self, memory: IOMemoryDescriptor, offset: int, length: int) -> tuple[int, int]:
        whole = memory.getLength()
        length = length or whole - offset
        check_within(offset, length, whole, "the memory")
        if 0 < self._limits.max_transfer < length:
            message = f"{length} bytes are more than the device transfers at a time, {self._limits.max_transfer}"
            raise IOReturnError(IOReturn.kIOReturnNoSpace, message)
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

    def _within(self, offset: int, length: int) -> DeviceTransfer:
        transfer = self._prepared()
        check_within(offset, length, transfer.length, "the prepared transfer")
        return transfer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.clearMemoryDescriptor()

    def __repr__(self) -> str:
        limits, transfer = self._limits, self._transfer
        state = f"prepared {self._active} times" if transfer else "not prepared"
        bounced = f", {len(transfer.bounce)} bytes bounced" if transfer and transfer.bounce else ""
        return f"<IODMACommand for {limits.address_bits} address bits, {state}{bounced}>"

    def __del__(self) -> None:
        transfer = getattr(self, "_transfer", None)
        if transfer is None or self._maker != os.getpid():
            return
        message = f"{self!r} was never completed"
        self._transfer = None
        with contextlib.suppress(IOReturnError):  # its memory may be garbage of the same cycle, and freed already
            transfer.release()
        warnings.warn(message, ResourceWarning, stacklevel=2, source=self)
