# The part of linux/userfaultfd.h that asynchronous tracking of writes (6.7) and accesses (7.3) needs; declared here
# for older headers
from libc.stdint cimport uint64_t

cdef extern from * nogil:
    """
    #include <fcntl.h>
    #include <stdint.h>
    #include <sys/ioctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    struct iobmd_uffd_api { uint64_t api, features, ioctls; };
    struct iobmd_uffd_register { uint64_t start, len, mode, ioctls; };
    struct iobmd_uffd_writeprotect { uint64_t start, len, mode; };
    #define IOBMD_UFFD_USER_MODE_ONLY 1
    #define IOBMD_UFFD_API 0xAA
    #define IOBMD_UFFD_WP_ASYNC (1 << 15)
    #define IOBMD_UFFD_RWP (1 << 17)
    #define IOBMD_UFFD_RWP_ASYNC (1 << 18)
    #define IOBMD_UFFD_REGISTER_WP 2
    #define IOBMD_UFFD_REGISTER_RWP 8
    #define IOBMD_UFFDIO_API _IOWR(0xAA, 0x3F, struct iobmd_uffd_api)
    #define IOBMD_UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct iobmd_uffd_register)
    #define IOBMD_UFFDIO_WRITEPROTECT _IOWR(0xAA, 0x06, struct iobmd_uffd_writeprotect)
    #define IOBMD_UFFDIO_RWPROTECT _IOWR(0xAA, 0x09, struct iobmd_uffd_writeprotect)
    static int iobmd_uffd_open(void)
    {
        return (int)syscall(__NR_userfaultfd, O_CLOEXEC | IOBMD_UFFD_USER_MODE_ONLY);
    }
    static int iobmd_uffd_track(int fd, int accesses)
    {
        const uint64_t features = accesses ? IOBMD_UFFD_RWP | IOBMD_UFFD_RWP_ASYNC : IOBMD_UFFD_WP_ASYNC;
        struct iobmd_uffd_api api = { IOBMD_UFFD_API, features, 0 };
        return ioctl(fd, IOBMD_UFFDIO_API, &api);
    }
    static int iobmd_uffd_register(int fd, uint64_t start, uint64_t len, int accesses)
    {
        const uint64_t mode = accesses ? IOBMD_UFFD_REGISTER_RWP : IOBMD_UFFD_REGISTER_WP;
        struct iobmd_uffd_register range = { start, len, mode, 0 };
        return ioctl(fd, IOBMD_UFFDIO_REGISTER, &range);
    }
    static int iobmd_uffd_hide(int fd, uint64_t start, uint64_t len)
    {
        struct iobmd_uffd_writeprotect range = { start, len, 1 };
        return ioctl(fd, IOBMD_UFFDIO_RWPROTECT, &range);
    }
    static int iobmd_uffd_protect(int fd, uint64_t start, uint64_t len, int protect)
    {
        struct iobmd_uffd_writeprotect range = { start, len, protect };
        return ioctl(fd, IOBMD_UFFDIO_WRITEPROTECT, &range);
    }
    """
    int iobmd_uffd_open()
    int iobmd_uffd_track(int fd, int accesses)
    int iobmd_uffd_register(int fd, uint64_t start, uint64_t len, int accesses)
    int iobmd_uffd_hide(int fd, uint64_t start, uint64_t len)
    int iobmd_uffd_protect(int fd, uint64_t start, uint64_t len, int protect)
