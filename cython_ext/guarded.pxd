# Work on memory that may be unmapped while it is accessed
from libc.stdint cimport uintptr_t

cdef extern from "guarded.h" nogil:
    int iobmd_guarded(void (*work)(void *) noexcept nogil, void *argument, uintptr_t *fault)
