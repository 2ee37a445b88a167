"""Memory of this process: private anonymous pages, or hugetlb pages if only those satisfy the request."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from iobmd import pagemap
from iobmd._internal import log
from iobmd._native import mapping, mman
from iobmd._native.mapping import Mapping
from iobmd.backing.mapped import MappedBacking
from iobmd.backing.placement import ANYWHERE, Placement
from iobmd.errors import CannotWireError, IOReturnError
from iobmd.host import headroom, limits
from iobmd.memory import numa, pinning, reuse
from iobmd.memory.mlock import make_resident
from iobmd.memory.populate import populate_anonymous
from iobmd.pagemap.file import counts
from iobmd.pagemap.self import own_pagemap
from iobmd.physical import policy, search
from iobmd.physical.pin_attempts import PinAttempts
from iobmd.physical.search import PhysicalConstraints
from iobmd.purgeable.private import LazilyFreed
from iobmd.task import clearing
from iobmd.task.task import kernel_task
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size, round_up

if TYPE_CHECKING:
    from iobmd._internal.chunked import Progress
    from iobmd.backing import Contents


_SPARSE_FROM = 16
"""A source with more than one absent byte in this number is sparse: its copy uses new memory."""


class AnonymousBacking(MappedBacking):
    """Zeroed memory that this process maps.

    Parameters
    ----------
    size : int
        Size in bytes, rounded up to whole pages.
    wired : bool
        Whether to wire it: mlock, and pin if the kernel permits it.
    purgeable : bool
        Whether the kernel may reclaim it while it is volatile.
    want : PhysicalConstraints, optional
        Constraints on the physical addresses, which require a pin.
    contents : Contents, optional
        Initial contents.
    placement : Placement
        The address.
    alignment : int
        Alignment of the address, unless `placement` specifies the address or `want` implies an alignment.
    progress : callable, optional
        Called with the number of bytes populated so far, unless `contents` or `want` populate the memory.
    """

    _reusable = True
    """Whether memory of this class can be reused."""

    def __init__(
        self,
        size: int,
        *,
        wired: bool,
        purgeable: bool = False,
        want: PhysicalConstraints | None = None,
        contents: Contents | None = None,
        placement: Placement = ANYWHERE,
        alignment: int = PAGE_SIZE,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(wired=wired)
        self._progress = progress
        self._anywhere = not placement.at
        self._kind: reuse.Kind | None = None
        # Other pageable memory is touched page by page, or not at all: a new mapping serves it as well.
        populated = self._reusable and (wired or contents) and not purgeable
        if populated and self._anywhere and (want or size >= reuse.LEAST) and (limit := policy.keep_limit()):
            self._kind = reuse.Kind(round_up(size, PAGE_SIZE), alignment, numa.wanted(), want)
            self._most_kept = limit
        # A pageable copy has no more pages than its source.
        self._sparse = bool(contents) and not (wired or purgeable or want)
        if self._reuse(size, want, contents):
            return
        if wired or contents:
            absent = contents.resident if contents and self._sparse else None
            headroom.require(size, swappable=not wired, absent=absent)
        attempts = PinAttempts()
        for _attempt in attempts:
            self.mapping = placement.place(
                round_up(size, PAGE_SIZE), lambda: self._obtain(size, want, attempts, alignment)
            )
            try:
                if purgeable:
                    self.purgeable = LazilyFreed(self.address, self.size)
                self._fill(contents, populated=want is not None)
                if not wired or self._wire(size, want, contents):
                    if want:
                        self._inherit()
                    return
                attempts.failed(self.runs)
            except BaseException:
                self.drop()
                raise
            self.drop()
        raise search.kept_moving(want, attempts)

    def _reuse(self, size: int, want: PhysicalConstraints | None, contents: Contents | None) -> bool:
        """Use kept memory; return False if none satisfies the request."""
        if self._kind is None or (self._sparse and contents and contents.resident() < size - size // _SPARSE_FROM):
            return False
        while kept := reuse.acquire(self._kind):
            self.mapping = kept
            try:
                self._refill(contents)
                if not self._wired or self._wire(size, want, contents):
                    self._inherit()
                    return True
            except BaseException:
                self.drop()
                raise
            self.drop()
        return False

    def _refill(self, contents: Contents | None) -> None:
        """Replace the bytes of a former owner by the contents, or by zeros."""
        huge = HUGE_PAGE_SIZE if self.size >= HUGE_PAGE_SIZE else 0
        if taken := self.size - counts(kernel_task, self.address, self.size).present * PAGE_SIZE:
            headroom.require(taken, swappable=not self._wired)
        self._advise_huge(huge)
        if self._wired:
            make_resident(self.address, self.size, populate=False)  # this charges the limit in advance
        if not self._sparse:
            populate_anonymous(self.address, self.size, swappable=not self._wired)
        filled = contents.size if contents else 0
        if contents:
            contents.fill(self.address, huge=huge, sparse=self._sparse, fresh=False)
        clearing.clear(self.address + filled, self.size - filled)
        if self._wired:
            make_resident(self.address, self.size)

    def _inherit(self) -> None:
        """Undo MADV_DONTFORK, which applies during the search and pinning."""
        self.mapping.withhold(False)
        try:
            mman.advise(self.address, self.size, mman.MADV_DOFORK)
        except OSError as error:  # ENOMEM: it was merged with an adjacent area, and no further area is permitted
            doing = f"cannot make {format_size(self.size)} inheritable (MADV_DOFORK)"
            raise limits.from_oserror(error, doing, PAGE_SIZE) from None

    def _obtain(self, size: int, want: PhysicalConstraints | None, attempts: PinAttempts, alignment: int) -> Mapping:
        try:
            if want:
                return search.obtain(want, attempts)
            if size >= HUGE_PAGE_SIZE:
                alignment = max(alignment, HUGE_PAGE_SIZE)
            return Mapping.anonymous(round_up(size, PAGE_SIZE), alignment, self._sparse)
        except IOReturnError:
            raise
        except (OSError, OverflowError) as error:
            raise limits.from_oserror(error, f"cannot map {format_size(size)}", size) from None

    def _fill(self, contents: Contents | None, *, populated: bool) -> None:
        if not populated:
            numa.place(self.address, self.size)
        huge = HUGE_PAGE_SIZE if self.size >= HUGE_PAGE_SIZE and not populated else 0
        if contents or self.purgeable:
            self._advise_huge(huge)
        if self._wired:
            # Large memory is faulted in on several threads, by the copy or by `populate`: this charges the limit in
            # advance.
            make_resident(self.address, self.size, populate=not huge)
        left_zero = contents.fill(self.address, huge=huge, sparse=self._sparse) if contents else bool(huge)
        if left_zero and (self._wired or (self.purgeable and contents)):
            populate_anonymous(self.address, self.size, swappable=not self._wired, progress=self._progress)
            if self._wired:
                make_resident(self.address, self.size)

    def _advise_huge(self, huge: int) -> None:
        # A kernel without transparent huge pages is only slower. In a sparse copy, MADV_HUGEPAGE is applied to ranges
        # that are copied completely.
        advice = mman.MADV_NOHUGEPAGE if self._sparse else mman.MADV_HUGEPAGE
        if huge:
            with contextlib.suppress(OSError):
                mman.advise(self.address, self.size, advice)

    def _wire(self, size: int, want: PhysicalConstraints | None, contents: Contents | None) -> bool:
        """Pin; return False if pinning moved pages to unsuitable frames, so that another attempt may succeed."""
        try:
            self.pin()
        except CannotWireError as error:
            # mremap(2) does not move hugetlb pages to a given address.
            if self._anywhere:
                log.debug("%s; trying hugetlb pages, which do not move", error)
            else:
                log.debug("%s; its address rules out hugetlb pages", error)
            if not self._anywhere or not self._use_hugetlb(want or PhysicalConstraints(size)):
                if want:
                    raise
                self.pin_refusal = str(error)
                lacking = "no hugetlb pages are free; " if self._anywhere else ""
                log.debug("%smemory of %s is resident (mlock), not pinned", lacking, format_size(size))
                return True
            log.debug("%s is in hugetlb pages", format_size(size))
            self._fill(contents, populated=True)
        if not want:
            return True
        if self.runs is None:  # hidden: it must be in one huge page
            return pagemap.is_huge(self.address, self.size)
        return want.accepts(self.runs)

    def _certain(self) -> list[tuple[int, int]] | None:
        # Private memory cannot be identified in maps, but a pinned frame is mapped nowhere else.
        if not self.runs or not self._pin or self._generation != mapping.generation():
            return None
        try:
            if self.runs.holds(own_pagemap(), PAGE_SIZE):
                return [(self.address, self.size)]
        except IOReturnError:  # pagemap can no longer be read
            return None
        # A page that the kernel is inspecting is temporarily unmapped: this waits for its return.
        now = pinning.visible_runs(self.address, self.size, gaps=True)
        return None if now is None else self.runs.common(now)

    def _use_hugetlb(self, want: PhysicalConstraints) -> bool:
        """Use hugetlb pages if pins are not available: compaction does not move them."""
        mapping = search.from_pools(want)
        if mapping:
            self.mapping.close()
            self.mapping = mapping
            self.runs = self.read_runs()
            self._immovable = True
        return mapping is not None

    def without_reuse(self) -> None:
        """Do not keep its memory when it is freed, because it has properties other than its bytes, such as a name."""
        self._kind = None

    def close(self) -> None:
        """As `MappedBacking.close`; the memory may be kept for later allocations."""
        self._end(keep=True)

    def drop(self) -> None:
        """As `close`, without keeping the memory."""
        self._end(keep=False)

    def _end(self, *, keep: bool) -> None:
        self.seal()
        certain = self._certain()  # before pages may move
        self.unpin()
        if keep and self._kind and self._is_whole(certain) and reuse.offer(self.mapping, self._kind, self._most_kept):
            return
        if policy.NOTHING_REUSED:
            self.mapping.reserved = True
        self.mapping.close(certain)

    def _is_whole(self, certain: list[tuple[int, int]] | None) -> bool:
        """Return whether the whole mapping is still its own, in private pages that the kernel can reclaim."""
        if self._immovable or not self.address:
            return False
        return certain == [(self.address, self.size)] or (certain is None and self.mapping.lost() is None)
