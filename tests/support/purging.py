"""Helpers of the tests of purgeable memory: buffers with known bytes, and pages reclaimed on demand."""

import errno
import itertools
import os
import time

import iobmd
from iobmd import IOPurgeable
from iobmd._native import mman
from iobmd.units import PAGE_SIZE
from support import kernel

KEEP_CURRENT = IOPurgeable.kIOMemoryPurgeableKeepCurrent
NON_VOLATILE = IOPurgeable.kIOMemoryPurgeableNonVolatile
VOLATILE = IOPurgeable.kIOMemoryPurgeableVolatile
EMPTY = IOPurgeable.kIOMemoryPurgeableEmpty
OBSOLETE = IOPurgeable.kIOMemoryPurgeableVolatileOrderingObsolete
LIFO = IOPurgeable.kIOMemoryPurgeableVolatileBehaviorLifo

DENIALS = {
    "tracked": {},
    "no userfaultfd": {"userfaultfd": errno.ENOSYS},
    "no PAGEMAP_SCAN": {"ioctl": errno.ENOTTY},
}
"""The ways to detect lost pages: those of the kernel, without the system calls that a seccomp filter denies."""


def purgeable(size: int, *, shared: bool = False, huge: bool = True) -> tuple[iobmd.IOBufferMemoryDescriptor, bytes]:
    """Return a purgeable buffer full of random nonzero bytes, and those bytes."""
    buffer = iobmd.allocate(size, wired=False, purgeable=True, shared=shared)
    if not huge and not shared:
        mman.advise(buffer.getBytesNoCopy(), size, mman.MADV_NOHUGEPAGE)
    data = os.urandom(PAGE_SIZE).replace(b"\0", b"\1") * -(-size // PAGE_SIZE)
    buffer.writeBytes(0, data[:size])
    return buffer, data[:size]


def page_out(buffer: iobmd.IOBufferMemoryDescriptor, offset: int = 0, size: int | None = None) -> None:
    """Make the kernel reclaim as much of a range as possible: lazily freed pages are discarded, others swapped out.

    Raises OSError (EINVAL) for locked memory.
    """
    length = buffer.getCapacity() - offset if size is None else size
    mman.advise(buffer.getBytesNoCopy() + offset, length, mman.MADV_PAGEOUT)


def discard(buffer: iobmd.IOBufferMemoryDescriptor, offset: int, size: int) -> None:
    """Make the kernel discard all pages of a range of a volatile buffer."""
    take(buffer.getBytesNoCopy() + offset, size)


def take(address: int, size: int) -> None:
    """Make the kernel discard all pages of lazily freed memory.

    Pages that a processor has just faulted in wait in a batch, and MADV_FREE skips them. MADV_FREE and MADV_PAGEOUT
    empty only the batch of the processor that they run on; another that is idle keeps its batch for any time.
    """
    allowed = os.sched_getaffinity(0)
    try:
        for processor in itertools.islice(itertools.cycle(allowed), 1000):
            mman.advise(address, size, mman.MADV_PAGEOUT)
            if not kernel.present(address, size):
                return
            time.sleep(0.001)
            os.sched_setaffinity(0, {processor})
            mman.advise(address, size, mman.MADV_FREE)
    finally:
        os.sched_setaffinity(0, allowed)
    raise AssertionError("the kernel retains the pages")


def reads_zero(buffer: iobmd.IOBufferMemoryDescriptor) -> bool:
    """Return whether every byte is zero, read through the kernel and not through the buffer."""
    return not any(iobmd.kernel_task.read(buffer.getBytesNoCopy(), buffer.getCapacity()))
