# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Decoding of /proc/PID/pagemap entries and the PAGEMAP_SCAN ioctl (proc_pid_pagemap(5))."""

from libc.errno cimport errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcpy, memset, strerror
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer

from pagemap_entry cimport (
    EXCLUSIVE_BIT, FILE_BIT, GUARD_BIT, PFN_MASK, PRESENT_BIT, SOFT_DIRTY_BIT, iobmd_is_swapped,
)
from pagemap_scan cimport (
    C_CHECK_WPASYNC, C_PAGE_IS_HUGE, C_PAGE_IS_PFNZERO, C_PAGE_IS_PRESENT, C_PAGE_IS_SWAPPED, C_PAGE_IS_WRITTEN,
    C_WP_MATCHING, IOBMD_PAGEMAP_SCAN, ioctl, iobmd_page_region, iobmd_scan_arg,
)

cdef enum:
    REGIONS = 512  # with 4096 and more the final walk_end is stale and a resumed walk repeats pages (6.18)
    STEP = 4096  # pages
    SPARSE = 1 << 28  # bytes of which most may be empty

PAGE_IS_WRITTEN = C_PAGE_IS_WRITTEN
PAGE_IS_PRESENT = C_PAGE_IS_PRESENT
PAGE_IS_SWAPPED = C_PAGE_IS_SWAPPED
PAGE_IS_PFNZERO = C_PAGE_IS_PFNZERO
PAGE_IS_HUGE = C_PAGE_IS_HUGE


def decode(raw):
    """Decode little arrays of 64-bit entries.

    Returns
    -------
    list[tuple[bool, bool, int | None, bool, bool, bool, bool]]
        Per entry: present, swapped, PFN (None: not present, or hidden by the kernel), file or shared,
        exclusively mapped, soft-dirty, guard page.
    """
    cdef Py_buffer view
    cdef size_t index
    cdef uint64_t entry
    entries = []
    PyObject_GetBuffer(raw, &view, PyBUF_SIMPLE)
    try:
        for index in range(<size_t>view.len // 8):
            memcpy(&entry, <char *>view.buf + index * 8, 8)
            entries.append((
                bool(entry & PRESENT_BIT),
                iobmd_is_swapped(entry),
                entry & PFN_MASK if entry & PRESENT_BIT and entry & PFN_MASK else None,
                bool(entry & FILE_BIT),
                bool(entry & EXCLUSIVE_BIT),
                bool(entry & SOFT_DIRTY_BIT),
                bool(entry & GUARD_BIT),
            ))
    finally:
        PyBuffer_Release(&view)
    return entries


def tally(raw):
    """Count entries: `(present, swapped, hidden, exclusive)`; `hidden` are present without a PFN."""
    cdef Py_buffer view
    cdef size_t index, present = 0, swapped = 0, hidden = 0, exclusive = 0
    cdef uint64_t entry
    PyObject_GetBuffer(raw, &view, PyBUF_SIMPLE)
    try:
        for index in range(<size_t>view.len // 8):
            memcpy(&entry, <char *>view.buf + index * 8, 8)
            if entry & PRESENT_BIT:
                present += 1
                hidden += not entry & PFN_MASK
                exclusive += bool(entry & EXCLUSIVE_BIT)
            elif iobmd_is_swapped(entry):
                swapped += 1
    finally:
        PyBuffer_Release(&view)
    return present, swapped, hidden, exclusive


def scan(int fd, uint64_t start, uint64_t end, uint64_t required, uint64_t excluded, bint protect=False):
    """Ask PAGEMAP_SCAN (Linux 6.7) for the ranges whose pages have every category of `required` and none of
    `excluded`. With `protect` the writes to these pages are tracked from here on: PAGE_IS_WRITTEN tells of them.

    Returns
    -------
    list[tuple[int, int]]
        Start and end addresses, ascending; neighbours may touch.
    """
    cdef iobmd_page_region regions[REGIONS]
    cdef iobmd_scan_arg arg
    cdef int found, index
    ranges = []
    while start < end:
        _ask(&arg, regions, start, end, required, excluded)
        arg.flags = C_WP_MATCHING | C_CHECK_WPASYNC if protect else 0
        with nogil:
            found = ioctl(fd, IOBMD_PAGEMAP_SCAN, &arg)
        if found < 0:
            raise OSError(errno, f"ioctl(PAGEMAP_SCAN): {strerror(errno).decode()}")
        for index in range(found):
            ranges.append((regions[index].start, regions[index].end))
        if arg.walk_end <= start:
            break
        start = arg.walk_end
    return ranges


def amount(int fd, uint64_t start, uint64_t end, uint64_t required, uint64_t excluded, uint64_t limit):
    """Return how many bytes lie in such pages as `scan` finds; at `limit` it stops looking for more.

    In steps that hold up the address space for a tenth of a millisecond each.
    """
    cdef iobmd_page_region regions[REGIONS]
    cdef iobmd_scan_arg arg
    cdef uint64_t total = 0
    cdef int found = 0, index
    with nogil:
        while start < end and total < limit:
            _ask(&arg, regions, start, min(end, start + SPARSE), required, excluded)
            arg.max_pages = STEP
            found = ioctl(fd, IOBMD_PAGEMAP_SCAN, &arg)
            if found < 0:
                break
            for index in range(found):
                total += regions[index].end - regions[index].start
            start = arg.walk_end if arg.walk_end > start else arg.end
    if found < 0:
        raise OSError(errno, f"ioctl(PAGEMAP_SCAN): {strerror(errno).decode()}")
    return total


cdef void _ask(
    iobmd_scan_arg *arg, iobmd_page_region *regions, uint64_t start, uint64_t end, uint64_t required,
    uint64_t excluded,
) noexcept nogil:
    memset(arg, 0, sizeof(arg[0]))
    arg.size = sizeof(arg[0])
    arg.start, arg.end = start, end
    arg.vec, arg.vec_len = <uintptr_t>regions, REGIONS
    arg.category_inverted = excluded
    arg.category_mask = required | excluded
    arg.return_mask = required
