"""The rings of descriptors that the driver and the card share."""

import struct
from typing import NamedTuple

import iobmd

SIZE = 16  # bytes of a descriptor
END_OF_PACKET, INSERT_CHECKSUM, REPORT_STATUS = 0x01, 0x02, 0x08  # of a transmit descriptor's command
DONE, PACKET_COMPLETE = 0x01, 0x02  # of a status
_TRANSMIT = struct.Struct("<QHBBBBH")  # address, length, checksum offset, command, status, checksum start, special
_RECEIVE = struct.Struct("<QHHBBH")  # address, length, checksum, status, errors, special


class Received(NamedTuple):
    """A receive descriptor that the card has written."""

    index: int
    length: int
    status: int
    errors: int


class Ring:
    """A ring of descriptors in contiguous memory, whose physical address is programmed into the card.

    Parameters
    ----------
    registers : IOMemoryMap
        The registers of the card.
    base : int
        The offset of the ring's registers: its address, length, head and tail.
    count : int
        The number of descriptors, a multiple of 8.
    """

    def __init__(self, registers: iobmd.IOMemoryMap, base: int, count: int) -> None:
        self._registers, self._base = registers, base
        self.count = count
        self.memory = iobmd.allocate(count * SIZE, alignment=4096, contiguous=True)
        address = self.memory.getPhysicalAddress()
        registers.write32(base, address & 0xFFFFFFFF)
        registers.write32(base + 4, address >> 32)
        registers.write32(base + 8, count * SIZE)
        registers.write32(base + 0x10, 0)  # head
        registers.write32(base + 0x18, 0)  # tail
        self.next = 0

    def announce(self, tail: int) -> None:
        """Pass the descriptors before `tail` to the card. The store follows those to the ring in memory, in order."""
        self._registers.write32(self._base + 0x18, tail)

    def status(self, index: int) -> int:
        """Return the status of a descriptor, at the same offset in both kinds."""
        return self.memory.readBytes(index * SIZE + 12, 1)[0]

    def transmit(self, index: int, segment: iobmd.PhysicalSegment, *, last: bool) -> None:
        """Write a descriptor of a piece of a frame."""
        command = INSERT_CHECKSUM | (END_OF_PACKET | REPORT_STATUS if last else 0)
        packed = _TRANSMIT.pack(segment.address, segment.length, 0, command, 0, 0, 0)
        self.memory.writeBytes(index * SIZE, packed)

    def receive_into(self, index: int, address: int) -> None:
        """Write a descriptor of an empty receive buffer."""
        self.memory.writeBytes(index * SIZE, _RECEIVE.pack(address, 0, 0, 0, 0, 0))

    def received(self, index: int) -> Received:
        """Return what the card has written to a receive descriptor."""
        _address, length, _checksum, status, errors, _special = _RECEIVE.unpack(
            self.memory.readBytes(index * SIZE, SIZE)
        )
        return Received(index, length, status, errors)
