"""Purgeable private memory: lazily freed (MADV_FREE), so that the kernel takes it, also while this process sleeps."""

from __future__ import annotations

import errno

from iobmd import pagemap
from iobmd._native import mman
from iobmd._native import pagemap as native
from iobmd._native.mapping import generation
from iobmd.errors import UnsupportedError
from iobmd.purgeable import EMPTY, NON_VOLATILE, OBSOLETE, VOLATILE, Order, now, restore, wanted_non_volatile
from iobmd.units import PAGE_SIZE, round_down, round_up


class LazilyFreed:
    """Private anonymous memory of this process, `address` to `address + size`, whole pages of a mapping of its own.

    What the kernel took is found out by looking at the pages (`windows`). A store while it is volatile that does not
    go through `before_write` makes its page count as lost, for nothing tells it from one on a page that was lost.
    """

    shared = False

    def __init__(self, address: int, size: int) -> None:
        self._address = address
        self._size = size
        self._tracker = pagemap.track_writes(address, size)
        self._tracked_in = generation()
        self._state = NON_VOLATILE
        # What is lazily freed. None: nobody knows, for freeing it was interrupted, and then it counts as lost.
        self._ranges: list[restore.Range] | None = []
        self._half_dropped = False
        self._modifiers = self._since = 0

    def current(self) -> int:
        """Find out the state by looking at the pages."""
        if self._half_dropped or (self._state == VOLATILE and not self._all_there()):
            self._drop()
        return self._state

    def keep(self) -> int:
        """Make it non-volatile: take everything back, or drop it."""
        old = self._settle()
        self._state = NON_VOLATILE
        return old

    def give(self, modifiers: int) -> int:
        """Make it volatile: free it lazily, or drop it at once when it is obsolete."""
        old = self._settle()
        if modifiers & OBSOLETE:
            self._drop()
        elif old != EMPTY or pagemap.has_content(self._address, self._size):
            self._free_lazily()
            if old != VOLATILE or modifiers != self._modifiers:  # else it keeps its place in the order
                self._modifiers, self._since = modifiers, now()
        return old

    def empty(self) -> int:
        """Drop the content."""
        old = self.current()
        self._drop()
        return old

    def order(self) -> Order | None:
        """Return when it is to be taken."""
        return Order(self._modifiers, self._since) if self._state == VOLATILE else None

    def purge(self) -> int:
        """Drop the content if it is volatile; what the kernel left of it counts."""
        if self._state != VOLATILE:
            return 0
        resident = pagemap.own_ranges(self._address, self._size, protect=False)
        freed = sum(end - start for start, end in resident)
        self._drop()
        return freed

    def before_write(self, offset: int, length: int) -> None:
        """Take back the pages that are about to be written to, for a write is no sign of loss then."""
        if self._state != VOLATILE or not length:
            return
        if not self._take_back(self._address + offset, self._address + offset + length):
            self._drop()

    def hold(self) -> None:
        """Make sure that it is not volatile."""
        if self.current() == VOLATILE:
            raise wanted_non_volatile()

    def let_go(self) -> None:
        """Nothing: whether it is prepared is for the descriptor to know."""

    def lazily_freed(self) -> int:
        """Count the pages that are clean still."""
        if self._state != VOLATILE or not self._ranges:
            return 0
        if self._here < 0:
            return pagemap.certain_bytes(self._address, self._size, "LazyFree")
        wanted, without = native.PAGE_IS_PRESENT, native.PAGE_IS_PFNZERO | native.PAGE_IS_WRITTEN
        found = (native.scan(pagemap.own_pagemap(), start, end, wanted, without) for start, end in self._ranges)
        return sum(end - start for ranges in found for start, end in ranges)

    @property
    def _here(self) -> int:
        """The tracker, -1 where it is that of a parent, whose memory this is not."""
        return self._tracker if self._tracked_in == generation() else -1

    def _settle(self) -> int:
        """Take everything back; returns the state before. What is left of `VOLATILE` is a name to be changed."""
        taken_back = self._state != VOLATILE or (
            self._ranges is not None and restore.take_back(self._ranges, self._here)
        )
        if self._half_dropped or not taken_back:
            self._drop()
        return self._state

    def _all_there(self) -> bool:
        return self._ranges is not None and restore.all_there(self._ranges, self._here)

    def _take_back(self, first: int, end: int) -> bool:
        """Make the pages between two addresses safe if all are there."""
        if self._ranges is None:
            return False
        inside, outside = _split(self._ranges, first, end)
        try:
            return restore.take_back(inside, self._here)
        finally:
            self._ranges = outside + inside

    def _free_lazily(self) -> None:
        # Only what is resident, and protected in the same moment: swapped pages stay in swap, for MADV_FREE would
        # throw them away, and what was never touched has nothing to lose.
        ranges = pagemap.own_ranges(self._address, self._size, protect=self._here >= 0)
        # Volatile first, and of unknown extent: whatever interrupts this, nothing is taken for safe that is not.
        before = self._state
        self._state, self._ranges = VOLATILE, None
        freed: list[restore.Range] = []
        try:
            for start, end in ranges:
                self._advise_free(start, end)
                freed.append((start, end))
        except OSError as error:
            if restore.take_back(freed, self._here):
                self._state, self._ranges = before, []
            raise _cannot_free(error) from None
        self._ranges = ranges

    def _advise_free(self, start: int, end: int) -> None:
        try:
            mman.advise(start, end - start, mman.MADV_FREE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Locked, by mlockall(MCL_CURRENT) since it was made: volatile memory is the opposite of that.
            mman.unlock(self._address, self._size)
            mman.advise(start, end - start, mman.MADV_FREE)

    def _drop(self) -> None:
        before, self._state, self._half_dropped = self._state, EMPTY, True
        try:
            _discard(self._address, self._size)
        except OSError as error:
            self._state, self._half_dropped = before, False
            message = f"cannot drop the content: the kernel refuses it ({error})"
            raise UnsupportedError(message, error.errno or 0) from None
        self._ranges, self._half_dropped = [], False


def _discard(address: int, size: int) -> None:
    try:
        mman.advise(address, size, mman.MADV_DONTNEED_LOCKED)  # Linux 5.18
    except OSError:
        mman.advise(address, size, mman.MADV_DONTNEED)


def _split(ranges: list[restore.Range], first: int, end: int) -> tuple[list[restore.Range], list[restore.Range]]:
    """Cut ranges into what lies on the pages between two addresses, and what does not."""
    first, end = round_down(first, PAGE_SIZE), round_up(end, PAGE_SIZE)
    inside, outside = [], []
    for low, high in ranges:
        if low < min(high, first):
            outside.append((low, min(high, first)))
        if max(low, first) < min(high, end):
            inside.append((max(low, first), min(high, end)))
        if max(low, end) < high:
            outside.append((max(low, end), high))
    return inside, outside


def _cannot_free(error: OSError) -> UnsupportedError:
    return UnsupportedError(
        f"the kernel cannot take this memory ({error}): it is locked, by mlockall() or mlock(); unlock it first",
        error.errno or 0,
    )
