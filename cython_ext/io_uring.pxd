# linux/io_uring.h by raw system calls: liburing is not needed for setup and buffer registration
from libc.stdint cimport uint64_t

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
    #define IOBMD_REGISTER_BUFFERS 0
    #define IOBMD_REGISTER_BUFFERS2 15
    #define IOBMD_REGISTER_BUFFERS_UPDATE 16
    #define IOBMD_RSRC_REGISTER_SPARSE 1
    /* struct io_uring_rsrc_register and struct io_uring_rsrc_update2 */
    struct iobmd_rsrc_register { uint32_t nr, flags; uint64_t resv2, data, tags; };
    struct iobmd_rsrc_update2 { uint32_t offset, resv; uint64_t data, tags; uint32_t nr, resv2; };
    static int iobmd_uring_setup(unsigned entries)
    {
        /* struct io_uring_params is 120 bytes; all zeros request the defaults */
        uint32_t params[30];
        memset(params, 0, sizeof params);
        return (int)syscall(__NR_io_uring_setup, entries, params);
    }
    static int iobmd_uring_register(int ring, uint64_t address, size_t size)
    {
        struct iovec vec = { (void *)(uintptr_t)address, size };
        return (int)syscall(__NR_io_uring_register, ring, IOBMD_REGISTER_BUFFERS, &vec, 1);
    }
    static int iobmd_uring_sparse(int ring, uint32_t slots)
    {
        struct iobmd_rsrc_register table = { slots, IOBMD_RSRC_REGISTER_SPARSE, 0, 0, 0 };
        return (int)syscall(__NR_io_uring_register, ring, IOBMD_REGISTER_BUFFERS2, &table, sizeof table);
    }
    static int iobmd_uring_update(int ring, uint32_t slot, uint64_t address, size_t size)
    {
        struct iovec vec = { (void *)(uintptr_t)address, size };
        struct iobmd_rsrc_update2 update = { slot, 0, (uintptr_t)&vec, 0, 1, 0 };
        return (int)syscall(__NR_io_uring_register, ring, IOBMD_REGISTER_BUFFERS_UPDATE, &update, sizeof update);
    }
    """
    int iobmd_uring_setup(unsigned int entries)
    int iobmd_uring_register(int ring, uint64_t address, size_t size)
    int iobmd_uring_sparse(int ring, unsigned int slots)
    int iobmd_uring_update(int ring, unsigned int slot, uint64_t address, size_t size)
