"""What belongs to one process and not to a child forked from it: its open pagemap, and locks.

A descriptor of /proc/self/pagemap goes on naming the parent's memory after a fork, and a lock may have been held by a
thread that the child does not have.
"""

from __future__ import annotations

import os
import threading

from iobmd import refusals
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError


class _Pagemap:
    """The open pagemap of this process, -1 before it is first asked for."""

    def __init__(self) -> None:
        self.fd = -1

    def open(self) -> int:
        if self.fd < 0:
            opened = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            if self.fd < 0:
                self.fd = opened
            else:  # another thread was faster
                os.close(opened)
        return self.fd

    def forget(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1


_pagemap = _Pagemap()
os.register_at_fork(after_in_child=_pagemap.forget)


def pagemap() -> int:
    """Return a descriptor of this process's pagemap, which stays open.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPrivileged`: this process may not read its own pagemap. `kIOReturnNoResources`: no descriptor.
    """
    try:
        return _pagemap.open()
    except PermissionError as error:
        message = (
            "this process may not read its own pagemap: it has changed its user and is not dumpable; call "
            "prctl(PR_SET_DUMPABLE, 1), or run with CAP_SYS_ADMIN"
        )
        raise IOReturnError(IOReturn.kIOReturnNotPrivileged, message, error.errno or 0) from None
    except OSError as error:
        raise refusals.own(error, "cannot read /proc/self/pagemap") from None


class Locks:
    """A reentrant lock that is another one in each process."""

    __slots__ = ("_by_pid",)

    def __init__(self) -> None:
        self._by_pid: dict[int, threading.RLock] = {}

    def here(self) -> threading.RLock:
        """Return this process's."""
        return self._by_pid.setdefault(os.getpid(), threading.RLock())
