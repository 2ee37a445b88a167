/* The parts of linux/userfaultfd.h that iobmd needs, declared here for older headers: asynchronous tracking of writes
   (6.7) and accesses (7.3), and the delivery of missing pages (4.3; UFFDIO_POISON 6.6, UFFDIO_MOVE 6.8). */
#ifndef IOBMD_USERFAULT_H
#define IOBMD_USERFAULT_H
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

struct iobmd_uffd_api { uint64_t api, features, ioctls; };
struct iobmd_uffd_range { uint64_t start, len; };
struct iobmd_uffd_register { uint64_t start, len, mode, ioctls; };
struct iobmd_uffd_writeprotect { uint64_t start, len, mode; };
struct iobmd_uffd_copy { uint64_t dst, src, len, mode; int64_t copy; };
struct iobmd_uffd_zeropage { uint64_t start, len, mode; int64_t zeropage; };
struct iobmd_uffd_poison { uint64_t start, len, mode; int64_t updated; };
struct iobmd_uffd_move { uint64_t dst, src, len, mode; int64_t move; };
struct iobmd_uffd_msg {
    uint8_t event, unused[7];
    uint64_t flags, address, thread;
};

#define IOBMD_UFFD_USER_MODE_ONLY 1
#define IOBMD_UFFD_API 0xAA
#define IOBMD_UFFD_WP_ASYNC (1 << 15)
#define IOBMD_UFFD_RWP (1 << 17)
#define IOBMD_UFFD_RWP_ASYNC (1 << 18)
#define IOBMD_UFFD_REGISTER_MISSING 1
#define IOBMD_UFFD_REGISTER_WP 2
#define IOBMD_UFFD_REGISTER_RWP 8
#define IOBMD_UFFD_EVENT_PAGEFAULT 0x12
#define IOBMD_UFFD_IOC_NEW _IO(0xAA, 0x00)
#define IOBMD_UFFDIO_API _IOWR(0xAA, 0x3F, struct iobmd_uffd_api)
#define IOBMD_UFFDIO_REGISTER _IOWR(0xAA, 0x00, struct iobmd_uffd_register)
#define IOBMD_UFFDIO_UNREGISTER _IOR(0xAA, 0x01, struct iobmd_uffd_range)
#define IOBMD_UFFDIO_WAKE _IOR(0xAA, 0x02, struct iobmd_uffd_range)
#define IOBMD_UFFDIO_COPY _IOWR(0xAA, 0x03, struct iobmd_uffd_copy)
#define IOBMD_UFFDIO_ZEROPAGE _IOWR(0xAA, 0x04, struct iobmd_uffd_zeropage)
#define IOBMD_UFFDIO_MOVE _IOWR(0xAA, 0x05, struct iobmd_uffd_move)
#define IOBMD_UFFDIO_WRITEPROTECT _IOWR(0xAA, 0x06, struct iobmd_uffd_writeprotect)
#define IOBMD_UFFDIO_RWPROTECT _IOWR(0xAA, 0x09, struct iobmd_uffd_writeprotect)
#define IOBMD_UFFDIO_POISON _IOWR(0xAA, 0x08, struct iobmd_uffd_poison)

static inline int iobmd_uffd_open(void)
{
    return (int)syscall(__NR_userfaultfd, O_CLOEXEC | IOBMD_UFFD_USER_MODE_ONLY);
}

static inline int iobmd_uffd_track(int fd, int accesses)
{
    const uint64_t features = accesses ? IOBMD_UFFD_RWP | IOBMD_UFFD_RWP_ASYNC : IOBMD_UFFD_WP_ASYNC;
    struct iobmd_uffd_api api = { IOBMD_UFFD_API, features, 0 };
    return ioctl(fd, IOBMD_UFFDIO_API, &api);
}

static inline int iobmd_uffd_register_mode(int fd, uint64_t start, uint64_t len, uint64_t mode)
{
    struct iobmd_uffd_register range = { start, len, mode, 0 };
    return ioctl(fd, IOBMD_UFFDIO_REGISTER, &range);
}

static inline int iobmd_uffd_register(int fd, uint64_t start, uint64_t len, int accesses)
{
    return iobmd_uffd_register_mode(fd, start, len, accesses ? IOBMD_UFFD_REGISTER_RWP : IOBMD_UFFD_REGISTER_WP);
}

static inline int iobmd_uffd_hide(int fd, uint64_t start, uint64_t len)
{
    struct iobmd_uffd_writeprotect range = { start, len, 1 };
    return ioctl(fd, IOBMD_UFFDIO_RWPROTECT, &range);
}

static inline int iobmd_uffd_unregister(int fd, uint64_t start, uint64_t len)
{
    struct iobmd_uffd_range range = { start, len };
    return ioctl(fd, IOBMD_UFFDIO_UNREGISTER, &range);
}

static inline int iobmd_uffd_wake(int fd, uint64_t start, uint64_t len)
{
    struct iobmd_uffd_range range = { start, len };
    return ioctl(fd, IOBMD_UFFDIO_WAKE, &range);
}

static inline int iobmd_uffd_protect(int fd, uint64_t start, uint64_t len, int protect)
{
    struct iobmd_uffd_writeprotect range = { start, len, (uint64_t)protect };
    return ioctl(fd, IOBMD_UFFDIO_WRITEPROTECT, &range);
}

/* Return a descriptor that reports faults at missing pages of a range, or -1; `kernel`: whether also those of system
   calls. That requires CAP_SYS_PTRACE, vm.unprivileged_userfaultfd, or access to /dev/userfaultfd (6.1). Without these,
   faults of system calls fail (UFFD_USER_MODE_ONLY, 5.11). */
static inline int iobmd_uffd_open_missing(uint64_t start, uint64_t len, int *kernel)
{
    struct iobmd_uffd_api api = { IOBMD_UFFD_API, 0, 0 };
    int device, fd = (int)syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 && errno == EPERM && (device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC)) >= 0) {
        fd = ioctl(device, IOBMD_UFFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
    }
    *kernel = fd >= 0;
    if (fd < 0) fd = (int)syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK | IOBMD_UFFD_USER_MODE_ONLY);
    if (fd < 0) return -1;
    if (!ioctl(fd, IOBMD_UFFDIO_API, &api) &&
        !iobmd_uffd_register_mode(fd, start, len, IOBMD_UFFD_REGISTER_MISSING))
        return fd;
    close(fd);
    return -1;
}

#endif
