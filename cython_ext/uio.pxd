# sys/uio.h: process_vm_readv(2), and the file operations on /proc/PID/mem that replace it
cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t process_vm_readv(int pid, const iovec *local, unsigned long liovcnt,
                             const iovec *remote, unsigned long riovcnt, unsigned long flags)
    ssize_t process_vm_writev(int pid, const iovec *local, unsigned long liovcnt,
                              const iovec *remote, unsigned long riovcnt, unsigned long flags)

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *buf, size_t count, long offset)
    ssize_t pwrite(int fd, const void *buf, size_t count, long offset)

cdef extern from * nogil:
    """
    #include <unistd.h>
    #include <sys/syscall.h>
    #ifndef SYS_pidfd_getfd
    #define SYS_pidfd_getfd 438
    #endif
    #ifndef SYS_process_madvise
    #define SYS_process_madvise 440
    #endif
    """
    enum:
        SYS_pidfd_getfd
        SYS_process_madvise
        SYS_process_vm_writev
    long syscall(long number, ...)

cdef extern from "<fcntl.h>" nogil:
    enum:
        O_CLOEXEC
    int c_open "open"(const char *path, int flags, ...)
