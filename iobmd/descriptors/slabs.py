"""Memory of small buffers, which is used again at once: pieces of slabs, and whole pages.

Wired buffers of up to `SHARED` bytes are pieces of slabs, pinned pages that several buffers share, as XNU's `iopa`
does. Larger ones, and pageable ones, of up to `SMALL` bytes have whole pages. Some of these are retained for the next
buffers of the same size: wired pages remain pinned, and are cleared when the buffer is freed; pageable pages are
freed, and only their addresses are used again.

Secrets are pieces of separate slabs, in which canaries surround each secret; a large secret is the only piece of its
slab, which is not used again.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, cast

from iobmd import pagemap
from iobmd._native import mapping
from iobmd._native.pagemap import concatenated
from iobmd.backing.anonymous import AnonymousBacking
from iobmd.backing.mapped import MappedBacking
from iobmd.backing.secret import SecretBacking
from iobmd.constants import IOOptionBits
from iobmd.descriptors import device_access
from iobmd.descriptors.options import SMALL
from iobmd.descriptors.ownership import MemoryOwner
from iobmd.errors import NotOpenError
from iobmd.host import headroom
from iobmd.memory import mlock, pinning
from iobmd.memory.mlock import Wiring
from iobmd.pagemap.self import own_pagemap, resident_and_dirty
from iobmd.task.task import kernel_task
from iobmd.units import PAGE_SIZE, round_down, round_up

if TYPE_CHECKING:
    from iobmd._native.mapping import Piece, Pool, SecretSlab, Slab, SmallBuffer
    from iobmd._native.pagemap import RunTable
    from iobmd.backing import Contents
    from iobmd.descriptors.options import Request

SHARED = 2 << 10
"""Bytes of the largest wired buffers that share pages with others."""

_PAGEABLE_OPTION = int(IOOptionBits.kIOMemoryPageable)
_SMALLEST = mapping.LINE_SIZE  # no two owners share a cache line, which a device might write to
_PAGES = 16
"""The maximum number of pages of a slab."""
_SPARE = 128 << 10
"""Bytes of whole pages that are retained for each size: at most 2 MiB in all remain pinned."""


def _shared_pools(largest: int) -> list[Pool]:
    """Create the pools of slabs, one for each power of two; in the list, by the size of a buffer in bytes."""
    found: list[Pool] = []
    size = _SMALLEST
    while size <= largest:
        pool = mapping.Pool(size)
        found += [pool] * (size + 1 - len(found))
        size *= 2
    return found


def _page_pools(*, inherited: bool) -> list[Pool]:
    """Create the pools of whole pages; in the list, by the number of pages of a buffer, from one on."""
    return [mapping.Pool(size, _SPARE // size, inherited) for size in range(PAGE_SIZE, SMALL + 1, PAGE_SIZE)]


_SHARED = _shared_pools(SHARED)
_WIRED = _page_pools(inherited=False)
_PAGEABLE = _page_pools(inherited=True)
_CANARIES = 16
"""The minimum number of canary bytes on each side of a secret that shares pages with others."""
_SECRETS = _shared_pools(1 << 10)
_LARGE_SECRETS = mapping.Pool(0, 0)
_ALL = [*dict.fromkeys(_SHARED + _SECRETS), _LARGE_SECRETS, *_WIRED, *_PAGEABLE]


def all_slabs() -> list[Slab]:
    """Return the slabs of this process."""
    return [slab for pool in _ALL for slab in pool.slabs]


def allocate(buffer: SmallBuffer, wanted: Request) -> bool:
    """Assign cleared memory to a buffer of at most `SMALL` bytes; return False if none has this alignment.

    Raises
    ------
    IOReturnError
        As `AnonymousBacking`, if memory is mapped.
    """
    # Not `wanted.wired`: a property takes a twentieth of the time of a small buffer.
    size, wired = wanted.capacity, not wanted.options & _PAGEABLE_OPTION
    if wired and size <= SHARED:
        pool = _SHARED[size]
        if wanted.piece_alignment > pool.piece_size:
            return False
        while not pool.acquire(buffer):
            _extend(pool)
        return True
    if wanted.piece_alignment > PAGE_SIZE:
        return False
    pool = (_WIRED if wired else _PAGEABLE)[(size - 1) // PAGE_SIZE]
    while not pool.acquire(buffer):
        _map_pages(pool, wired=wired)
    return True


def _extend(pool: Pool) -> None:
    keeper, backing = _mapped(_next_size(pool), wired=True)
    pool.add(mapping.Slab(keeper, backing.address, backing.size, pool.piece_size))


def _next_size(pool: Pool) -> int:
    """Return the size of another slab: as many pages as the pool has, but at least one and at most `_PAGES`."""
    present = sum(slab.count for slab in pool.slabs) * pool.piece_size
    return min(max(round_up(present, PAGE_SIZE), PAGE_SIZE), _PAGES * PAGE_SIZE)


def allocate_secret(
    buffer: SmallBuffer, size: int, alignment: int, contents: Contents | None, *, separate: bool, concealed: bool
) -> SecretSlab:
    """Assign memory that is neither dumped nor inherited to a buffer; return its slab.

    A secret of up to 992 bytes shares pages with others, between canaries. Larger ones, and those with `separate`
    pages, which can be `concealed`, end where the guard page begins, unless `alignment` prevents that; the rest of
    their first page contains canaries.

    Raises
    ------
    IOReturnError
        As `SecretBacking`, and of filling it with the contents.
    """
    alignment = max(alignment, 1)
    whole = round_up(_CANARIES, alignment) + size + _CANARIES
    if separate or concealed or whole >= len(_SECRETS):
        backing = SecretBacking(size)
        _LARGE_SECRETS.add_for(_secret_slab(backing, backing.size, 0, backing.mapping), buffer)
    else:
        pool = _SECRETS[whole]
        while not pool.acquire(buffer):
            pool.add(_secret_slab(SecretBacking(_next_size(pool)), pool.piece_size, _CANARIES))
    slab = cast("SecretSlab", buffer._slab)
    slab.put(buffer, size, alignment)
    try:
        if contents:
            contents.fill(cast("Piece", buffer._piece()).address)
        if concealed:
            slab.conceal()
    except BaseException:
        buffer._release_piece()
        raise
    return slab


def _secret_slab(
    backing: SecretBacking, piece_size: int, margin: int, whole: mapping.Mapping | None = None
) -> SecretSlab:
    keeper = MemoryOwner(backing, backing.size, "slab", has_handle=False)
    return mapping.SecretSlab(keeper, backing.address, backing.size, piece_size, margin, whole)


def _map_pages(pool: Pool, *, wired: bool) -> None:
    keeper, backing = _mapped(pool.piece_size, wired=wired)
    frames = [physical // PAGE_SIZE for physical in _page_addresses(backing)]
    number = own_pagemap() if frames else -1
    pool.add(mapping.WholePages(keeper, backing.address, backing.size, pool.piece_size, number, frames, not wired))


def _mapped(size: int, *, wired: bool) -> tuple[MemoryOwner, AnonymousBacking]:
    backing = AnonymousBacking(size, wired=wired)
    return MemoryOwner(backing, size, "slab", has_handle=False), backing


def _page_addresses(backing: AnonymousBacking) -> list[int]:
    """Return the physical address of each page, none if they are hidden or the pages may move."""
    if backing.runs is None:
        return []
    pages = range(backing.address, backing.address + backing.size, PAGE_SIZE)
    return [backing.runs.segment(page, PAGE_SIZE)[0] for page in pages]


def own(buffer: SmallBuffer) -> MemoryOwner | None:
    """Create the owner of a buffer's piece; return None if it has none, or another thread was faster.

    Most small buffers are only allocated, used by their address and freed: they need no owner.
    """
    slab, piece = buffer._slab, buffer._piece()
    if slab is None or piece is None:
        return None
    keeper: MemoryOwner = slab.keeper
    owner = MemoryOwner(PieceBacking(piece, keeper), buffer._capacity, type(buffer).__name__, maker=keeper.maker)
    device_access.restrict(owner, buffer._options)
    return owner if buffer._own(owner, piece) else None


def trim() -> int:
    """Unmap the memory that no buffer uses; return its size in bytes, without pageable memory, which is absent."""
    for pool in _PAGEABLE:
        pool.trim()
    return sum(pool.trim() for pool in _ALL)


def _renew() -> None:
    for pool in _ALL:
        pool.renew()


os.register_at_fork(after_in_child=_renew)


def find(address: int) -> MemoryOwner | None:
    """Return the owner of the small buffer at an address of this process."""
    for pool in _ALL:
        if (buffer := pool.find(address)) is not None:
            with contextlib.suppress(NotOpenError):
                return cast("MemoryOwner", buffer._memory())
    return None


class PieceBacking(MappedBacking):
    """A piece of a slab. The slab is pinned or resident; its owner is `keeper`."""

    def __init__(self, piece: Piece, keeper: MemoryOwner) -> None:
        pages = keeper.backing  # read directly: in a forked child its owner refuses it
        assert pages, "a slab has memory as long as a piece exists"
        super().__init__(wired=pages.wiring is not Wiring.PAGEABLE)
        self.mapping = piece
        self._keeper = keeper
        self._pages = pages
        self._pinned = False
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
        """Whether its slab is resident or pinned; a pin that only other pieces need does not count."""
        return Wiring.RESIDENT if self._keeper.pins and not self._pinned else self._pages.wiring

    def pin(self) -> None:
        """Pin its slab again. Raises as `MemoryOwner.pin`."""
        self.mapping.hold()  # the kernel does not pin inaccessible memory
        try:
            with self._keeper.guard:
                self._keeper.pin()
                self._pinned = True
        finally:
            self.mapping.release()
        self.runs = self._cut(self._pages.runs)

    def unpin(self, *, wait: bool = True) -> None:
        """Undo its `pin`; idempotent. `wait` as `Backing.unpin`."""
        if not self._pinned:
            return
        self._pinned = False
        if not wait:
            self._keeper.unpin_when_free()
            return
        with self._keeper.guard:
            self._keeper.unpin()

    def read_runs(self, *, gaps: bool = False) -> RunTable | None:
        """Read its physical run."""
        return self._cut(pinning.visible_runs(*self._page_range, gaps=gaps))

    def lost(self) -> int | None:
        """Return its first address whose page is no longer mapped, or None."""
        lost = self._pages.lost()
        start, size = self._page_range
        return max(lost, self.address) if lost is not None and start <= lost < start + size else None

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
mlock.on_refusal(trim)
