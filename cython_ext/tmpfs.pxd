# linux/mount.h by raw system calls: the C library (glibc) provides them only since 2.36
cdef extern from * nogil:
    """
    #include <unistd.h>
    #include <sys/syscall.h>
    #ifndef SYS_fsopen
    #define SYS_fsopen 430
    #define SYS_fsconfig 431
    #define SYS_fsmount 432
    #endif
    #define IOBMD_FSCONFIG_SET_STRING 1
    #define IOBMD_FSCONFIG_CMD_CREATE 6
    /* FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC are 1 */
    static int iobmd_fsopen(const char *type) { return (int)syscall(SYS_fsopen, type, 1); }
    static int iobmd_fsconfig(int fd, unsigned command, const char *key, const char *value)
    {
        return (int)syscall(SYS_fsconfig, fd, command, key, value, 0);
    }
    static int iobmd_fsmount(int fd) { return (int)syscall(SYS_fsmount, fd, 1, 0); }
    """
    enum:
        FSCONFIG_SET_STRING "IOBMD_FSCONFIG_SET_STRING"
        FSCONFIG_CMD_CREATE "IOBMD_FSCONFIG_CMD_CREATE"
    int iobmd_fsopen(const char *type)
    int iobmd_fsconfig(int fd, unsigned command, const char *key, const char *value)
    int iobmd_fsmount(int fd)

cdef extern from "<sys/vfs.h>" nogil:
    ctypedef struct statfs_t "struct statfs":
        long f_type
        long f_bsize
    int fstatfs(int fd, statfs_t *status)

cdef extern from "<linux/magic.h>" nogil:
    enum:
        TMPFS_MAGIC
        HUGETLBFS_MAGIC
