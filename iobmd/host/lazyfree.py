"""Probes for purgeable memory: lazy freeing, and write tracking."""

import errno
import os

from iobmd._native import mman
from iobmd.host.fact import Fact, Status, has_seccomp_filter, scratch


def madv_free() -> Fact:
    """Probe MADV_FREE (madvise(2), Linux 4.5): lazily free a page of this process."""
    name, purpose = "MADV_FREE", "purgeable buffers that the kernel reclaims when memory is short"
    try:
        with scratch() as page:
            page.write(0, b"\1")
            mman.advise(page.address, page.size, mman.MADV_FREE)
    except OSError as error:
        remedy = "munlockall(), or start without mlockall(MCL_FUTURE): locked memory cannot be freed lazily"
        return Fact(name, Status.NO, False, f"{error.strerror}", purpose, remedy)
    return Fact(name, Status.YES, True, "a page was lazily freed", purpose)


def write_tracking() -> Fact:
    """Probe write tracking by the kernel (userfaultfd(2) with UFFD_FEATURE_WP_ASYNC, Linux 6.7)."""
    name, purpose = "userfaultfd", "detect the loss of purgeable memory in microseconds instead of milliseconds"
    try:
        os.close(mman.track_writes())
    except OSError as error:
        remedy = "Linux 6.7 or later, with CONFIG_USERFAULTFD"
        if error.errno in (errno.EPERM, errno.ENOSYS) and has_seccomp_filter():
            remedy = "allow userfaultfd in the seccomp profile (container: --security-opt seccomp=unconfined)"
        return Fact(name, Status.LIMITED, False, f"{error.strerror}; smaps is used, which is slower", purpose, remedy)
    return Fact(name, Status.YES, True, "tracks writes", purpose)
