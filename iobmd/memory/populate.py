"""Populating new memory with zeroed pages, on several threads if it is large."""

import errno

from iobmd._internal import chunked
from iobmd._native import mman
from iobmd.errors import NoMemoryError
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size

_COLLAPSED = 32 << 20
"""Bytes of a request for huge pages: each waits for all processors (lru_add_drain_all)."""


def populate(address: int, size: int, huge: int = HUGE_PAGE_SIZE, *, collapse: bool = False) -> None:
    """Fault in a range of this process for writing (MADV_POPULATE_WRITE, Linux 5.14; mlock before that).

    Parameters
    ----------
    address, size : int
        Whole pages, in bytes.
    huge : int
        Size of the huge pages that may be used.
    collapse : bool
        Whether the memory has no huge pages unless they are requested: that of a memfd.

    Raises
    ------
    IOReturnError
        `kIOReturnNoMemory`.
    """

    def work(offset: int, length: int) -> tuple[int, int]:
        return mman.populate(address + offset, length, huge, PAGE_SIZE, collapse)

    cuts = range(0, size, _COLLAPSED) if collapse else None
    done, number = chunked.run(work, size, cuts=cuts)
    if number == errno.EINVAL:
        _by_locking(address, size)
    elif number:
        raise _no_memory(size, done, number)


def _by_locking(address: int, size: int) -> None:
    try:
        mman.lock(address, size)
        mman.unlock(address, size)
    except OSError as error:
        raise _no_memory(size, 0, error.errno or 0) from None


def _no_memory(size: int, done: int, number: int) -> NoMemoryError:
    message = f"the kernel has no memory for {format_size(size)}: only {format_size(done)} could be populated"
    return NoMemoryError(message, number)
