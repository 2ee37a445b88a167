"""`IODeviceMemory`: registers and memory of devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from iobmd._internal.arguments import check_flags, check_integers, check_type, integers
from iobmd.backing.device import DeviceBacking
from iobmd.constants import IOOptionBits
from iobmd.descriptors.composite_memory import CompositeBacking
from iobmd.descriptors.descriptor import IOMemoryDescriptor
from iobmd.descriptors.options import check_within
from iobmd.descriptors.ownership import Part
from iobmd.device.pci import PCIRegion
from iobmd.device.physical import PhysicalRegion
from iobmd.device.uio import UIORegion
from iobmd.device.vfio import VFIORegion

if TYPE_CHECKING:
    from collections.abc import Iterable

    from iobmd.device.region import Region
    from iobmd.device.vfio import Attached

_NONE = int(IOOptionBits.kIODirectionNone)


class IODeviceMemory(IOMemoryDescriptor):
    """Memory of a device: registers, buffers, frame buffers.

    Map it, and access registers by the methods of the map: `read32`, `write32` and the other widths make exactly one
    access. `readBytes` and `writeBytes` access each byte once, by the widest aligned accesses.

    It has no page frames. Nothing can pin, page out or move it: `wiring` is `Wiring.DEVICE`, `prepare` and `complete`
    only count, `segments` returns the bus addresses at any time, and `getPageCounts` returns (0, 0). For a process
    that reads /proc/PID/pagemap it has no pages either.

    Notes
    -----
    If a device is removed or disabled, accesses through its mappings end the process by SIGBUS, or read as ones. With
    VFIO the kernel announces a removal first: `IOInterruptEventSource.ofVFIO(mapper, kind="request")`.

    Source: IODeviceMemory.h of IOKit.
    """

    _initializer = "withRange"
    _region: Region
    _first = 0  # the offset in the region

    @classmethod
    def withRange(cls, start: int, length: int) -> Self:
        """Describe a range of physical addresses, which is mapped by /dev/mem.

        Creating the descriptor requires no privilege; mapping it requires /dev/mem, root, and a kernel that permits
        it: neither main memory nor, on most kernels, memory of a device that has a driver.

        Parameters
        ----------
        start, length : int
            The first address, and the size in bytes.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`. Maps and accesses raise `kIOReturnUnsupported` (no /dev/mem),
            `kIOReturnNotPrivileged` and `kIOReturnNotPermitted`, with the reason, and `kIOReturnBadArgument` for
            addresses that this processor cannot generate.
        """
        start, length = integers(start=start, length=length)
        return cls._of_region(PhysicalRegion(start, length))

    @classmethod
    def withSubRange(cls, of: IODeviceMemory, offset: int, length: int) -> Self:
        """Describe `length` bytes of device memory, starting at `offset`. It retains `of`.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: past the end.
        """
        check_type(IODeviceMemory, of=of)
        offset, length = check_within(offset, length, of.getLength(), of)
        part = Part(of._memory(), offset, length)
        self = cls()._hold(CompositeBacking([part]), _NONE, length)
        self._region, self._first = of._region, of._first + offset
        return self

    @classmethod
    def arrayFromList(cls, ranges: Iterable[tuple[int, int]]) -> list[Self]:
        """Return a descriptor for each (start, length), as `withRange`."""
        return [cls.withRange(start, length) for start, length in ranges]

    @classmethod
    def ofPCI(cls, device: str, region: int, *, write_combine: bool = False) -> Self:
        """Describe a region of a PCI device, by its file in sysfs.

        Parameters
        ----------
        device : str
            The address with its domain: "0000:00:04.0".
        region : int
            The number of the base address register, 0 to 5.
        write_combine : bool
            Whether stores are combined, for frame buffers and other memory in which their order is irrelevant;
            prefetchable regions only. `performOperation(kIOMemoryIncoherentIOStore, …)` completes them, as do
            `writeBytes` and any uncached access. False: accesses are not cached.

        Raises
        ------
        IOReturnError
            `kIOReturnNoDevice`; `kIOReturnBadArgument`: there is no such region; `kIOReturnUnsupported`: I/O ports,
            or a region that cannot be combined; `kIOReturnNotPrivileged`: the file belongs to root. Maps and accesses
            raise `kIOReturnNotReady`: the device is disabled; `kIOReturnNotPermitted`: the kernel is locked down.

        Notes
        -----
        Source: Documentation/PCI/sysfs-pci.rst.
        """
        check_type(str, device=device)
        check_integers(region=region)
        check_flags(write_combine=write_combine)
        return cls._of_region(PCIRegion(device, region, write_combine=bool(write_combine)))

    @classmethod
    def ofUIO(cls, device: str, map: int = 0) -> Self:  # noqa: A002 (the kernel's name)
        """Describe a map of a UIO device, uncached.

        Parameters
        ----------
        device : str
            Its name, "uio0", or the address of its PCI device.
        map : int
            The number of the map. uio_pci_generic has none: use `ofPCI`.

        Raises
        ------
        IOReturnError
            `kIOReturnNoDevice`; `kIOReturnBadArgument`: there is no such map; `kIOReturnNotPrivileged`.

        Notes
        -----
        Source: Documentation/driver-api/uio-howto.rst.
        """
        check_type(str, device=device)
        check_integers(map=map)
        return cls._of_region(UIORegion(device, map))

    @classmethod
    def ofVFIO(cls, mapper: Attached, region: int) -> Self:
        """Describe a region of a device that is attached to VFIO, uncached.

        Parameters
        ----------
        mapper : IOMapper
            The mapper of the device. It may be closed before the descriptor; the device is released with the last of
            them.
        region : int
            0 to 5: the base address registers. 6, the ROM, and 7, the configuration space, cannot be mapped, but read
            and written by the methods of the descriptor.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: there is no such region. Maps and accesses raise `kIOReturnNotReady`: the device
            is disabled.

        Notes
        -----
        Source: linux/vfio.h, VFIO_DEVICE_GET_REGION_INFO.
        """
        check_integers(region=region)
        return cls._of_region(VFIORegion(mapper, region))

    @classmethod
    def _of_region(cls, region: Region) -> Self:
        self = cls()._hold(DeviceBacking(region), _NONE, region.size)
        self._region = region
        return self

    def exportDMABuffer(self, offset: int = 0, length: int = 0) -> int:
        """Return the descriptor of a dma-buf of memory that is described by `ofVFIO`, for another driver.

        The importer, such as iommufd or the driver of an RDMA card, accesses the memory directly (peer to peer). If
        the device is reset or disabled, VFIO revokes the importer's access.

        Parameters
        ----------
        offset, length : int
            The part, in whole pages; `length` 0: to the end.

        Returns
        -------
        int
            A file descriptor, which the caller closes.

        Raises
        ------
        IOReturnError
            `kIOReturnUnsupported`: the kernel does not export it (Linux 6.19, CONFIG_VFIO_PCI_DMABUF), or it is not
            memory of VFIO. `kIOReturnBadArgument`: not whole pages, or past the end.
        """
        offset, length = integers(offset=offset, length=length)
        size = self.getLength()
        length = length or size - offset
        check_within(offset, length, size, self)
        return self._region.export(self._first + offset, length)
