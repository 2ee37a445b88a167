# cython: language_level=3, auto_pickle=False, autotestdict=False
"""Shared memory as files: a tmpfs that is mounted nowhere (fsopen(2), Linux 5.2), and what kind a file is."""

from libc.errno cimport errno
from libc.string cimport strerror
from posix.unistd cimport close

from tmpfs cimport (
    FSCONFIG_CMD_CREATE, FSCONFIG_SET_STRING, HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs, iobmd_fsconfig, iobmd_fsmount,
    iobmd_fsopen, statfs_t,
)


cdef int _check(int result, str call) except -1:
    if result < 0:
        raise OSError(errno, f"{call}: {strerror(errno).decode()}")
    return result


def hugetlb_page(int fd):
    """Return the page size of a file of hugetlbfs, 0 for one of tmpfs, as a memfd. Raises ValueError for others."""
    cdef statfs_t status
    if fstatfs(fd, &status):
        raise OSError(errno, f"fstatfs: {strerror(errno).decode()}")
    if status.f_type == HUGETLBFS_MAGIC:
        return status.f_bsize
    if status.f_type != TMPFS_MAGIC:
        raise ValueError("not memory: a file of another file system")
    return 0


def mount(dict options):
    """Return the descriptor of the root of a new tmpfs, with mount options as text; it goes with the last user."""
    cdef int context = _check(iobmd_fsopen("tmpfs"), "fsopen")
    try:
        for name, value in options.items():
            _check(iobmd_fsconfig(context, FSCONFIG_SET_STRING, name.encode(), value.encode()), "fsconfig")
        _check(iobmd_fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL), "fsconfig")
        return _check(iobmd_fsmount(context), "fsmount")
    finally:
        close(context)
