# linux/fs.h since 6.11: ioctl(PROCMAP_QUERY) on /proc/PID/maps; declared here for older headers
from libc.stdint cimport uint32_t, uint64_t

cdef extern from * nogil:
    """
    #include <sys/ioctl.h>
    #include <stdint.h>
    struct iobmd_procmap_query {
        uint64_t size, query_flags, query_addr;
        uint64_t vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
        uint32_t dev_major, dev_minor, vma_name_size, build_id_size;
        uint64_t vma_name_addr, build_id_addr;
    };
    #define IOBMD_PROCMAP_QUERY _IOWR('f', 17, struct iobmd_procmap_query)
    enum {
        IOBMD_VMA_READABLE = 1 << 0, IOBMD_VMA_WRITABLE = 1 << 1, IOBMD_VMA_EXECUTABLE = 1 << 2,
        IOBMD_VMA_SHARED = 1 << 3, IOBMD_COVERING_OR_NEXT_VMA = 1 << 4,
    };
    """
    struct iobmd_procmap_query:
        uint64_t size, query_flags, query_addr
        uint64_t vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode
        uint32_t dev_major, dev_minor, vma_name_size, build_id_size
        uint64_t vma_name_addr, build_id_addr
    unsigned long IOBMD_PROCMAP_QUERY
    enum:
        C_VMA_READABLE "IOBMD_VMA_READABLE"
        C_VMA_WRITABLE "IOBMD_VMA_WRITABLE"
        C_VMA_EXECUTABLE "IOBMD_VMA_EXECUTABLE"
        C_VMA_SHARED "IOBMD_VMA_SHARED"
        C_COVERING_OR_NEXT_VMA "IOBMD_COVERING_OR_NEXT_VMA"

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, void *arg)
