"""The formats of scatter/gather lists that IOKit's output functions write."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Buffer

    from iobmd._native.pagemap import PhysicalSegment


class SegmentFormat:
    """The format of a segment in memory: its address and its length, each of 32 or 64 bits.

    It can be called as a `SegmentFunction` of IOKit, and encodes whole lists.

    Parameters
    ----------
    bits : int
        32 or 64.
    order : str
        The byte order: ``"="`` of this processor, ``">"`` big endian, ``"<"`` little endian.
    """

    def __init__(self, bits: int, order: str) -> None:
        self.bits = bits
        self._packed = struct.Struct(order + ("II" if bits == 32 else "QQ"))

    @property
    def size(self) -> int:
        """The size of a segment in bytes: 8 or 16."""
        return self._packed.size

    def __call__(self, command: object, segment: PhysicalSegment, segments: Buffer, segmentIndex: int) -> bool:  # noqa: ARG002 (IOKit's)
        """Store a segment in a writable buffer; return False if it lacks room for the segment.

        Parameters
        ----------
        command
            The command, which is not used.
        segment
            The segment.
        segments
            The buffer, with one segment after another.
        segmentIndex : int
            The number of the segment in the buffer.
        """
        with memoryview(segments) as view, view.cast("B") as list_:
            if len(list_) < (segmentIndex + 1) * self.size:
                return False
            self._packed.pack_into(list_, segmentIndex * self.size, segment.address, segment.length)
        return True

    def encode(self, segments: Iterable[PhysicalSegment]) -> bytes:
        """Return segments as the bytes of a list."""
        return b"".join(self._packed.pack(segment.address, segment.length) for segment in segments)
