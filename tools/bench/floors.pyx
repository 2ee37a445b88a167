# cython: language_level=3, auto_pickle=False, autotestdict=False
"""The floors of the benchmarks: bare system calls and memcpy, timed in C."""

from libc.errno cimport errno
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset, strerror
from cpython.bytes cimport PyBytes_AsString, PyBytes_FromStringAndSize
from posix.unistd cimport pread
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from mman cimport (
    C_MADV_FREE, C_MADV_NOHUGEPAGE, C_MADV_POPULATE_WRITE, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE,
    PROT_READ, PROT_WRITE, c_madvise, c_mincore, c_mlock, c_mlock2, c_mmap, c_munlock, c_munmap,
)
from pagemap_scan cimport (
    C_CHECK_WPASYNC, C_PAGE_IS_PFNZERO, C_PAGE_IS_PRESENT, C_WP_MATCHING, iobmd_first_lost, iobmd_page_region,
    iobmd_scan, iobmd_wanted,
)
from userfault cimport iobmd_uffd_protect
from uio cimport iovec, process_vm_readv


cdef enum:
    VECTORS = 1024  # the maximum for one call (IOV_MAX)
    FLAGS = 1 << 15  # words of kpageflags a read


cdef extern from *:
    ctypedef uint64_t volatile_uint64 "volatile uint64_t"


cdef extern from *:
    """
    #include <pthread.h>
    #include <sys/mman.h>
    #include <time.h>
    #include "userfault.h"

    struct iobmd_floor_server { int uffd; volatile int stop; char page[4096]; };

    static void *iobmd_floor_serve(void *argument)
    {
        struct iobmd_floor_server *server = argument;
        struct iobmd_uffd_msg fault;
        while (!server->stop)
            if (read(server->uffd, &fault, sizeof fault) == sizeof fault) {
                uint64_t page = fault.address & ~(uint64_t)4095;
                struct iobmd_uffd_copy copy = { page, (uintptr_t)server->page, 4096, 0, 0 };
                ioctl(server->uffd, IOBMD_UFFDIO_COPY, &copy);
            }
        return NULL;
    }

    /* Touch every `step`th byte of new memory, whose page faults a thread serves; return the seconds, or -1. */
    static double iobmd_floor_faults(size_t size, size_t step)
    {
        struct iobmd_floor_server server;
        struct timespec begin, end;
        pthread_t thread;
        int kernel;
        volatile char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return -1;
        memset(&server, 1, sizeof server);
        server.stop = 0;
        server.uffd = iobmd_uffd_open_missing((uintptr_t)memory, size, &kernel);
        if (server.uffd >= 0 && !pthread_create(&thread, NULL, iobmd_floor_serve, &server)) {
            clock_gettime(CLOCK_MONOTONIC, &begin);
            for (size_t at = 0; at < size; at += step) memory[at];
            clock_gettime(CLOCK_MONOTONIC, &end);
            server.stop = 1;
            pthread_join(thread, NULL);
        } else size = 0;
        if (server.uffd >= 0) close(server.uffd);
        munmap((void *)memory, size);
        return size ? end.tv_sec - begin.tv_sec + (end.tv_nsec - begin.tv_nsec) * 1e-9 : -1;
    }
    """
    double iobmd_floor_faults(size_t size, size_t step) nogil


cdef double _now() noexcept nogil:
    cdef timespec moment
    clock_gettime(CLOCK_MONOTONIC, &moment)
    return moment.tv_sec + moment.tv_nsec * 1e-9


cdef double _read_fresh(int pid, uint64_t source, size_t size, iovec *local, iovec *remote, size_t count,
                        bint sparse) noexcept nogil:
    cdef double begin = _now()
    cdef size_t done = 0, index, batch
    cdef ssize_t moved = 1
    cdef char *fresh = <char *>c_mmap(
        NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
    )
    if fresh == MAP_FAILED:
        return -1
    if sparse:
        c_madvise(fresh, size, C_MADV_NOHUGEPAGE)
    for index in range(count):
        local[index].iov_base = fresh + (<uint64_t><uintptr_t>remote[index].iov_base - source)
    while done < count and moved > 0:
        batch = min(count - done, VECTORS)
        moved = process_vm_readv(pid, local + done, batch, remote + done, batch, 0)
        while moved > 0 and done < count and <size_t>moved >= local[done].iov_len:
            moved -= local[done].iov_len
            done += 1
        if moved > 0:  # a call transfers less than 2 GiB
            local[done].iov_base = <char *>local[done].iov_base + moved
            remote[done].iov_base = <char *>remote[done].iov_base + moved
            local[done].iov_len -= moved
            remote[done].iov_len -= moved
        moved = 1 if moved >= 0 else -1
    c_munmap(fresh, size)
    return _now() - begin if moved > 0 else -1


def read_fresh(int pid, uint64_t source, size_t size, ranges=None):
    """Return the seconds for mmap + process_vm_readv of `size` bytes + munmap, as a program without iobmd would copy.

    With `ranges` of that memory, (start, end), only these are read, as by a program that knows their positions.
    """
    cdef double seconds
    cdef bint sparse = ranges is not None
    cdef size_t index = 0, count = 1 if ranges is None else len(ranges)
    cdef iovec *vectors = <iovec *>malloc(2 * count * sizeof(iovec))
    cdef uint64_t start, end
    if vectors == NULL:
        raise MemoryError()
    try:
        for start, end in [(source, source + size)] if ranges is None else ranges:
            vectors[count + index].iov_base = <void *><uintptr_t>start
            vectors[index].iov_len = vectors[count + index].iov_len = end - start
            index += 1
        with nogil:
            seconds = _read_fresh(pid, source, size, vectors, vectors + count, count, sparse)
    finally:
        free(vectors)
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
    """Return the seconds for mmap + mlock + munmap of `size` bytes."""
    cdef double seconds
    with nogil:
        seconds = _lock_small(size)
    if seconds < 0:
        raise OSError(errno, f"mlock: {strerror(errno).decode()}")
    return seconds


def copy(uint64_t destination, uint64_t source, size_t size):
    """Call memcpy between two addresses of this process, with the GIL released."""
    with nogil:
        memcpy(<void *><uintptr_t>destination, <void *><uintptr_t>source, size)


def clear(uint64_t address, size_t size):
    """Return the seconds that memset takes to clear memory of this process."""
    cdef double begin
    with nogil:
        begin = _now()
        memset(<void *><uintptr_t>address, 0, size)
        begin = _now() - begin
    return begin


def chase(uint64_t address, size_t steps):
    """Return the seconds per load of a chain from `address` on: each load reads the 8-byte offset of the next."""
    cdef double begin
    cdef size_t _step
    cdef uint64_t offset = 0
    with nogil:
        begin = _now()
        for _step in range(steps):
            offset = (<volatile_uint64 *><uintptr_t>(address + offset))[0]
        begin = _now() - begin
    return begin / steps


cdef int _protect(int pagemap, uint64_t start, uint64_t end) noexcept nogil:
    cdef iobmd_page_region region
    cdef iobmd_wanted wanted
    cdef uint64_t walked
    wanted.flags = C_WP_MATCHING | C_CHECK_WPASYNC
    wanted.max_pages = wanted.anyof = 0
    wanted.inverted = C_PAGE_IS_PFNZERO
    wanted.mask = C_PAGE_IS_PRESENT | C_PAGE_IS_PFNZERO
    wanted.reported = C_PAGE_IS_PRESENT
    return iobmd_scan(pagemap, start, end, &wanted, &region, 1, &walked)


def free_and_restore(int tracker, int pagemap, uint64_t address, size_t size, size_t page):
    """Return the seconds for the bare calls of a round trip of lazily freed memory that remains intact.

    The calls are MADV_FREE, mlock2 on fault, an inspection, MADV_POPULATE_WRITE and munlock. The inspection is
    mincore; with a `tracker` (not negative) it is PAGEMAP_SCAN, and the calls that begin and end write tracking are
    included. `page` is the base page size.
    """
    cdef bytes kept = PyBytes_FromStringAndSize(NULL, size // page)
    cdef unsigned char *vector = <unsigned char *>PyBytes_AsString(kept)
    cdef double begin
    cdef uint64_t where
    cdef void *start = <void *><uintptr_t>address
    cdef int failed = 0
    with nogil:
        begin = _now()
        if tracker >= 0:
            failed |= _protect(pagemap, address, address + size) != 1
        failed |= c_madvise(start, size, C_MADV_FREE)
        failed |= c_mlock2(start, size, 1)
        if tracker >= 0:
            failed |= iobmd_first_lost(pagemap, address, address + size, &where)
            failed |= iobmd_uffd_protect(tracker, address, size, 0)
        else:
            failed |= c_mincore(start, size, vector)
        failed |= c_madvise(start, size, C_MADV_POPULATE_WRITE)
        failed |= c_munlock(start, size)
        begin = _now() - begin
    if failed:
        raise OSError(errno, f"a round trip of lazily freed memory: {strerror(errno).decode()}")
    return begin


def read_pagemap(int fd, ranges, size_t page):
    """Return the seconds for reading the entries of (start, end) `ranges` of an open pagemap, 64 KiB at a time."""
    cdef uint64_t entries[8192]
    cdef uint64_t at, last
    cdef ssize_t got
    cdef double begin = _now()
    for start, end in ranges:
        at, last = start, end
        with nogil:
            while at < last:
                got = pread(fd, entries, min((last - at) // page, <uint64_t>8192) * 8, at // page * 8)
                if got <= 0:
                    break
                at += <uint64_t>got // 8 * page
    return _now() - begin


def read_flags(int fd, ranges):
    """Return the seconds for reading the flags of (first, end) frames, 256 KiB at a time, and how many are free."""
    cdef uint64_t *words = <uint64_t *>malloc(FLAGS * sizeof(uint64_t))
    cdef uint64_t at, last, free_frames = 0
    cdef ssize_t got, index
    cdef double begin = _now()
    if words == NULL:
        raise MemoryError()
    for first, end in ranges:
        at, last = first, end
        with nogil:
            while at < last:
                got = pread(fd, words, min(last - at, <uint64_t>FLAGS) * 8, at * 8) // 8
                if got <= 0:
                    break
                for index in range(got):
                    free_frames += words[index] >> 10 & 1  # KPF_BUDDY
                at += <uint64_t>got
    free(words)
    return _now() - begin, free_frames


def map_stalls(double seconds, size_t size):
    """Map and unmap `size` bytes repeatedly for `seconds`; return the duration of the longest mmap in seconds."""
    cdef double end = _now() + seconds, begin, took, worst = 0
    cdef void *mapped
    with nogil:
        while True:
            begin = _now()
            mapped = c_mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
            took = _now() - begin
            if mapped != MAP_FAILED:
                c_munmap(mapped, size)
            worst = max(worst, took)
            if begin > end:
                break
    return worst


def served_faults(size_t size, size_t step):
    """Return the seconds in which a thread serves a page fault at every `step` bytes, by a copy of a constant page.

    Raises
    ------
    OSError
        userfaultfd(2) is not permitted.
    """
    cdef double took
    with nogil:
        took = iobmd_floor_faults(size, step)
    if took < 0:
        raise OSError(errno, strerror(errno).decode())
    return took
