"""Purgeable shared memory, whose state all processes that map it agree on.

The state is a word behind the last page of the shared object: the `IOPurgeable` word it was set with, a mark while a
purge is under way, and the time it became volatile. It is read and written under a record lock (fcntl(2)) on the
word, which the kernel takes from a process that dies: whoever comes next finds the mark, and finishes the purge. A
second record lock, held shared while the memory is prepared, tells the other processes so in the same way.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from typing import TYPE_CHECKING

from iobmd._native import memory
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.purgeable import EMPTY, MODIFIERS, NON_VOLATILE, VOLATILE, Order, now, wanted_non_volatile
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

TRAILER = PAGE_SIZE
"""Bytes behind the memory that the object needs for the word."""

_WORD = struct.Struct("=Q")
_STATE = 0xF
_PURGING = 0x10
_TIME_SHIFT = 16
_BLOCK = 512  # unit of st_blocks (stat(2))
_PATIENCE = 5.0  # seconds to wait for another process, which needs milliseconds at the most


class AgreedState:
    """The first `size` bytes of a shared object, whole pages, and the word behind them.

    Closing any other descriptor of the object in this process would release its record locks (fcntl(2)): it has this
    one only.
    """

    shared = True

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        if not self._word():
            self._set(NON_VOLATILE)

    def current(self) -> int:
        """Find out the state."""
        with self._exclusively() as word:
            return word & _STATE

    def keep(self) -> int:
        """Make it non-volatile."""
        with self._exclusively() as word:
            self._set(NON_VOLATILE)
            return word & _STATE

    def give(self, modifiers: int) -> int:
        """Make it volatile, unless another process has it prepared."""
        with self._exclusively() as word:
            self._require_unprepared()
            if word & _STATE != EMPTY or self._allocated():
                same = word & (_STATE | MODIFIERS) == VOLATILE | modifiers  # then it keeps its place in the order
                self._set(word if same else VOLATILE | modifiers | now() << _TIME_SHIFT)
            return word & _STATE

    def empty(self) -> int:
        """Drop the content."""
        with self._exclusively() as word:
            self._require_unprepared()
            self._drop()
            return word & _STATE

    def order(self) -> Order | None:
        """Return when it is to be taken."""
        word = self._word()
        return Order(word & MODIFIERS, word >> _TIME_SHIFT) if word & _STATE == VOLATILE else None

    def purge(self) -> int:
        """Drop the content if it is volatile; memory and swap count. Nothing while another process changes it."""
        if not self.order():
            return 0
        with self._exclusively(wait=False) as word:
            if word & _STATE != VOLATILE:
                return 0
            before = self._allocated()
            self._drop()
            return max(0, before - self._allocated())

    def before_write(self, offset: int, length: int) -> None:
        """Nothing: the memory is taken whole, under the lock, and never page by page."""

    def hold(self) -> None:
        """Refuse to be volatile, in all processes."""
        with self._exclusively() as word:
            if word & _STATE == VOLATILE:
                raise wanted_non_volatile()
            fcntl.lockf(self._fd, fcntl.LOCK_SH, 1, self._preparing)

    def let_go(self) -> None:
        """Undo `hold`, for this process."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, self._preparing)

    def lazily_freed(self) -> int:
        """Return 0: the kernel takes no shared memory by itself."""
        return 0

    @property
    def _preparing(self) -> int:
        return self._size + _WORD.size

    @contextlib.contextmanager
    def _exclusively(self, *, wait: bool = True) -> Iterator[int]:
        """Keep all others out, finish what one of them died of, and yield the word."""
        try:  # around the lock too: it is given back whatever interrupts us, and if we do not have it that is no harm
            self._lock(_PATIENCE if wait else 0)
            if self._word() & _PURGING:
                self._drop()
            yield self._word()
        except OSError as error:
            if isinstance(error, IOReturnError):
                raise
            message = f"cannot change the state of shared memory: {error}"
            raise IOReturnError(IOReturn.kIOReturnError, message, error.errno or 0) from None
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, self._size)

    def _lock(self, patience: float) -> None:
        """Take the record lock by trying again: waiting in the kernel takes threads for deadlocked processes."""
        deadline = time.monotonic() + patience
        pause = 0.00005
        while not self._try(self._size):
            if time.monotonic() > deadline:
                message = (
                    "another process is changing the state of this shared memory, and does not end: is it stopped?"
                )
                raise IOReturnError(IOReturn.kIOReturnBusy, message)
            time.sleep(pause)
            pause = min(pause * 2, 0.005)

    def _try(self, place: int) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _require_unprepared(self) -> None:
        """Raise `kIOReturnBusy` while another process has it prepared."""
        if not self._try(self._preparing):
            message = "the memory is prepared in another process: it stays wired until complete() there"
            raise IOReturnError(IOReturn.kIOReturnBusy, message)
        self.let_go()

    def _drop(self) -> None:
        self._set(EMPTY | _PURGING)
        memory.punch(self._fd, 0, self._size)
        self._set(EMPTY)

    def _allocated(self) -> int:
        """Return how many bytes of memory and swap the object holds, without the word's page."""
        return max(0, os.fstat(self._fd).st_blocks * _BLOCK - TRAILER)

    def _word(self) -> int:
        (word,) = _WORD.unpack(os.pread(self._fd, _WORD.size, self._size))
        return int(word)

    def _set(self, word: int) -> None:
        os.pwrite(self._fd, _WORD.pack(word), self._size)
