"""PCI devices of a guest, driven from userspace: finding them by their ids, enabling and binding them."""

import os
from pathlib import Path

import iobmd

DEVICES = Path("/sys/bus/pci/devices")
DRIVERS = DEVICES.parent / "drivers"
MEMORY_AND_BUS_MASTER = 0x6  # bits of the command register (PCI Local Bus Specification 3.0, 6.2.2)
COMMAND = 4
CONFIGURATION = 7  # VFIO_PCI_CONFIG_REGION_INDEX (linux/vfio.h)


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
        command = int.from_bytes(os.pread(config, 2, COMMAND), "little")
        os.pwrite(config, (command | MEMORY_AND_BUS_MASTER).to_bytes(2, "little"), COMMAND)
    finally:
        os.close(config)


def switch_on_through(mapper: iobmd.IOMapper) -> None:
    """As `switch_on`, for a device that is attached to VFIO."""
    with iobmd.IODeviceMemory.ofVFIO(mapper, CONFIGURATION) as config:
        command = int.from_bytes(config.readBytes(COMMAND, 2), "little")
        config.writeBytes(COMMAND, (command | MEMORY_AND_BUS_MASTER).to_bytes(2, "little"))


def bind(device: Path, driver: str) -> str:
    """Bind a device to a driver that accepts any, instead of the present one; return its address."""
    if (device / "driver").exists():
        if (device / "driver").readlink().name == driver:
            return device.name
        (device / "driver/unbind").write_text(device.name)
    (device / "driver_override").write_text(driver)
    (DEVICES.parent / "drivers_probe").write_text(device.name)
    assert (device / "driver").readlink().name == driver
    return device.name


def unbind(device: Path) -> None:
    """Bind a device to no driver."""
    if (device / "driver").exists():
        (device / "driver/unbind").write_text(device.name)
    (device / "driver_override").write_text("\n")
