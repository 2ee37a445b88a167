"""What belongs to one process and not to a child forked from it: its pagemap, its userfaultfd, uses and locks.

These descriptors go on naming the parent's memory after a fork, and a lock may have been held by a thread that the
child does not have.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

from iobmd import procfs, refusals
from iobmd._native import guard as native
from iobmd._native import lazyfree
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError

if TYPE_CHECKING:
    from collections.abc import Callable


class Kept:
    """A descriptor that is opened when it is first asked for, and then kept."""

    def __init__(self, opener: Callable[[], int]) -> None:
        self._opener = opener
        self._fd = -1
        os.register_at_fork(after_in_child=self._forget)

    def open(self) -> int:
        """Return it. Raises OSError."""
        if self._fd < 0:
            opened = self._opener()
            if self._fd < 0:
                self._fd = opened
            else:  # another thread was faster
                os.close(opened)
        return self._fd

    def _forget(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


_pagemap = Kept(lambda: os.open(procfs.memory_file("self", "pagemap"), os.O_RDONLY | os.O_CLOEXEC))
_tracker = Kept(lazyfree.track)


def pagemap() -> int:
    """Return a descriptor of this process's pagemap, which stays open.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPrivileged`: this process may not read its own pagemap. `kIOReturnUnsupported`: /proc is not
        mounted. `kIOReturnNoResources`: no descriptor.
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
        raise refusals.own_pagemap(error) from None


def track_writes(address: int, size: int) -> int:
    """Track the writes to a range of this process, whole pages, from when PAGEMAP_SCAN protects them.

    Returns
    -------
    int
        The userfaultfd that does so; -1 where none can be had (before Linux 6.7, behind a seccomp filter).
    """
    try:
        tracker = _tracker.open()
        lazyfree.register(tracker, address, size)
    except OSError:
        return -1
    return tracker


class Fd(native.Fd):
    """A file descriptor that several threads use, and what it is; closed with this object at the latest."""

    __slots__ = ()

    def refuse(self) -> NoReturn:
        """Raise `kIOReturnNotOpen`."""
        raise IOReturnError(IOReturn.kIOReturnNotOpen, f"{self.what} is closed")


class Guard(native.Guard):
    """Keeps other threads out of a `with`, and a signal handler out of what it interrupted; free after a fork."""

    def reentered(self) -> NoReturn:
        """Raise `kIOReturnBusy`."""
        raise IOReturnError(
            IOReturn.kIOReturnBusy, "a signal handler, or a function called back, cannot use what it interrupted"
        )
