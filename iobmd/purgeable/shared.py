"""Purgeable shared memory, whose state is common to all processes that map it.

The state is a word after the last page of the shared object: the `IOPurgeable` word with which it was set, a mark
during a purge, and the time at which it became volatile. Inside `nonvolatile` blocks it also contains what the last
of them does at its end. It is read and written under a record lock (fcntl(2)) on the word, which the kernel releases
if its holder dies: the next process finds the mark and completes the purge, or ends the block. Two more record locks,
held shared while the memory is prepared and inside a block, inform the other users in the same way.

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
from iobmd.purgeable import (
    EMPTY,
    MODIFIERS,
    NON_VOLATILE,
    OBSOLETE,
    VOLATILE,
    Block,
    Kept,
    Order,
    now,
    wanted_non_volatile,
)
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
_TIME_SHIFT = 16  # of volatile memory; the marks of `Kept` are in its place in the other states
_AGAIN, _UNFILLED, _SPOILT = 1 << 16, 1 << 17, 1 << 18
_BLOCK = 512  # unit of st_blocks (stat(2))
_PATIENCE = 5.0  # seconds to wait for another process, which needs at most milliseconds


class KeptError(BusyError):
    """Another process, or another descriptor, is inside a `nonvolatile` block of the memory."""


class SharedState:
    """The first `size` bytes of a shared object, in whole pages, and the word after them.

    The open file description of the object's descriptor is not shared.
    """

    shared = True

    def __init__(self, shared: SharedObject) -> None:
        self._object = shared
        self._size = shared.size
        self._held = False  # whether this user has it prepared
        self._keeps = False  # whether it holds the lock of those inside a block
        self._entered = 0  # the number of its blocks
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
            if word & _STATE != NON_VOLATILE:  # otherwise the marks of blocks remain
                self._set(NON_VOLATILE)
            return word & _STATE

    def make_volatile(self, modifiers: int) -> int:
        """Make it volatile, unless another user has it prepared or is inside a block."""
        with self._exclusively() as word:
            self._require_unused()
            if word & _STATE != EMPTY or self._allocated():
                same = word & (_STATE | MODIFIERS) == VOLATILE | modifiers  # then it keeps its position in the order
                self._set(word if same else VOLATILE | modifiers | now() << _TIME_SHIFT)
            return word & _STATE

    def empty(self) -> int:
        """Discard the contents."""
        with self._exclusively() as word:
            self._require_unused()
            self._drop(word)
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
            self._drop(word)
            return max(0, before - self._allocated())

    def before_write(self, offset: int, length: int) -> None:
        """Do nothing: the memory is purged as a whole, under the lock."""

    def hold(self) -> None:
        """Prevent it from becoming volatile, in all processes."""
        with self._exclusively() as word:
            if word & _STATE == VOLATILE:
                raise wanted_non_volatile()
            self._held = True
            self._set_lock(fcntl.F_RDLCK, self._preparing)

    def release(self) -> None:
        """Undo `hold`, for this user."""
        self._set_lock(fcntl.F_UNLCK, self._preparing)
        self._held = False

    def enter(self, block: Block, modifiers: int | None) -> None:
        """As `Blocks.enter`, for the blocks of all processes."""
        with self._exclusively() as word:
            block.intact = True  # so that the destructor ends the block if a signal handler raises an exception
            self._entered += 1
            self._keeps = True
            self._set_lock(fcntl.F_RDLCK, self._keeping)
            known = word & MODIFIERS if word & _STATE == VOLATILE or word & _AGAIN else modifiers
            kept = _marks(word).entered(word & _STATE, known)
            self._set_marks(kept)
            block.intact = not kept.unfilled

    def leave(self, block: Block, *, failed: bool) -> tuple[int, int] | None:
        """As `Blocks.leave`; None too while another user is inside a block, whose end does the rest."""
        unlock = self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, self._keeping)
        intact, block.intact = block.intact, None
        self._entered -= 1
        try:
            with self._exclusively() as word:
                if word & _STATE != NON_VOLATILE:  # set inside the block
                    return None
                kept = _marks(word).left(intact=intact is not False, failed=failed)
                self._set_marks(kept)
                if not self._entered:  # unlocked before the next user looks for others
                    self._keeps = False
                    fcntl.fcntl(*unlock)
                if self._kept():
                    return None
                if self._prepared():  # then the caller is refused
                    self._set(NON_VOLATILE)
                return kept.then
        finally:
            if not self._entered:
                self._keeps = False
                fcntl.fcntl(*unlock)  # a single call, as in _exclusively

    def lazily_freed(self) -> int:
        """Return 0: the kernel does not reclaim shared memory."""
        return 0

    @property
    def _preparing(self) -> int:
        return self._size + _WORD.size

    @property
    def _keeping(self) -> int:
        return self._preparing + 1

    @contextlib.contextmanager
    def _exclusively(self, *, wait: bool = True) -> Iterator[int]:
        """Exclude all other users, complete what a process that died has begun, and yield the word."""
        unlock = self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, self._size)
        try:  # includes the lock: it is released after any interrupt, which is harmless if it is not held
            self._lock(_PATIENCE if wait else 0)
            if (word := self._word()) & _PURGING:
                self._drop(word)
            elif (then := _marks(word).then) and not self._kept() and not self._prepared():
                self._end(word, *then)
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

    def _require_unused(self) -> None:
        """Raise `kIOReturnBusy` while another user has it prepared or is inside a block."""
        if self._locked_by_others(self._preparing):
            message = "the memory is prepared in another process: it remains wired until that calls complete()"
            raise BusyError(message)
        if self._locked_by_others(self._keeping):
            message = "another process, or another descriptor of this memory, is inside a nonvolatile() block"
            raise KeptError(message)

    def _prepared(self) -> bool:
        return self._held or self._locked_by_others(self._preparing)

    def _kept(self) -> bool:
        return self._keeps or self._locked_by_others(self._keeping)

    def _locked_by_others(self, place: int) -> bool:
        # Only queried, not locked, because an interrupt would leave it locked.
        conflict, *_ = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, place)))
        return bool(conflict != fcntl.F_UNLCK)

    def _end(self, word: int, state: int, modifiers: int) -> None:
        """End the blocks of a process that died."""
        if state == EMPTY:
            self._drop(word)
        else:
            self._set(VOLATILE | modifiers | now() << _TIME_SHIFT)

    def _drop(self, word: int) -> None:
        again = word & _STATE == VOLATILE or word & _AGAIN
        empty = EMPTY | (_AGAIN | word & MODIFIERS & ~OBSOLETE if again else 0)
        self._set(empty | _PURGING)
        mman.punch(self._fd, 0, self._size)
        self._set(empty)

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
            self._held = False
            if self._keeps:  # the child is inside the same blocks
                self._set_lock(fcntl.F_RDLCK, self._keeping)

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

    def _set_marks(self, kept: Kept) -> None:
        again = 0 if kept.volatile_again is None else _AGAIN | kept.volatile_again
        self._set(NON_VOLATILE | again | _UNFILLED * kept.unfilled | _SPOILT * kept.spoilt)

    def _set(self, word: int) -> None:
        os.pwrite(self._fd, _WORD.pack(word), self._size)


def _marks(word: int) -> Kept:
    """Return what the last block does; for memory that is not non-volatile, as if there were none."""
    if word & _STATE != NON_VOLATILE:
        return Kept()
    again = word & MODIFIERS if word & _AGAIN else None
    return Kept(again, unfilled=bool(word & _UNFILLED), spoilt=bool(word & _SPOILT))


def _flock(kind: int, place: int) -> bytes:
    """Return a struct flock (fcntl(2)) for one byte."""
    return _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0)


_open: weakref.WeakSet[SharedState] = weakref.WeakSet()


def _forked() -> None:
    for state in list(_open):
        state.forked()


os.register_at_fork(after_in_child=_forked)
