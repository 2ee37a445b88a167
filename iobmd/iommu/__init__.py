"""`IOMapper`: a device behind an IOMMU sees any buffer, contiguous or not, in one piece at an address of its own."""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from typing import TYPE_CHECKING, Self

from iobmd._internal import process_local
from iobmd._native.pagemap import PhysicalSegment
from iobmd.constants import IOOptionBits
from iobmd.descriptors.options import DIRECTION_MASK
from iobmd.errors import BadArgumentError, BusyError, IOReturnError, NoResourcesError, NotOpenError
from iobmd.iommu.addresses import Addresses
from iobmd.iommu.vfio import READ, WRITE, Container, Device
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size

if TYPE_CHECKING:
    from iobmd.descriptors.descriptor import IOMemoryDescriptor

_OUT, _IN = int(IOOptionBits.kIODirectionOut), int(IOOptionBits.kIODirectionIn)

__all__ = ["IOMapper", "IOVMRange"]


class IOMapper:
    """The I/O address space of one PCI device: what it may reach, and at which addresses.

    Parameters
    ----------
    device : str
        Its PCI address, domain and all: ``"0000:00:03.0"``. It must belong to the driver vfio-pci.
    address_bits : int
        How many bits of address it puts out: buffers are mapped below 1 << `address_bits`, wherever they lie.

    Raises
    ------
    IOReturnError
        What is missing, and the command that helps: `kIOReturnNoDevice`; `kIOReturnUnsupported`: no IOMMU, no VFIO;
        `kIOReturnNotReady`: it is not vfio-pci's; `kIOReturnNotPrivileged`: /dev/vfio may not be opened, or its
        interrupts are not safe; `kIOReturnBusy`: it, or a device that it cannot be told apart from, is in use.
        `kIOReturnBadArgument`.

    Notes
    -----
    A VFIO container with a type 1 IOMMU (Documentation/driver-api/vfio.rst, Linux 3.6). Physical addresses mean
    nothing to the device then: what is not prepared cannot be reached by it, and that is the kernel's promise, not
    the driver's. May be used from any thread; a forked child must not use it, for its memory is not what is mapped.
    Source: IOMapper of IOKit.
    """

    def __init__(self, device: str, *, address_bits: int = 64) -> None:
        if not 12 < address_bits <= 64:
            message = f"a device puts out 13 to 64 bits of address, not {address_bits}"
            raise BadArgumentError(message)
        self.name = device
        self._maker = os.getpid()
        self._guard = process_local.Guard()
        self._ranges: weakref.WeakSet[IOVMRange] = weakref.WeakSet()
        self._container: Container | None = Container(Device(device))
        self._addresses = Addresses(self._container.ranges(), (1 << address_bits) - 1)

    def prepare(self, descriptor: IOMemoryDescriptor, forDirection: int = 0) -> IOVMRange:  # noqa: N803 (IOKit's)
        """Pin a descriptor's memory and map all of it for the device, at one address, until `IOVMRange.complete`.

        Parameters
        ----------
        descriptor
            Any buffer: wired or pageable, contiguous or not, of this process, another, or none; and memory that this
            process had already. Of parts and concatenations, what they are made of is to be prepared.
        forDirection : int
            `kIODirectionOut`: the device reads it; `kIODirectionIn`: it writes there; 0: the descriptor's own.

        Raises
        ------
        IOReturnError
            As `IOMemoryDescriptor.prepare`; `kIOReturnNoResources`: no addresses are free below the device's limit;
            `kIOReturnBadArgument`: no direction; `kIOReturnUnsupported`: in parts, or another task's own. Then
            nothing is prepared, or mapped.
        """
        direction = forDirection & DIRECTION_MASK or int(descriptor.getDirection())
        if not direction:
            message = "neither the transfer nor the descriptor has a direction: the device could do nothing"
            raise BadArgumentError(message)
        access = (READ if direction & _OUT else 0) | (WRITE if direction & _IN else 0)
        descriptor.prepare(forDirection)
        try:
            with self._guard:
                prepared = self._map(descriptor, access)
        except BaseException:
            descriptor.complete(forDirection)
            raise
        return prepared

    def _map(self, descriptor: IOMemoryDescriptor, access: int) -> IOVMRange:
        container, backing = self._open(), descriptor._memory().require_backing()
        alignment = HUGE_PAGE_SIZE if backing.size >= HUGE_PAGE_SIZE else PAGE_SIZE  # so that it takes larger pages
        address = self._addresses.take(backing.size, alignment)
        if address is None:
            message = f"no {format_size(backing.size)} of addresses are free that {self.name} can reach"
            raise NoResourcesError(message)
        try:
            with backing.here(populated=True) as mapping:
                container.map(mapping.address, address, backing.size, access)
        except BaseException:
            self._addresses.give_back(address, backing.size)
            raise
        prepared = IOVMRange(self, descriptor, address, backing.size, backing.in_page(0))
        self._ranges.add(prepared)
        return prepared

    def _unmap(self, prepared: IOVMRange, address: int, size: int) -> None:
        with self._guard:
            self._open().unmap(address, size)
            self._addresses.give_back(address, size)
            self._ranges.discard(prepared)

    def fileno(self) -> int:
        """Return VFIO's descriptor of the device, by which a driver reaches its registers (linux/vfio.h)."""
        return self._open().device

    def close(self) -> None:
        """Let the device go. Idempotent, and so is leaving `with`.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while memory is prepared for it.
        """
        with self._guard:
            if self._container is None:
                return
            if self._ranges and self._maker == os.getpid():
                message = f"{len(self._ranges)} ranges are prepared for {self.name}: complete() each first"
                raise BusyError(message)
            self._container.close()
            self._container = None

    def _open(self) -> Container:
        container = self._container  # once: another thread may close it
        if container is None:
            raise NotOpenError(f"the mapper of {self.name} is closed")
        if self._maker != os.getpid():
            message = f"the mapper of {self.name} is process {self._maker}'s, and maps its memory"
            raise NotOpenError(message)
        return container

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if container := getattr(self, "_container", None):
            container.close()


class IOVMRange:
    """Where a device sees a descriptor's memory: from `IOMapper.prepare` to `complete`, or the end of `with`."""

    def __init__(
        self, mapper: IOMapper, descriptor: IOMemoryDescriptor, address: int, mapped: int, offset: int
    ) -> None:
        self._mapped = address, mapped
        self.address = address + offset
        """The first byte's address, for the device."""
        self.length = descriptor.getLength()
        """In bytes."""
        self._mapper: IOMapper | None = mapper
        self._descriptor = descriptor

    def segments(self) -> list[PhysicalSegment]:
        """Return it as `IOMemoryDescriptor.segments` does: it is always one."""
        return [PhysicalSegment(self.address, self.length)]

    def complete(self) -> None:
        """Take it away from the device, whose accesses fault from now on, and undo the `prepare`. Idempotent."""
        mapper, self._mapper = self._mapper, None
        if mapper:
            try:
                mapper._unmap(self, *self._mapped)
            except BaseException:
                self._mapper = mapper
                raise
            self._descriptor.complete()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.complete()

    def __repr__(self) -> str:
        state = f"for {self._mapper.name}" if self._mapper else "complete"
        return f"<{type(self).__name__} {self.length} bytes at {self.address:#x} {state}>"

    def __del__(self) -> None:
        if self._mapper and self._mapper._maker == os.getpid():
            message = f"{self!r} was never completed"
            with contextlib.suppress(IOReturnError):  # its memory may be garbage of the same cycle, and freed already
                self.complete()
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)
