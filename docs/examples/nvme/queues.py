"""Rings of commands and of their completions, in memory shared by driver and controller."""

import struct
import time
from collections.abc import Sequence

from pci_device import Device

import iobmd

PAGE = 4096
_COMMAND = struct.Struct("<BxHI16xQQ6I")  # opcode, identifier, namespace, PRP entries 1 and 2, dwords 10 to 15
_COMPLETION = struct.Struct("<I4xHHHH")  # result, queue head and number, identifier, status with the phase in bit 0
TIMEOUT = 30  # seconds


class CommandError(OSError):
    """The controller completed a command with an error status."""

    def __init__(self, opcode: int, status: int) -> None:
        super().__init__(f"command {opcode:#04x} ended with status code {status & 0xFF:#x} of type {status >> 8 & 7}")
        self.status = status


class QueuePair:
    """A submission queue with its completion queue, for up to `depth` - 1 commands in flight.

    The data pages of a command are described by PRP entry 1 and by a list to which entry 2 points. Each place in the
    queue has its own page for that list.
    """

    def __init__(self, device: Device, number: int, depth: int) -> None:
        stride = 4 << (device.registers.read64(0) >> 32 & 0xF)  # CAP.DSTRD
        self._device, self._registers = device, device.registers
        self._tail_doorbell, self._head_doorbell = (0x1000 + (2 * number + which) * stride for which in (0, 1))
        self.depth = depth
        # Contiguous and pinned, because the controller has one physical address for each queue.
        self.commands = iobmd.allocate(depth * 64, alignment=PAGE, contiguous=True)
        self.completions = iobmd.allocate(depth * 16, alignment=PAGE, contiguous=True)
        self._lists = iobmd.allocate(depth * PAGE, alignment=PAGE)
        self._list_addresses = [self._lists.getPhysicalSegment(index * PAGE)[0] for index in range(depth)]
        self._tail = self._head = 0
        self._phase = 1
        self._free = list(range(depth - 1))  # a completely full ring could not be distinguished from an empty one
        self._opcodes: dict[int, int] = {}

    @property
    def idle(self) -> bool:
        """Whether no command is in flight."""
        return not self._opcodes

    @property
    def full(self) -> bool:
        """Whether no further command can be submitted."""
        return not self._free

    def submit(self, opcode: int, namespace: int = 0, pages: Sequence[int] = (), dwords: Sequence[int] = ()) -> None:
        """Queue a command; `pages` are the physical addresses of its data pages."""
        identifier = self._free.pop()
        self._opcodes[identifier] = opcode
        first, second = self._entries(identifier, pages)
        words = (*dwords, *[0] * (6 - len(dwords)))
        self.commands.writeBytes(self._tail * 64, _COMMAND.pack(opcode, identifier, namespace, first, second, *words))
        self._tail = (self._tail + 1) % self.depth
        self._registers.write32(self._tail_doorbell, self._tail)  # after the command, in order

    def _entries(self, identifier: int, pages: Sequence[int]) -> tuple[int, int]:
        if len(pages) <= 2:
            first, second = (*pages, 0, 0)[:2]
            return first, second
        assert len(pages) - 1 <= PAGE // 8, "more data than a list has entries"
        self._lists.writeBytes(identifier * PAGE, struct.pack(f"<{len(pages) - 1}Q", *pages[1:]))
        return pages[0], self._list_addresses[identifier]

    def complete(self) -> int:
        """Wait for the completion of one command and return its result; raise `CommandError` or TimeoutError."""
        end = time.monotonic() + TIMEOUT
        while self.completions.readBytes(self._head * 16 + 14, 1)[0] & 1 != self._phase:
            if (left := end - time.monotonic()) < 0:
                raise TimeoutError(f"the controller did not respond within {TIMEOUT} s")
            self._device.wait(left)
        # Read after the phase bit has flipped, which the controller writes last.
        entry = self.completions.readBytes(self._head * 16, 16)
        result, _head, _queue, identifier, status = _COMPLETION.unpack(entry)
        self._head = (self._head + 1) % self.depth
        self._phase ^= not self._head
        self._registers.write32(self._head_doorbell, self._head)
        self._free.append(identifier)
        opcode = self._opcodes.pop(identifier)
        if status >> 1:
            raise CommandError(opcode, status >> 1)
        return result

    def free(self) -> None:
        """Free the memory, after the controller has stopped using it."""
        for buffer in (self.commands, self.completions, self._lists):
            buffer.free()
