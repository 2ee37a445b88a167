"""The physical memory of the host by kind, from /proc/kpageflags (Documentation/admin-guide/mm/pagemap.rst)."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from iobmd._internal.arguments import integers
from iobmd._native.pagemap import KINDS, WINDOW_STATES
from iobmd.errors import BadArgumentError, UnsupportedError
from iobmd.host import zoneinfo
from iobmd.pagemap.frame import Frames
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, round_down, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from iobmd._native.pagemap import Census
    from iobmd.host.zoneinfo import Zone

_STEP = 4 << 30
"""Bytes whose frames are read between two reports of progress: a tenth of a second."""

_WIDEST = 1 << 30
"""The largest size of windows that are reported."""

MOVABLE = ("anonymous", "file", "shared")
"""Kinds of frames that compaction can move, unless they are in a huge page or pinned."""

_CELL_KINDS = (*KINDS, "huge pages")
"""The kinds of a cell of the map."""
_FREE = KINDS.index("free")
_MOVABLE = tuple(map(KINDS.index, MOVABLE))


class ZoneMemory(NamedTuple):
    """The memory of a zone; sizes in bytes."""

    node: int
    """The NUMA node."""
    name: str
    """The name, such as ``Normal``."""
    kinds: dict[str, int]
    """Memory by kind: ``free``, ``anonymous``, ``file`` (page cache), ``shared`` (tmpfs, memfd, SysV), ``hugetlb``,
    ``slab``, ``page_tables``, ``kernel`` (all other memory in use), ``reserved`` (at boot: the kernel's image, the
    array of page descriptors, firmware), ``offline`` (by a balloon or hotplug), ``poisoned``, ``uninitialized``
    (free, but the kernel must initialize its page descriptors before it can allocate it)."""
    huge: dict[str, int]
    """The part of each kind in folios of at least a huge page, mapped as such or not."""
    windows: dict[int, dict[str, int]]
    """Numbers of aligned windows by size and state: ``free``; ``movable`` (free after compaction); ``huge`` (huge
    pages, and otherwise free or movable memory); ``one_short`` (windows of a huge page: free or movable except for
    one unmovable page, or a slab of up to 8); ``unmovable`` (others). None contains uninitialized memory."""
    free_runs: dict[int, tuple[int, int]]
    """Runs of free frames by length, rounded down to a power of two: their number, and the memory in them."""


class FrameRun(NamedTuple):
    """Contiguous physical memory, in bytes."""

    physical: int
    """The first address."""
    length: int
    """The length."""
    free: int
    """The free part."""


class LonelyPage(NamedTuple):
    """The only unmovable page of an otherwise free or movable window of a huge page."""

    physical: int
    """The physical address."""
    length: int
    """The length in bytes: a page, or a slab of a few."""
    kind: str
    """The kind, such as ``page_tables``."""
    cgroup: str | None
    """The memory cgroup to which it is charged; None if it is charged to no cgroup, or if that is unknown."""


class MapRow(NamedTuple):
    """A row of a map of physical memory."""

    physical: int
    """The address of its first cell."""
    cells: list[dict[str, int]]
    """Bytes by kind in each cell, movable memory in huge pages as ``huge``; empty if there is no memory."""


class HostMemory(NamedTuple):
    """The physical memory of the host. It changes while it is read, so that sums are exact only on an idle host."""

    zones: list[ZoneMemory]
    """The zones."""
    offline: int
    """Memory in blocks that are offline (/sys/devices/system/memory), in bytes; in no zone."""
    longest_free: FrameRun
    """The longest run of free memory."""
    longest_movable: FrameRun
    """The longest run of free and movable memory, in a zone: the most that compaction can free."""
    closest: dict[int, int]
    """By size: the address of the aligned window with the fewest unmovable pages."""
    lonely: list[LonelyPage]
    """Unmovable pages in windows that are one page short of being free or movable; at most 16,384."""
    block: int
    """The size of a huge page, in bytes."""
    cell: int
    """The size of a cell of the map, in bytes; 0 for no map."""
    rows: list[MapRow]
    """The map, if requested: rows with memory, ascending."""

    @property
    def kinds(self) -> dict[str, int]:
        """Memory by kind, in bytes, with offline blocks."""
        total = _sum(zone.kinds for zone in self.zones)
        total["offline"] += self.offline
        return total

    @property
    def huge(self) -> dict[str, int]:
        """The part of each kind in huge pages, in bytes."""
        return _sum(zone.huge for zone in self.zones)

    @property
    def windows(self) -> dict[int, dict[str, int]]:
        """Numbers of aligned windows by size and state."""
        sizes = self.zones[0].windows if self.zones else ()
        return {size: _sum(zone.windows[size] for zone in self.zones) for size in sizes}

    @property
    def free_runs(self) -> dict[int, tuple[int, int]]:
        """Runs of free frames by length, rounded down to a power of two: their number, and the memory in them."""
        lengths = sorted({length for zone in self.zones for length in zone.free_runs})
        found = {length: [zone.free_runs.get(length, (0, 0)) for zone in self.zones] for length in lengths}
        return {length: (sum(n for n, _ in runs), sum(held for _, held in runs)) for length, runs in found.items()}

    @property
    def after_compaction(self) -> int:
        """The maximum length of contiguous memory that compaction can free, in bytes.

        Movable memory must fit elsewhere: no run can be longer than all free memory. Pinned pages look movable.
        """
        return min(self.longest_movable.length, self.kinds["free"])


def host_memory(
    *, rows: int = 0, cells: int = 64, progress: Callable[[int, int], object] | None = None
) -> HostMemory:
    """Count the page frames of the host by kind, node and zone.

    Parameters
    ----------
    rows : int
        The maximum number of rows of a map; 0: no map.
    cells : int
        Cells in each row.
    progress : callable, optional
        Called with the number of bytes read, and their total.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: a negative number of rows, or no cells.
        `kIOReturnNotPrivileged`: /proc/kpageflags cannot be read (root). `kIOReturnUnsupported`: the zones are hidden
        (/proc/zoneinfo).

    Notes
    -----
    Reading takes the kernel 0.11 µs per frame: 0.7 s for 24 GiB. Nothing is locked. Memory that the kernel keeps in
    lists of each processor counts as ``kernel``, because no flag shows it.
    """
    rows, cells = integers(rows=rows, cells=cells)
    if rows < 0 or cells < 1:
        raise BadArgumentError(f"a map of {rows} rows of {cells} cells is not possible")
    zones = _zones()
    with Frames() as frames:
        return _Reading(frames, _Map(_online(), rows, cells), progress).result(zones)


def _zones() -> list[Zone]:
    try:
        return zoneinfo.zones()
    except OSError as error:
        message = f"cannot locate the zones of memory: /proc/zoneinfo: {error.strerror}"
        raise UnsupportedError(message, error.errno or 0) from None


def kinds_between(physical: int, length: int) -> dict[str, int]:
    """Return the memory of a physical range by kind, in bytes. Raises as `host_memory`."""
    with Frames() as frames:
        census = frames.census(1, 0, 1)
        census.begin(physical // PAGE_SIZE, 0)
        census.read((physical + length) // PAGE_SIZE)
        census.finish()
        return _by_kind(census.collect()[0])


def ranges(node: int | None, block: int) -> list[tuple[int, int]]:
    """Return the physical ranges of memory of a node, or all, in whole blocks, ascending; each is in one zone.

    Raises
    ------
    IOReturnError
        `kIOReturnUnsupported`: the zones are hidden (/proc/zoneinfo).
    """
    found = [
        (round_up(max(start, zone.start), block), round_down(min(end, zone.end), block))
        for zone in _zones()
        if node in (None, zone.node)
        for start, end in _online()
    ]
    return sorted((start, end) for start, end in found if start < end)


class BlockTable:
    """The memory of each block of the size of a huge page, by kind.

    Parameters
    ----------
    node : int, optional
        Only blocks of this node.

    Raises
    ------
    IOReturnError
        As `host_memory`.
    """

    def __init__(self, node: int | None = None) -> None:
        self.block = HUGE_PAGE_SIZE
        found = [(start // self.block, end // self.block) for start, end in ranges(node, self.block)]
        self.first = found[0][0] if found else 0
        """The number of the first block: its address divided by the size of a block."""
        self._free, self._unmovable, self._present = ([0] for _ in range(3))  # sums of the blocks before each
        self._counts: dict[int, array[int]] = {}
        with Frames() as frames:
            for start, end in found:
                self._read(frames, start, end)

    def _read(self, frames: Frames, start: int, end: int) -> None:
        each = self.block // PAGE_SIZE
        census = frames.census(each, end - start, each)
        census.begin(start * each, 0)
        census.read(end * each)
        census.finish()
        counts, many = array("I", census.cell_counts()), len(KINDS) + 1
        self._append(start - self.first - len(self), 0, 0, 0)
        for number in range(start, end):
            kinds = counts[(number - start) * many :][:many]
            free = kinds[_FREE]
            unmovable = sum(kinds) - free - sum(kinds[index] for index in _MOVABLE)
            if unmovable:
                self._counts[number] = kinds
            self._append(1, free, unmovable, 1)

    def _append(self, blocks: int, free: int, unmovable: int, present: int) -> None:
        for sums, value in ((self._free, free), (self._unmovable, unmovable), (self._present, present)):
            sums.extend([sums[-1] + value] * blocks)

    def __len__(self) -> int:
        return len(self._free) - 1

    def free(self, start: int, blocks: int) -> int:
        """Return the free memory of consecutive blocks, in bytes."""
        return self._between(self._free, start, blocks) * PAGE_SIZE

    def obstacles(self, start: int, blocks: int) -> int:
        """Return the bytes of consecutive blocks that compaction cannot move; pinned pages do not count."""
        return self._between(self._unmovable, start, blocks) * PAGE_SIZE

    def has_memory(self, start: int, blocks: int) -> bool:
        """Return whether there is memory in each of consecutive blocks."""
        return self._between(self._present, start, blocks) == blocks

    def kinds(self, start: int, blocks: int) -> dict[str, int]:
        """Return the memory of consecutive blocks that compaction cannot move, by kind, in bytes."""
        total: dict[str, int] = {}
        for number in range(start, start + blocks):
            for index, frames in enumerate(self._counts.get(number, ())):
                if frames and index != _FREE and index not in _MOVABLE:
                    name = _CELL_KINDS[index]
                    total[name] = total.get(name, 0) + frames * PAGE_SIZE
        return total

    def _between(self, sums: list[int], start: int, blocks: int) -> int:
        return sums[start - self.first + blocks] - sums[start - self.first]


class _Map:
    """The positions of memory in the rows of a map; rows without memory are left out.

    A cell is as small as the number of rows permits: a page, or that times a power of two.
    """

    def __init__(self, ram: list[tuple[int, int]], rows: int, cells: int) -> None:
        self.ram, self.cells = ram, cells if rows else 0
        memory = sum(end - start for start, end in ram)
        needed = max(1, memory // (max(rows, 1) * cells))
        self.cell = max(PAGE_SIZE, 1 << (needed - 1).bit_length())
        self.rows = self._rows()
        # Ranges that begin or end inside a row may need more of them, but each at least one.
        while len(self.rows) > max(rows, len(ram)):
            self.cell *= 2
            self.rows = self._rows()

    def _rows(self) -> list[int]:
        """Return the addresses of the rows."""
        if not self.cells:
            return []
        row = self.cell * self.cells
        numbers = {number for start, end in self.ram for number in range(start // row, (end - 1) // row + 1)}
        return [number * row for number in sorted(numbers)]

    def cell_of(self, physical: int) -> int:
        """Return the index of the cell that contains an address."""
        if not self.rows:
            return 0
        row = bisect_right(self.rows, physical) - 1
        return row * self.cells + (physical - self.rows[row]) // self.cell

    def filled(self, raw: bytes) -> list[MapRow]:
        """Return the rows with the counts of a census."""
        counts, names = array("I", raw), (*KINDS, "huge")
        many = len(names)
        kinds = [
            {name: frames * PAGE_SIZE for name, frames in zip(names, counts[at : at + many], strict=True) if frames}
            for at in range(0, len(counts), many)
        ]
        return [MapRow(at, kinds[index * self.cells :][: self.cells]) for index, at in enumerate(self.rows)]


class _Reading:
    """One pass through the flags of all frames."""

    def __init__(self, frames: Frames, layout: _Map, progress: Callable[[int, int], object] | None) -> None:
        self._frames, self._map = frames, layout
        self._progress = progress
        self._block = HUGE_PAGE_SIZE
        self._total, self._done = sum(end - start for start, end in layout.ram), 0
        self._census = frames.census(
            self._block // PAGE_SIZE, len(layout.rows) * layout.cells, layout.cell // PAGE_SIZE
        )

    def result(self, zones: list[Zone]) -> HostMemory:
        """Read the frames of the zones."""
        offline = sum(
            max(0, min(end, high) - max(start, low))
            for start, end in zoneinfo.ram()
            for low, high in zoneinfo.offline_blocks()
        )
        found = []
        defers = zoneinfo.uninitialized(zones) > 0
        for zone in zones:
            parts = [(max(start, zone.start), min(end, zone.end)) for start, end in self._map.ram]
            parts = [(start, end) for start, end in parts if start < end]
            for start, end in parts:
                is_last = (start, end) == parts[-1]
                self._read(start, end, self._initialized(zone, start, end) if defers and is_last else end)
            found.append(_zone_memory(zone, self._census, self._block))
        free, movable = (FrameRun(*(number * PAGE_SIZE for number in run)) for run in self._census.longest())
        closest = {size: self._closest(size) for size in (found[0].windows if found else ())}
        return HostMemory(
            zones=found,
            offline=offline,
            longest_free=free,
            longest_movable=movable,
            closest={size: at for size, at in closest.items() if at is not None},
            lonely=[self._lonely(*page) for page in self._census.nearly_free()],
            block=self._block,
            cell=self._map.cell if self._map.rows else 0,
            rows=self._map.filled(self._census.cell_counts()),
        )

    def _initialized(self, zone: Zone, start: int, end: int) -> int:
        """Return the end of the initialized memory of the last range of a zone.

        Kernels may initialize page descriptors after boot (CONFIG_DEFERRED_STRUCT_PAGE_INIT), or when they need the
        memory (deferred_init=lazy), from the start of a zone to its end. Until then, the descriptors have no flags,
        and the memory is not managed. Memory reserved at boot is not managed either, but has a flag. Memory of a
        driver may have none at the end of a zone as well: only MemFree shows that some is not initialized.
        """
        begin = max(start, end - (zone.present - zone.managed))
        untouched = self._frames.end_of_flags(begin, end)
        return untouched if end - untouched >= zoneinfo.SECTION else end

    def _read(self, start: int, end: int, initialized: int) -> None:
        """Read the frames of a range up to the end of its initialized part."""
        self._census.begin(start // PAGE_SIZE, self._map.cell_of(start))
        at = start
        while at < initialized:
            until = min(initialized, at + _STEP)
            stopped = self._census.read(until // PAGE_SIZE) * PAGE_SIZE
            self._report(until - at)
            at = until if stopped >= until else initialized  # no frame has a descriptor from there on
        if initialized < end:
            self._census.skip(end // PAGE_SIZE)
            self._report(end - initialized)
        self._census.finish()

    def _report(self, done: int) -> None:
        self._done += done
        if self._progress:
            self._progress(self._done, self._total)

    def _closest(self, size: int) -> int | None:
        at = self._census.closest_window((size // self._block).bit_length() - 1)
        return None if at is None else at * PAGE_SIZE

    def _lonely(self, frame: int, frames: int, kind: int) -> LonelyPage:
        physical, length = frame * PAGE_SIZE, frames * PAGE_SIZE
        cgroups = self._frames.describe(physical, length).cgroups
        return LonelyPage(physical, length, KINDS[kind], cgroups[0] if cgroups else None)


def _online() -> list[tuple[int, int]]:
    """Return the ranges of RAM in whole pages, without the blocks that are offline."""
    found = [(round_up(start, PAGE_SIZE), round_down(end, PAGE_SIZE)) for start, end in zoneinfo.ram()]
    for low, high in zoneinfo.offline_blocks():
        parts = ((start, min(end, low)) for start, end in found), ((max(start, high), end) for start, end in found)
        found = sorted({part for kind in parts for part in kind if part[0] < part[1]})
    return found


def _zone_memory(zone: Zone, census: Census, block: int) -> ZoneMemory:
    frames, huge, windows, runs, held = census.collect()
    sizes = {
        block << level: dict(zip(WINDOW_STATES, states, strict=True))
        for level, states in enumerate(windows)
        if block << level <= _WIDEST
    }
    free_runs = {
        PAGE_SIZE << order: (number, in_runs * PAGE_SIZE)
        for order, (number, in_runs) in enumerate(zip(runs, held, strict=True))
        if number
    }
    return ZoneMemory(zone.node, zone.name, _by_kind(frames), _by_kind(huge), sizes, free_runs)


def _by_kind(frames: Iterable[int]) -> dict[str, int]:
    return {kind: many * PAGE_SIZE for kind, many in zip(KINDS, frames, strict=True)}


def _sum(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0) + amount
    return total
