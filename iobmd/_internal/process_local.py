"""Resources that a forked child does not inherit: file descriptors, their uses, and locks.

After a fork, such descriptors still refer to the parent's memory, and a lock may be held by a thread that does not
exist in the child.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

from iobmd._native import mapping as native
from iobmd.errors import BusyError, NotOpenError

if TYPE_CHECKING:
    from collections.abc import Callable


class LazyFd:
    """A descriptor that is opened on first use and remains open."""

    def __init__(self, opener: Callable[[], int]) -> None:
        self._opener = opener
        self._fd = -1
        os.register_at_fork(after_in_child=self._forget)

    def open(self) -> int:
        """Return the descriptor. Raises OSError."""
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


class Fd(native.Fd):
    """A file descriptor that several threads use, with a description; closed at the latest with this object."""

    __slots__ = ()

    def refuse(self) -> NoReturn:
        """Raise `kIOReturnNotOpen`."""
        raise NotOpenError(f"{self.what} is closed")


class Guard(native.Guard):
    """A lock for a `with` block, against other threads and signal handlers; unlocked after a fork."""

    def reentered(self) -> NoReturn:
        """Raise `kIOReturnBusy`."""
        raise BusyError("a signal handler or callback cannot use the object that it interrupted")
