"""iommufd (Documentation/userspace-api/iommufd.rst, linux/iommufd.h; Linux 6.2), with VFIO's devices (6.6)."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd._internal.process_local import Fd
from iobmd.device.vfio import BASE, control
from iobmd.errors import BusyError, CannotWireError, IOReturnError
from iobmd.host import limits
from iobmd.iommu.vfio import READ, WRITE, opened, unsafe_interrupts
from iobmd.memory.mlock import cannot_lock, within_limits
from iobmd.units import format_size

if TYPE_CHECKING:
    from iobmd.iommu.vfio import Device

_FILE = "/dev/iommu"
_COMMAND = ord(";") << 8 | 0x80  # _IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE)
_ALLOCATE, _RANGES, _MAP, _UNMAP = _COMMAND + 1, _COMMAND + 4, _COMMAND + 5, _COMMAND + 6
_BIND, _ATTACH = BASE + 18, BASE + 19
_FIXED, _FLAGS = 1, {READ: 4, WRITE: 2}
_SPACE = struct.Struct("=III")  # iommu_ioas_alloc: size, flags, out_ioas_id
_ALLOWED = struct.Struct("=IIIIQQ")  # iommu_ioas_iova_ranges: size, ioas_id, num_iovas, -, allowed_iovas, alignment
_MAPPING = struct.Struct("=IIIIQQQ")  # iommu_ioas_map: size, flags, ioas_id, -, user_va, length, iova
_RELEASE = struct.Struct("=IIQQ")  # iommu_ioas_unmap: size, ioas_id, iova, length
_BINDING = struct.Struct("=IIiI")  # vfio_device_bind_iommufd: argsz, flags, iommufd, out_devid
_ATTACHMENT = struct.Struct("=III")  # vfio_device_attach_iommufd_pt: argsz, flags, pt_id


def node(device: Device) -> str | None:
    """Return the character device of a PCI device, or None if VFIO has none or the kernel has no iommufd.

    Raises
    ------
    IOReturnError
        As `Device.folder`.
    """
    for path in device.folder.glob("vfio-dev/vfio*"):
        place = Path("/dev/vfio/devices", path.name)
        if os.path.exists(place) and os.path.exists(_FILE):  # noqa: PTH110 (Path.exists() raises PermissionError)
            return str(place)
    return None


class IOAS:
    """An I/O address space, to which a device is attached.

    Parameters
    ----------
    device : Device
        The device.
    place : str
        Its character device, from `node`.

    Raises
    ------
    IOReturnError
        As `iobmd.iommu.IOMapper`.
    """

    interface = "iommufd"

    def __init__(self, device: Device, place: str) -> None:
        remedy = f"bind it to VFIO, as root: {device.bind_commands()}"
        self._iommu = opened(_FILE, "load it: modprobe iommufd")
        self._device: Fd | None = None
        try:
            self._device = opened(place, remedy)
            self._bind(device, place, self._device)
            answer = self._ask(_ALLOCATE, _SPACE.pack(_SPACE.size, 0, 0))
            self._number: int = _SPACE.unpack(answer)[2]
            control(self._device, _ATTACH, bytearray(_ATTACHMENT.pack(_ATTACHMENT.size, 0, self._number)))
        except OSError as error:
            self.close()
            if isinstance(error, IOReturnError):
                raise
            raise limits.from_oserror(error, f"iommufd cannot attach {device.name}") from None
        except BaseException:
            self.close()
            raise

    def _bind(self, device: Device, place: str, descriptor: Fd) -> None:
        try:
            with self._iommu.use() as number:
                control(descriptor, _BIND, bytearray(_BINDING.pack(_BINDING.size, 0, number, 0)))
        except OSError as error:
            raise _not_bound(device, place, error) from None

    @property
    def device(self) -> int:
        """The descriptor of the device, as `Container.device`."""
        assert self._device  # set by the constructor
        return self._device.fileno()

    def ranges(self) -> list[tuple[int, int]]:
        """Return the first and last address of each range that can be mapped for the device."""
        count = 16
        while True:
            found = array("Q", [0, 0] * count)
            request = _ALLOWED.pack(_ALLOWED.size, self._number, count, 0, found.buffer_info()[0], 0)
            try:
                answer = self._ask(_RANGES, request)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
                count *= 2
            else:
                return list(zip(found[::2], found[1::2], strict=True))[: _ALLOWED.unpack(answer)[2]]

    def map(self, virtual: int, address: int, size: int, access: int) -> None:
        """Map whole pages of this process, as `Container.map`."""
        flags = _FIXED | sum(flag for right, flag in _FLAGS.items() if access & right)
        request = _MAPPING.pack(_MAPPING.size, flags, self._number, 0, virtual, size, address)
        try:
            within_limits(self._ask, _MAP, request)
        except OSError as error:
            if isinstance(error, IOReturnError):
                raise
            if error.errno == errno.ENOMEM:
                raise _no_pins(size, error) from None
            raise limits.from_oserror(error, f"cannot map {size} bytes for the device at {address:#x}") from None

    def unmap(self, address: int, size: int) -> None:
        """Unmap a range, as `Container.unmap`."""
        with contextlib.suppress(FileNotFoundError):  # it is not mapped, which VFIO's container accepts
            self._ask(_UNMAP, _RELEASE.pack(_RELEASE.size, self._number, address, size))

    def _ask(self, request: int, argument: bytes) -> bytearray:
        """Return the argument as the kernel leaves it. Raises OSError."""
        answer = bytearray(argument)
        control(self._iommu, request, answer)
        return answer

    def close(self) -> None:
        """Close the device, as `Container.close`."""
        for descriptor in (self._device, self._iommu):
            if descriptor:
                descriptor.close()


def _not_bound(device: Device, place: str, error: OSError) -> IOReturnError:
    if error.errno == errno.EPERM:
        return unsafe_interrupts(device, "iommufd")
    # EINVAL: its character device has a user; EBUSY: its group has one, or other drivers use devices of its group.
    if error.errno in (errno.EINVAL, errno.EBUSY):
        message = (
            f"{place} is in use by another process, or by another mapper of this process, or a device of the IOMMU "
            f"group of {device.name} is used by another driver: bind each of {', '.join(device.group_members())} to "
            "vfio-pci as well, or to no driver"
        )
        return BusyError(message, error.errno)
    return limits.from_oserror(error, f"iommufd cannot attach {device.name}")


def _no_pins(size: int, error: OSError) -> IOReturnError:
    """Return the error for pages that iommufd could not pin: it counts them with the other pins of the user."""
    if limit := limits.pins(size):
        message = f"cannot pin {format_size(size)} ({size} bytes) for the device: {limit}, or run with CAP_IPC_LOCK"
        return CannotWireError(message, errno.ENOMEM)
    return cannot_lock(size, error)
