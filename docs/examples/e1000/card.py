"""The driver: start the card, send frames from any memory, and receive frames."""

import time
from typing import Self

from pci_device import Device

import iobmd
from iobmd import IODMACommand, kIODirectionOut

from .rings import DONE, Ring

ETHERNET_CLASS = 0x020000
CONTROL, STATUS, CAUSE, MASK_SET, MASK_CLEAR = 0x0000, 0x0008, 0x00C0, 0x00D0, 0x00D8  # registers
RECEIVE_CONTROL, TRANSMIT_CONTROL, GAP = 0x0100, 0x0400, 0x0410
RECEIVE_RING, TRANSMIT_RING, MULTICAST, ADDRESS = 0x2800, 0x3800, 0x5200, 0x5400
SET_LINK_UP, RESET, LINK_UP = 1 << 6, 1 << 26, 1 << 1
ENABLE, ACCEPT_BROADCAST, STRIP_CHECKSUM, PAD_SHORT = 1 << 1, 1 << 15, 1 << 26, 1 << 3
COLLISIONS = 0x0F << 4 | 0x40 << 12
SENT, RECEIVED = 1 << 0, 1 << 7  # causes of interrupts
BUFFER = 2048  # bytes of a receive buffer
LARGEST = 1514  # bytes of a frame without its checksum


class Card:
    """An 82540EM that this process drives: `with Card("0000:00:03.0") as card`.

    Requires root. It waits by interrupts if the device is bound to uio_pci_generic, and polls if it has no driver.

    Attributes
    ----------
    address : bytes
        Its Ethernet address.
    """

    def __init__(self, name: str, descriptors: int = 32) -> None:
        self._device = Device(name, ETHERNET_CLASS)
        self._registers = self._device.registers
        self._reset()
        low, high = self._registers.read32(ADDRESS), self._registers.read32(ADDRESS + 4)
        self.address = (low | high << 32).to_bytes(8, "little")[:6]
        self._sending = Ring(self._registers, TRANSMIT_RING, descriptors)
        self._receiving = Ring(self._registers, RECEIVE_RING, descriptors)
        self._buffers = iobmd.allocate(descriptors * BUFFER, alignment=BUFFER, direction="in")
        # Descriptors have lengths of 16 bits; a frame is sent in as many pieces as its memory has.
        self._command = IODMACommand.withSpecification(64, maxSegmentSize=LARGEST)
        self._start()

    def _reset(self) -> None:
        self._registers.write32(MASK_CLEAR, 0xFFFFFFFF)
        self._registers.write32(CONTROL, self._registers.read32(CONTROL) | RESET)
        time.sleep(0.01)  # it must not be accessed for a microsecond
        self._registers.write32(MASK_CLEAR, 0xFFFFFFFF)
        self._registers.read32(CAUSE)  # which clears it
        for offset in range(MULTICAST, MULTICAST + 512, 4):
            self._registers.write32(offset, 0)

    def _start(self) -> None:
        for index in range(self._receiving.count):
            self._receiving.receive_into(index, self._buffers.getPhysicalSegment(index * BUFFER)[0])
        self._receiving.announce(self._receiving.count - 1)  # a completely full ring would look empty
        self._registers.write32(CONTROL, self._registers.read32(CONTROL) | SET_LINK_UP)
        self._registers.write32(GAP, 10 | 8 << 10 | 6 << 20)
        self._registers.write32(TRANSMIT_CONTROL, ENABLE | PAD_SHORT | COLLISIONS)
        self._registers.write32(RECEIVE_CONTROL, ENABLE | ACCEPT_BROADCAST | STRIP_CHECKSUM)
        self._registers.write32(MASK_SET, SENT | RECEIVED)
        end = time.monotonic() + 10
        while not self._registers.read32(STATUS) & LINK_UP:
            if time.monotonic() > end:
                raise OSError("the link does not come up: is a cable connected?")
            time.sleep(0.01)

    def send(self, frame: iobmd.IOMemoryDescriptor, timeout: float = 10) -> int:
        """Send a frame from any memory that can be prepared; return the number of descriptors that it took.

        The memory belongs to the caller again when this returns. If that raises TimeoutError, the memory remains
        prepared, because the card may still read it until `close`.
        """
        frame.prepare(kIODirectionOut)
        self._command.setMemoryDescriptor(frame)
        segments = self._command.genIOVMSegments()
        for number, segment in enumerate(segments, 1):
            self._sending.transmit(self._sending.next, segment, last=number == len(segments))
            last, self._sending.next = self._sending.next, (self._sending.next + 1) % self._sending.count
        self._sending.announce(self._sending.next)
        self._wait(self._sending, last, timeout)
        self._command.clearMemoryDescriptor()
        frame.complete(kIODirectionOut)
        return len(segments)

    def receive(self, timeout: float = 10) -> bytes:
        """Return the next frame, without its checksum; raise TimeoutError if none arrives."""
        ring = self._receiving
        index = ring.next
        self._wait(ring, index, timeout)
        found = ring.received(index)
        frame = self._buffers.readBytes(index * BUFFER, found.length)
        ring.receive_into(index, self._buffers.getPhysicalSegment(index * BUFFER)[0])
        ring.announce(index)
        ring.next = (index + 1) % ring.count
        return frame

    def _wait(self, ring: Ring, index: int, timeout: float) -> None:
        """Wait until the card has set the status of a descriptor."""
        end = time.monotonic() + timeout
        while not ring.status(index) & DONE:
            if (left := end - time.monotonic()) < 0:
                raise TimeoutError(f"the card has not completed descriptor {index} within {timeout} s")
            self._device.wait(left)
            self._registers.read32(CAUSE)  # which clears it, so that the line is no longer asserted

    def close(self) -> None:
        """Stop the card, so that it no longer accesses memory, and free the memory."""
        for register in (RECEIVE_CONTROL, TRANSMIT_CONTROL):
            self._registers.write32(register, 0)
        self._registers.write32(MASK_CLEAR, 0xFFFFFFFF)
        self._device.close()
        for buffer in (self._sending.memory, self._receiving.memory, self._buffers):
            buffer.free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
