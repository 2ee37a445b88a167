"""VFIO (Documentation/driver-api/vfio.rst, linux/vfio.h): containers, groups and devices, by their ioctls."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import NamedTuple

from iobmd._internal.process_local import Fd
from iobmd.device import pci
from iobmd.device.vfio import BASE, HEADER, capabilities, control
from iobmd.errors import (
    BusyError,
    IOReturnError,
    NoResourcesError,
    NotPrivilegedError,
    NotReadyError,
    UnsupportedError,
)
from iobmd.host import limits
from iobmd.iommu import absence
from iobmd.memory.mlock import cannot_lock, within_limits

READ, WRITE = 1, 2
"""Access rights of a device to a mapping."""

_CONTAINER = "/dev/vfio/vfio"
_SET_IOMMU, _GROUP_STATUS, _SET_CONTAINER, _DEVICE = BASE + 2, BASE + 3, BASE + 4, BASE + 6
_IOMMU_INFO, _MAP_DMA, _UNMAP_DMA = BASE + 12, BASE + 13, BASE + 14
_TYPE1V2 = 3
_VIABLE = 1
_HAS_CAPABILITIES, _IOVA_RANGES = 1 << 1, 1
_INFO = struct.Struct("=IIQI4x")  # vfio_iommu_type1_info: argsz, flags, iova_pgsizes, cap_offset
_MAP = struct.Struct("=IIQQQ")  # vfio_iommu_type1_dma_map: argsz, flags, vaddr, iova, size
_UNMAP = struct.Struct("=IIQQ")
_EVERYWHERE = [(0, (1 << 39) - 1)]  # for kernels before 5.4, which do not report it; the minimum that VT-d translates


class Device(NamedTuple):
    """A PCI device in sysfs."""

    name: str
    """Its address: domain, bus, device, function, as in "0000:00:03.0"."""

    @property
    def folder(self) -> Path:
        """Its directory in sysfs. Raises as `pci.folder`."""
        return Path(pci.folder(self.name))

    def group(self) -> str:
        """Return the number of its IOMMU group.

        Raises
        ------
        IOReturnError
            `kIOReturnNoDevice`; `kIOReturnUnsupported`: no IOMMU is enabled; with the remedy.
        """
        folder = self.folder
        try:
            return (folder / "iommu_group").readlink().name
        except OSError:
            raise UnsupportedError(absence.reason(self.name, self.bind_commands())) from None

    def group_file(self) -> str:
        """Return the path of VFIO's file of its IOMMU group. Raises as `group`."""
        return f"/dev/vfio/{self.group()}"

    def group_members(self) -> list[str]:
        """Return the addresses of the devices of its IOMMU group. Raises as `group`."""
        folder = Path("/sys/kernel/iommu_groups", self.group(), "devices")
        return sorted(path.name for path in folder.iterdir())

    def bind_commands(self) -> str:
        """Return the commands that bind it to VFIO."""
        return (
            f"modprobe vfio-pci; echo vfio-pci > {self.folder}/driver_override; "
            f"echo {self.name} > {self.folder}/driver/unbind; echo {self.name} > /sys/bus/pci/drivers_probe"
        )


class Container:
    """An I/O address space with the group of a device. Raises as `iobmd.iommu.IOMapper`."""

    interface = "container"

    def __init__(self, device: Device) -> None:
        group = device.group()
        self._container = opened(_CONTAINER, "load it: modprobe vfio_iommu_type1 vfio-pci")
        self._group: Fd | None = None
        self._device: Fd | None = None
        try:
            self._group = opened(device.group_file(), f"bind it to VFIO, as root: {device.bind_commands()}")
            self._require_viable(device, group, self._group)
            with self._container.use() as container:
                control(self._group, _SET_CONTAINER, struct.pack("=i", container))
            control(self._container, _SET_IOMMU, _TYPE1V2)
            number = control(self._group, _DEVICE, bytearray(device.name.encode() + b"\0"))
            self._device = Fd(number, f"VFIO's descriptor of {device.name}")
        except OSError as error:
            self.close()
            raise error if isinstance(error, IOReturnError) else _not_attached(device, error) from None
        except BaseException:
            self.close()
            raise

    @property
    def device(self) -> int:
        """The descriptor of the device, for its regions (VFIO_DEVICE_GET_REGION_INFO, mmap)."""
        assert self._device  # set by the constructor
        return self._device.fileno()

    @staticmethod
    def _require_viable(device: Device, group: str, descriptor: Fd) -> None:
        status = bytearray(struct.pack("=II", 8, 0))
        control(descriptor, _GROUP_STATUS, status)
        if struct.unpack("=II", status)[1] & _VIABLE:
            return
        raise BusyError(
            f"the IOMMU group {group} of {device.name} is shared with devices that other drivers use: bind each of "
            f"{', '.join(device.group_members())} to vfio-pci as well, or to no driver"
        )

    def ranges(self) -> list[tuple[int, int]]:
        """Return the first and last address of each range that can be mapped (reported since Linux 5.4)."""
        info = bytearray(_INFO.size)
        _INFO.pack_into(info, 0, len(info), 0, 0, 0)
        control(self._container, _IOMMU_INFO, info)
        size, flags, _pages, _at = _INFO.unpack_from(info)
        if not flags & _HAS_CAPABILITIES:
            return _EVERYWHERE
        info = bytearray(size)
        _INFO.pack_into(info, 0, size, 0, 0, 0)
        control(self._container, _IOMMU_INFO, info)
        return _iova_ranges(info) or _EVERYWHERE

    def map(self, virtual: int, address: int, size: int, access: int) -> None:
        """Map whole pages of this process for the device at `address`. They are pinned until `unmap`.

        Raises
        ------
        IOReturnError
            `kIOReturnCannotWire` at RLIMIT_MEMLOCK; `kIOReturnNoResources`; `kIOReturnNoMemory`.
        """
        request = _MAP.pack(_MAP.size, access, virtual, address, size)
        try:
            within_limits(control, self._container, _MAP_DMA, request)
        except OSError as error:
            if isinstance(error, IOReturnError):
                raise
            if error.errno == errno.ENOMEM:
                raise cannot_lock(size, error) from None
            if error.errno == errno.ENOSPC:
                message = "VFIO has no mapping left (the parameter dma_entry_limit of vfio_iommu_type1); unmap some"
                raise NoResourcesError(message, error.errno) from None
            raise limits.from_oserror(error, f"cannot map {size} bytes for the device at {address:#x}") from None

    def unmap(self, address: int, size: int) -> None:
        """Unmap a range, if it is mapped, from the device, whose further accesses to it fault."""
        control(self._container, _UNMAP_DMA, bytearray(_UNMAP.pack(_UNMAP.size, 0, address, size)))

    def close(self) -> None:
        """Close the device at the end of the last call that uses it, which ends all its mappings. Idempotent."""
        for descriptor in (self._device, self._group, self._container):
            if descriptor:
                descriptor.close()


def _iova_ranges(info: bytearray) -> list[tuple[int, int]]:
    at = capabilities(info, _INFO.unpack_from(info)[3]).get(_IOVA_RANGES)
    if at is None:
        return []
    (count,) = struct.unpack_from("=I", info, at + HEADER.size)
    begin = at + HEADER.size + 8
    return [struct.unpack_from("=QQ", info, begin + 16 * index) for index in range(count)]


def opened(path: str, absent: str) -> Fd:
    """Open a file of VFIO or iommufd; `absent` is the remedy if it is missing. Raises as `iobmd.iommu.IOMapper`."""
    try:
        return Fd(os.open(path, os.O_RDWR | os.O_CLOEXEC), path)
    except PermissionError as error:
        message = f"permission to open {path} is denied: as root, chown it to this user, or run with CAP_DAC_OVERRIDE"
        raise NotPrivilegedError(message, error.errno or 0) from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            message = f"{path} is in use by another process, or by another mapper of this process"
            raise BusyError(message, errno.EBUSY) from None
        if error.errno in (errno.ENOENT, errno.ENODEV):
            message = f"there is no {path}: {absent}"
            raise UnsupportedError(message, error.errno) from None
        raise limits.from_oserror(error, f"cannot open {path}") from None


def unsafe_interrupts(device: Device, module: str) -> IOReturnError:
    """Return the error for a device whose interrupts are not isolated; `module` refuses it."""
    message = (
        f"VFIO refuses {device.name}: its interrupts are not remapped; enable interrupt remapping, or, if the "
        f"device is trusted, `echo 1 > /sys/module/{module}/parameters/allow_unsafe_interrupts` as root"
    )
    return NotPrivilegedError(message, errno.EPERM)


def _not_attached(device: Device, error: OSError) -> IOReturnError:
    if error.errno == errno.EPERM:
        return unsafe_interrupts(device, "vfio_iommu_type1")
    if error.errno == errno.ENODEV:
        message = f"{device.name} is not bound to vfio-pci: bind it to VFIO, as root: {device.bind_commands()}"
        return NotReadyError(message, errno.ENODEV)
    return limits.from_oserror(error, f"VFIO cannot attach {device.name}")
