# userfaultfd(2): asynchronous tracking of writes and accesses
from libc.stdint cimport uint64_t

cdef extern from "userfault.h" nogil:
    int iobmd_uffd_open()
    int iobmd_uffd_track(int fd, int accesses)
    int iobmd_uffd_register(int fd, uint64_t start, uint64_t len, int accesses)
    int iobmd_uffd_hide(int fd, uint64_t start, uint64_t len)
    int iobmd_uffd_protect(int fd, uint64_t start, uint64_t len, int protect)
