"""Windows of physical memory that can become contiguous memory, and how a search obtains one of them.

The kernel allocates huge pages in the order of its lists, which is not that of their addresses. A search that only
collects them must hold nearly all free memory before the blocks of one window are among those that it has. Here
/proc/kpageflags shows in advance which windows are free. All free huge pages are then held without being cleared
(`ballast`), to have those of the chosen window among them. Then the others are freed, unless the kernel would
allocate these first, and those of the window one by one, each for the next page fault.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from iobmd._internal import log
from iobmd.errors import IOReturnError
from iobmd.memory import numa
from iobmd.pagemap import census
from iobmd.pagemap.census import BlockTable
from iobmd.pagemap.frame import Frames
from iobmd.pagemap.self import own_runs
from iobmd.physical import zones
from iobmd.physical.ballast import Ballast
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size, round_down, round_up

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from iobmd.physical.policy import Budget

_STEP = 256 << 20
"""Bytes that are held before the windows are examined again: 1 to 3 ms."""
_CANDIDATES = 16
"""Windows that are tried."""
_SAMPLED = 32  # every such frame of a window is examined
_CHUNK = 64  # blocks that are freed at a time, to locate those of a window, or as slack
_SLACK = 128 << 20
"""Bytes that remain free: below its watermark and the reserve for low addresses, a zone has none for page faults."""
_NAMES = {"page_tables": "page tables", "kernel": "kernel memory", "hugetlb": "hugetlb pages", "none": "no memory"}


class Window(NamedTuple):
    """A range of physical memory of the requested size and alignment; sizes in bytes."""

    start: int
    """The physical address."""
    size: int
    """The size, in whole blocks."""
    free: int
    """The free part of it."""
    obstacles: dict[str, int]
    """What the kernel cannot move away, by kind."""

    @property
    def heads(self) -> range:
        """The addresses of its blocks."""
        return range(self.start, self.start + self.size, HUGE_PAGE_SIZE)

    def __str__(self) -> str:
        """Return what the window lacks."""
        lacks = [
            f"{_amount(size)} of {_NAMES.get(kind, kind)}"
            for kind, size in sorted(self.obstacles.items(), key=lambda item: -item[1])
        ]
        where = f"the best window, at {self.start:#x},"
        if not lacks and self.free == self.size:
            return f"{where} is free, but other processes allocated memory there at the same time"
        if not lacks:
            lacks = [f"{format_size(self.size - self.free)} in use, which the kernel did not move"]
        return f"{where} lacks {' and '.join(lacks)}"


def _amount(size: int) -> str:
    frames = size // PAGE_SIZE
    return f"{frames} page{'s' * (frames != 1)}" if frames < 256 else format_size(size)


def free_windows(size: int, alignment: int, allowed: int) -> list[Window]:
    """Return disjoint windows that may be free, the highest first; none if the kernel does not show flags of frames.

    Of each block, one frame is examined (20 ms for 24 GiB, a thirtieth of the time for all), and of those in such a
    window, 16: 1 ms for 256 MiB.
    """
    block, frames_each = HUGE_PAGE_SIZE, HUGE_PAGE_SIZE // PAGE_SIZE
    size, step = round_up(size, block), max(alignment, block)
    found: list[Window] = []
    try:
        with Frames() as frames:
            for start, end in reversed(census.ranges(numa.wanted(), block)):
                is_free = frames.free(range(start // PAGE_SIZE, end // PAGE_SIZE, frames_each))
                place = end
                while (place := round_down(place - size, step)) >= start and len(found) < _CANDIDATES:
                    low, high = (place - start) // block, (place + size - start) // block
                    used = is_free.rfind(b"\0", low, high)
                    if used >= 0:  # the next window ends below that block
                        place = start + used * block
                    elif (place | place + size - 1) & ~allowed:
                        place += size - step
                    elif (
                        used := frames.free(range(place // PAGE_SIZE, (place + size) // PAGE_SIZE, _SAMPLED)).rfind(0)
                    ) >= 0:
                        place = round_down(place + used * _SAMPLED * PAGE_SIZE, block)
                    else:
                        found.append(Window(place, size, size, {}))
    except (IOReturnError, OSError) as error:
        log.debug("windows of physical memory cannot be examined: %s", error)
    return found


class Survey:
    """Which blocks of the host's memory are free, movable or neither, at one moment.

    Parameters
    ----------
    size, alignment, allowed : int
        The size of the windows, the alignment of their first address, and the bits that their addresses may have.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPrivileged`: /proc/kpageflags cannot be read (root). `kIOReturnUnsupported`: /proc/zoneinfo.
    """

    def __init__(self, size: int, alignment: int, allowed: int) -> None:
        self._table = BlockTable(numa.wanted())
        self._blocks = -(-size // self._table.block)
        self._step = max(alignment // self._table.block, 1)
        self._allowed = allowed

    def windows(self) -> list[Window]:
        """Return disjoint windows without obstacles, those with the most free memory first."""
        block = self._table.block
        clear = [start for start in self._starts() if not self._table.obstacles(start, self._blocks)]
        ranked = sorted(clear, key=lambda start: (-self._table.free(start, self._blocks), -start))
        found: list[int] = []
        for start in ranked:
            if all(abs(start - other) >= self._blocks for other in found):
                found.append(start)
                if len(found) == _CANDIDATES:
                    break
        return [self._window(start, block) for start in found]

    def best(self) -> Window | None:
        """Return the window with the fewest obstacles, and among these with the most free memory."""
        rank = min(
            ((self._table.obstacles(start, self._blocks), -self._table.free(start, self._blocks), start)
             for start in self._starts()),
            default=None,
        )  # fmt: skip
        return self._window(rank[2], self._table.block) if rank else None

    def _starts(self) -> Iterator[int]:
        block, last = self._table.block, self._table.first + len(self._table) - self._blocks
        first = -(-self._table.first // self._step) * self._step
        for start in range(first, last + 1, self._step):
            low, high = start * block, (start + self._blocks) * block - 1
            if not (low | high) & ~self._allowed and self._table.has_memory(start, self._blocks):
                yield start

    def _window(self, start: int, block: int) -> Window:
        size = self._blocks * block
        return Window(
            start * block, size, self._table.free(start, self._blocks), self._table.kinds(start, self._blocks)
        )


def compact() -> None:
    """Compact the host's memory (vm.compact_memory), if this process is permitted to."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/compact_memory").write_text("1")


class Claim:
    """All free huge pages of the host, until one of several windows is held completely; for a `with` block.

    The calling thread stays on one processor: the kernel keeps freed pages in a list of each, from which the thread's
    next page faults are served.

    Parameters
    ----------
    windows : list of Window
        The windows, the best first.
    budget : Budget
        What may be held.
    """

    def __init__(self, windows: list[Window], budget: Budget) -> None:
        self._windows = windows
        self._budget = budget
        self._undo = contextlib.ExitStack()
        self._located: list[tuple[int, int]] = []  # the frames of its blocks and their offsets in the ballast
        self._freed = 0  # the frame of the block that was freed last
        self._preferred: set[tuple[int, str]] = set()  # the zones that serve page faults before the window's
        self.ballast = Ballast()
        self._undo.callback(self.ballast.close)
        try:
            self._frames = self._undo.enter_context(Frames())
            self._undo.enter_context(_one_processor())
        except BaseException:
            self._undo.close()
            raise

    def hold_one(self, owned: Container[int] = ()) -> Window | None:
        """Hold memory until all of a window is held, except for blocks that are `owned` already, and return it."""
        while self._windows:
            for window in list(self._windows):
                frames = [head // PAGE_SIZE for head in window.heads if head not in owned]
                if not frames:  # all of it was allocated, but one of its frames cannot be pinned
                    self._windows.remove(window)
                    continue
                if self._frames.untouched(frames) < len(frames):
                    continue
                if self._find(frames):
                    return window
                self._windows.remove(window)  # other processes have just allocated a part of it
            self._budget.measure(self.ballast.size)
            if self._budget.over or not self.ballast.hold(min(_STEP, self._budget.untouched - self.ballast.size)):
                break
        return None

    @property
    def blocks(self) -> int:
        """How many blocks of the window are held."""
        return len(self._located)

    def free_next(self, previous: int) -> bool:
        """Free a block of the window, the highest first, so that the next page fault of this thread allocates it.

        It is the first in its processor's list. But if other processes have freed huge pages in a zone that the
        kernel prefers, these are allocated first: the next block is not freed until this one is allocated.

        Parameters
        ----------
        previous : int
            The address at which the last page fault allocated a block; 0 before the first.

        Returns
        -------
        bool
            Whether a page fault must follow; False: all blocks are allocated, or another process has one of them, or
            the budget was exhausted before the last one was allocated.
        """
        if previous and not _is_at(previous, self._freed):
            if self._budget.over or not self._frames.is_unused(self._freed):
                return False
            zones.hold_free(self.ballast, self._preferred, self._budget)
            return True
        if not self._located:
            return False
        self._freed, offset = self._located.pop()
        self.ballast.free(offset, HUGE_PAGE_SIZE)
        return True

    def _find(self, frames: list[int]) -> bool:
        """Determine the positions of blocks in the ballast; return False if it does not have all of them."""
        located: dict[int, int] = {}
        for offset, size in self.ballast.parts(_CHUNK * HUGE_PAGE_SIZE):  # windows are completed by the last blocks
            found = self._locate(offset, size // HUGE_PAGE_SIZE, frames)
            frames = [frame for frame in frames if frame not in found]
            located |= found
            if not frames or self._budget.over:
                break
        if frames:
            return False
        self._located = sorted(located.items())
        self._free_others()
        return True

    def _free_others(self) -> None:
        """Free the held memory outside of the window: all of it if its zone is the first to serve page faults.

        Otherwise, free as much as that zone needs, and also hold the free memory of the zones before it.
        """
        lowest, highest = (self._located[index][0] * PAGE_SIZE for index in (0, -1))
        preferred = zones.preferred_to(highest + HUGE_PAGE_SIZE)
        is_first = preferred is not None and not preferred
        wanted = zones.free_around(lowest) + _SLACK
        needed = {offset for _frame, offset in self._located}
        for start, size in self.ballast.parts(_CHUNK * HUGE_PAGE_SIZE, without=needed):  # most are in that zone
            if not is_first and zones.free_around(lowest) >= wanted:
                break
            self.ballast.free(start, size)
        self._preferred = preferred or set()
        zones.hold_free(self.ballast, self._preferred, self._budget)

    def _locate(self, offset: int, blocks: int, frames: list[int]) -> dict[int, int]:
        """Return the offsets of those blocks, by their first frames, that are in a part of the ballast.

        No interface shows the frames of pages that are not mapped, and mapping them would clear them. A part is
        therefore freed for the few microseconds that it takes to see which frames are no longer in use.
        """
        try:
            freed = self._frames.freed_with(frames, self.ballast.fd, offset, blocks * HUGE_PAGE_SIZE)
        except OSError:  # a signal has interrupted the call, or others have allocated the memory
            return {}
        if not freed or blocks == 1:
            return dict.fromkeys(freed, offset) if len(freed) == 1 else {}
        half = blocks // 2
        found = self._locate(offset, half, freed)
        rest = [frame for frame in freed if frame not in found]
        return found | (self._locate(offset + half * HUGE_PAGE_SIZE, blocks - half, rest) if rest else {})

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_error: object) -> None:
        self._undo.close()


def _is_at(address: int, frame: int) -> bool:
    """Return whether a page of this process is in a page frame."""
    table = own_runs(address, PAGE_SIZE)
    return table.count == 1 and table[0][1] == frame * PAGE_SIZE


@contextlib.contextmanager
def _one_processor() -> Iterator[None]:
    """Keep the calling thread on the processor on which it runs."""
    before = os.sched_getaffinity(0)
    current = int(Path("/proc/thread-self/stat").read_text().rpartition(")")[2].split()[36])
    os.sched_setaffinity(0, {current} if current in before else before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def survey(size: int, alignment: int, allowed: int) -> Survey | None:
    """Return a survey; None if the kernel does not show the flags of frames to this process."""
    try:
        return Survey(size, alignment, allowed)
    except (IOReturnError, OSError) as error:
        log.debug("windows of physical memory cannot be examined: %s", error)
        return None
