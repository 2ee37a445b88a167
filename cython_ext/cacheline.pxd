# Instructions on cache lines: x86-64's clflush, clflushopt and clwb, aarch64's dc
from libc.stdint cimport uintptr_t

cdef extern from "cacheline.h" nogil:
    enum:
        IOBMD_NONE
        IOBMD_CLFLUSH
        IOBMD_CLFLUSHOPT
        IOBMD_CLWB
        IOBMD_DC
        IOBMD_INHIBIT
        IOBMD_WRITE_THROUGH
        IOBMD_WRITE_COMBINE
    int iobmd_best()
    size_t iobmd_line()
    void iobmd_drop(void *line, int how)
    void iobmd_write_back(void *line, int how)
    size_t iobmd_lines(uintptr_t address, size_t size, size_t line, int how, void (*what)(void *, int) nogil)
    void iobmd_copy(void *to, const void *source, size_t size, int mode, int writing, size_t line, int how)
