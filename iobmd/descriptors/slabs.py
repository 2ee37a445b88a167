"""Small wired buffers: pieces of slabs, which are pinned pages that several buffers share, as XNU's `iopa` does."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, cast

from iobmd import pagemap
from iobmd._native import mapping
from iobmd._native.pagemap import concatenated
from iobmd.backing.anonymous import AnonymousBacking
from iobmd.backing.mapped import MappedBacking
from iobmd.descriptors.options import SMALL
from iobmd.descriptors.ownership import MemoryOwner
from iobmd.errors import NotOpenError
from iobmd.host import headroom
from iobmd.memory import pinning
from iobmd.pagemap.self import resident_and_dirty
from iobmd.task.task import kernel_task
from iobmd.units import PAGE_SIZE, round_down, round_up

if TYPE_CHECKING:
    from iobmd._native.mapping import Exporter, Piece, Pool, Slab
    from iobmd._native.pagemap import RunTable
    from iobmd.memory.mlock import Wiring

_SMALLEST = mapping.LINE_SIZE  # no two owners share a cache line, which a device might write to
_PAGES = 16
"""The most pages of a slab."""


def _pools() -> list[Pool]:
    """Create the pools, one for each power of two; in the list, by the number of cache lines of a buffer."""
    found: list[Pool] = []
    size = _SMALLEST
    while size <= SMALL:
        pool = mapping.Pool(size)
        found += [pool] * (size // _SMALLEST + 1 - len(found))
        size *= 2
    return found


_BY_LINES = _pools()


def pools() -> list[Pool]:
    """Return the pools, from the smallest pieces to the largest."""
    return list(dict.fromkeys(_BY_LINES))


def all_slabs() -> list[Slab]:
    """Return the slabs of this process."""
    return [slab for pool in pools() for slab in pool.slabs]


def allocate(handle: Exporter, size: int, alignment: int) -> bool:
    """Make a cleared piece the memory of a buffer of `size` bytes; return False if its pieces are not so aligned.

    Raises
    ------
    IOReturnError
        As `AnonymousBacking`, if a slab is created.
    """
    pool = _BY_LINES[(size + _SMALLEST - 1) // _SMALLEST]
    if alignment > pool.piece_size:
        return False
    while not pool.take(size, handle):
        _extend(pool)
    return True


def _extend(pool: Pool) -> None:
    """Add a slab with as many pages as the pool has, but at least one and at most `_PAGES`."""
    present = sum(slab.count for slab in pool.slabs) * pool.piece_size
    size = min(max(round_up(present, PAGE_SIZE), PAGE_SIZE), _PAGES * PAGE_SIZE)
    backing = AnonymousBacking(size, wired=True)
    keeper = MemoryOwner(backing, size, "slab", has_handle=False)
    pool.add(mapping.Slab(keeper, backing.address, size, pool.piece_size))


def own(piece: Piece, length: int, handle: object) -> MemoryOwner | None:
    """Create the owner of a buffer's piece; return None if another thread was faster.

    Most small buffers are only allocated, used by their address and freed: they need no owner.

    Raises
    ------
    IOReturnError
        `kIOReturnNotOpen`: another thread closed the piece.
    """
    slab, kind = piece.slab, type(handle).__name__
    if slab is None:
        raise NotOpenError(f"this {kind} is released")
    keeper: MemoryOwner = slab.keeper
    owner = MemoryOwner(PieceBacking(piece, keeper), length, kind, maker=keeper.maker)
    return owner if piece.own(owner) else None


def trim() -> int:
    """Unmap the slabs without buffers; return their size in bytes."""
    return sum(pool.trim() for pool in pools())


def find(address: int) -> MemoryOwner | None:
    """Return the owner of the small buffer at an address of this process."""
    for pool in pools():
        if (buffer := pool.find(address)) is not None:
            with contextlib.suppress(NotOpenError):
                return cast("MemoryOwner", buffer._memory())
    return None


class PieceBacking(MappedBacking):
    """A piece of a slab. The slab is pinned or resident; its owner is `keeper`."""

    def __init__(self, piece: Piece, keeper: MemoryOwner) -> None:
        super().__init__(wired=True)
        self.mapping = piece
        self._keeper = keeper
        pages = keeper.backing  # read directly: in a forked child its owner refuses it
        assert pages, "a slab has memory as long as a piece exists"
        self._pages = pages
        self.pin_refusal = self._pages.pin_refusal
        self.runs = self._cut(self._pages.runs)

    def _cut(self, runs: RunTable | None) -> RunTable | None:
        if runs is None:
            return None
        return concatenated([(runs, self.address, self.mapping.size)], self.address)

    @property
    def _page_range(self) -> tuple[int, int]:
        start = round_down(self.address, PAGE_SIZE)
        return start, round_up(self.address + self.mapping.size, PAGE_SIZE) - start

    @property
    def wiring(self) -> Wiring:
        """Whether its slab is resident or pinned."""
        return self._pages.wiring

    def pin(self) -> None:
        """Pin its slab again. Raises as `MemoryOwner.pin`."""
        with self._keeper.guard:
            self._keeper.pin()
        self.runs = self._cut(self._pages.runs)

    def unpin(self, *, wait: bool = True) -> None:
        """Undo one `pin`. `wait` as `Backing.unpin`."""
        if not wait:
            self._keeper.unpin_when_free()
            return
        with self._keeper.guard:
            self._keeper.unpin()

    def read_runs(self, *, gaps: bool = False) -> RunTable | None:
        """Read its physical run."""
        return self._cut(pinning.visible_runs(*self._page_range, gaps=gaps))

    def lost(self) -> int | None:
        """Return its address if its page is no longer mapped, otherwise None."""
        lost = self._pages.lost()
        start, size = self._page_range
        return self.address if lost is not None and start <= lost < start + size else None

    def huge_bytes(self) -> int:
        """Return its size if it is in a huge page, otherwise 0."""
        return self.mapping.size if pagemap.is_huge(*self._page_range) else 0

    def page_counts(self) -> tuple[int, int]:
        """Count its pages, which it shares with others."""
        return resident_and_dirty(kernel_task, *self._page_range)

    def in_page(self, offset: int) -> int:
        """Return the offset of a byte in its page."""
        return (self.address + offset) % PAGE_SIZE

    def close(self) -> None:
        """Seal and clear it, and make it available to other buffers. Idempotent."""
        self.mapping.close()


headroom.on_shortage(lambda _missing: trim())
