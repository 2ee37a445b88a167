"""QEMU's educational device, which is independent of Linux, and reads and writes memory at programmed addresses."""

import itertools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import iobmd
from support import pci

VENDOR, DEVICE = 0x1234, 0x11E8
LARGEST = 4095
"""Bytes of a transfer: QEMU 7.2 aborts for 4096, which it considers larger than its buffer."""
_IDENTIFICATION, _LIVENESS, _SOURCE, _DESTINATION, _COUNT, _COMMAND = 0x00, 0x04, 0x80, 0x88, 0x90, 0x98
_BUFFER = 0x40000
_START, _TO_MEMORY = 1, 2


class Edu:
    """One device (QEMU, docs/specs/edu.txt). A transfer takes a tenth of a second."""

    def __init__(self, registers: iobmd.IOMemoryMap) -> None:
        self._registers = registers
        assert registers.read32(_IDENTIFICATION) & 0xFF == 0xED
        registers.write32(_LIVENESS, 0x12345678)
        assert registers.read32(_LIVENESS) == 0xEDCBA987

    def start(self, source: int, destination: int, length: int, command: int) -> None:
        assert 0 < length <= LARGEST
        for register, value in ((_SOURCE, source), (_DESTINATION, destination), (_COUNT, length)):
            self._registers.write64(register, value)
        self._registers.write64(_COMMAND, _START | command)

    def start_reading(self, address: int, length: int) -> None:
        """Make it read memory into its buffer."""
        self.start(address, _BUFFER, length, 0)

    def start_writing(self, address: int, length: int) -> None:
        """Make it write its buffer to memory."""
        self.start(_BUFFER, address, length, _TO_MEMORY)

    def wait(self) -> None:
        end = time.monotonic() + 20
        while self._registers.read64(_COMMAND) & _START:
            assert time.monotonic() < end, "the device does not complete its transfer"
            time.sleep(0.002)


def registers_of(device: Path) -> iobmd.IOMemoryMap:
    """Map the registers of a device."""
    return iobmd.IODeviceMemory.ofPCI(device.name, 0).map()


class Copy(NamedTuple):
    """Bytes that a device must read at one address and write at another."""

    source: int
    destination: int
    length: int


class Devices:
    """Devices that work concurrently. `transfers` counts their transfers."""

    def __init__(self, devices: Sequence[Edu]) -> None:
        self.devices = devices
        self.transfers = 0

    @classmethod
    def of_guest(cls) -> "Devices":
        devices = pci.find(VENDOR, DEVICE)
        for device in devices:
            pci.switch_on(device)
        return cls([Edu(registers_of(device)) for device in devices])

    def copy(self, copies: Iterable[Copy]) -> None:
        """Perform all copies, with two transfers each."""
        waiting = iter(copies)
        while batch := list(zip(self.devices, itertools.islice(waiting, len(self.devices)), strict=False)):
            for edu, copy in batch:
                edu.start_reading(copy.source, copy.length)
            for edu, _copy in batch:
                edu.wait()
            for edu, copy in batch:
                edu.start_writing(copy.destination, copy.length)
            for edu, _copy in batch:
                edu.wait()
            self.transfers += 2 * len(batch)
