# cython: language_level=3, auto_pickle=False, autotestdict=False
"""io_uring registered buffers: the one long-term page pin that userspace can take without a device."""

from libc.errno cimport errno
from libc.stdint cimport uint64_t
from libc.string cimport strerror

from io_uring cimport (
    iobmd_uring_register, iobmd_uring_setup, iobmd_uring_sparse, iobmd_uring_update,
)


cdef int _check(int result, str call) except -1:
    if result < 0:
        raise OSError(errno, f"{call}: {strerror(errno).decode()}")
    return result


def setup(unsigned int entries):
    """Call io_uring_setup(2); returns the ring's descriptor (close-on-exec, as the kernel makes it)."""
    cdef int ring
    with nogil:
        ring = iobmd_uring_setup(entries)
    return _check(ring, "io_uring_setup")


def register_buffer(int ring, uint64_t address, size_t size):
    """Pin one range with io_uring_register(2), IORING_REGISTER_BUFFERS; closing the ring unpins it."""
    cdef int result
    with nogil:
        result = iobmd_uring_register(ring, address, size)
    _check(result, "io_uring_register")


def register_sparse(int ring, unsigned int slots):
    """Give the ring a table of empty slots (IORING_RSRC_REGISTER_SPARSE, Linux 5.19)."""
    cdef int result
    with nogil:
        result = iobmd_uring_sparse(ring, slots)
    _check(result, "io_uring_register")


def update(int ring, unsigned int slot, uint64_t address, size_t size):
    """Pin a range into a slot of the ring's table; address and size 0 empty the slot and unpin what it held."""
    cdef int result
    with nogil:
        result = iobmd_uring_update(ring, slot, address, size)
    _check(result, "io_uring_register")
