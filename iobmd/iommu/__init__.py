"""`IOMapper`: any buffer, contiguous or not, as one range of addresses of a device behind an IOMMU."""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from typing import TYPE_CHECKING, Self

from iobmd._internal import process_local, with_block
from iobmd._internal.arguments import check_integers, check_type
from iobmd._native.pagemap import PhysicalSegment
from iobmd.constants import IOOptionBits, IOReturn, kIOMapperUncached, kIOReturnSuccess
from iobmd.descriptors.options import DIRECTION_MASK
from iobmd.errors import (
    BadArgumentError,
    BusyError,
    NoResourcesError,
    NotOpenError,
    NotPermittedError,
    UnsupportedError,
)
from iobmd.iommu.addresses import Addresses
from iobmd.iommu.vfio import READ, WRITE, Container, Device
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size, round_down, round_up

if TYPE_CHECKING:
    from iobmd.descriptors.descriptor import IOMemoryDescriptor

_OUT, _IN = int(IOOptionBits.kIODirectionOut), int(IOOptionBits.kIODirectionIn)

__all__ = ["IOMapper", "IOVMRange"]


class IOMapper:
    """The I/O address space of a PCI device: the memory that the device may access, and its addresses there.

    Parameters
    ----------
    device : str
        Its PCI address with the domain: ``"0000:00:03.0"``. It must be bound to the driver vfio-pci.
    address_bits : int
        The number of its address bits: buffers are mapped below 1 << `address_bits`, whatever their physical
        addresses.

    Raises
    ------
    IOReturnError
        With the missing prerequisite and its remedy. `kIOReturnNoDevice`; `kIOReturnUnsupported`: no IOMMU, no VFIO;
        `kIOReturnNotReady`: it is not bound to vfio-pci; `kIOReturnNotPrivileged`: /dev/vfio may not be opened, or
        its interrupts are not safe; `kIOReturnBusy`: it, or another device of its group, is in use.
        `kIOReturnBadArgument`.

    Notes
    -----
    This is a VFIO container with a type 1 IOMMU (Documentation/driver-api/vfio.rst, Linux 3.6). Physical addresses
    are meaningless to the device: the kernel, not the driver, guarantees that it can access only prepared memory. A
    mapper may be used from any thread, but not in a forked child, whose memory is not mapped. Source: IOMapper of
    IOKit.
    """

    def __init__(self, device: str, *, address_bits: int = 64) -> None:
        check_type(str, device=device)
        check_integers(address_bits=address_bits)
        if not 12 < address_bits <= 64:
            message = f"a device has 13 to 64 address bits, not {address_bits}"
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
            Any buffer: wired or pageable, contiguous or not, of this process, another, or none; and existing memory
            of this process. For parts and concatenations, prepare the underlying descriptors.
        forDirection : int
            `kIODirectionOut`: the device reads it; `kIODirectionIn`: the device writes it; 0: the descriptor's own.

        Raises
        ------
        IOReturnError
            As `IOMemoryDescriptor.prepare`; `kIOReturnNoResources`: no addresses are free below the device's limit;
            `kIOReturnBadArgument`: no direction; `kIOReturnUnsupported`: several parts, existing memory of another
            task, or the mapper option `kIOMapperUncached`; `kIOReturnNotPermitted`: memory that no device may access
            (`kIOMemoryHostOnly`). After an error, nothing is prepared or mapped.
        """
        direction = forDirection & DIRECTION_MASK or int(descriptor.getDirection())
        if not direction:
            message = "neither the transfer nor the descriptor has a direction: the device would have no access"
            raise BadArgumentError(message)
        _require_accessible(descriptor)
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
        with backing.here(populated=True) as mapping:
            # Whole pages, even for a small buffer, which is a part of one.
            start = round_down(mapping.address, PAGE_SIZE)
            size = round_up(mapping.address + backing.size, PAGE_SIZE) - start
            alignment = HUGE_PAGE_SIZE if size >= HUGE_PAGE_SIZE else PAGE_SIZE  # permits larger pages
            address = self._addresses.take(size, alignment)
            if address is None:
                message = f"{self.name} has no {format_size(size)} of free addresses"
                raise NoResourcesError(message)
            try:
                container.map(start, address, size, access)
            except BaseException:
                self._addresses.give_back(address, size)
                raise
        prepared = IOVMRange(self, descriptor, address, size, backing.in_page(0))
        self._ranges.add(prepared)
        return prepared

    def _unmap(self, prepared: IOVMRange, address: int, size: int) -> None:
        """Undo `_map`, with the guard held."""
        self._open().unmap(address, size)
        self._addresses.give_back(address, size)
        self._ranges.discard(prepared)

    def fileno(self) -> int:
        """Return VFIO's descriptor of the device, with which a driver accesses its registers (linux/vfio.h)."""
        return self._open().device

    def close(self) -> None:
        """Release the device. Idempotent, as is leaving a `with` block.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while memory is prepared for it.
        """
        with self._guard:
            if self._container is None:
                return
            if self._ranges and self._maker == os.getpid():
                message = f"memory is still prepared for {self.name} (count {len(self._ranges)}): complete() it first"
                raise BusyError(message)
            self._container.close()
            self._container = None

    def _open(self) -> Container:
        container = self._container  # read once: another thread may close it
        if container is None:
            raise NotOpenError(f"the mapper of {self.name} is closed")
        if self._maker != os.getpid():
            message = f"the mapper of {self.name} belongs to process {self._maker}, whose memory it maps"
            raise NotOpenError(message)
        return container

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        with_block.leave(self.close, error)

    def __del__(self) -> None:
        if container := getattr(self, "_container", None):
            container.close()


def _require_accessible(descriptor: IOMemoryDescriptor) -> None:
    """Raise the named error for a descriptor that a device may not access, or not by this IOMMU."""
    if descriptor.getFlags() & IOOptionBits.kIOMemoryHostOnly:
        raise NotPermittedError(f"{descriptor!r} was created with kIOMemoryHostOnly: no device may access its memory")
    if descriptor.getMapperOptions() & kIOMapperUncached:
        raise UnsupportedError("VFIO maps memory cached, and not with kIOMapperUncached: call setMapperOptions(0)")


class IOVMRange:
    """A descriptor's memory as a device sees it, from `IOMapper.prepare` to `complete` or the end of `with`."""

    def __init__(
        self, mapper: IOMapper, descriptor: IOMemoryDescriptor, address: int, mapped: int, offset: int
    ) -> None:
        self._mapped = address, mapped
        self.address = address + offset
        """The device's address of the first byte."""
        self.length = descriptor.getLength()
        """In bytes."""
        self._mapper: IOMapper | None = mapper
        self._descriptor = descriptor

    def segments(self) -> list[PhysicalSegment]:
        """Return its single segment, like `IOMemoryDescriptor.segments`."""
        return [PhysicalSegment(self.address, self.length)]

    def complete(self) -> IOReturn:
        """Unmap it from the device, whose further accesses fault, and undo the `prepare`. Idempotent.

        Returns
        -------
        IOReturn
            `kIOReturnSuccess`.
        """
        mapper, self._mapper = self._mapper, None
        if mapper:
            try:
                with mapper._guard:
                    mapper._unmap(self, *self._mapped)
            except BaseException:
                self._mapper = mapper
                raise
            self._descriptor.complete()
        return kIOReturnSuccess

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        with_block.leave(self.complete, error)

    def __repr__(self) -> str:
        state = f"for {self._mapper.name}" if self._mapper else "complete"
        return f"<{type(self).__name__} {self.length} bytes at {self.address:#x} {state}>"

    def __del__(self) -> None:
        if self._mapper and self._mapper._maker == os.getpid():
            message = f"{self!r} was never completed"
            self._mapper._guard.when_free(self._complete_collected)
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    def _complete_collected(self) -> None:
        """As `complete`, for the destructor, which must not wait, with the mapper's guard held."""
        mapper, self._mapper = self._mapper, None
        if mapper:
            with contextlib.suppress(OSError):  # the mapper may be closed, which unmaps everything
                mapper._unmap(self, *self._mapped)
            self._descriptor._complete_when_free()
