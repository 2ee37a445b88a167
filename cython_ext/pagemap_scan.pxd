# linux/fs.h since 6.7: ioctl(PAGEMAP_SCAN) on /proc/PID/pagemap; declared here for older headers
from libc.stdint cimport uint64_t

cdef extern from * nogil:
    """
    #include <stdint.h>
    #include <sys/ioctl.h>
    struct iobmd_page_region { uint64_t start, end, categories; };
    struct iobmd_scan_arg {
        uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
        uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
    };
    #define IOBMD_PAGEMAP_SCAN _IOWR('f', 16, struct iobmd_scan_arg)
    enum {
        IOBMD_PAGE_IS_WRITTEN = 1 << 1, IOBMD_PAGE_IS_FILE = 1 << 2, IOBMD_PAGE_IS_PRESENT = 1 << 3,
        IOBMD_PAGE_IS_SWAPPED = 1 << 4, IOBMD_PAGE_IS_PFNZERO = 1 << 5, IOBMD_PAGE_IS_HUGE = 1 << 6,
        IOBMD_PAGE_IS_ACCESSED = 1 << 9,
    };
    enum { IOBMD_PM_SCAN_WP_MATCHING = 1 << 0, IOBMD_PM_SCAN_CHECK_WPASYNC = 1 << 1 };
    /* The pages that a scan finds, its actions on them, and the reported categories: fields of struct pm_scan_arg. */
    struct iobmd_wanted { uint64_t flags, max_pages, inverted, mask, anyof, reported; };
    /*
     * Call PAGEMAP_SCAN for `start` to `end`. Return the number of regions found, at most `room`, and in `walked` the
     * address at which the walk stopped; -1 on an error.
     */
    static inline int iobmd_scan(int pagemap, uint64_t start, uint64_t end, const struct iobmd_wanted *wanted,
                                 struct iobmd_page_region *found, uint64_t room, uint64_t *walked)
    {
        struct iobmd_scan_arg arg = {
            .size = sizeof arg, .flags = wanted->flags, .start = start, .end = end, .vec = (uintptr_t)found,
            .vec_len = room, .max_pages = wanted->max_pages, .category_inverted = wanted->inverted,
            .category_mask = wanted->mask, .category_anyof_mask = wanted->anyof, .return_mask = wanted->reported,
        };
        int many = ioctl(pagemap, IOBMD_PAGEMAP_SCAN, &arg);
        *walked = arg.walk_end;
        return many;
    }
    /*
     * Find the first page that no longer exists, is the zero page, or was written to since it was protected; return 0
     * if there is no such page. A page that is in swap or migrating, and was not written to, still exists.
     */
    static inline int iobmd_first_lost(int pagemap, uint64_t start, uint64_t end, uint64_t *where)
    {
        const uint64_t lost = IOBMD_PAGE_IS_PRESENT | IOBMD_PAGE_IS_PFNZERO | IOBMD_PAGE_IS_WRITTEN;
        const struct iobmd_wanted wanted = {
            .max_pages = 1, .inverted = IOBMD_PAGE_IS_PRESENT, .anyof = lost,
            .reported = lost | IOBMD_PAGE_IS_SWAPPED,
        };
        while (start < end) {
            struct iobmd_page_region region = { 0, 0, 0 };
            uint64_t walked;
            int found = iobmd_scan(pagemap, start, end, &wanted, &region, 1, &walked);
            if (found <= 0)
                return found;
            if ((region.categories & (IOBMD_PAGE_IS_SWAPPED | IOBMD_PAGE_IS_WRITTEN)) != IOBMD_PAGE_IS_SWAPPED) {
                *where = region.start;
                return 1;
            }
            start = region.end;
        }
        return 0;
    }
    """
    struct iobmd_page_region:
        uint64_t start, end, categories
    struct iobmd_wanted:
        uint64_t flags, max_pages, inverted, mask, anyof, reported
    enum:
        C_PAGE_IS_WRITTEN "IOBMD_PAGE_IS_WRITTEN"
        C_PAGE_IS_FILE "IOBMD_PAGE_IS_FILE"
        C_PAGE_IS_PRESENT "IOBMD_PAGE_IS_PRESENT"
        C_PAGE_IS_SWAPPED "IOBMD_PAGE_IS_SWAPPED"
        C_PAGE_IS_PFNZERO "IOBMD_PAGE_IS_PFNZERO"
        C_WP_MATCHING "IOBMD_PM_SCAN_WP_MATCHING"
        C_CHECK_WPASYNC "IOBMD_PM_SCAN_CHECK_WPASYNC"
        C_PAGE_IS_HUGE "IOBMD_PAGE_IS_HUGE"
        C_PAGE_IS_ACCESSED "IOBMD_PAGE_IS_ACCESSED"
    int iobmd_scan(int pagemap, uint64_t start, uint64_t end, const iobmd_wanted *wanted, iobmd_page_region *found,
                   uint64_t room, uint64_t *walked)
    int iobmd_first_lost(int pagemap, uint64_t start, uint64_t end, uint64_t *where)
