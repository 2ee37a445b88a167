# The 64-bit entries of /proc/PID/pagemap (proc_pid_pagemap(5))
from libc.stdint cimport uint64_t

cdef extern from * nogil:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <unistd.h>
    #define IOBMD_PFN_MASK ((1ULL << 55) - 1)
    #define IOBMD_SOFT_DIRTY (1ULL << 55)
    #define IOBMD_EXCLUSIVE (1ULL << 56)
    #define IOBMD_UFFD_WP (1ULL << 57)
    #define IOBMD_GUARD (1ULL << 58)
    #define IOBMD_FILE (1ULL << 61)
    #define IOBMD_SWAP (1ULL << 62)
    #define IOBMD_PRESENT (1ULL << 63)
    /*
     * Guard pages (6.15) and other markers have the swap bit set, because they use the swap format. The type of a
     * marker is above those of swap files (MAX_SWAPFILES is 23 to 30), and is hidden together with frame numbers.
     */
    static inline int iobmd_is_marker(uint64_t entry)
    {
        return (entry & IOBMD_SWAP) && (entry & 31) >= 20;
    }
    static inline int iobmd_is_swapped(uint64_t entry)
    {
        return (entry & (IOBMD_PRESENT | IOBMD_SWAP | IOBMD_GUARD)) == IOBMD_SWAP && !iobmd_is_marker(entry);
    }
    /* Read the entries of `many` pages, from the page number `first` on; return their number, -1 on an error. */
    static inline ssize_t iobmd_entries(int pagemap, uint64_t first, uint64_t *entries, uint64_t many)
    {
        ssize_t got;
        do
            got = pread(pagemap, entries, many * sizeof *entries, first * sizeof *entries);
        while (got < 0 && errno == EINTR);
        return got < 0 ? -1 : got / (ssize_t)sizeof *entries;
    }
    """
    const uint64_t PFN_MASK "IOBMD_PFN_MASK"
    const uint64_t SOFT_DIRTY_BIT "IOBMD_SOFT_DIRTY"
    const uint64_t EXCLUSIVE_BIT "IOBMD_EXCLUSIVE"
    const uint64_t UFFD_WP_BIT "IOBMD_UFFD_WP"
    const uint64_t GUARD_BIT "IOBMD_GUARD"
    const uint64_t FILE_BIT "IOBMD_FILE"
    const uint64_t SWAP_BIT "IOBMD_SWAP"
    const uint64_t PRESENT_BIT "IOBMD_PRESENT"
    bint iobmd_is_marker(uint64_t entry)
    bint iobmd_is_swapped(uint64_t entry)
    ssize_t iobmd_entries(int pagemap, uint64_t first, uint64_t *entries, uint64_t many)
