"""Search for memory with given physical addresses: contiguous, aligned, masked.

Userspace cannot choose its page frames. Huge pages are therefore collected, sorted by frame, moved into physical
order, and the others freed. This requires no pool, boot parameter or setting of the host, only visible frame numbers
(CAP_SYS_ADMIN). Without them, a single huge page is still known to be contiguous and aligned to its size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iobmd import host, pagemap
from iobmd._internal import log
from iobmd.errors import NoResourcesError, NotPrivilegedError
from iobmd.host.pages import boot_size, folio_sizes
from iobmd.physical import pin_attempts, trim, windows, zones
from iobmd.physical.hugetlb import PoolBlocks
from iobmd.physical.pin_attempts import PinAttempts
from iobmd.physical.policy import Budget
from iobmd.physical.shmem_pages import FileBlocks
from iobmd.physical.thp import Places, Source, TransparentBlocks
from iobmd.physical.zones import ALL_ADDRESSES
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size, format_time, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from iobmd._native.mapping import Mapping
    from iobmd._native.pagemap import RunTable
    from iobmd.memory.shmem import SharedObject
    from iobmd.physical.windows import Window

_STEP = 8 << 20  # the minimum that is worth another attempt
_BRIEF = 0.1  # seconds, and
_BRIEF_FROM = 32 << 20  # bytes, after which windows are examined: on a busy host, one batch takes longer
_BRIEF_UP_TO = 64 << 20  # bytes that are often found among the first huge pages
_COMPACTED = 16  # blocks for which the kernel compacts memory before the windows are examined again
_ROUNDS = 64
_ELSEWHERE = 32  # blocks that page faults may allocate outside of a window before the search continues
_ATTEMPTS = 3  # on a busy host, free windows are soon in use
# Huge pages of up to this size are also used for less memory: clearing one takes 0.1 ms, and many are free.
_SMALL_BLOCK = 2 << 20
_GIGANTIC = 1 << 30
_GIGANTIC_FROM = 512 << 20  # bytes from which half of a gigantic page is used


class PhysicalConstraints(NamedTuple):
    """Constraints on the physical addresses of `size` bytes."""

    size: int
    contiguous: bool = False
    alignment: int = 1
    """Alignment of the physical and the virtual address of the first byte."""
    allowed: int = ALL_ADDRESSES
    """The bits that addresses may have."""

    @property
    def lowest_hole(self) -> int:
        """The lowest bit that addresses may not have; 1 << 64 for none."""
        hole = ~self.allowed & ALL_ADDRESSES
        return hole & -hole or 1 << 64

    @property
    def blocks(self) -> tuple[int, ...]:
        """Sizes of the pages to search, each if there are none of the previous one."""
        if self.lowest_hole < HUGE_PAGE_SIZE:  # no huge page consists only of such addresses
            return (PAGE_SIZE,)
        if not self.contiguous:
            return HUGE_PAGE_SIZE, PAGE_SIZE
        return (HUGE_PAGE_SIZE,) if HUGE_PAGE_SIZE <= _SMALL_BLOCK else blocks_for(self.size, folio_sizes())

    def accepts(self, table: RunTable) -> bool:
        """Return whether memory with these runs satisfies the constraints."""
        if table.hidden or not table.count or table.highest() & ~self.allowed:
            return False
        return not self.contiguous or (table.count == 1 and table[0][1] % max(self.alignment, 1) == 0)

    def __str__(self) -> str:
        kind = "contiguous " if self.contiguous else ""
        aligned = f" aligned to {format_size(self.alignment)}" if self.alignment > PAGE_SIZE else ""
        under = f" under the mask {self.allowed:#x}" if self.allowed != ALL_ADDRESSES else ""
        return f"{kind}physical memory of {format_size(self.size)}{aligned}{under}"


def blocks_for(size: int, available: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of pages to search for contiguous memory, the most suitable first.

    With base pages of 16 KiB, a huge page is 32 MiB: of 200 buffers of 64 KiB in 2 GiB, 55 succeeded from such
    pages. Less memory than a huge page is therefore taken from the smallest page that holds it, then from
    consecutive smaller ones, and otherwise from a huge page, which must be cleared and split.

    Parameters
    ----------
    size : int
        Size of the memory.
    available : sequence of int
        The page sizes: of base pages, of those of intermediate size (mTHP), and of huge pages, ascending.
    """
    *smaller, huge = available
    single = [block for block in smaller if block >= size]
    several = [block for block in reversed(smaller) if block < size]
    return (*single[:1], *several, huge) if size < huge else (huge, *several)


def obtain(want: PhysicalConstraints, attempts: PinAttempts) -> Mapping:
    """Return populated, zeroed memory that satisfies the constraints: whole pages, at least `want.size` bytes.

    The chosen frames are recorded in `attempts`.

    Raises
    ------
    IOReturnError
        `kIOReturnNoResources`: not found within the policy's budget; the message names the longest run and the
        remedies. `kIOReturnNotPrivileged`: the search requires frame numbers, which are hidden. `kIOReturnNoMemory`.
    """
    search = Search(want, Budget())
    why = _out_of_reach(want, search.budget)
    hidden = _require_visible(want)
    gigantic = not why and search.budget.may_reserve and want.size >= _GIGANTIC_FROM
    if gigantic and (pooled := _search_pools(want, search, at_least=_GIGANTIC)):
        return pooled
    for block in () if why else (HUGE_PAGE_SIZE,) if hidden else want.blocks:
        source = TransparentBlocks(block)
        try:
            if chosen := search.find(source):
                attempts.expect(search.chosen, block, want.size)
                mapping = source.assemble(chosen, want.alignment)
                trim.trim(mapping, round_up(want.size, PAGE_SIZE))
                return mapping
            if hidden:
                return _one_huge_page(want, source)
        finally:
            source.close()
        if search.looked_at and not want.contiguous:
            break
    if pooled := _search_pools(want, search):
        return pooled
    if pin_attempts.forget():
        return obtain(want, attempts)
    raise _not_found(want, why or search.report())


def _out_of_reach(want: PhysicalConstraints, budget: Budget) -> str:
    """Return why the search cannot succeed within a budget, or "".

    Raises `kIOReturnNoResources` if no memory of this host meets the requirements, whatever the privilege or policy.
    """
    if want.allowed == ALL_ADDRESSES and want.alignment <= HUGE_PAGE_SIZE:
        return ""
    if want.contiguous and want.size > want.lowest_hole:
        hole = want.lowest_hole
        why = f"addresses of {want.size} contiguous bytes have the bit {hole:#x}, which the mask forbids"
        raise _not_found(want, why)
    if without := zones.without_memory(want.allowed, want.size, want.alignment):
        raise _not_found(want, without)
    return zones.out_of_reach(want.allowed, budget)


def _require_visible(want: PhysicalConstraints) -> bool:
    """Refuse constraints that require frame numbers if these are hidden; return whether they are."""
    try:
        hidden = not host.pfns_visible()
    except OSError:  # /proc/self/pagemap cannot be read, which is reported later
        return False
    if hidden and not _fits_one_huge_page(want):
        raise _must_be_seen(want)
    return hidden


def obtain_shared(
    want: PhysicalConstraints, attempts: PinAttempts, name: str, *, sealed: bool = False
) -> SharedObject:
    """Return a shared object of that name whose pages satisfy the constraints. Raises as `obtain`."""
    search = Search(want, Budget())
    why = _out_of_reach(want, search.budget)
    hidden = _require_visible(want)
    size = round_up(want.size, PAGE_SIZE)
    blocks = (HUGE_PAGE_SIZE,) if hidden or not want.contiguous else want.blocks
    may_reserve = search.budget.may_reserve
    for source in () if why else _shared_sources(blocks, name, sealed=sealed, may_reserve=may_reserve):
        try:
            if chosen := search.find(source):
                attempts.expect(search.chosen, source.block, want.size)
                return source.share(chosen, want.alignment, size)
            if hidden and (place := source.first()) is not None:
                return source.share([place], want.alignment, size)
        finally:
            source.close()
    if pin_attempts.forget():
        return obtain_shared(want, attempts, name, sealed=sealed)
    raise _not_found(want, why or search.report())


def _shared_sources(blocks: tuple[int, ...], name: str, *, sealed: bool, may_reserve: bool) -> Iterator[FileBlocks]:
    for block in blocks:
        # A memfd has pages of other sizes only if the host's settings request them.
        if block in (PAGE_SIZE, HUGE_PAGE_SIZE):
            yield FileBlocks(block, name, sealed=sealed)
    if sealed:  # pages that are freed to a pool in between may be allocated by other processes
        return
    for pool in host.hugetlb_pools():
        yield PoolBlocks(pool, reserve=may_reserve, name=name)


def from_pools(want: PhysicalConstraints) -> Mapping | None:
    """Return suitable memory from the hugetlb pools without enlarging them, or None."""
    return _search_pools(want, Search(want, Budget()), reserve=False)


class Search:
    """A search through the blocks of sources, within one budget."""

    def __init__(self, want: PhysicalConstraints, budget: Budget) -> None:
        self.want = want
        self.budget = budget
        self.looked_at = 0
        self.longest = 0
        self.fitting = 0
        self.chosen: list[int] = []
        """The physical addresses of the blocks that were found."""
        self.best: Window | None = None
        """The window with the fewest obstacles, if windows were examined and none was obtained."""

    def find(self, source: Source) -> list[int] | None:
        """Return the positions of suitable blocks in physical order; None if none are found within the budget.

        Contiguous memory of many blocks is rarely among those that the kernel offers first. It is taken from a window
        that is free according to the flags of all frames, or for which the kernel can move other memory away.
        """
        with zones.held_above(self.want.allowed, self.budget):
            if not self.want.contiguous or self.want.size <= source.block or source.immovable:
                return self.run(source)
            if source.block != HUGE_PAGE_SIZE or not self.budget.untouched:  # windows consist of huge pages
                return self.run(source)
            if self.want.size <= _BRIEF_UP_TO:
                chosen = self.run(source, brief=True)
                if chosen or source.hidden or not self.looked_at:
                    return chosen
                source.close()
            for _attempt in range(_ATTEMPTS):
                if self.budget.over or not (free := windows.free_windows(*self._window())):
                    break
                if chosen := self._claim(source, free, compact=False):
                    return chosen
            return self._examine(source)

    def _examine(self, source: Source) -> list[int] | None:
        """Examine all memory, and obtain a window from which the kernel can move other memory away."""
        if self.budget.may_reserve:
            windows.compact()
        for _attempt in range(_ATTEMPTS):
            if self.budget.over or not (survey := windows.survey(*self._window())):
                break
            candidates = survey.windows()
            if candidates and (chosen := self._claim(source, candidates, compact=True)):
                return chosen
            self.best = survey.best()
            if not candidates:
                break
        if self.budget.over and self.looked_at:
            return None
        # What looks like kernel memory may be free pages in the lists of processors, which compaction empties.
        return self.run(source)

    def _window(self) -> tuple[int, int, int]:
        return self.want.size, max(self.want.alignment, HUGE_PAGE_SIZE), self.want.allowed

    def _claim(self, source: Source, candidates: list[Window], *, compact: bool) -> list[int] | None:
        """Obtain one of the candidates.

        If none of them is free, `compact` them: page faults allocate huge pages while all free ones are held, and the
        kernel compacts memory for each, until it has moved all obstacles out of a candidate.
        """
        found: Places = {}
        candidates = [each for each in candidates if pin_attempts.may_be_pinned(each.start, each.size)]
        try:
            holder = windows.Claim(candidates, self.budget)
        except OSError as error:  # no descriptor is free
            log.debug("free memory cannot be held: %s", error)
            return None
        with holder as claim:
            for _round in range(_ROUNDS):  # another process may be faster to allocate some of the blocks
                more: Places = {}
                if claim.hold_one(found):
                    room = max(0, self.budget.bytes // source.block - len(found) - claim.blocks)
                    elsewhere = min(room, claim.blocks, _ELSEWHERE)
                    more = source.more(claim.blocks + elsewhere, self.want.alignment, claim.free_next)
                elif compact and not self.budget.over and len(found) * source.block < self.budget.bytes:
                    more = source.more(_COMPACTED, self.want.alignment)
                found |= more
                self.looked_at += len(more) * source.block
                if more and (chosen := self._choose(found, source.block, self._needed(source))):
                    log.debug("%s: found in a window, %s", self.want, self._effort())
                    return [found[block] for block in chosen]
                if not more or self.budget.over:
                    break
        source.close()
        return None

    def _needed(self, source: Source) -> int:
        return -(-self.want.size // source.block)

    def run(self, source: Source, *, brief: bool = False) -> list[int] | None:
        """As `find`, among the blocks that the kernel offers; `brief`: ends early if a few of them do not suffice."""
        needed = self._needed(source)
        found: Places = {}
        held = 0
        batch = needed
        while batch > 0:
            more = source.more(batch, self.want.alignment)
            held += batch
            self.looked_at += len(more) * source.block
            found |= more
            if chosen := self._choose(found, source.block, needed):
                log.debug("%s: found in %s, %s", self.want, type(source).__name__, self._effort())
                return [found[block] for block in chosen]
            if not more or source.hidden or self.budget.over:
                break
            if brief and self.budget.elapsed > _BRIEF and held * source.block >= _BRIEF_FROM:
                break
            batch = self._next_batch(held, needed, source.block)
        log.debug("%s: not found in %s, %s", self.want, type(source).__name__, self._effort())
        return None

    def _effort(self) -> str:
        return f"{format_size(self.looked_at)} inspected in {format_time(self.budget.elapsed)}"

    def _next_batch(self, held: int, needed: int, block: int) -> int:
        """Return how many blocks to allocate next, given those held; 0 or less if the budget is exhausted.

        Other processes allocate memory during a search. Free memory is therefore measured before each batch, and a
        batch takes at most a quarter of it. With a single measurement at the start, a guest whose other half was
        filled at the same time ran out of memory, and the kernel killed the searching process.
        """
        self.budget.measure(held * block)
        left = self.budget.bytes // block - held
        step = max(_STEP // block, 1)
        return min(max(needed // 2, step, held // 4), max(left // 4, min(left, step)))

    def _choose(self, found: Places, block: int, needed: int) -> list[int] | None:
        allowed = self.want.allowed
        fitting = sorted(address for address in found if not (address | block - 1) & ~allowed)
        if pin_attempts.any_moved():
            fitting = [address for address in fitting if pin_attempts.may_be_pinned(address, block)]
        self.fitting = max(self.fitting, len(fitting) * block)
        self.chosen = self._among(fitting, block, needed)
        return self.chosen or None

    def _among(self, fitting: list[int], block: int, needed: int) -> list[int]:
        alignment = self.want.alignment
        if not self.want.contiguous:
            return fitting[:needed] if len(fitting) >= needed else []
        start = 0
        for index, address in enumerate(fitting):
            if index and address != fitting[index - 1] + block:
                start = index
            self.longest = max(self.longest, (index + 1 - start) * block)
            while start <= index and fitting[start] % alignment:
                start += 1
            if index + 1 - start >= needed:
                return fitting[start : start + needed]
        return []

    def report(self) -> str:
        """Return a report of the failed search and the remedies."""
        best = f"the longest run was {format_size(self.longest)}"
        if not self.want.contiguous:
            best = f"{format_size(self.fitting)} were suitable"
        looked = f"of {format_size(self.looked_at)} inspected in {self.budget.elapsed:.2f} s {best}"
        if self.best:
            looked += f"; {self.best}"
        return f"{looked}; {', or '.join(self._remedies())}{self._reference()}"

    def _reference(self) -> str:
        """Return a reference to the command that shows why memory is not contiguous."""
        mib = -(-self.want.size >> 20)
        # Larger memory consists of windows of at most 1 GiB, which the command examines.
        command = f"iobmd pagemap --host {min(mib, 1024)}M"
        return f"; `{command}` shows the obstacles" if self.want.contiguous else ""

    def _remedies(self) -> Iterator[str]:
        pages = 4 * -(-self.want.size // HUGE_PAGE_SIZE)
        at_boot = f"reserve the pages at boot (hugepagesz={boot_size(HUGE_PAGE_SIZE)} hugepages={pages})"
        if self.best and self.best.obstacles:  # which neither more time, nor more memory, nor compaction moves away
            if "slab" in self.best.obstacles:
                yield "free slabs that can be reclaimed (as root: sysctl vm.drop_caches=2)"
            yield at_boot
            return
        if self.budget.over:
            yield f"allow more time ({self.budget.names.time_budget})"
        if more := self.budget.remedy():
            yield more
        else:
            yield f"make room ({self.budget.why_no_more()})"
        if self.budget.may_reserve:  # the kernel failed too: enlarging the pool or compacting manually would not help
            yield "free the caches of the host (as root: sysctl vm.drop_caches=3)"
            yield at_boot
            return
        yield f"allow larger hugetlb pools ({self.budget.names.reserve}, as root)"
        for pool in host.hugetlb_pools():
            if pool.size == HUGE_PAGE_SIZE:
                yield f"enlarge one: {host.pool_remedy(pool, pages).partition('  #')[0]}"


def _one_huge_page(want: PhysicalConstraints, source: TransparentBlocks) -> Mapping:
    """Find memory without frame numbers: a huge page is contiguous and aligned to its size."""
    mapping = source.detach_first()
    if pagemap.is_huge(mapping.address, mapping.size):
        return mapping
    mapping.close()
    raise _not_found(want, "the kernel had no huge page; `iobmd doctor` shows how to enable them")


def _fits_one_huge_page(want: PhysicalConstraints) -> bool:
    return want.size <= HUGE_PAGE_SIZE and want.alignment <= HUGE_PAGE_SIZE and want.allowed == ALL_ADDRESSES


def _must_be_seen(want: PhysicalConstraints) -> NotPrivilegedError:
    return NotPrivilegedError(
        f"no {want}: physical addresses are hidden from this process, so that only memory in one huge page "
        f"({format_size(HUGE_PAGE_SIZE)}) is possible; run with CAP_SYS_ADMIN"
    )


def _search_pools(
    want: PhysicalConstraints, search: Search, *, reserve: bool | None = None, at_least: int = 0
) -> Mapping | None:
    for pool in host.hugetlb_pools():
        if pool.size < at_least:
            continue
        source = PoolBlocks(pool, reserve=search.budget.may_reserve if reserve is None else reserve)
        try:
            if chosen := search.run(source):
                return source.assemble(chosen, want.alignment)
        finally:
            source.close()
    return None


def kept_moving(want: PhysicalConstraints | None, attempts: PinAttempts) -> NoResourcesError:
    """Return the error for memory that moved in each of several attempts to pin it."""
    message = f"the kernel moved the pages in each of {attempts.made} attempts to pin {want}"
    return NoResourcesError(message)


def _not_found(want: PhysicalConstraints, why: str) -> NoResourcesError:
    return NoResourcesError(f"no {want}: {why}")
