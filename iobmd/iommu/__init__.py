"""`IOMapper`: any buffer, contiguous or not, as one range of addresses of a device behind an IOMMU."""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from typing import TYPE_CHECKING, Self

from iobmd._internal import process_local, with_block
from iobmd._internal.arguments import check_type, integers, optional_integers
from iobmd._internal.uncopyable import Uncopyable
from iobmd._internal.weak_registry import WeakRegistry
from iobmd._native.pagemap import PhysicalSegment
from iobmd.constants import (
    IODMAMapOptions,
    IOOptionBits,
    IOReturn,
    kIODMAMapReadAccess,
    kIODMAMapWriteAccess,
    kIOMapperUncached,
    kIOReturnSuccess,
)
from iobmd.descriptors.device_access import require_device_access
from iobmd.descriptors.options import DIRECTION_MASK, check_descriptor, check_within
from iobmd.errors import (
    BadArgumentError,
    BusyError,
    NoResourcesError,
    NotOpenError,
    UnsupportedError,
)
from iobmd.iommu import device_pages
from iobmd.iommu.absence import ALL_IOMMUS
from iobmd.iommu.addresses import Addresses
from iobmd.iommu.attachment import Attachment, attach
from iobmd.iommu.vfio import READ, WRITE
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size, is_power_of_two

if TYPE_CHECKING:
    from iobmd.descriptors.descriptor import IOMemoryDescriptor
    from iobmd.descriptors.ownership import MemoryOwner

_OUT, _IN = int(IOOptionBits.kIODirectionOut), int(IOOptionBits.kIODirectionIn)
_READS, _WRITES = int(kIODMAMapReadAccess), int(kIODMAMapWriteAccess)
_HINTS = int(
    IODMAMapOptions.kIODMAMapPhysicallyContiguous
    | IODMAMapOptions.kIODMAMapPagingPath
    | IODMAMapOptions.kIODMAMapPageListFullyOccupied
)
_REFUSED = {
    int(IODMAMapOptions.kIODMAMapDeviceMemory): "kIODMAMapDeviceMemory: VFIO maps main memory only",
    int(IODMAMapOptions.kIODMAMapIdentityMap): (
        "kIODMAMapIdentityMap: the device would access physical addresses, from which the IOMMU protects the host"
    ),
    int(IODMAMapOptions.kIODMAMapFixedAddress): (
        "kIODMAMapFixedAddress: the mapper chooses the address, so that no other mapping has it"
    ),
}
"""Options of `iovmMapMemory` that VFIO cannot honor, and the reasons."""

_mappers: weakref.WeakValueDictionary[str, IOMapper] = weakref.WeakValueDictionary()
_creation = process_local.Guard()

__all__ = ["IOMapper", "IOVMRange"]


class IOMapper(Uncopyable):
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
    This is an address space of iommufd and the device's character device in /dev/vfio/devices
    (Documentation/userspace-api/iommufd.rst, Linux 6.6), where this process may open both; otherwise a container of
    VFIO with a type 1 IOMMU (Documentation/driver-api/vfio.rst, Linux 3.6). Physical addresses are meaningless to the
    device: the kernel, not the driver, guarantees that it can access only prepared memory. A mapper may be used from
    any thread, but not in a forked child, whose memory is not mapped. Source: IOMapper of IOKit.
    """

    def __init__(self, device: str, *, address_bits: int = 64) -> None:
        check_type(str, device=device)
        (address_bits,) = integers(address_bits=address_bits)
        if not 12 < address_bits <= 64:
            message = f"a device has 13 to 64 address bits, not {address_bits}"
            raise BadArgumentError(message)
        self.name = _name(device)
        self._maker = os.getpid()
        self._guard = process_local.Guard()
        self._ranges: WeakRegistry[IOVMRange] = WeakRegistry()
        self._mapped: dict[tuple[int, int], list[IOVMRange]] = {}
        self._attachment: Attachment | None = attach(self.name)
        self.interface = self._attachment.interface
        """The kernel's interface: "iommufd", or "container" (VFIO's group and container)."""
        self._addresses = Addresses(self._attachment.ranges(), (1 << address_bits) - 1)
        _mappers[self.name] = self

    def prepare(
        self,
        descriptor: IOMemoryDescriptor,
        forDirection: int = 0,
        *,
        alignment: int = 1,
        highest: int | None = None,
    ) -> IOVMRange:
        """Pin a descriptor's memory and map its bytes for the device, at one address, until `IOVMRange.complete`.

        Parameters
        ----------
        descriptor
            Any buffer: wired or pageable, contiguous or not, of this process, another, or none; existing memory of
            this process; and parts and concatenations of these. Of a part, the pages that contain it are mapped. The
            parts of a concatenation meet at page boundaries.
        forDirection : int
            `kIODirectionOut`: the device reads it; `kIODirectionIn`: the device writes it; 0: the descriptor's own.
        alignment : int
            A power of two: the alignment of the device's address of the page with the first byte, at least a page.
        highest : int, optional
            The highest address for it, if that is below those of the mapper.

        Raises
        ------
        IOReturnError
            As `IOMemoryDescriptor.prepare`; `kIOReturnNoResources`: no addresses are free below the device's limit;
            `kIOReturnBadArgument`: no direction, no bytes, an alignment that is not a power of two, or parts that
            meet inside a page (an `IODMACommand` with this mapper copies those); `kIOReturnVMError`: guard pages;
            `kIOReturnUnsupported`: memory of a device, existing memory of another task, or the mapper option
            `kIOMapperUncached`; `kIOReturnNotPermitted`: memory that no device may access (`kIOMemoryHostOnly`).
            After an error, nothing is prepared or mapped.
        """
        check_descriptor(descriptor=descriptor)
        forDirection, alignment = integers(forDirection=forDirection, alignment=alignment)  # noqa: N806 (IOKit's)
        (highest,) = optional_integers(highest=highest)
        if not is_power_of_two(alignment):
            raise BadArgumentError(f"the alignment {alignment} is not a power of two")
        direction = forDirection & DIRECTION_MASK or int(descriptor.getDirection())
        if not direction:
            message = "neither the transfer nor the descriptor has a direction: the device would have no access"
            raise BadArgumentError(message)
        _require_mappable(descriptor)
        access = (READ if direction & _OUT else 0) | (WRITE if direction & _IN else 0)
        memory = descriptor._pin(forDirection)
        try:
            with self._guard:
                prepared = self._map(descriptor, memory, access, alignment, highest)
        except BaseException:
            with memory.guard:
                memory.unpin()
            raise
        return prepared

    def _map(
        self, descriptor: IOMemoryDescriptor, memory: MemoryOwner, access: int, alignment: int, highest: int | None
    ) -> IOVMRange:
        attachment, length = self._open(), descriptor.getLength()
        with contextlib.ExitStack() as undo:  # outermost: Ctrl-C may follow each step
            with device_pages.of_memory(memory, length) as parts:
                size = sum(part.size for part in parts)
                # The IOMMU then uses larger pages.
                alignment = max(alignment, HUGE_PAGE_SIZE if size >= HUGE_PAGE_SIZE else PAGE_SIZE)
                address = self._addresses.allocate(size, alignment, highest)
                if address is None:
                    message = f"{self.name} has no {format_size(size)} of free addresses"
                    raise NoResourcesError(message)
                undo.callback(self._addresses.release, address, size)
                end = address
                for part in parts:
                    undo.callback(attachment.unmap, end, part.size)
                    attachment.map(part.address, end, part.size, access)
                    end += part.size
            prepared = IOVMRange(descriptor, memory, (address, size), length)
            self._ranges.add(prepared)
            undo.pop_all()
            prepared._mapper = self
        return prepared

    def _unmap(self, prepared: IOVMRange, address: int, size: int) -> bool:
        """Undo `_map`, with the guard held; return False if another thread has done so.

        After Ctrl-C during the unmapping, it is called again.
        """
        if prepared._mapper is None:
            return False
        self._open().unmap(address, size)
        prepared._mapper = None  # before its addresses may be those of another range
        self._addresses.release(address, size)
        self._ranges.remove(prepared)
        return True

    # --- IOKit's names

    @staticmethod
    def copyMapperForDevice(device: str, *, address_bits: int = 64) -> IOMapper:
        """Return the mapper of a device, which is created unless this process has one that is open.

        VFIO attaches a device to one mapper at a time: all users of a device in this process share it, and it must be
        closed once. Parameters and errors are those of the class; `address_bits` is used if a mapper is created.
        """
        check_type(str, device=device)
        with _creation:
            found = _mappers.get(_name(device))
            if found is not None and found._attachment is not None and found._maker == os.getpid():
                return found
            return IOMapper(device, address_bits=address_bits)

    @staticmethod
    def checkForSystemMapper() -> bool:
        """Return whether an IOMMU translates the addresses of any device of this host (/sys/class/iommu)."""
        return any(ALL_IOMMUS.glob("*"))

    def getPageSize(self) -> int:
        """Return the size of the pages that are mapped, in bytes."""
        return PAGE_SIZE

    def iovmMapMemory(
        self,
        memory: IOMemoryDescriptor,
        descriptorOffset: int = 0,
        length: int = 0,
        mapOptions: int = 0,
    ) -> tuple[int, int]:
        """Map memory for the device, as `prepare`, until `iovmUnmapMemory`.

        Parameters
        ----------
        memory : IOMemoryDescriptor
            The memory; all of it is mapped.
        descriptorOffset, length : int
            The range of the memory whose address is returned, in bytes; `length` 0: to the end.
        mapOptions : int
            `kIODMAMapReadAccess`: the device reads it; `kIODMAMapWriteAccess`: the device writes it; without both,
            as the direction of the memory. `kIODMAMapPhysicallyContiguous`, `…PagingPath` and
            `…PageListFullyOccupied`, which only make IOKit's mappers faster, have no effect.

        Returns
        -------
        tuple of (int, int)
            The device's address of the byte at `descriptorOffset`, and the length.

        Raises
        ------
        IOReturnError
            As `prepare`. `kIOReturnBadArgument`: a range past the end, or unknown options. `kIOReturnUnsupported`:
            `kIODMAMapDeviceMemory`, `…IdentityMap` and `…FixedAddress`, with the reason.
        """
        check_descriptor(memory=memory)
        descriptorOffset, length, mapOptions = integers(  # noqa: N806 (IOKit's)
            descriptorOffset=descriptorOffset, length=length, mapOptions=mapOptions
        )
        whole = memory.getLength()
        length = length or whole - descriptorOffset
        check_within(descriptorOffset, length, whole, "the memory")
        if refused := next((reason for bit, reason in _REFUSED.items() if mapOptions & bit), None):
            raise UnsupportedError(refused)
        if mapOptions & ~(_READS | _WRITES | _HINTS):
            raise BadArgumentError(f"map options {int(mapOptions):#x} have unknown bits")
        direction = (_OUT if mapOptions & _READS else 0) | (_IN if mapOptions & _WRITES else 0)
        prepared = self.prepare(memory, direction)
        address = prepared.address + descriptorOffset
        with self._guard:
            self._mapped.setdefault((address, length), []).append(prepared)
        return address, length

    def iovmUnmapMemory(self, memory: IOMemoryDescriptor, mapAddress: int, mapLength: int) -> IOReturn:
        """Undo an `iovmMapMemory` of memory that returned this address and length.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: this memory is not mapped there.
        """
        with self._guard:
            ranges = self._mapped.get((mapAddress, mapLength), [])
            prepared = next((one for one in ranges if one.descriptor is memory), None)
            if prepared is None:
                raise BadArgumentError(f"{memory!r} is not mapped at {mapAddress:#x} with length {mapLength}")
            ranges.remove(prepared)
            if not ranges:
                del self._mapped[mapAddress, mapLength]
        return prepared.complete()

    def mapToPhysicalAddress(self, mappedAddress: int) -> int:
        """Return the physical address of the byte that the device accesses at an address; 0 if nothing is mapped.

        Raises
        ------
        IOReturnError
            As `IOMemoryDescriptor.segments`, if the physical addresses are hidden.
        """
        (mappedAddress,) = integers(mappedAddress=mappedAddress)  # noqa: N806 (IOKit's)
        for prepared in self._ranges.all():
            offset = mappedAddress - prepared.address
            if 0 <= offset < prepared.length:
                return prepared._physical(offset)
        return 0

    # --- the device

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
            if self._attachment is None:
                return
            if (count := len(self._ranges.all())) and self._maker == os.getpid():
                raise BusyError(f"memory is still prepared for {self.name} (count {count}): complete() it first")
            self._attachment.close()
            self._attachment = None

    def _open(self) -> Attachment:
        attachment = self._attachment  # read once: another thread may close it
        if attachment is None:
            raise NotOpenError(f"the mapper of {self.name} is closed")
        if self._maker != os.getpid():
            message = f"the mapper of {self.name} belongs to process {self._maker}, whose memory it maps"
            raise NotOpenError(message)
        return attachment

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        with_block.leave(self.close, error)

    def __del__(self) -> None:
        if attachment := getattr(self, "_attachment", None):
            attachment.close()


def _name(device: str) -> str:
    """Return the address of a PCI device as the kernel writes it, by which VFIO finds the device."""
    return device.lower()


def _require_mappable(descriptor: IOMemoryDescriptor) -> None:
    """Raise the named error for a descriptor that a device may not access, or not by this IOMMU."""
    require_device_access(descriptor)
    if descriptor.getMapperOptions() & kIOMapperUncached:
        raise UnsupportedError("VFIO maps memory cached, and not with kIOMapperUncached: call setMapperOptions(0)")


class IOVMRange(Uncopyable):
    """A descriptor's memory as a device sees it, from `IOMapper.prepare` to `complete` or the end of `with`."""

    def __init__(
        self,
        descriptor: IOMemoryDescriptor,
        memory: MemoryOwner,
        mapped: tuple[int, int],
        length: int,
    ) -> None:
        self._mapper: IOMapper | None = None  # set when it is mapped
        self._mapped, self._pinned = mapped, memory
        self.address = mapped[0] + memory.require_backing().in_page(0)
        """The device's address of the first byte."""
        self.length = length
        """In bytes: the length of the descriptor when it was mapped."""
        self.descriptor = descriptor
        """The memory."""

    def _physical(self, offset: int) -> int:
        """Return the physical address of a byte, also of one that the descriptor's length no longer includes."""
        memory = self._pinned
        return memory.runs().segment(memory.require_backing().address + offset, 1)[0]

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
        if mapper := self._mapper:
            with mapper._guard:
                unmapped = mapper._unmap(self, *self._mapped)
            if unmapped:
                with self._pinned.guard:
                    self._pinned.unpin()
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
            self.drop()
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    def drop(self) -> None:
        """As `complete`, for a destructor, which must not wait: as soon as no other thread prevents it."""
        if self._mapper:
            self._mapper._guard.when_free(self._complete_collected)

    def _complete_collected(self) -> None:
        """As `complete`, for the destructor, which must not wait, with the mapper's guard held."""
        if mapper := self._mapper:
            with contextlib.suppress(OSError):  # the mapper may be closed, which unmaps everything
                mapper._unmap(self, *self._mapped)
            self._mapper = None
            self._pinned.unpin_when_free()
