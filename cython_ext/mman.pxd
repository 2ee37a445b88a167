# sys/mman.h: mmap(2), mlock(2), madvise(2), mincore(2)
from libc.stdint cimport uintptr_t

cdef extern from "<sys/mman.h>" nogil:
    void *c_mmap "mmap"(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int c_munmap "munmap"(void *addr, size_t length)
    int c_mprotect "mprotect"(void *addr, size_t length, int prot)
    int c_madvise "madvise"(void *addr, size_t length, int advice)
    void *c_mremap "mremap"(void *old, size_t old_size, size_t new_size, int flags, void *new)
    int c_mincore "mincore"(void *addr, size_t length, unsigned char *vec)
    void *MAP_FAILED
    enum:
        PROT_READ
        PROT_WRITE
        MAP_PRIVATE
        MAP_ANONYMOUS
        MAP_NORESERVE
        MAP_SHARED
        MAP_FIXED
        PROT_NONE
        MREMAP_MAYMOVE
        MREMAP_FIXED

cdef extern from "<sys/prctl.h>" nogil:
    int c_prctl "prctl"(int operation, ...)

cdef extern from "<fcntl.h>" nogil:
    int c_fallocate "fallocate"(int fd, int mode, long offset, long length)
    int c_fcntl "fcntl"(int fd, int operation)

cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    #ifdef __SANITIZE_ADDRESS__  /* its mlock and munlock do nothing */
    #define iobmd_mlock(address, length) ((int)syscall(__NR_mlock, address, length))
    #define iobmd_munlock(address, length) ((int)syscall(__NR_munlock, address, length))
    #else
    #define iobmd_mlock mlock
    #define iobmd_munlock munlock
    #endif
    #define iobmd_mlock2(address, length, flags) ((int)syscall(__NR_mlock2, address, length, flags))
    /* linux/mman.h since 4.5, 4.14, 4.17, 5.4, 5.14 and 5.18: libc headers may be older than the running kernel. */
    #ifndef MAP_FIXED_NOREPLACE
    #define MAP_FIXED_NOREPLACE 0x100000
    #endif
    #ifndef MREMAP_DONTUNMAP
    #define MREMAP_DONTUNMAP 4
    #endif
    #ifndef F_GET_SEALS
    #define F_GET_SEALS 1034
    #define F_SEAL_SHRINK 2
    #endif
    #ifndef MADV_FREE
    #define MADV_FREE 8
    #endif
    #ifndef MADV_WIPEONFORK
    #define MADV_WIPEONFORK 18
    #endif
    #ifndef MADV_KEEPONFORK
    #define MADV_KEEPONFORK 19
    #endif
    #ifndef MADV_COLD
    #define MADV_COLD 20
    #endif
    #ifndef MADV_PAGEOUT
    #define MADV_PAGEOUT 21
    #endif
    #ifndef MADV_POPULATE_READ
    #define MADV_POPULATE_READ 22
    #endif
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23
    #endif
    #ifndef MADV_DONTNEED_LOCKED
    #define MADV_DONTNEED_LOCKED 24
    #endif
    #ifndef MADV_COLLAPSE
    #define MADV_COLLAPSE 25
    #endif
    /*
     * Fault in a huge page by its last base page. The kernel clears a huge page so that the touched end comes last,
     * and clearing upwards is a third faster than downwards (measured, Linux 6.18). If that fails (before 5.14, or if
     * no huge page is free), the caller faults the pages in afterwards.
     */
    static inline void iobmd_fault_in_huge(uintptr_t start, size_t huge, size_t page)
    {
        madvise((void *)(start + huge - page), page, MADV_POPULATE_WRITE);
    }
    """
    void iobmd_fault_in_huge(uintptr_t start, size_t huge, size_t page)
    int c_msync "msync"(void *addr, size_t length, int flags)
    int c_mlock "iobmd_mlock"(const void *addr, size_t length)
    int c_munlock "iobmd_munlock"(const void *addr, size_t length)
    int c_mlock2 "iobmd_mlock2"(const void *addr, size_t length, unsigned int flags)
    enum:
        MAP_FIXED_NOREPLACE
        MREMAP_DONTUNMAP
        C_F_GET_SEALS "F_GET_SEALS"
        C_F_SEAL_SHRINK "F_SEAL_SHRINK"
        C_MS_ASYNC "MS_ASYNC"
        C_MADV_FREE "MADV_FREE"
        C_MADV_COLD "MADV_COLD"
        C_MADV_DODUMP "MADV_DODUMP"
        C_MADV_DOFORK "MADV_DOFORK"
        C_MADV_DONTDUMP "MADV_DONTDUMP"
        C_MADV_DONTFORK "MADV_DONTFORK"
        C_MADV_HUGEPAGE "MADV_HUGEPAGE"
        C_MADV_KEEPONFORK "MADV_KEEPONFORK"
        C_MADV_NOHUGEPAGE "MADV_NOHUGEPAGE"
        C_MADV_DONTNEED "MADV_DONTNEED"
        C_MADV_PAGEOUT "MADV_PAGEOUT"
        C_MADV_DONTNEED_LOCKED "MADV_DONTNEED_LOCKED"
        C_MADV_NORMAL "MADV_NORMAL"
        C_MADV_RANDOM "MADV_RANDOM"
        C_MADV_WIPEONFORK "MADV_WIPEONFORK"
        C_MADV_POPULATE_READ "MADV_POPULATE_READ"
        C_MADV_POPULATE_WRITE "MADV_POPULATE_WRITE"
        C_MADV_COLLAPSE "MADV_COLLAPSE"
