# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Lazily freed memory (MADV_FREE) taken back, and the tracking of writes to it (userfaultfd(2), 6.7)."""

from libc.errno cimport errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport strerror
from posix.unistd cimport close

from mman cimport C_MADV_POPULATE_WRITE, c_madvise, c_mlock2, c_munlock
from pagemap_scan cimport iobmd_first_lost
from userfault cimport iobmd_uffd_open, iobmd_uffd_protect, iobmd_uffd_register, iobmd_uffd_track

cdef extern from * nogil:
    """
    static void iobmd_rewrite(char *byte)
    {
        /* Compare and exchange, for "or 0" may be compiled to a mere load. */
        char value = __atomic_load_n(byte, __ATOMIC_RELAXED);
        while (!__atomic_compare_exchange_n(byte, &value, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            ;
    }
    """
    void iobmd_rewrite(char *byte)

# The calls of `take_back`, to tell which one failed.
cdef enum:
    C_LOCK = 1
    C_SCAN
    C_UNPROTECT
    C_POPULATE

LOCK, SCAN, UNPROTECT, POPULATE = C_LOCK, C_SCAN, C_UNPROTECT, C_POPULATE


def track():
    """Return a userfaultfd(2) that tracks writes by itself (UFFD_FEATURE_WP_ASYNC); needs no privilege."""
    cdef int fd, error
    with nogil:
        fd = iobmd_uffd_open()
        error = errno
        if fd >= 0 and iobmd_uffd_track(fd):
            error = errno
            close(fd)
            fd = -1
    if fd < 0:
        raise OSError(error, f"userfaultfd: {strerror(error).decode()}")
    return fd


def register(int fd, uint64_t address, size_t size):
    """Track writes to a range (UFFDIO_REGISTER), until it is unmapped."""
    cdef int failed
    with nogil:
        failed = iobmd_uffd_register(fd, address, size)
    if failed:
        raise OSError(errno, f"ioctl(UFFDIO_REGISTER): {strerror(errno).decode()}")


def first_lost(int pagemap, uint64_t start, uint64_t end):
    """Return the address of the first page that is not as it was when it was protected, None when all are.

    Such a page is gone, or the zero page (read after it was lost), or has been written to.
    """
    cdef uint64_t where = 0
    cdef int found
    with nogil:
        found = iobmd_first_lost(pagemap, start, end, &where)
    if found < 0:
        raise OSError(errno, f"ioctl(PAGEMAP_SCAN): {strerror(errno).decode()}")
    return where if found else None


def rewrite(uint64_t address, size_t size, size_t page):
    """Write to each page the byte it begins with, atomically, so that its page table entry is dirty."""
    cdef size_t offset = 0
    with nogil:
        while offset < size:
            iobmd_rewrite(<char *><uintptr_t>(address + offset))
            offset += page


def take_back(int tracker, int pagemap, uint64_t start, uint64_t end):
    """Make a lazily freed, protected range safe again if every page of it is still there.

    Lock on fault (mlock2: reclaim takes nothing from here on), look, lift the protection, write-populate (which
    cancels the lazy free), unlock.

    Returns
    -------
    tuple[bool, int, int]
        Whether every page was there; else the call that failed (one of `LOCK` …, 0: none) and its error number.
    """
    cdef uint64_t where
    cdef size_t size = end - start
    cdef int found = 0, step = C_LOCK, error = 0
    with nogil:
        if c_mlock2(<void *><uintptr_t>start, size, 1):
            error = errno
        else:
            step = C_SCAN
            found = iobmd_first_lost(pagemap, start, end, &where)
            if found < 0:
                error = errno
            elif found == 0:
                step = C_UNPROTECT
                # Not by the faults of the populate: that would be one for each page.
                if iobmd_uffd_protect(tracker, start, size, 0):
                    error = errno
                else:
                    step = C_POPULATE
                    if c_madvise(<void *><uintptr_t>start, size, C_MADV_POPULATE_WRITE):
                        error = errno
                        iobmd_uffd_protect(tracker, start, size, 1)  # all of it is there still: as before
            c_munlock(<void *><uintptr_t>start, size)
    if error:
        return False, step, error
    return found == 0, 0, 0
