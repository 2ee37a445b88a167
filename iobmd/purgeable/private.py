"""Purgeable private memory: lazily freed (MADV_FREE), and so reclaimed even while this process sleeps."""

from __future__ import annotations

import errno

from iobmd._native import mman
from iobmd._native import pagemap as native
from iobmd._native.mapping import generation
from iobmd.errors import UnsupportedError
from iobmd.pagemap.self import certain_bytes, has_content, own_pagemap, own_ranges, track_writes
from iobmd.purgeable import EMPTY, NON_VOLATILE, OBSOLETE, VOLATILE, Order, now, restore, wanted_non_volatile
from iobmd.units import PAGE_SIZE, round_down, round_up


class LazilyFreed:
    """Private anonymous memory of this process, `address` to `address + size`, whole pages of a separate mapping.

    Losses are detected by inspecting the pages (`restore`). A store to volatile memory without `before_write` makes
    its page count as lost, because it cannot be distinguished from a store to a lost page.
    """

    shared = False

    def __init__(self, address: int, size: int) -> None:
        self._address = address
        self._size = size
        self._tracker = track_writes(address, size)
        self._tracked_in = generation()
        self._state = NON_VOLATILE
        # The lazily freed ranges. None: unknown, because freeing was interrupted; the memory then counts as lost.
        self._ranges: list[restore.Range] | None = []
        self._half_dropped = False
        self._modifiers = self._since = 0

    def current(self) -> int:
        """Determine the state by inspecting the pages."""
        if self._half_dropped or (self._state == VOLATILE and not self._all_there()):
            self._drop()
        return self._state

    def make_nonvolatile(self) -> int:
        """Make it non-volatile: restore all pages, or drop them."""
        old = self._settle()
        self._state = NON_VOLATILE
        return old

    def make_volatile(self, modifiers: int) -> int:
        """Make it volatile: lazily free it, or drop it immediately if it is obsolete."""
        old = self._settle()
        if modifiers & OBSOLETE:
            self._drop()
        elif old != EMPTY or has_content(self._address, self._size):
            self._free_lazily()
            if old != VOLATILE or modifiers != self._modifiers:  # otherwise it keeps its position in the order
                self._modifiers, self._since = modifiers, now()
        return old

    def empty(self) -> int:
        """Discard the contents."""
        old = self.current()
        self._drop()
        return old

    def order(self) -> Order | None:
        """Return its position in the order of purging."""
        return Order(self._modifiers, self._since) if self._state == VOLATILE else None

    def purge(self) -> int:
        """Drop the contents if it is volatile; return the number of bytes that still existed."""
        if self._state != VOLATILE:
            return 0
        resident = own_ranges(self._address, self._size, protect=False)
        freed = sum(end - start for start, end in resident)
        self._drop()
        return freed

    def before_write(self, offset: int, length: int) -> None:
        """Restore the pages that are about to be written to, so that the write does not count as a loss."""
        if self._state != VOLATILE or not length:
            return
        if not self._restore(self._address + offset, self._address + offset + length):
            self._drop()

    def hold(self) -> None:
        """Check that it is not volatile."""
        if self.current() == VOLATILE:
            raise wanted_non_volatile()

    def release(self) -> None:
        """Do nothing: the descriptor records whether it is prepared."""

    def lazily_freed(self) -> int:
        """Count the pages that are still clean."""
        if self._state != VOLATILE or not self._ranges:
            return 0
        if self._here < 0:
            return certain_bytes(self._address, self._size, "LazyFree")
        wanted, without = native.PAGE_IS_PRESENT, native.PAGE_IS_PFNZERO | native.PAGE_IS_WRITTEN
        found = (native.scan(own_pagemap(), start, end, wanted, without) for start, end in self._ranges)
        return sum(end - start for ranges in found for start, end in ranges)

    @property
    def _here(self) -> int:
        """The tracker, -1 if it belongs to a parent process."""
        return self._tracker if self._tracked_in == generation() else -1

    def _settle(self) -> int:
        """Restore all pages, or drop them if one is lost; return the previous state, or `EMPTY`."""
        restored = self._state != VOLATILE or (
            self._ranges is not None and restore.restore_all(self._ranges, self._here)
        )
        if self._half_dropped or not restored:
            self._drop()
        return self._state

    def _all_there(self) -> bool:
        return self._ranges is not None and restore.all_there(self._ranges, self._here)

    def _restore(self, first: int, end: int) -> bool:
        """Restore the pages between two addresses if all are present."""
        if self._ranges is None:
            return False
        inside, outside = _split(self._ranges, first, end)
        try:
            return restore.restore_all(inside, self._here)
        finally:
            self._ranges = outside + inside

    def _free_lazily(self) -> None:
        # Only resident pages, which are protected at the same moment. Swapped pages remain in swap, because MADV_FREE
        # would discard them, and untouched pages have no contents.
        ranges = own_ranges(self._address, self._size, protect=self._here >= 0)
        # First volatile with unknown ranges: if this is interrupted, no page is wrongly considered safe.
        before = self._state
        self._state, self._ranges = VOLATILE, None
        freed: list[restore.Range] = []
        try:
            for start, end in ranges:
                self._advise_free(start, end)
                freed.append((start, end))
        except OSError as error:
            if restore.restore_all(freed, self._here):
                self._state, self._ranges = before, []
            raise _cannot_free(error) from None
        self._ranges = ranges

    def _advise_free(self, start: int, end: int) -> None:
        try:
            mman.advise(start, end - start, mman.MADV_FREE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Locked by mlockall(MCL_CURRENT) after its allocation, which contradicts volatile memory.
            mman.unlock(self._address, self._size)
            mman.advise(start, end - start, mman.MADV_FREE)

    def _drop(self) -> None:
        before, self._state, self._half_dropped = self._state, EMPTY, True
        try:
            _discard(self._address, self._size)
        except OSError as error:
            self._state, self._half_dropped = before, False
            message = f"cannot drop the contents: the kernel refused ({error})"
            raise UnsupportedError(message, error.errno or 0) from None
        self._ranges, self._half_dropped = [], False


def _discard(address: int, size: int) -> None:
    try:
        mman.advise(address, size, mman.MADV_DONTNEED_LOCKED)  # Linux 5.18
    except OSError:
        mman.advise(address, size, mman.MADV_DONTNEED)


def _split(ranges: list[restore.Range], first: int, end: int) -> tuple[list[restore.Range], list[restore.Range]]:
    """Split ranges into the parts on the pages between two addresses, and the others."""
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
        f"the kernel cannot reclaim this memory ({error}): it is locked by mlockall() or mlock(); unlock it first",
        error.errno or 0,
    )
