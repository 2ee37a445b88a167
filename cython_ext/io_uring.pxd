# linux/io_uring.h by raw system calls: liburing is not needed for setup and buffer registration
from libc.stdint cimport uint32_t, uint64_t

cdef extern from * nogil:
    """
    #include <string.h>
    #include <stdint.h>
    #include <unistd.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #ifndef __NR_io_uring_setup
    #define __NR_io_uring_setup 425
    #endif
    #ifndef __NR_io_uring_register
    #define __NR_io_uring_register 427
    #endif
    /* struct io_uring_params is 120 bytes; all zero but the flags at offset 8 asks for the defaults. */
    static int iobmd_uring_setup(unsigned entries)
    {
        uint32_t params[30];
        memset(params, 0, sizeof params);
        return (int)syscall(__NR_io_uring_setup, entries, params);
    }
    /* IORING_REGISTER_BUFFERS = 0 with one iovec: a long-term pin of its pages. */
    static int iobmd_uring_register(int ring, uint64_t address, size_t size)
    {
        struct iovec vec = { (void *)(uintptr_t)address, size };
        return (int)syscall(__NR_io_uring_register, ring, 0, &vec, 1);
    }
    """
    int iobmd_uring_setup(unsigned int entries)
    int iobmd_uring_register(int ring, uint64_t address, size_t size)
