"""A prepared range of memory as a device sees it: in place if it is within reach, otherwise in bounce buffers.

With a mapper, the device sees one range of its addresses, wherever the memory is.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from iobmd._native.mapping import BEST_FLUSH
from iobmd._native.pagemap import PhysicalSegment, bounds, joined
from iobmd.constants import (
    IOOptionBits,
    IOReturn,
    kIODirectionIn,
    kIODirectionOut,
)
from iobmd.descriptors.buffer import IOBufferMemoryDescriptor
from iobmd.descriptors.options import require_cache_instruction
from iobmd.errors import IOReturnError, NoResourcesError, NotReadyError, UnsupportedError
from iobmd.iommu import device_pages
from iobmd.pagemap import segment
from iobmd.task.task import kernel_task
from iobmd.units import PAGE_SIZE, pages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from iobmd.backing import Backing
    from iobmd.descriptors.descriptor import IOMemoryDescriptor
    from iobmd.descriptors.ownership import MemoryOwner
    from iobmd.dma.specification import Specification
    from iobmd.iommu import IOMapper, IOVMRange

    _Bounds = tuple[int, int, int, int, int]  # the result of `bounds`

_CONTIGUOUS = int(IOOptionBits.kIOMemoryPhysicallyContiguous)
_IN, _OUT = int(kIODirectionIn), int(kIODirectionOut)


class BounceRange(NamedTuple):
    """A contiguous part of a transfer; in bytes."""

    offset: int
    """Offset in the transfer."""
    length: int
    place: int | None
    """Offset in the bounce buffer; None: in the memory itself."""


class DeviceTransfer:
    """A range of pinned memory, made reachable for a device, and prepared until `release`.

    Parameters
    ----------
    descriptor : IOMemoryDescriptor
        The memory, already pinned.
    offset, length : int
        The range, in bytes.
    limits : Specification
        The limits of the device.
    mapper : IOMapper, optional
        Maps the memory, or its bounce buffer, for the device; None: the device uses physical addresses.
    forced : bool
        Whether to use a contiguous bounce buffer for the whole range.

    Raises
    ------
    IOReturnError
        `kIOReturnNotReady`: it is not pinned. `kIOReturnNoResources`: no memory for the bounce buffer within reach of
        the device. `kIOReturnVMError`: the program has unmapped memory that a bounce buffer is to replace. Also as
        `IOMemoryDescriptor.segments` or `IOMapper.prepare`. After an error, nothing is held.
    """

    def __init__(
        self,
        descriptor: IOMemoryDescriptor,
        offset: int,
        length: int,
        limits: Specification,
        mapper: IOMapper | None = None,
        *,
        forced: bool = False,
    ) -> None:
        self.descriptor, self.offset, self.length, self.limits = descriptor, offset, length, limits
        self.bounce: IOBufferMemoryDescriptor | None = None
        self.bounced_bytes = 0
        self.double = self._forced = forced
        self._direction = int(descriptor.getDirection())  # of this transfer, even if the descriptor is released
        self._mapper = mapper
        self._mapped: IOVMRange | None = None
        self._starts: list[int] | None = None
        if not descriptor.wiring.is_immovable:
            raise NotReadyError(f"{descriptor!r} is not pinned: call its prepare() first")
        self.memory = descriptor._pin()
        try:
            lying = self._lying()
            met = bounds(lying)
            self._ranges = self._divide(lying, met)
            self.bounce = self._allocate()
            self._pieces = lying if self.bounce is None else self._locate()
            if mapper is not None:
                self._pieces = self._map(mapper)
            self._uncut = self._check(met if self._pieces is lying else bounds(self._pieces))
        except BaseException:
            self.release()
            raise

    def _lying(self) -> list[PhysicalSegment]:
        """Return the positions of the bytes in the memory; with a mapper, only their offsets in pages matter."""
        if self._mapper is None:
            return joined(self.memory.segments(self.offset, self.length))
        within = self.memory.require_backing().in_page(0)
        if within and self.limits.alignment > PAGE_SIZE:  # the mapper aligns the page
            return [PhysicalSegment(1, self.length)]
        return [PhysicalSegment(within + self.offset, self.length)]

    def _divide(self, lying: list[PhysicalSegment], met: _Bounds) -> list[BounceRange]:
        if not self.length:
            return []
        if self.limits.iterates_only:
            return [BounceRange(0, self.length, None)]
        self.double = self.double or _must_move(lying, met, self.limits) or self._has_border_inside_page()
        if self.double:
            return [BounceRange(0, self.length, 0)]
        if self._mapper or met[2] <= self.limits.highest:
            return [BounceRange(0, self.length, None)]
        return _split(lying, self.limits.highest)

    def _has_border_inside_page(self) -> bool:
        """Whether the memory cannot be mapped for the device as one range, so that a bounce buffer must be."""
        if self._mapper is None:
            return False
        return device_pages.border_inside_page(self.memory, self.descriptor.getLength()) is not None

    def _allocate(self) -> IOBufferMemoryDescriptor | None:
        bounced = [piece for piece in self._ranges if piece.place is not None]
        if not bounced:
            return None
        # Before the bounce buffer is mapped, because the kernel may map it at the address of unmapped memory.
        self.memory.require_mapped()
        self.bounced_bytes = size = max((piece.place or 0) + piece.length for piece in bounced)
        bounce = IOBufferMemoryDescriptor()
        limits, options = self.limits, self._direction
        if self._mapper:
            bounce.initWithPhysicalMask(kernel_task, options, size, PAGE_SIZE, 0)
        else:
            options |= _CONTIGUOUS if self._forced else 0
            try:
                bounce.initWithPhysicalMask(kernel_task, options, size, limits.buffer_alignment, limits.mask)
            except NoResourcesError as error:
                message = f"{self.descriptor!r} needs a bounce buffer for this device: {error.strerror}"
                raise NoResourcesError(message, error.errno or 0) from None
        try:
            bounce.prepare()  # raises the error with the reason if it is only resident
        except BaseException:
            bounce.free()
            raise
        return bounce

    def _locate(self) -> list[PhysicalSegment]:
        """Return the physical positions of the bytes for the device, with contiguous parts joined."""
        parts = (source.segments(place, length) for source, place, length in self._parts(0, self.length))
        return joined(list(itertools.chain.from_iterable(parts)))

    def _map(self, mapper: IOMapper) -> list[PhysicalSegment]:
        """Map the memory for the device, and return its position there."""
        if not self.length:
            return []
        source, offset = (self.descriptor, self.offset) if self.bounce is None else (self.bounce, 0)
        limits = self.limits
        self._mapped = mapper.prepare(source, alignment=limits.buffer_alignment, highest=limits.highest)
        return [PhysicalSegment(self._mapped.address + offset, self.length)]

    def _check(self, met: _Bounds) -> bool:
        """Check that all bytes were located; return whether the pieces are segments that satisfy every limit."""
        total, longest, highest, addresses, lengths = met
        if total != self.length:
            message = f"{self.descriptor!r} has physical addresses for {total} of {self.length} bytes"
            raise IOReturnError(IOReturn.kIOReturnUnderrun, message)
        limits, first = self.limits, self._pieces[0].address if self._pieces else 0
        suitable = not (first % limits.alignment or addresses % limits.internal_alignment)
        suitable = suitable and not (lengths % limits.length_unit or self.length % limits.length_unit)
        within = highest <= limits.highest and (not limits.max_segment or longest <= limits.max_segment)
        return suitable and within and not limits.boundary

    def _begin_at(self, offset: int) -> tuple[int, int]:
        """Return the index of the piece with the byte at `offset`, and the offset in it."""
        if not offset:
            return 0, 0
        if self._starts is None:
            self._starts = list(itertools.accumulate((piece.length for piece in self._pieces), initial=0))
        index = bisect_right(self._starts, offset) - 1
        return index, offset - self._starts[index]

    def _parts(self, offset: int, length: int) -> Iterator[tuple[MemoryOwner, int, int]]:
        """Yield the memory of a part of the transfer, the offset in it, and the number of bytes."""
        end = offset + length
        first = bisect_right(self._ranges, offset, key=lambda piece: piece.offset) - 1
        for piece in itertools.islice(self._ranges, max(first, 0), None):
            start, stop = max(offset, piece.offset), min(end, piece.offset + piece.length)
            if piece.offset >= end:
                return
            if start >= stop:
                continue
            if piece.place is None or self.bounce is None:
                yield self.memory, self.offset + start, stop - start
            else:
                yield self.bounce._memory(), piece.place + start - piece.offset, stop - start

    def segments(self, offset: int, most: int | None) -> list[PhysicalSegment]:
        """Return at most `most` segments for the device, starting at `offset`, split to its limits.

        Raises
        ------
        IOReturnError
            `kIOReturnMessageTooLarge`: out of the device's reach, which happens only without bounce buffers.
            `kIOReturnNotAligned`: an address or a length with an unsuitable alignment.
        """
        if self._uncut and not offset:
            return self._pieces[:most]
        return list(itertools.islice(self._cut(offset), most))

    def _cut(self, offset: int) -> Iterator[PhysicalSegment]:
        limits = self.limits
        alignment = limits.alignment if not offset else limits.internal_alignment
        index, skipped = self._begin_at(offset)
        for piece in itertools.islice(self._pieces, index, None):
            for address, size in segment.cut(
                piece.address + skipped,
                piece.length - skipped,
                limits.max_segment,
                limits.boundary,
                limits.internal_alignment,
                limits.length_unit,
            ):
                if address % alignment:
                    message = f"a segment at {address:#x} does not start at a multiple of {alignment}"
                    raise IOReturnError(IOReturn.kIOReturnNotAligned, message)
                if size % limits.length_unit:
                    message = (
                        f"the {size} bytes of a segment at {address:#x} are not a multiple of {limits.length_unit}"
                    )
                    raise IOReturnError(IOReturn.kIOReturnNotAligned, message)
                if address + size - 1 > limits.highest:
                    message = f"a segment of {size} bytes at {address:#x} is out of reach of {limits.highest:#x}"
                    raise IOReturnError(IOReturn.kIOReturnMessageTooLarge, message)
                yield PhysicalSegment(address, size)
                alignment = limits.internal_alignment
            skipped = 0

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes as the device sees them."""
        return b"".join(_bytes(source).read(place, size) for source, place, size in self._parts(offset, length))

    def write(self, offset: int, data: Buffer) -> None:
        """Store bytes as the device would."""
        done = 0
        with memoryview(data) as view, view.cast("B") as source:
            for target, place, size in self._parts(offset, len(source)):
                _bytes(target).write(place, source[done : done + size])
                done += size

    def begin(self, *, flush: bool, synchronize: bool) -> None:
        """Hand it over to the device: copy outgoing bytes to the bounce buffer, and flush them to memory."""
        if synchronize and self._goes(_OUT):
            self.copy_out()
        if flush and self.limits.incoherent:
            self._write_back(drop=False)

    def end(self, *, invalidate: bool, synchronize: bool) -> None:
        """Return it to the processor: copy incoming bytes to the descriptor's memory."""
        if invalidate and self.limits.incoherent:
            self._write_back(drop=True)
        if synchronize and self._goes(_IN):
            self.copy_in()

    def doubled(self) -> DeviceTransfer:
        """Return the transfer with a forced bounce buffer, replacing this one. Raises as the class."""
        if self._forced:
            return self
        if self.limits.iterates_only:
            message = "a command with kIterateOnly has no bounce buffers"
            raise UnsupportedError(message)
        after = DeviceTransfer(self.descriptor, self.offset, self.length, self.limits, self._mapper, forced=True)
        try:
            # In both directions: what the device does not write is copied back to the memory at the end, too.
            after._copy_from(self)
            after._direction = self._direction
        except BaseException:
            after.release()
            raise
        self.release()
        return after

    def _copy_from(self, before: DeviceTransfer) -> None:
        """Copy the bytes that the device sees in another transfer of the same range to the forced bounce buffer."""
        if self.bounce is None:
            return
        done = 0
        with memoryview(self.bounce) as view:
            for source, place, size in before._parts(0, self.length):
                with view[done : done + size] as part:
                    _bytes(source).read_into(place, part)
                done += size

    def copy_out(self) -> None:
        """Copy the memory's bytes to the bounce buffer, regardless of its direction."""
        for offset, part in self._bounced():
            _bytes(self.memory).read_into(offset, part)

    def copy_in(self) -> None:
        """Copy the bounce buffer's bytes to the memory, regardless of its direction."""
        for offset, part in self._bounced():
            _bytes(self.memory).write(offset, part)

    def _bounced(self) -> Iterator[tuple[int, memoryview]]:
        """Yield the bytes in the bounce buffer, with their offsets in the memory."""
        if self.bounce is None:
            return
        with memoryview(self.bounce) as view:
            for piece in self._ranges:
                if piece.place is not None:
                    with view[piece.place : piece.place + piece.length] as part:
                        yield self.offset + piece.offset, part

    def _goes(self, direction: int) -> bool:
        """Whether it is transferred in this direction; memory without a direction is transferred in both."""
        return not self._direction or bool(self._direction & direction)

    def _write_back(self, *, drop: bool) -> None:
        require_cache_instruction(BEST_FLUSH)
        for source, place, length in self._parts(0, self.length):
            _bytes(source).write_back(place, length, drop=drop)

    def release(self) -> None:
        """Free the bounce buffer and release the memory; to be called once."""
        try:
            if self._mapped is not None:
                self._mapped.complete()
            if self.bounce is not None:
                self.bounce.complete()
                self.bounce.free()
        finally:
            with self.memory.guard:
                self.memory.unpin()

    def drop(self) -> None:
        """As `release`, for a destructor, which must not wait and cannot report errors."""
        if self._mapped is not None:
            self._mapped.drop()
        if self.bounce is not None:
            self.bounce._abandon()
        self.memory.unpin_when_free()


def _must_move(lying: list[PhysicalSegment], met: _Bounds, limits: Specification) -> bool:
    """Whether parts have an unsuitable alignment, so that bouncing only the unreachable pages does not suffice."""
    _total, _longest, highest, addresses, lengths = met
    if limits.buffer_alignment > PAGE_SIZE and highest > limits.highest:
        return True
    internal = addresses % limits.internal_alignment or lengths % limits.length_unit
    return bool(internal or (lying and lying[0].address % limits.alignment))


def _split(lying: list[PhysicalSegment], highest: int) -> list[BounceRange]:
    """Divide a range into parts that a device can reach, and parts that are bounced with the same page offsets."""
    found: list[BounceRange] = []
    offset = used = 0
    for address, length in lying:
        within = min(max(highest + 1 - address, 0), length)
        if within:
            _add(found, BounceRange(offset, within, None))
        if beyond := length - within:
            place = used + (address + within) % PAGE_SIZE
            used += pages((address + within) % PAGE_SIZE + beyond) * PAGE_SIZE
            _add(found, BounceRange(offset + within, beyond, place))
        offset += length
    return found


def _add(found: list[BounceRange], piece: BounceRange) -> None:
    last = found[-1] if found else None
    if last and piece.place == (None if last.place is None else last.place + last.length):
        found[-1] = last._replace(length=last.length + piece.length)
    else:
        found.append(piece)


def _bytes(memory: MemoryOwner) -> Backing:
    """Return the prepared memory: its length may have been reduced in the meantime (`setLength`)."""
    return memory.require_backing()
