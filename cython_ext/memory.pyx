# cython: language_level=3, auto_pickle=False, autotestdict=False
"""madvise, mlock and mincore on address ranges of this process."""

from libc.errno cimport errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport strerror
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize

from mman cimport (
    C_MADV_COLLAPSE, C_MADV_DONTNEED, C_MADV_HUGEPAGE, C_MADV_NOHUGEPAGE, C_MADV_PAGEOUT,
    C_MADV_POPULATE_READ, C_MADV_POPULATE_WRITE, c_madvise, c_mincore, c_mlock, c_mlock2,
    c_munlock,
)

MADV_DONTNEED = C_MADV_DONTNEED
MADV_HUGEPAGE = C_MADV_HUGEPAGE
MADV_NOHUGEPAGE = C_MADV_NOHUGEPAGE
MADV_PAGEOUT = C_MADV_PAGEOUT
MADV_POPULATE_READ = C_MADV_POPULATE_READ
MADV_POPULATE_WRITE = C_MADV_POPULATE_WRITE
MADV_COLLAPSE = C_MADV_COLLAPSE


cdef _check(int failed, str call):
    if failed:
        raise OSError(errno, f"{call}: {strerror(errno).decode()}")


def advise(uint64_t address, size_t size, int advice):
    """Call madvise(2)."""
    cdef int failed
    with nogil:
        failed = c_madvise(<void *><uintptr_t>address, size, advice)
    _check(failed, "madvise")


def lock(uint64_t address, size_t size):
    """Call mlock(2): fault the range in and keep it resident."""
    cdef int failed
    with nogil:
        failed = c_mlock(<void *><uintptr_t>address, size)
    _check(failed, "mlock")


def lock_on_fault(uint64_t address, size_t size):
    """Call mlock2(2) with MLOCK_ONFAULT: lock each page as it is first touched."""
    cdef int failed
    with nogil:
        failed = c_mlock2(<void *><uintptr_t>address, size, 1)
    _check(failed, "mlock2")


def unlock(uint64_t address, size_t size):
    """Call munlock(2)."""
    cdef int failed
    with nogil:
        failed = c_munlock(<void *><uintptr_t>address, size)
    _check(failed, "munlock")


def incore(uint64_t address, size_t pages, size_t page_size):
    """Call mincore(2); one byte a page, bit 0 set where the page is resident."""
    cdef bytes vector = PyBytes_FromStringAndSize(NULL, pages)
    cdef unsigned char *raw = <unsigned char *>PyBytes_AsString(vector)
    cdef int failed
    with nogil:
        failed = c_mincore(<void *><uintptr_t>address, pages * page_size, raw)
    _check(failed, "mincore")
    return vector
