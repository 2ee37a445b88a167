"""`IOMemoryCursor` and its subclasses: the segments of prepared memory, without a command."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, ClassVar, Self

from iobmd._internal.arguments import integers
from iobmd._native.pagemap import PhysicalSegment
from iobmd.constants import IOReturn
from iobmd.descriptors.options import check_descriptor
from iobmd.dma.segment_format import SegmentFormat
from iobmd.dma.specification import Specification
from iobmd.errors import BadArgumentError, IOReturnError
from iobmd.pagemap import segment

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from iobmd.descriptors.descriptor import IOMemoryDescriptor


class IOMemoryCursor:
    """The physical segments of prepared memory, within the limits of a device, in the byte order of this processor.

    Unlike a command, it never copies: memory that does not satisfy the limits is an error.

    Source: IOKit's IOMemoryCursor.h.
    """

    format: ClassVar[SegmentFormat] = SegmentFormat(64, "=")
    """The format in which `genPhysicalSegments` stores segments."""

    def __init__(self, limits: Specification) -> None:
        self._limits = limits.checked()

    @classmethod
    def withSpecification(cls, maxSegmentSize: int, maxTransferSize: int = 0, alignment: int = 1) -> Self:
        """Create a cursor for a device with these limits.

        Parameters
        ----------
        maxSegmentSize, maxTransferSize : int
            The maximum size in bytes of a segment, and of all segments of one call; 0: no limit.
        alignment : int
            Every segment starts at a multiple of this power of two.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: a limit that no transfer can satisfy.
        """
        return cls(Specification(64, maxSegmentSize, 0, maxTransferSize, alignment))

    def getPhysicalSegments(
        self,
        descriptor: IOMemoryDescriptor,
        fromPosition: int,
        maxSegments: int,
        maxTransferSize: int = 0,
    ) -> list[PhysicalSegment]:
        """Return the segments of memory, starting at a position.

        Parameters
        ----------
        descriptor : IOMemoryDescriptor
            The memory, which must be prepared.
        fromPosition : int
            The offset of the first byte. For the next call, add the lengths of all returned segments.
        maxSegments : int
            The maximum number of segments.
        maxTransferSize : int
            The maximum number of bytes; 0: that of the cursor.

        Returns
        -------
        list[PhysicalSegment]
            Empty at the end of the memory.

        Raises
        ------
        IOReturnError
            As `IOMemoryDescriptor.segments`. `kIOReturnNotAligned`: a segment does not start at a multiple of the
            alignment.
        """
        check_descriptor(descriptor=descriptor)
        fromPosition, maxSegments, maxTransferSize = integers(  # noqa: N806 (IOKit's)
            fromPosition=fromPosition, maxSegments=maxSegments, maxTransferSize=maxTransferSize
        )
        if min(fromPosition, maxTransferSize) < 0 or maxSegments < 1:
            raise BadArgumentError(f"cannot generate {maxSegments} segments from position {fromPosition}")
        limits, left = self._limits, max(descriptor.getLength() - fromPosition, 0)
        length = min(left, limits.max_transfer or left, maxTransferSize or left)
        pieces = descriptor.segments(fromPosition, length) if length else []
        cut = itertools.chain.from_iterable(
            segment.cut(piece.address, piece.length, limits.max_segment, 0, limits.alignment) for piece in pieces
        )
        found = [PhysicalSegment(*one) for one in itertools.islice(cut, maxSegments)]
        if misaligned := next((one.address for one in found if one.address % limits.alignment), None):
            message = f"a segment at {misaligned:#x} does not start at a multiple of {limits.alignment}"
            raise IOReturnError(IOReturn.kIOReturnNotAligned, message)
        return found

    def genPhysicalSegments(
        self,
        descriptor: IOMemoryDescriptor,
        fromPosition: int,
        segments: Buffer,
        maxSegments: int,
        maxTransferSize: int = 0,
    ) -> tuple[int, int]:
        """Store segments in a writable buffer, in the format of the class; return their number and total length.

        Parameters and errors are those of `getPhysicalSegments`. No more segments are stored than fit in the buffer.
        """
        room = memoryview(segments).nbytes // self.format.size
        found = self.getPhysicalSegments(descriptor, fromPosition, min(maxSegments, room), maxTransferSize)
        for index, one in enumerate(found):
            self.format(self, one, segments, index)
        return len(found), sum(one.length for one in found)


class IONaturalMemoryCursor(IOMemoryCursor):
    """A cursor that stores segments in the byte order of this processor."""


class IOBigMemoryCursor(IOMemoryCursor):
    """A cursor that stores segments in big-endian byte order."""

    format = SegmentFormat(64, ">")
    """Big endian."""


class IOLittleMemoryCursor(IOMemoryCursor):
    """A cursor that stores segments in little-endian byte order."""

    format = SegmentFormat(64, "<")
    """Little endian."""
