# cython: language_level=3, auto_pickle=False, autotestdict=False
"""mbind and move_pages: on which NUMA node memory is to lie, and where it lies."""

from libc.errno cimport errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.string cimport strerror

cdef extern from * nogil:
    """
    #include <sys/syscall.h>
    #include <unistd.h>
    #define iobmd_mbind(address, length, mode, nodes, most, flags) \\
        syscall(__NR_mbind, address, length, mode, nodes, most, flags)
    #define iobmd_where(count, pages, status) syscall(__NR_move_pages, 0, count, pages, NULL, status, 0)
    """
    long c_mbind "iobmd_mbind"(void *address, unsigned long length, int mode, const uint64_t *nodes,
                               unsigned long most, unsigned flags)
    long c_where "iobmd_where"(unsigned long count, void **pages, int *status)

cdef enum:
    MPOL_PREFERRED = 1
    WORDS = 16
    MOST_NODES = 1024  # 16 words of 64 bits
    STEP = 256


def prefer(uint64_t address, size_t size, unsigned node):
    """Have pages of a range, none of which is there yet, come from a node while it has any (mbind(2))."""
    cdef uint64_t nodes[WORDS]
    cdef long failed
    cdef size_t index
    if node >= MOST_NODES:
        raise ValueError(f"there is no node {node}")
    for index in range(WORDS):
        nodes[index] = 0
    nodes[node // 64] = <uint64_t>1 << node % 64
    with nogil:
        failed = c_mbind(<void *><uintptr_t>address, size, MPOL_PREFERRED, nodes, MOST_NODES, 0)
    if failed:
        raise OSError(errno, f"mbind: {strerror(errno).decode()}")


def elsewhere(uint64_t address, size_t pages, size_t page_size, int node):
    """Count the pages of a range that do not lie on a node, or are not there (move_pages(2))."""
    cdef void *places[STEP]
    cdef int status[STEP]
    cdef size_t done = 0, index, count, found = 0
    cdef long failed = 0
    with nogil:
        while done < pages and not failed:
            count = min(pages - done, STEP)
            for index in range(count):
                places[index] = <void *><uintptr_t>(address + (done + index) * page_size)
            failed = c_where(count, places, status)
            for index in range(count):
                found += status[index] != node
            done += count
    if failed:
        raise OSError(errno, f"move_pages: {strerror(errno).decode()}")
    return found
