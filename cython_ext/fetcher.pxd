# A thread that fetches the contents of a lazy copy
from libc.stdint cimport int64_t, uint64_t, uintptr_t

cdef extern from "fetcher.h" nogil:
    enum: IOBMD_BEGINNING
    enum: IOBMD_FETCHING
    enum: IOBMD_COMPLETE
    enum: IOBMD_LOST
    enum: IOBMD_REFUSED
    enum: IOBMD_STOPPED
    struct iobmd_fetcher:
        char *destination
        size_t page
        size_t pages
        uintptr_t source
        int snapshot
        char *directory
        const uint64_t *samples
        size_t samples_count
        int moves
        int state
        int error
        int stop
        int is_lazy
        int serves_kernel
        int64_t snapshot_ns
        int tid
        size_t done_pages
        size_t lost_pages
    iobmd_fetcher *iobmd_fetcher_new(size_t size, size_t page)
    int iobmd_fetcher_start(iobmd_fetcher *fetcher)
    int iobmd_fetcher_wait(iobmd_fetcher *fetcher, int before, int milliseconds)
    int iobmd_fetcher_require(iobmd_fetcher *fetcher, size_t first, size_t last, int milliseconds)
    size_t iobmd_fetcher_lost(iobmd_fetcher *fetcher, size_t first, size_t last)
    void iobmd_fetcher_stop(iobmd_fetcher *fetcher)
    void iobmd_fetcher_free(iobmd_fetcher *fetcher)
