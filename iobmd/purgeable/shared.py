"""Purgeable shared memory, whose state is common to all processes that map it.

The state is a word after the last page of the shared object: the `IOPurgeable` word with which it was set, a mark
during a purge, and the time at which it became volatile. It is read and written under a record lock (fcntl(2)) on the
word, which the kernel releases if its holder dies: the next process finds the mark and completes the purge. A second
record lock, held shared while the memory is prepared, informs the other users in the same way.

The locks belong to the open file description (F_OFD_SETLK, Linux 3.15). Every user has its own, including two users
in one process, and a forked child.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
import weakref
from typing import TYPE_CHECKING

from iobmd._native import mman
from iobmd.constants import IOReturn
from iobmd.errors import BusyError, IOReturnError, VMError
from iobmd.memory import shmem
from iobmd.purgeable import EMPTY, MODIFIERS, NON_VOLATILE, VOLATILE, Order, now, wanted_non_volatile
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd.memory.shmem import SharedObject

TRAILER = PAGE_SIZE
"""Bytes after the memory that the object needs for the word."""

_WORD = struct.Struct("=Q")
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock (fcntl(2)): type, whence, start, length, pid
_STATE = 0xF
_PURGING = 0x10
_TIME_SHIFT = 16
_BLOCK = 512  # unit of st_blocks (stat(2))
_PATIENCE = 5.0  # seconds to wait for another process, which needs at most milliseconds


class SharedState:
    """The first `size` bytes of a shared object, in whole pages, and the word after them.

    The open file description of the object's descriptor is not shared.
    """

    shared = True

    def __init__(self, shared: SharedObject) -> None:
        self._object = shared
        self._size = shared.size
        _open.add(self)
        if not self._stored():
            self._set(NON_VOLATILE)

    def current(self) -> int:
        """Determine the state."""
        with self._exclusively() as word:
            return word & _STATE

    def make_nonvolatile(self) -> int:
        """Make it non-volatile."""
        with self._exclusively() as word:
            self._set(NON_VOLATILE)
            return word & _STATE

    def make_volatile(self, modifiers: int) -> int:
        """Make it volatile, unless another process has it prepared."""
        with self._exclusively() as word:
            self._require_unprepared()
            if word & _STATE != EMPTY or self._allocated():
                same = word & (_STATE | MODIFIERS) == VOLATILE | modifiers  # then it keeps its position in the order
                self._set(word if same else VOLATILE | modifiers | now() << _TIME_SHIFT)
            return word & _STATE

    def empty(self) -> int:
        """Discard the contents."""
        with self._exclusively() as word:
            self._require_unprepared()
            self._drop()
            return word & _STATE

    def order(self) -> Order | None:
        """Return its position in the order of purging."""
        word = self._word()
        return Order(word & MODIFIERS, word >> _TIME_SHIFT) if word & _STATE == VOLATILE else None

    def purge(self) -> int:
        """Drop the contents if it is volatile; return the bytes of memory and swap freed, 0 while it is changed."""
        if not self.order():
            return 0
        with self._exclusively(wait=False) as word:
            if word & _STATE != VOLATILE:
                return 0
            before = self._allocated()
            self._drop()
            return max(0, before - self._allocated())

    def before_write(self, offset: int, length: int) -> None:
        """Do nothing: the memory is purged as a whole, under the lock."""

    def hold(self) -> None:
        """Prevent it from becoming volatile, in all processes."""
        with self._exclusively() as word:
            if word & _STATE == VOLATILE:
                raise wanted_non_volatile()
            self._set_lock(fcntl.F_RDLCK, self._preparing)

    def release(self) -> None:
        """Undo `hold`, for this user."""
        self._set_lock(fcntl.F_UNLCK, self._preparing)

    def lazily_freed(self) -> int:
        """Return 0: the kernel does not reclaim shared memory."""
        return 0

    @property
    def _preparing(self) -> int:
        return self._size + _WORD.size

    @contextlib.contextmanager
    def _exclusively(self, *, wait: bool = True) -> Iterator[int]:
        """Exclude all other users, complete a purge whose process died, and yield the word."""
        unlock = self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, self._size)
        try:  # includes the lock: it is released after any interrupt, which is harmless if it is not held
            self._lock(_PATIENCE if wait else 0)
            if self._word() & _PURGING:
                self._drop()
            yield self._word()
        except OSError as error:
            if isinstance(error, IOReturnError):
                raise
            message = f"cannot change the state of shared memory: {error}"
            sealed = shmem.sealed_against_writing([self._fd])
            raise sealed or IOReturnError(IOReturn.kIOReturnError, message, error.errno or 0) from None
        finally:
            # Python runs signal handlers at the start of a Python function and after a C call. This single call with
            # precomputed arguments cannot be interrupted; _set_lock could, which would leave the lock held.
            fcntl.fcntl(*unlock)

    def _lock(self, patience: float) -> None:
        """Acquire the record lock by polling, because a wait in the kernel has no deadline."""
        deadline = time.monotonic() + patience
        pause = 0.00005
        while not self._try():
            if time.monotonic() > deadline:
                message = (
                    "another process is changing the state of this shared memory and does not finish: is it stopped?"
                )
                raise BusyError(message)
            time.sleep(pause)
            pause = min(pause * 2, 0.005)

    def _try(self) -> bool:
        try:
            self._set_lock(fcntl.F_WRLCK, self._size)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _set_lock(self, kind: int, place: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(kind, place))

    def _require_unprepared(self) -> None:
        """Raise `kIOReturnBusy` while another process has it prepared."""
        # Only queried, not locked, because an interrupt would leave it locked.
        conflict, *_ = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, self._preparing)))
        if conflict != fcntl.F_UNLCK:
            message = "the memory is prepared in another process: it remains wired until that calls complete()"
            raise BusyError(message)

    def _drop(self) -> None:
        self._set(EMPTY | _PURGING)
        mman.punch(self._fd, 0, self._size)
        self._set(EMPTY)

    def _allocated(self) -> int:
        """Return how many bytes of memory and swap the object has, without the word's page."""
        return max(0, os.fstat(self._fd).st_blocks * _BLOCK - TRAILER)

    def forked(self) -> None:
        """In a forked child, create a separate open file description with the same descriptor number."""
        if self._object.fd.closed:
            return
        with contextlib.suppress(OSError):
            fd = shmem.reopen(self._fd)
            os.dup2(fd, self._fd, inheritable=False)
            os.close(fd)

    @property
    def _fd(self) -> int:
        # The descriptor calls this under its lock, which it also holds to close the object.
        return self._object.fd.fileno()

    def _word(self) -> int:
        """Return the word.

        Any process with a descriptor can write an unknown state, which counts as non-volatile: the memory is not
        purged.
        """
        word = self._stored()
        return word if word & _STATE in (VOLATILE, EMPTY) else word & ~_STATE | NON_VOLATILE

    def _stored(self) -> int:
        stored = os.pread(self._fd, _WORD.size, self._size)
        if len(stored) < _WORD.size:
            message = "another process has truncated this shared memory: its purgeable state is lost"
            raise VMError(message)
        return int(_WORD.unpack(stored)[0])

    def _set(self, word: int) -> None:
        os.pwrite(self._fd, _WORD.pack(word), self._size)


def _flock(kind: int, place: int) -> bytes:
    """Return a struct flock (fcntl(2)) for one byte."""
    return _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0)


_open: weakref.WeakSet[SharedState] = weakref.WeakSet()


def _forked() -> None:
    for state in list(_open):
        state.forked()


os.register_at_fork(after_in_child=_forked)
