"""dma-bufs: memory that drivers accept through a file descriptor (V4L2, DRM, RDMA, GPUs), from and for iobmd."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from iobmd._internal import process_local
from iobmd._internal.arguments import check_type, integers
from iobmd.api import DIRECTIONS
from iobmd.backing.dma_buf import DmaBufBacking
from iobmd.backing.shared import SharedBacking
from iobmd.constants import IOOptionBits
from iobmd.descriptors.descriptor import IOMemoryDescriptor
from iobmd.descriptors.options import DIRECTION_MASK
from iobmd.errors import BadArgumentError, UnsupportedError
from iobmd.memory import dma_buf, shmem
from iobmd.units import PAGE_SIZE, round_up

if TYPE_CHECKING:
    from iobmd.api import Direction
    from iobmd.descriptors.ownership import MemoryOwner

__all__ = ["allocate", "attach", "export"]

_ACCESS = {
    int(IOOptionBits.kIODirectionNone): dma_buf.READ,
    int(IOOptionBits.kIODirectionIn): dma_buf.READ,
    int(IOOptionBits.kIODirectionOut): dma_buf.WRITE,
    int(IOOptionBits.kIODirectionInOut): dma_buf.READ | dma_buf.WRITE,
}
"""The accesses of the processor, by direction: a device that reads needs what the processor wrote."""


def export(descriptor: IOMemoryDescriptor) -> int:
    """Return a dma-buf of shared memory, which drivers accept as a buffer. It is the same memory, not a copy.

    Parameters
    ----------
    descriptor : IOMemoryDescriptor
        Memory allocated with ``shared=True``, or a part or a concatenation of such memory, from the start of a page;
        or all memory of a dma-buf (`attach`, `allocate`): the result is another descriptor of it.

    Returns
    -------
    int
        A new file descriptor, with ``FD_CLOEXEC``. It contains whole pages. Close it when no driver needs it.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`: private or purgeable memory, memory whose size cannot be sealed, huge pages that this
        kernel handles wrongly, or a kernel without udmabuf. `kIOReturnBadArgument`: it does not begin with a page.
        `kIOReturnNotPrivileged`: /dev/udmabuf is not accessible. `kIOReturnNoResources`: a limit of udmabuf, or no
        file descriptor is free.

    Notes
    -----
    The kernel pins the pages as long as the dma-buf exists, and charges them to no limit. Until the last descriptor,
    mapping and driver has released it, `IOMemoryDescriptor.free` is refused with `kIOReturnBusy`.
    """
    check_type(IOMemoryDescriptor, descriptor=descriptor)
    owner = descriptor._memory()
    with owner.guard:
        backing = owner.require_backing()
        if backing.in_page(0):
            raise BadArgumentError("a dma-buf consists of whole pages, but this memory does not begin with one")
        if isinstance(backing, DmaBufBacking):
            return backing.duplicate()
        parts = [_exportable(origin) for origin in owner.origins()]
        fd = dma_buf.export(backing.file_extents(0, round_up(owner.length, PAGE_SIZE)))
        try:
            for part in parts:
                part.exports.add(process_local.Fd(dma_buf.duplicate_known(fd), "this dma-buf"))
        except BaseException:
            os.close(fd)  # the caller would not know it, and it pins the memory
            raise
    return fd


def _exportable(origin: MemoryOwner) -> SharedBacking:
    """Return the memory of an owner, if a dma-buf can be made of it; otherwise raise `kIOReturnUnsupported`."""
    backing = origin.require_backing()
    if isinstance(backing, DmaBufBacking):
        raise UnsupportedError("a part of this memory belongs to another dma-buf: export that part alone")
    if not isinstance(backing, SharedBacking):
        raise UnsupportedError(
            "private memory cannot be exported: allocate it with kIOMemoryKernelUserShared (shared=True)"
        )
    if backing.purgeable:
        raise UnsupportedError(
            "purgeable memory cannot be exported, because a driver would keep pages that are purged: "
            "allocate it without purgeable=True"
        )
    with backing.shared.fd.use() as fd:
        if not shmem.has_sealed_size(fd):
            raise UnsupportedError(
                "the size of this memory is not sealed, which udmabuf requires: allocate it wired, or less than "
                "2 MiB of it"
            )
    if (backing.shared.page > PAGE_SIZE or backing.huge_bytes()) and dma_buf.reads_huge_pages_wrongly():
        raise UnsupportedError(
            "drivers of this kernel would access wrong pages of memory in huge pages (Linux 6.12): concatenate "
            "buffers of less than 2 MiB (IOMultiMemoryDescriptor)"
        )
    return backing


def attach(fd: int, direction: Direction | int) -> IOMemoryDescriptor:
    """Describe the memory of a dma-buf of another exporter, and map it in this process.

    Parameters
    ----------
    fd : int
        The descriptor of the dma-buf. The caller retains it, and may close it.
    direction : {"in", "out", "inout"} or IOOptionBits
        The direction of transfers: ``"in"``: a device writes, and this process reads; ``"out"``: the reverse.

    Returns
    -------
    IOMemoryDescriptor
        `map`, `readBytes` and `writeBytes` access the memory. `prepare` begins accesses by this process through a map
        or an address, and `complete` ends them (DMA_BUF_IOCTL_SYNC); `readBytes` and `writeBytes` do this themselves.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: not a dma-buf. `kIOReturnNotPermitted`: its descriptor is open for reading only.
        `kIOReturnUnsupported`: its exporter does not permit mapping it. `kIOReturnNoResources`: no file descriptor is
        free.

    Notes
    -----
    The kernel shows no physical addresses of a dma-buf: `segments`, `getPageCounts` and `layout` raise
    `kIOReturnUnsupported` or `kIOReturnNotReady`, and it is never `Wiring.PINNED`, although most exporters pin it.
    """
    (fd,) = integers(fd=fd)
    options = _option(direction)
    return _described(dma_buf.duplicate(fd), options)


def allocate(size: int, *, heap: str = "system") -> IOMemoryDescriptor:
    """Allocate memory from a dma-buf heap, zeroed.

    Parameters
    ----------
    size : int
        Bytes, which are rounded up to pages.
    heap : str
        The name of the heap in /dev/dma_heap. ``"system"`` allocates any pages, other heaps contiguous or reserved
        memory.

    Returns
    -------
    IOMemoryDescriptor
        As `attach`, for transfers in both directions. `export` returns a descriptor for drivers.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`: no such heap. `kIOReturnNotPrivileged`: its file is not accessible (root).
        `kIOReturnNoMemory`: it does not fit in free memory.
    """
    (size,) = integers(size=size)
    check_type(str, heap=heap)
    if size <= 0:
        raise BadArgumentError(f"the size is {size}: it must be positive")
    fd = dma_buf.allocate(round_up(size, PAGE_SIZE), heap)
    return _described(fd, int(IOOptionBits.kIODirectionInOut))


def _described(fd: int, options: int) -> IOMemoryDescriptor:
    backing = DmaBufBacking(fd, _ACCESS[options & DIRECTION_MASK])
    return IOMemoryDescriptor()._hold(backing, options, backing.size)


def _option(direction: Direction | int) -> int:
    option = DIRECTIONS.get(direction) if isinstance(direction, str) else direction
    if option is None or option not in _ACCESS:
        raise BadArgumentError(f"the direction is {direction!r}: it must be 'in', 'out' or 'inout'")
    return int(option)
