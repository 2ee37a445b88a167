# cython: language_level=3, auto_pickle=False, autotestdict=False
"""A tmpfs that is mounted nowhere: fsopen(2), fsconfig(2) and fsmount(2) (Linux 5.2)."""

from libc.errno cimport errno
from libc.string cimport strerror
from posix.unistd cimport close

from tmpfs cimport FSCONFIG_CMD_CREATE, FSCONFIG_SET_STRING, iobmd_fsconfig, iobmd_fsmount, iobmd_fsopen


cdef int _check(int result, str call) except -1:
    if result < 0:
        raise OSError(errno, f"{call}: {strerror(errno).decode()}")
    return result


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
