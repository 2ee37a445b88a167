"""The attachment of a device to an I/O address space: by iommufd, or by a container of VFIO."""

from __future__ import annotations

import os
from typing import Protocol

from iobmd.errors import NotPrivilegedError, UnsupportedError
from iobmd.iommu import iommufd
from iobmd.iommu.vfio import Container, Device


class Attachment(Protocol):
    """An I/O address space, to which a device is attached."""

    interface: str
    """The kernel's interface: "iommufd" or "container"."""

    @property
    def device(self) -> int:
        """The descriptor of the device, for its regions (VFIO_DEVICE_GET_REGION_INFO, mmap)."""

    def ranges(self) -> list[tuple[int, int]]:
        """Return the first and last address of each range that can be mapped."""

    def map(self, virtual: int, address: int, size: int, access: int) -> None:
        """Map whole pages of this process for the device at `address`. They are pinned until `unmap`."""

    def unmap(self, address: int, size: int) -> None:
        """Unmap a range, if it is mapped, from the device, whose further accesses to it fault."""

    def close(self) -> None:
        """Close the device at the end of the last call that uses it, which ends all its mappings. Idempotent."""


def attach(name: str) -> Attachment:
    """Attach a PCI device to a new I/O address space. Raises as `iobmd.iommu.IOMapper`.

    A container is used without iommufd, and if this process may open the group of the device but not its character
    device or /dev/iommu.
    """
    device = Device(name)
    place = iommufd.node(device)
    if place is None:
        return Container(device)
    try:
        return iommufd.IOAS(device, place)
    except NotPrivilegedError as refused:
        if not os.path.exists(device.group_file()):  # noqa: PTH110 (the kernel may have no groups: CONFIG_VFIO_GROUP)
            raise
        try:
            return Container(device)
        except UnsupportedError:  # there is no container
            raise refused from None
