# cython: language_level=3, auto_pickle=False, autotestdict=False
"""madvise, mlock and mincore on address ranges of this process."""

from libc.errno cimport errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport strerror
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize

from mman cimport (
    C_MADV_COLD, C_MADV_COLLAPSE, C_MADV_DOFORK, C_MADV_DONTFORK, C_MADV_DONTNEED, C_MADV_DONTNEED_LOCKED,
    C_MADV_FREE, C_MADV_HUGEPAGE, C_MADV_NOHUGEPAGE, C_MADV_NORMAL, C_MADV_PAGEOUT, C_MADV_POPULATE_READ,
    C_MADV_POPULATE_WRITE, C_MADV_RANDOM, MAP_FAILED, MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, c_fallocate,
    c_madvise, c_mincore, c_mlock, c_mlock2, c_mremap, c_munlock, c_prctl,
)

MADV_COLD = C_MADV_COLD
MADV_DOFORK = C_MADV_DOFORK
MADV_DONTFORK = C_MADV_DONTFORK
MADV_DONTNEED = C_MADV_DONTNEED
MADV_DONTNEED_LOCKED = C_MADV_DONTNEED_LOCKED
MADV_FREE = C_MADV_FREE
MADV_HUGEPAGE = C_MADV_HUGEPAGE
MADV_NOHUGEPAGE = C_MADV_NOHUGEPAGE
MADV_NORMAL = C_MADV_NORMAL
MADV_PAGEOUT = C_MADV_PAGEOUT
MADV_POPULATE_READ = C_MADV_POPULATE_READ
MADV_POPULATE_WRITE = C_MADV_POPULATE_WRITE
MADV_RANDOM = C_MADV_RANDOM
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


def populate(uint64_t address, size_t size, size_t huge, size_t page):
    """Fault a range in for writing, huge page by huge page of `huge` bytes, each by its last base page of `page`.

    That order lets the kernel clear a huge page upwards (see crosstask). Returns the bytes done and the error
    number that ended it, 0 for none; whatever a huge page could not be had for is faulted in too.
    """
    cdef size_t done = 0, piece
    cdef int failed = 0
    with nogil:
        while done < size:
            piece = min(size - done, huge - (address + done) % huge)
            if piece == huge:
                c_madvise(<void *><uintptr_t>(address + done + huge - page), page, C_MADV_POPULATE_WRITE)
            failed = c_madvise(<void *><uintptr_t>(address + done), piece, C_MADV_POPULATE_WRITE)
            if failed:
                failed = errno
                break
            done += piece
    return done, failed


def populate_downwards(uint64_t address, size_t size, size_t huge, size_t page):
    """As `populate`, for whole aligned huge pages, from the highest to the lowest."""
    cdef size_t left = size
    cdef int failed = 0
    with nogil:
        while left >= huge and not failed:
            left -= huge
            c_madvise(<void *><uintptr_t>(address + left + huge - page), page, C_MADV_POPULATE_WRITE)
            failed = c_madvise(<void *><uintptr_t>(address + left), huge, C_MADV_POPULATE_WRITE)
            if failed:
                failed = errno
                left += huge
    return size - left, failed


def move(uint64_t source, uint64_t destination, size_t size):
    """Move private anonymous pages to another place, over what is mapped there; `source` stays mapped, empty.

    mremap(2) with MREMAP_DONTUNMAP (Linux 5.7): the emptied range cannot be taken by another thread's mapping
    before its owner unmaps it.
    """
    cdef void *moved
    with nogil:
        moved = c_mremap(<void *><uintptr_t>source, size, size,
                         MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, <void *><uintptr_t>destination)
    _check(moved == MAP_FAILED, "mremap")


def punch(int fd, uint64_t offset, size_t size):
    """Free a piece of a memfd (fallocate(2), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)."""
    cdef int failed
    with nogil:
        failed = c_fallocate(fd, 3, offset, size)
    _check(failed, "fallocate")


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


def name(uint64_t address, size_t size, bytes text):
    """Name anonymous memory in /proc/PID/maps (prctl(2), PR_SET_VMA_ANON_NAME, Linux 5.17 where it is built in)."""
    cdef const char *raw = PyBytes_AsString(text)
    cdef int failed
    with nogil:
        failed = c_prctl(0x53564D41, <unsigned long>0, <unsigned long>address, <unsigned long>size, raw)
    _check(failed, "prctl")


def incore(uint64_t address, size_t pages, size_t page_size):
    """Call mincore(2); one byte a page, bit 0 set where the page is resident."""
    cdef bytes vector = PyBytes_FromStringAndSize(NULL, pages)
    cdef unsigned char *raw = <unsigned char *>PyBytes_AsString(vector)
    cdef int failed
    with nogil:
        failed = c_mincore(<void *><uintptr_t>address, pages * page_size, raw)
    _check(failed, "mincore")
    return vector
