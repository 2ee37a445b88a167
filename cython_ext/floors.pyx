# cython: language_level=3, auto_pickle=False, autotestdict=False
"""What the benchmarks compare with: bare system calls and memcpy, timed in C."""

from libc.errno cimport errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport memcpy, strerror
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, c_mlock, c_mmap, c_munmap
from uio cimport iovec, process_vm_readv


cdef double _now() noexcept nogil:
    cdef timespec moment
    clock_gettime(CLOCK_MONOTONIC, &moment)
    return moment.tv_sec + moment.tv_nsec * 1e-9


cdef double _read_fresh(int pid, uint64_t source, size_t size) noexcept nogil:
    cdef double begin = _now()
    cdef size_t done = 0
    cdef ssize_t moved
    cdef iovec local, remote
    cdef void *fresh = c_mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if fresh == MAP_FAILED:
        return -1
    while done < size:
        local.iov_base = <char *>fresh + done
        remote.iov_base = <void *><uintptr_t>(source + done)
        local.iov_len = remote.iov_len = size - done
        moved = process_vm_readv(pid, &local, 1, &remote, 1, 0)
        if moved <= 0:
            c_munmap(fresh, size)
            return -1
        done += moved
    c_munmap(fresh, size)
    return _now() - begin


def read_fresh(int pid, uint64_t source, size_t size):
    """Seconds for mmap + process_vm_readv of `size` bytes + munmap, what people write by hand."""
    cdef double seconds
    with nogil:
        seconds = _read_fresh(pid, source, size)
    if seconds < 0:
        raise OSError(errno, f"process_vm_readv: {strerror(errno).decode()}")
    return seconds


cdef double _lock_small(size_t size) noexcept nogil:
    cdef double begin = _now()
    cdef void *fresh = c_mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if fresh == MAP_FAILED or c_mlock(fresh, size):
        return -1
    c_munmap(fresh, size)
    return _now() - begin


def map_and_lock(size_t size):
    """Seconds for mmap + mlock + munmap of `size` bytes."""
    cdef double seconds
    with nogil:
        seconds = _lock_small(size)
    if seconds < 0:
        raise OSError(errno, f"mlock: {strerror(errno).decode()}")
    return seconds


def copy(uint64_t destination, uint64_t source, size_t size):
    """memcpy between two addresses of this process, with the GIL released."""
    with nogil:
        memcpy(<void *><uintptr_t>destination, <void *><uintptr_t>source, size)
