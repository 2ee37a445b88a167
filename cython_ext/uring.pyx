# cython: language_level=3, auto_pickle=False, autotestdict=False
"""io_uring registered buffers: the one long-term page pin that userspace can take without a device."""

from libc.errno cimport errno
from libc.stdint cimport uint64_t
from libc.string cimport strerror

from io_uring cimport iobmd_uring_register, iobmd_uring_setup


def setup(unsigned int entries):
    """Call io_uring_setup(2); returns the ring's descriptor (close-on-exec, as the kernel makes it)."""
    cdef int ring
    with nogil:
        ring = iobmd_uring_setup(entries)
    if ring < 0:
        raise OSError(errno, f"io_uring_setup: {strerror(errno).decode()}")
    return ring


def register_buffer(int ring, uint64_t address, size_t size):
    """Pin one range with io_uring_register(2), IORING_REGISTER_BUFFERS; closing the ring unpins it."""
    cdef int failed
    with nogil:
        failed = iobmd_uring_register(ring, address, size)
    if failed < 0:
        raise OSError(errno, f"io_uring_register: {strerror(errno).decode()}")
