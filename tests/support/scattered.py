"""A descriptor whose bytes have physical addresses chosen by the test, for any layout that a device may encounter."""

import contextlib
from collections.abc import Iterable

from iobmd import (
    PhysicalSegment,
    Wiring,
    kIODirectionInOut,
    kIOMemoryIncoherentIOFlush,
    kIOMemoryIncoherentIOStore,
)
from iobmd.errors import NotOpenError


class ScatteredDescriptor:
    """The methods of an `IOMemoryDescriptor` that `IODMACommand` calls, over a `bytearray`."""

    def __init__(self, pieces: Iterable[tuple[int, int]], direction: int = int(kIODirectionInOut)) -> None:
        self.pieces = list(pieces)
        self.bytes = bytearray(sum(length for _, length in self.pieces))
        self.bytes[:] = bytes(index * 7 % 251 for index in range(len(self.bytes)))
        self.direction = direction
        self.prepared = 1
        self.freed = False
        self.operations: list[tuple[int, int, int]] = []

    def _open(self) -> None:
        if self.freed:
            raise NotOpenError("released")

    def getLength(self) -> int:
        self._open()
        return len(self.bytes)

    def getDirection(self) -> int:
        return self.direction

    # --- the memory of the handle

    guard = contextlib.nullcontext()

    def _memory(self) -> "ScatteredDescriptor":
        self._open()
        return self

    def _pin(self) -> "ScatteredDescriptor":
        self.pin()
        return self

    def require_backing(self) -> "ScatteredDescriptor":
        self._open()
        return self

    def require_mapped(self) -> None:
        self._open()

    @property
    def wiring(self) -> Wiring:
        self._open()
        return Wiring.PINNED if self.prepared else Wiring.PAGEABLE

    def pin(self) -> None:
        self.prepared += 1

    def unpin(self) -> None:
        assert self.prepared > 0
        self.prepared -= 1

    def segments(self, offset: int, length: int) -> list[PhysicalSegment]:
        found, end, at = [], offset + length, 0
        for address, size in self.pieces:
            start, stop = max(offset, at), min(end, at + size)
            if start < stop:
                found.append(PhysicalSegment(address + start - at, stop - start))
            at += size
        return found

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.bytes[offset : offset + length])

    def read_into(self, offset: int, buffer: memoryview) -> int:
        buffer[:] = self.bytes[offset : offset + len(buffer)]
        return len(buffer)

    def write(self, offset: int, data: memoryview) -> int:
        size = memoryview(data).nbytes
        assert offset + size <= len(self.bytes)
        self.bytes[offset : offset + size] = data
        return size

    def write_back(self, offset: int, length: int, *, drop: bool) -> None:
        self.operations.append((kIOMemoryIncoherentIOFlush if drop else kIOMemoryIncoherentIOStore, offset, length))
