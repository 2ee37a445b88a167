"""PCI devices in sysfs (Documentation/PCI/sysfs-pci.rst): their regions and their command register."""

from __future__ import annotations

import errno
import os
import re
from typing import NamedTuple

from iobmd.device.region import COMBINED, UNCACHED, Region, no_device, opened
from iobmd.errors import BadArgumentError, BusyError, IOReturnError, NotReadyError, UnsupportedError
from iobmd.host.fact import read_text
from iobmd.units import PAGE_SIZE

_NAME = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", re.IGNORECASE)
_IO, _PREFETCHABLE = 0x100, 0x2000  # IORESOURCE_IO, IORESOURCE_PREFETCH (linux/ioport.h)
_BARS = 6
COMMAND = 4
"""Offset of the command register in the configuration space (PCI Local Bus Specification 3.0, 6.2.2)."""
MEMORY_SPACE, INTX_DISABLE = 0x2, 0x400
"""Bits of the command register."""


class Bar(NamedTuple):
    """A base address register: the range of a region."""

    start: int
    """Its first address, as this processor uses it."""
    size: int
    """In bytes; 0: the device has no such region."""
    flags: int
    """IORESOURCE_… (linux/ioport.h)."""


def folder(name: str) -> str:
    """Return the directory of a device in sysfs.

    Parameters
    ----------
    name : str
        Its address: domain, bus, device, function, as in "0000:00:03.0".

    Raises
    ------
    IOReturnError
        `kIOReturnNoDevice`; `kIOReturnBadArgument`: not an address.
    """
    if not _NAME.fullmatch(name):
        raise BadArgumentError(f"{name!r} is not a PCI address with its domain, like '0000:00:03.0' (lspci -D)")
    path = f"/sys/bus/pci/devices/{name.lower()}"
    if not os.path.exists(path):
        raise no_device(f"there is no PCI device {name} (lspci -D lists them)")
    return path


def bars(name: str) -> list[Bar]:
    """Return the ranges of a device's regions 0 to 5. Raises as `folder`."""
    found = []
    for line in (read_text(f"{folder(name)}/resource") or "").splitlines()[:_BARS]:
        start, end, flags = (int(number, 16) for number in line.split())
        found.append(Bar(start, end - start + 1 if end else 0, flags))
    return found


def command(name: str) -> int:
    """Return the command register of a device. Raises as `folder`."""
    try:
        with open(f"{folder(name)}/config", "rb", buffering=0) as config:
            return int.from_bytes(os.pread(config.fileno(), 2, COMMAND), "little")
    except OSError as error:
        raise error if isinstance(error, IOReturnError) else no_device(f"{name} has disappeared: {error}") from None


def change_command(name: str, *, set_bits: int = 0, clear_bits: int = 0) -> None:
    """Change bits of the command register of a device, which requires write access to its `config` (root).

    Raises
    ------
    IOReturnError
        As `folder` and `opened`.
    """
    config = opened(f"{folder(name)}/config", f"the command register of {name}", "sysfs is not mounted")
    try:
        with config.use() as number:
            now = int.from_bytes(os.pread(number, 2, COMMAND), "little")
            os.pwrite(number, (now & ~clear_bits | set_bits).to_bytes(2, "little"), COMMAND)
    finally:
        config.close()


class PCIRegion(Region):
    """A memory region of a PCI device, by its file `resourceN` or `resourceN_wc`.

    Parameters
    ----------
    name : str
        The address of the device.
    number : int
        The number of its base address register.
    write_combine : bool
        Whether it is mapped write-combined instead of uncached.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: there is no such region. `kIOReturnUnsupported`: I/O ports, or a region that is not
        prefetchable, with `write_combine`. As `folder` and `opened`.
    """

    def __init__(self, name: str, number: int, *, write_combine: bool) -> None:
        place, ranges = folder(name), bars(name)
        what = f"region {number} of {name}"
        if not 0 <= number < len(ranges) or not ranges[number].size:
            there = ", ".join(str(index) for index, one in enumerate(ranges) if one.size) or "none"
            raise BadArgumentError(f"there is no {what} (it has: {there})")
        bar = ranges[number]
        if bar.flags & _IO:
            message = f"{what} consists of I/O ports, which cannot be mapped: read and write {place}/resource{number}"
            raise UnsupportedError(message)
        if write_combine and not bar.flags & _PREFETCHABLE:
            message = f"{what} is not prefetchable, so that the kernel does not combine writes: omit write_combine"
            raise UnsupportedError(message)
        absent = "this kernel does not map PCI regions into processes"
        file = opened(f"{place}/resource{number}{'_wc' * write_combine}", what, absent)
        cache = COMBINED if write_combine else UNCACHED
        super().__init__(what, file, 0, bar.size, in_page=bar.start % PAGE_SIZE, address=bar.start, cache=cache)
        self._device = name

    def require_ready(self) -> None:
        """Raise `kIOReturnNotReady` if the device does not decode memory addresses: reads would return ones."""
        if not command(self._device) & MEMORY_SPACE:
            message = f"{self._device} is disabled: as root, echo 1 > /sys/bus/pci/devices/{self._device}/enable"
            raise NotReadyError(message)

    def refusal(self, error: OSError) -> IOReturnError | None:
        """Return the error for an mmap(2) that failed, as `Region.refusal`."""
        if error.errno == errno.EINVAL:
            message = f"{self.what} is claimed exclusively by its driver: unbind the driver first"
            return BusyError(message, errno.EINVAL)
        return super().refusal(error)
