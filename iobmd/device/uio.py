"""UIO devices (Documentation/driver-api/uio-howto.rst): their maps and their interrupt."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from iobmd.device import pci
from iobmd.device.region import Region, no_device, opened
from iobmd.errors import BadArgumentError, UnsupportedError
from iobmd.host.fact import read_text
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from iobmd._internal.process_local import Fd

_CLASS = "/sys/class/uio"
_COUNTER = 1 << 32
_ABSENT = "udev creates it, with the device"


def name_of(device: str) -> str:
    """Return the name of a UIO device, "uio0", from that name or from the address of its PCI device.

    Raises
    ------
    IOReturnError
        `kIOReturnNoDevice`; `kIOReturnBadArgument`.
    """
    if ":" in device:
        found = sorted(os.listdir(f"{pci.folder(device)}/uio")) if _is_bound(device) else []
        if not found:
            raise no_device(f"no UIO driver is bound to {device}: {_bind_commands(device)}")
        return found[0]
    if "/" in device or not device:
        raise BadArgumentError(f"{device!r} is neither the name of a UIO device, like 'uio0', nor a PCI address")
    if not os.path.exists(f"{_CLASS}/{device}"):
        raise no_device(f"there is no UIO device {device} (ls {_CLASS})")
    return device


def _is_bound(device: str) -> bool:
    return os.path.isdir(f"{pci.folder(device)}/uio")


def _bind_commands(device: str) -> str:
    place = pci.folder(device)
    return (
        f"as root, modprobe uio_pci_generic; echo uio_pci_generic > {place}/driver_override; "
        f"echo {device} > {place}/driver/unbind; echo {device} > /sys/bus/pci/drivers_probe"
    )


def _opened(name: str, what: str, flags: int = 0) -> Fd:
    return opened(f"/dev/{name}", what, _ABSENT, flags)


class UIORegion(Region):
    """A map of a UIO device.

    Parameters
    ----------
    device : str
        Its name or the address of its PCI device.
    number : int
        The number of the map.

    Raises
    ------
    IOReturnError
        As `name_of` and `opened`; `kIOReturnBadArgument`: there is no such map.
    """

    maps_parts = False  # the offset in the file denotes the map

    def __init__(self, device: str, number: int) -> None:
        name = name_of(device)
        place, what = f"{_CLASS}/{name}/maps", f"map {number} of {name}"
        if not os.path.isdir(f"{place}/map{number}"):
            maps = sorted(os.listdir(place)) if os.path.isdir(place) else []
            there = ", ".join(each.removeprefix("map") for each in maps) or "none; use IODeviceMemory.ofPCI"
            raise BadArgumentError(f"there is no {what} (it has: {there})")
        size, address, in_page = (
            int((read_text(f"{place}/map{number}/{field}") or "0").strip(), 16)
            for field in ("size", "addr", "offset")
        )
        # The address of memory of the kernel, which a driver may offer as well, is virtual.
        bus = None if address >> 63 else address + in_page
        super().__init__(what, _opened(name, what), number * PAGE_SIZE, size, in_page=in_page, address=bus)

    def pages(self, offset: int, length: int) -> tuple[int, int]:
        """Return the offset in the file, and the size, of the pages that contain a range, as `Region.pages`."""
        start, size = super().pages(offset, length)
        if start != self._start:
            message = f"{self.what} can only be mapped from its first page on: map all of it, and use its offsets"
            raise UnsupportedError(message)
        return start, size

    def refusal(self, error: OSError) -> None:
        """Return None: the kernel refuses only invalid arguments."""


class UIOLine:
    """The interrupt of a UIO device. Parameter and errors as `UIORegion`."""

    automatic = True
    """Whether an interrupt masks itself."""

    def __init__(self, device: str) -> None:
        self.name = name_of(device)
        self.what = f"the interrupt of {self.name}"
        self._seen = int((read_text(f"{_CLASS}/{self.name}/event") or "0").strip())
        self.file = _opened(self.name, self.what, os.O_NONBLOCK)
        address = os.path.basename(os.path.realpath(f"{_CLASS}/{self.name}/device"))
        self._pci = address if os.path.isdir(f"/sys/bus/pci/devices/{address}") else None

    def read(self) -> int:
        """Return the number of interrupts since the last call, 0 if there were none."""
        try:
            with self.file.use() as number:
                now = int.from_bytes(os.read(number, 4), "little")
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self._not_there(error) from None
        count, self._seen = (now - self._seen) % _COUNTER, now
        return count

    def mask(self, *, masked: bool) -> None:
        """Mask or unmask it: by its driver, or, as uio_pci_generic, by the command register of the PCI device."""
        try:
            with self.file.use() as number:
                os.write(number, int(not masked).to_bytes(4, "little"))
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL) or self._pci is None:
                raise self._not_there(error) from None
            bits = {"set_bits" if masked else "clear_bits": pci.INTX_DISABLE}
            pci.change_command(self._pci, **bits)

    def _not_there(self, error: OSError) -> OSError:
        if error.errno == errno.EIO:
            return no_device(f"{self.name} has no interrupt, or its driver was unbound")
        if error.errno == errno.ENOSYS:
            return UnsupportedError(f"the driver of {self.name} does not mask its interrupt", errno.ENOSYS)
        return error

    def close(self) -> None:
        """Close the device. Idempotent."""
        self.file.close()
