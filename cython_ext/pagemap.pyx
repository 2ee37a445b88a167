# cython: language_level=3, auto_pickle=False, autotestdict=False
"""The positions of pages, from /proc/PID/pagemap (proc_pid_pagemap(5)), and the properties of page frames.

This part decodes single entries and calls PAGEMAP_SCAN; the included parts collect runs, walk address spaces, and
inspect frames.
"""

cimport cython

from libc.errno cimport EBUSY, EINTR, EINVAL, ENODATA, errno
from libc.stdint cimport int32_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memset, strerror
from posix.unistd cimport getpid, usleep

from cpython.bytearray cimport PyByteArray_AsString
from mman cimport C_MADV_POPULATE_READ, c_fallocate, c_madvise
from pagemap_entry cimport (
    EXCLUSIVE_BIT, FILE_BIT, GUARD_BIT, PFN_MASK, PRESENT_BIT, SOFT_DIRTY_BIT, SWAP_BIT, iobmd_entries,
    iobmd_is_marker, iobmd_is_swapped,
)
from pagemap_scan cimport (
    C_CHECK_WPASYNC, C_PAGE_IS_ACCESSED, C_PAGE_IS_HUGE, C_PAGE_IS_PFNZERO, C_PAGE_IS_PRESENT, C_PAGE_IS_SWAPPED,
    C_PAGE_IS_WRITTEN, C_WP_MATCHING, iobmd_page_region, iobmd_scan, iobmd_wanted,
)
from uio cimport iovec, process_vm_readv

cdef enum:
    ENTRIES = 8192  # 64 KiB per read: larger reads are no faster (measured)
    REGIONS = 512  # with 4096 and more the final walk_end is stale and a resumed walk repeats pages (6.18)
    STEP = 4096  # pages per step: 16 MiB block the address space for a tenth of a millisecond
    SPARSE = 1 << 28  # bytes per step through mostly empty addresses

ABSENT = PRESENT_BIT | SWAP_BIT, 0
GUARDED = GUARD_BIT, GUARD_BIT  # Linux 6.15
PAGE_IS_ACCESSED = C_PAGE_IS_ACCESSED
PAGE_IS_WRITTEN = C_PAGE_IS_WRITTEN
PAGE_IS_PRESENT = C_PAGE_IS_PRESENT
PAGE_IS_PFNZERO = C_PAGE_IS_PFNZERO
PAGE_IS_HUGE = C_PAGE_IS_HUGE


def read_entries(int fd, uint64_t first, size_t most):
    """Read the entries of up to `most` pages, from the page number `first` on, of an open pagemap.

    Returns
    -------
    list[tuple[bool, bool, int | None, bool, bool, bool, bool]]
        For each entry: present, swapped, PFN (None: not present, or hidden by the kernel), file or shared,
        exclusively mapped, soft-dirty, guard page. Empty at the end of the address space.
    """
    cdef uint64_t few[64]
    cdef uint64_t *entries = few
    cdef uint64_t entry
    cdef ssize_t got, index
    found = []
    if most > 64:
        most = min(most, <size_t>ENTRIES)
        entries = <uint64_t *>malloc(most * sizeof(uint64_t))
        if entries == NULL:
            raise MemoryError
    try:
        with nogil:
            got = iobmd_entries(fd, first, entries, most)
        if got < 0:
            raise OSError(errno, f"read of pagemap: {strerror(errno).decode()}")
        for index in range(got):
            entry = entries[index]
            found.append((
                bool(entry & PRESENT_BIT),
                iobmd_is_swapped(entry),
                entry & PFN_MASK if entry & PRESENT_BIT and entry & PFN_MASK else None,
                bool(entry & FILE_BIT),
                bool(entry & EXCLUSIVE_BIT),
                bool(entry & SOFT_DIRTY_BIT),
                bool(entry & GUARD_BIT),
            ))
    finally:
        if entries != few:
            free(entries)
    return found


def first_entry(int fd, uint64_t first, uint64_t last, uint64_t mask, uint64_t value):
    """Return the first page number from `first` to below `last` whose entry has `value` in the bits of `mask`.

    None if there is no such page below the end of the address space. `ABSENT` and `GUARDED` are pairs of (mask,
    value). Raises OSError.
    """
    cdef uint64_t *entries = <uint64_t *>malloc(ENTRIES * sizeof(uint64_t))
    cdef ssize_t got = 0, index = 0
    cdef int error
    if entries == NULL:
        raise MemoryError
    with nogil:
        while first < last:
            got = iobmd_entries(fd, first, entries, min(last - first, <uint64_t>ENTRIES))
            index = 0
            while index < got and entries[index] & mask != value:
                index += 1
            if index < got or got < 1:
                break
            first += got
        error = errno
        free(entries)
    if got < 0:
        raise OSError(error, f"read of pagemap: {strerror(error).decode()}")
    return first + index if index < got else None


def scan(int fd, uint64_t start, uint64_t end, uint64_t required, uint64_t excluded, bint protect=False):
    """Find the ranges whose pages have every category of `required` and none of `excluded` (PAGEMAP_SCAN, Linux 6.7).
    With `protect`, writes to these pages are tracked from now on: PAGE_IS_WRITTEN shows them.

    Returns
    -------
    list[tuple[int, int]]
        Start and end addresses, ascending; ranges may be adjacent.
    """
    cdef iobmd_page_region regions[REGIONS]
    cdef iobmd_wanted wanted = _that_are(required, excluded)
    cdef uint64_t walked
    cdef int found, index
    wanted.flags = C_WP_MATCHING | C_CHECK_WPASYNC if protect else 0
    ranges = []
    while start < end:
        with nogil:
            found = iobmd_scan(fd, start, end, &wanted, regions, REGIONS, &walked)
        if found < 0:
            raise OSError(errno, f"ioctl(PAGEMAP_SCAN): {strerror(errno).decode()}")
        for index in range(found):
            ranges.append((regions[index].start, regions[index].end))
        if walked <= start:
            break
        start = walked
    return ranges


def amount(int fd, uint64_t start, uint64_t end, uint64_t required, uint64_t excluded, uint64_t limit):
    """Return how many bytes of pages `scan` would find; stop at `limit`.

    The scan blocks the address space for a tenth of a millisecond per step.
    """
    cdef iobmd_page_region regions[REGIONS]
    cdef iobmd_wanted wanted = _that_are(required, excluded)
    cdef uint64_t total = 0, stop, walked
    cdef int found = 0, index
    wanted.max_pages = STEP
    with nogil:
        while start < end and total < limit:
            stop = min(end, start + SPARSE)
            found = iobmd_scan(fd, start, stop, &wanted, regions, REGIONS, &walked)
            if found < 0:
                break
            for index in range(found):
                total += regions[index].end - regions[index].start
            start = walked if walked > start else stop
    if found < 0:
        raise OSError(errno, f"ioctl(PAGEMAP_SCAN): {strerror(errno).decode()}")
    return total


cdef iobmd_wanted _that_are(uint64_t required, uint64_t excluded) noexcept nogil:
    """Return the arguments that find the pages with every category of `required` and none of `excluded`."""
    cdef iobmd_wanted wanted
    memset(&wanted, 0, sizeof(wanted))
    wanted.inverted, wanted.mask, wanted.reported = excluded, required | excluded, required
    return wanted


include "pagemap_runs.pxi"
include "pagemap_walk.pxi"
include "pagemap_frames.pxi"
include "pagemap_census.pxi"
