# Loads and stores of exactly one width, and copies by them, for memory of devices
from libc.stdint cimport uint64_t

cdef extern from "device_access.h" nogil:
    uint64_t iobmd_load(const void *source, int width)
    void iobmd_store(void *to, int width, uint64_t value)
    void iobmd_copy_from_device(void *to, const void *source, size_t size)
    void iobmd_copy_to_device(void *to, const void *source, size_t size)
    void iobmd_drain()
