"""Proof by devices: the bytes that they read and write at physical addresses are those at the virtual addresses."""

import mmap
import os
import random
from collections.abc import Iterator, Sequence

import iobmd
from support.edu import LARGEST, Copy, Devices

PAGE = mmap.PAGESIZE


class Proof:
    """Makes devices read and write memory at physical addresses, and compares every byte with the processor's view.

    A device copies each piece to a separate page and back, which `devices` counts as two transfers.
    """

    def __init__(self, devices: Devices, pages: iobmd.IOBufferMemoryDescriptor) -> None:
        self.devices = devices
        self.pages = pages
        self._places = [pages.getPhysicalSegment(index * PAGE)[0] for index in range(len(devices.devices))]

    def read(self, addresses: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes that devices read at physical addresses, up to 4095 at each."""
        found = []
        for start in range(0, len(addresses), len(self._places)):
            batch = addresses[start : start + len(self._places)]
            self.pages.writeBytes(0, os.urandom(len(self.pages)))
            self.devices.copy(
                [Copy(source, place, length) for (source, length), place in zip(batch, self._places, strict=False)]
            )
            found += [self.pages.readBytes(index * PAGE, length) for index, (_, length) in enumerate(batch)]
        return found

    def write(self, addresses: Sequence[tuple[int, int]], contents: Sequence[bytes]) -> None:
        """Make devices write to physical addresses."""
        for start in range(0, len(addresses), len(self._places)):
            batch = addresses[start : start + len(self._places)]
            for index, data in enumerate(contents[start : start + len(batch)]):
                self.pages.writeBytes(index * PAGE, data)
            self.devices.copy(
                [Copy(place, target, length) for (target, length), place in zip(batch, self._places, strict=False)]
            )

    def holds(self, buffer: iobmd.IOBufferMemoryDescriptor, offset: int = 0, length: int | None = None) -> int:
        """Check both directions, at both ends of every segment and inside long ones; return the number of pieces."""
        pieces = list(pieces_of(buffer.segments(offset, length), offset))
        places = [(physical, size) for _, physical, size in pieces]
        data = [os.urandom(size) for _, _, size in pieces]
        for (at, _, _), each in zip(pieces, data, strict=True):
            buffer.writeBytes(at, each)
        assert self.read(places) == data, "a device read other bytes than were written"
        data = [os.urandom(size) for _, _, size in pieces]
        self.write(places, data)
        written = [buffer.readBytes(at, size) for at, _, size in pieces]
        assert written == data, "the bytes that a device wrote are missing"
        return len(pieces)


def pieces_of(segments: Sequence[iobmd.PhysicalSegment], offset: int) -> Iterator[tuple[int, int, int]]:
    """Return pieces of segments, no two overlapping: offset in the buffer, physical address, and length."""
    for address, length in segments:
        size = min(length, LARGEST)
        starts = {length - size}
        if length >= 2 * size:
            inside = range(size, length - 2 * size, size)
            starts |= {0, *random.sample(inside, min(6, len(inside)))}
        for start in sorted(starts):
            yield offset + start, address + start, size
        offset += length
