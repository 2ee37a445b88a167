"""The driver: start a controller, identify it, create its queues, and read and write blocks."""

import time
from collections.abc import Iterator
from typing import NamedTuple, Self

from pci_device import Device

import iobmd

from .queues import PAGE, CommandError, QueuePair

NVME_CLASS = 0x010802
CAPABILITIES, CONFIGURATION, STATUS = 0x00, 0x14, 0x1C  # registers
ADMIN_SIZES, ADMIN_COMMANDS, ADMIN_COMPLETIONS = 0x24, 0x28, 0x30
ENABLE, READY, FATAL = 1, 1, 2
ENTRY_SIZES = 6 << 16 | 4 << 20  # commands of 1 << 6 bytes, completions of 1 << 4
CREATE_COMMANDS, CREATE_COMPLETIONS, IDENTIFY = 0x01, 0x05, 0x06
FLUSH, WRITE, READ = 0x00, 0x01, 0x02


class Identity(NamedTuple):
    """The identify data of the controller and its first namespace."""

    model: str
    serial: str
    firmware: str
    blocks: int
    block_size: int
    """In bytes."""
    largest: int
    """Maximum data size of one command, in bytes."""


class Controller:
    """An NVMe controller that this process drives: `with Controller("0000:01:00.0") as disk`.

    Requires root, for the registers and for physical addresses (CAP_SYS_ADMIN). It waits by interrupts if the device
    is bound to uio_pci_generic, and polls if it has no driver.
    """

    def __init__(self, name: str, depth: int = 32) -> None:
        self._device = Device(name, NVME_CLASS)
        self._registers = self._device.registers
        self._capabilities = self._registers.read64(CAPABILITIES)
        depth = min(depth, (self._capabilities & 0xFFFF) + 1)
        self._admin, self._io = (QueuePair(self._device, number, depth) for number in (0, 1))
        try:
            self._start()
            self.identity = self._identify()
            self._create_queues()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self._enable(on=False)
        self._registers.write32(ADMIN_SIZES, (self._admin.depth - 1) * (1 | 1 << 16))
        self._registers.write64(ADMIN_COMMANDS, self._admin.commands.getPhysicalAddress())
        self._registers.write64(ADMIN_COMPLETIONS, self._admin.completions.getPhysicalAddress())
        self._enable(on=True)

    def _enable(self, *, on: bool) -> None:
        self._registers.write32(CONFIGURATION, ENTRY_SIZES | on * ENABLE)  # pages of 4 KiB
        end = time.monotonic() + (self._capabilities >> 24 & 0xFF) / 2 + 1  # CAP.TO, in half seconds
        while (status := self._registers.read32(STATUS)) & READY != on:
            if status & FATAL or time.monotonic() > end:
                raise OSError(f"the controller does not become {'ready' if on else 'idle'}")
            time.sleep(0.01)

    def _ask(self, opcode: int, *dwords: int, namespace: int = 0, pages: tuple[int, ...] = ()) -> int:
        self._admin.submit(opcode, namespace, pages, dwords)
        return self._admin.complete()

    def _identify(self) -> Identity:
        with iobmd.allocate(2 * PAGE, alignment=PAGE) as answer:
            for index, (what, namespace) in enumerate([(1, 0), (0, 1)]):  # the controller, namespace 1
                page = answer.getPhysicalSegment(index * PAGE)[0]
                self._ask(IDENTIFY, what, namespace=namespace, pages=(page,))
            identified = answer.readBytes(0, 2 * PAGE)
        serial, model, firmware = (
            identified[start:end].decode().strip() for start, end in ((4, 24), (24, 64), (64, 72))
        )
        smallest = 4096 << (self._capabilities >> 48 & 0xF)
        listed = PAGE * 512  # by one page list
        largest = min(smallest << identified[77], listed) if identified[77] else listed  # MDTS; 0: no limit
        namespace_data = identified[PAGE:]
        blocks = int.from_bytes(namespace_data[:8], "little")
        format_at = 128 + 4 * (namespace_data[26] & 0xF)  # FLBAS chooses among the formats
        return Identity(model, serial, firmware, blocks, 1 << namespace_data[format_at + 2], largest)

    def _create_queues(self) -> None:
        size = 1 | self._io.depth - 1 << 16  # queue 1
        contiguous, interrupts = 1, 2
        self._ask(
            CREATE_COMPLETIONS, size, contiguous | interrupts, pages=(self._io.completions.getPhysicalAddress(),)
        )
        self._ask(CREATE_COMMANDS, size, contiguous | 1 << 16, pages=(self._io.commands.getPhysicalAddress(),))

    # --- reading and writing

    def read(self, block: int, buffer: iobmd.IOMemoryDescriptor) -> None:
        """Read blocks, starting with number `block`, until the buffer is full; any buffer that can be prepared."""
        self._transfer(READ, block, buffer)

    def write(self, block: int, buffer: iobmd.IOMemoryDescriptor) -> None:
        """Write the whole buffer to blocks, starting with number `block`."""
        self._transfer(WRITE, block, buffer)

    def flush(self) -> None:
        """Make all completed writes persistent."""
        self._io.submit(FLUSH, 1)
        self._io.complete()

    def _transfer(self, opcode: int, block: int, buffer: iobmd.IOMemoryDescriptor) -> None:
        size, most = self.identity.block_size, self.identity.largest
        if len(buffer) % PAGE or block * size + len(buffer) > self.identity.blocks * size:
            raise ValueError(f"{len(buffer)} bytes at block {block} are not whole pages within the disk")
        buffer.prepare()
        try:
            pages = list(pages_of(buffer))
            for start in range(0, len(buffer), most):
                piece = pages[start // PAGE : (start + most) // PAGE]
                first, count = block + start // size, len(piece) * PAGE // size
                if self._io.full:
                    self._io.complete()
                self._io.submit(opcode, 1, piece, (first & 0xFFFFFFFF, first >> 32, count - 1))
        finally:
            failed = self._drain()  # the controller must not write to the memory after it is reused
            buffer.complete()
        if failed:
            raise failed

    def _drain(self) -> CommandError | None:
        """Wait for all commands in flight. If that raises TimeoutError, the memory remains pinned."""
        failed = None
        while not self._io.idle:
            try:
                self._io.complete()
            except CommandError as error:
                failed = error
        return failed

    def close(self) -> None:
        """Stop the controller, so that it no longer accesses memory, and free the memory."""
        self._enable(on=False)
        self._device.close()
        self._admin.free()
        self._io.free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def pages_of(buffer: iobmd.IOMemoryDescriptor) -> Iterator[int]:
    """Yield the physical address of each page of a buffer, for PRP entries, from its contiguous segments."""
    for address, length in buffer.segments():
        yield from range(address, address + length, PAGE)
