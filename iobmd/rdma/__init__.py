"""RDMA: memory of descriptors as memory regions of pyverbs, which other machines read and write directly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd._internal.arguments import check_integers, check_type
from iobmd.descriptors.descriptor import IOMemoryDescriptor
from iobmd.errors import UnsupportedError

if TYPE_CHECKING:
    from pyverbs.pd import PD

    from iobmd.rdma.memory_region import MemoryRegion

__all__ = ["register"]


def register(descriptor: IOMemoryDescriptor, pd: PD, access: int) -> MemoryRegion:
    """Register memory with an RDMA device, which then reads and writes it for this process and others.

    Parameters
    ----------
    descriptor : IOMemoryDescriptor
        Any memory that this process can map as one range, except purgeable memory: buffers, shared memory of another
        task, parts and concatenations, and existing memory of this process.
    pd : pyverbs.pd.PD
        The protection domain.
    access : int
        The permitted accesses, a combination of ``IBV_ACCESS_…`` of `pyverbs.enums`. ``IBV_ACCESS_REMOTE_WRITE`` and
        ``IBV_ACCESS_REMOTE_ATOMIC`` require ``IBV_ACCESS_LOCAL_WRITE``.

    Returns
    -------
    MemoryRegion
        A `pyverbs.mr.MR`, with its members, and ``address``, ``length``, ``lkey``, ``rkey`` and ``descriptor``: work
        requests name the first two with ``lkey``, those of other machines with ``rkey``. ``close`` or leaving a
        ``with`` block ends the registration; so does closing `pd` or its context.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`: pyverbs is not installed, purgeable memory, memory of a device or of a dma-buf, memory
        that is mapped nowhere in this process, or a device that refuses this access. `kIOReturnBadArgument`: an
        invalid combination of accesses. `kIOReturnCannotWire`: RLIMIT_MEMLOCK, with what the region and iobmd pin.
        `kIOReturnNotPermitted`: `kIOMemoryHostOnly`. `kIOReturnVMError`: the program has unmapped memory.
        `kIOReturnNotOpen`: `pd` is closed. After an error, nothing is registered or pinned.

    Notes
    -----
    `IOMemoryDescriptor.free` is refused with `kIOReturnBusy` until the region is closed, and its memory is retained
    until then. The device pins the pages itself (``ibv_reg_mr``), and they count against RLIMIT_MEMLOCK in addition
    to a pin of iobmd of the same pages. Pageable memory (``wired=False``) counts once, as only the region pins it.
    In a forked child, a region of the parent is closed, and ending it there does not affect the parent.
    """
    check_type(IOMemoryDescriptor, descriptor=descriptor)
    check_integers(access=access)
    try:
        from iobmd.rdma.memory_region import MemoryRegion  # noqa: PLC0415 (pyverbs may be missing)
    except ImportError as error:
        raise UnsupportedError(
            f"RDMA requires pyverbs, the Python interface of rdma-core ({error}): install it (Debian, Ubuntu and "
            "Fedora: python3-pyverbs; with the headers of libibverbs: pip install pyverbs)"
        ) from error
    return MemoryRegion(descriptor, pd, access)
