"""What belongs to one process and not to a child forked from it: file descriptors, their uses, and locks.

These descriptors go on naming the parent's memory after a fork, and a lock may have been held by a thread that the
child does not have.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NoReturn

from iobmd._native import mapping as native
from iobmd.errors import BusyError, NotOpenError

if TYPE_CHECKING:
    from collections.abc import Callable


class LazyFd:
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


class Fd(native.Fd):
    """A file descriptor that several threads use, and what it is; closed with this object at the latest."""

    __slots__ = ()

    def refuse(self) -> NoReturn:
        """Raise `kIOReturnNotOpen`."""
        raise NotOpenError(f"{self.what} is closed")


class Guard(native.Guard):
    """Keeps other threads out of a `with`, and a signal handler out of what it interrupted; free after a fork."""

    def reentered(self) -> NoReturn:
        """Raise `kIOReturnBusy`."""
        raise BusyError("a signal handler, or a function called back, cannot use what it interrupted")
