"""PCI devices of a guest, driven from userspace: finding them by their ids, enabling them, and mapping registers."""

import ctypes
import mmap
import os
from pathlib import Path

DEVICES = Path("/sys/bus/pci/devices")
MEMORY_AND_BUS_MASTER = 0x6  # bits of the command register (PCI Local Bus Specification 3.0, 6.2.2)


def find(vendor: int, device: int) -> list[Path]:
    """Return the sysfs directories of the devices with these ids."""
    wanted = [f"0x{vendor:04x}", f"0x{device:04x}"]
    folders = sorted(DEVICES.iterdir()) if DEVICES.exists() else []
    return [
        path for path in folders if [(path / name).read_text().strip() for name in ("vendor", "device")] == wanted
    ]


def switch_on(device: Path) -> None:
    """Enable a device to respond at its addresses, and to access memory by itself."""
    if (device / "enable").read_text().strip() == "0":
        (device / "enable").write_text("1")
    config = os.open(device / "config", os.O_RDWR)
    try:
        become_master(config, 0)
    finally:
        os.close(config)


def become_master(config: int, offset: int) -> None:
    """Set the bits of the command register, in the configuration space that begins at `offset` of a file."""
    command = int.from_bytes(os.pread(config, 2, offset + 4), "little")
    os.pwrite(config, (command | MEMORY_AND_BUS_MASTER).to_bytes(2, "little"), offset + 4)


class Registers:
    """The registers of a device, in a mapping of its resource."""

    def __init__(self, mapping: mmap.mmap) -> None:
        self._mapping = mapping
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))

    @classmethod
    def of(cls, device: Path, resource: int = 0) -> "Registers":
        """Map a resource of a device."""
        file = os.open(device / f"resource{resource}", os.O_RDWR | os.O_SYNC)
        try:
            return cls(mmap.mmap(file, os.fstat(file).st_size))
        finally:
            os.close(file)

    def read32(self, offset: int) -> int:
        return ctypes.c_uint32.from_address(self._base + offset).value

    def write32(self, offset: int, value: int) -> None:
        ctypes.c_uint32.from_address(self._base + offset).value = value

    def read64(self, offset: int) -> int:
        return ctypes.c_uint64.from_address(self._base + offset).value

    def write64(self, offset: int, value: int) -> None:
        ctypes.c_uint64.from_address(self._base + offset).value = value
