"""The PCI device: enable a controller that has no driver, and map its registers."""

import mmap
import os
from pathlib import Path

MEMORY_SPACE, BUS_MASTER = 0x2, 0x4  # bits of the command register, at 4 in the configuration space
NVME_CLASS = 0x010802


class Registers:
    """The registers of an NVMe controller (its resource 0), accessed 32 bits at a time.

    Parameters
    ----------
    name : str
        The PCI address with its domain, such as "0000:01:00.0".

    Raises
    ------
    OSError
        A kernel driver is bound to the device, or it is not an NVMe controller.
    """

    def __init__(self, name: str) -> None:
        self._folder = Path("/sys/bus/pci/devices", name)
        if int((self._folder / "class").read_text(), 16) != NVME_CLASS:
            raise OSError(f"{name} is not an NVMe controller")
        if (self._folder / "driver").exists():
            driver = (self._folder / "driver").readlink().name
            raise OSError(f"{name} is bound to the driver {driver}: echo {name} > {self._folder}/driver/unbind")
        (self._folder / "enable").write_text("1")
        self._command(set_bits=MEMORY_SPACE | BUS_MASTER)
        with (self._folder / "resource0").open("r+b", buffering=0) as file:
            self._mapping = mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size)
        self._words = memoryview(self._mapping).cast("I")

    def __getitem__(self, offset: int) -> int:
        return self._words[offset // 4]

    def __setitem__(self, offset: int, value: int) -> None:
        self._words[offset // 4] = value

    def read64(self, offset: int) -> int:
        """Read a 64-bit register."""
        return self[offset] | self[offset + 4] << 32

    def write64(self, offset: int, value: int) -> None:
        """Write a 64-bit register."""
        self[offset] = value & 0xFFFFFFFF
        self[offset + 4] = value >> 32

    def close(self) -> None:
        """Disable DMA of the device, unmap its registers, and disable it."""
        self._command(clear_bits=BUS_MASTER)
        self._words.release()
        self._mapping.close()
        (self._folder / "enable").write_text("0")

    def _command(self, set_bits: int = 0, clear_bits: int = 0) -> None:
        with (self._folder / "config").open("r+b", buffering=0) as config:
            now = int.from_bytes(os.pread(config.fileno(), 2, 4), "little")
            os.pwrite(config.fileno(), (now & ~clear_bits | set_bits).to_bytes(2, "little"), 4)
