# linux/fs.h since 6.7: ioctl(PAGEMAP_SCAN) on /proc/PID/pagemap; declared here for older headers
from libc.stdint cimport uint64_t

cdef extern from * nogil:
    """
    #include <sys/ioctl.h>
    #include <stdint.h>
    struct iobmd_page_region { uint64_t start, end, categories; };
    struct iobmd_scan_arg {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
    };
    #define IOBMD_PAGEMAP_SCAN _IOWR('f', 16, struct iobmd_scan_arg)
    """
    struct iobmd_page_region:
        uint64_t start, end, categories
    struct iobmd_scan_arg:
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask
    unsigned long IOBMD_PAGEMAP_SCAN

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, void *arg)
