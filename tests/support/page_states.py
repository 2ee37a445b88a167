"""`PageStateProcess`: a process with memory in every state (page_states.c); and a reader of pages without `iobmd`."""

import contextlib
import mmap
import re
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from support import source_process

SOURCE = Path(__file__).with_name("page_states.c")
PAGE = mmap.PAGESIZE
HEAD, TAIL, HUGETLB, THP, ZERO_PAGE = 1 << 15, 1 << 16, 1 << 17, 1 << 22, 1 << 24
STATES = 1 << 63 | 1 << 62 | 1 << 58
"""Bits of an entry of an existing page: present, swapped, guard (the soft-dirty bit alone does not count)."""
COUNTERS = (
    "Rss", "Swap", "LazyFree", "Anonymous", "AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Shared_Hugetlb",
    "Private_Hugetlb",
)  # fmt: skip
"""Counters of smaps; the others depend on other processes."""
_BLOCK = 512 * 8
S = TypeVar("S")
T = TypeVar("T")


def build(folder: Path) -> Path:
    """Compile the program."""
    return source_process.build(folder, SOURCE)


class PageStateProcess(source_process.CommandedProcess):
    """The running program, which the end of the `with` block kills."""

    def __init__(self, program: Path, *kinds: str, user: int | None = None) -> None:
        file = program.with_name("file")
        if not file.exists():
            file.write_bytes(bytes(range(256)) * (16 << 10))
            file.chmod(0o666)
        # Another user may be unable to access their directory.
        with program.open("rb") as opened, file.open("r+b") as opened_file:
            self.process = subprocess.Popen(
                [f"/proc/self/fd/{opened.fileno()}", f"/proc/self/fd/{opened_file.fileno()}", *kinds],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
                pass_fds=[opened.fileno(), opened_file.fileno()],
            )
        self.pid = self.process.pid
        self.found: dict[str, tuple[int, int]] = {}
        while (line := self._answer()) != "ready":
            assert line, f"the target exited: {self.process.wait()}"
            kind, address, size = line.split()
            self.found[kind] = int(address), int(size)

    def __getitem__(self, kind: str) -> tuple[int, int]:
        return self.found[kind]


class Area(NamedTuple):
    """The counters of one area in /proc/PID/smaps, in bytes."""

    start: int
    end: int
    name: str
    flags: list[str]
    counters: dict[str, int]

    @property
    def resident(self) -> int:
        return self.counters["Rss"] + self.counters["Shared_Hugetlb"] + self.counters["Private_Hugetlb"]

    @property
    def huge(self) -> int:
        """Bytes mapped by huge pages."""
        return sum(self.counters[name] for name in COUNTERS[4:])


def areas(pid: int) -> list[Area]:
    """Read smaps, without areas above the addresses for which pagemap has entries (vsyscall)."""
    found: list[Area] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)", line):
            found.append(Area(int(head[1], 16), int(head[2], 16), head[3], [], {}))
        elif (field := re.match(r"(\w+):\s+(\d+) kB", line)) and field[1] in COUNTERS:
            found[-1].counters[field[1]] = int(field[2]) << 10
        elif line.startswith("VmFlags:"):
            found[-1].flags.extend(line.split()[1:])
    return [area for area in found if area.start < 1 << 63]


def entries(pid: int, ranges: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Return the nonempty pagemap entries of ranges (start, end), by the addresses of the pages."""
    found: dict[int, int] = {}
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        for start, end in ranges:
            at, last = start // PAGE * 8, -(-end // PAGE) * 8
            while at < last:
                pagemap.seek(at)
                raw = pagemap.read(min(_BLOCK, last - at))
                assert raw, f"no entries at {at // 8 * PAGE:#x}"
                if raw != bytes(len(raw)):
                    words = struct.unpack(f"={len(raw) // 8}Q", raw)
                    found.update((at // 8 * PAGE + index * PAGE, word) for index, word in enumerate(words) if word)
                at += len(raw)
    return {address: word for address, word in found.items() if word & STATES}


class Page(NamedTuple):
    """The state of one page, from bits 63, 62, 58 and 61 of its entry."""

    present: bool
    swapped: bool
    guard: bool
    marker: bool
    file: bool
    frame: int | None


def page(word: int, swap_files: int, hidden: bool = False) -> Page:
    """Decode an entry (proc_pid_pagemap(5)). An entry with the swap bit but without a swap file is a marker."""
    present, guard = bool(word >> 63), bool(word >> 58 & 1)
    kept = bool(word >> 62 & 1) and not guard
    marker = kept and word & 31 >= swap_files
    frame = word & (1 << 55) - 1 if present and not hidden else None
    return Page(present, kept and not marker, guard, marker, present and bool(word >> 61 & 1), frame)


def pages(words: dict[int, int], hidden: bool = False) -> dict[int, Page]:
    """Decode entries."""
    swap_files = Path("/proc/swaps").read_text().count("\n") - 1
    return {address: page(word, swap_files, hidden) for address, word in words.items()}


def runs(words: dict[int, int]) -> list[tuple[int, int, int]]:
    """Return the physically contiguous runs, which end at unmapped pages and at frames that are not adjacent."""
    found: list[list[int]] = []
    for address, word in words.items():
        if not word >> 63:
            continue
        physical = (word & (1 << 55) - 1) * PAGE
        if found and found[-1][0] + found[-1][2] == address and found[-1][1] + found[-1][2] == physical:
            found[-1][2] += PAGE
        else:
            found.append([address, physical, PAGE])
    return [(virtual, physical, length) for virtual, physical, length in found]


class FrameTable:
    """/proc/kpageflags or /proc/kpagecount: one word per frame."""

    def __init__(self, name: str) -> None:
        self._file = Path("/proc", name).open("rb", buffering=0)  # noqa: SIM115 (close)
        self._blocks: dict[int, tuple[int, ...]] = {}
        self._folios: dict[int, int] = {}

    def __getitem__(self, frame: int) -> int:
        block = self._blocks.get(frame // 512)
        if block is None:
            self._file.seek(frame // 512 * _BLOCK)
            raw = self._file.read(_BLOCK)
            block = self._blocks[frame // 512] = struct.unpack(f"={len(raw) // 8}Q", raw)
        return block[frame % 512]

    def folio(self, frame: int) -> int:
        """Return the size in bytes of the folio to which a frame belongs, from its head to its last tail."""
        if not self[frame] & (HEAD | TAIL) or not self[frame] & (THP | HUGETLB):
            return PAGE
        size = self._folios.get(frame)
        if size is None:
            first, end = frame, frame + 1
            while self[first] & TAIL:
                first -= 1
            while self[end] & TAIL:
                end += 1
            size = (end - first) * PAGE
            self._folios.update(dict.fromkeys(range(first, end), size))
        return size

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def table(name: str = "kpageflags") -> Iterator[FrameTable]:
    """Open a table of frames at one moment: words that were read once are not read again."""
    opened = FrameTable(name)
    try:
        yield opened
    finally:
        opened.close()


def quiet(look: Callable[[], S], ours: Callable[[], T], patience: float = 20) -> tuple[S, T]:
    """Return the results of `look` and `ours` when `look` returns the same before and after: pages may move.

    They are tried five times, and for `patience` seconds.
    """
    end, attempts = time.monotonic() + patience, 0
    while attempts < 5 or time.monotonic() < end:
        attempts += 1
        before, found = look(), ours()
        if before == look():
            return before, found
    raise AssertionError("the pages of an idle process keep changing")


def expected(words: dict[int, int], hidden: bool = False) -> dict[int, tuple[Page, bool]]:
    """Return the state of each page, and whether it is the zero page."""
    with table() as flags:
        found = {}
        for address, page in pages(words, hidden).items():
            zero = bool(words[address] >> 63 and flags[words[address] & (1 << 55) - 1] & ZERO_PAGE)
            # The huge zero page has bit 61 set, but does not belong to a file.
            found[address] = page._replace(file=page.file and not zero), zero
        return found


def area_facts(area: Area, inside: dict[int, int], flags: FrameTable) -> dict[str, object]:
    """Return the contents of an area, from its entries, smaps and kpageflags."""
    found = pages(inside).values()
    pieces = runs(inside)
    zero = {page.frame for page in found if page.present and flags[page.frame or 0] & ZERO_PAGE}
    folios: dict[int, int] = {}
    for page in found:
        if page.present and page.frame not in zero:
            size = flags.folio(page.frame or 0)
            folios[size] = folios.get(size, 0) + PAGE
    if area.huge:  # they are counted separately
        size = max(folios)
        folios[size] -= area.huge
        if not folios[size]:
            del folios[size]
    # Repetitions of the small zero page have no order.
    small_zero = {frame for frame in zero if frame and not flags[frame] & (HEAD | TAIL)}
    frames = [physical for _virtual, physical, _length in pieces if physical // PAGE not in small_zero]
    return {
        "present": sum(page.present for page in found) * PAGE,
        "tally.swapped": sum(page.swapped for page in found) * PAGE,
        "guard": sum(page.guard for page in found) * PAGE,
        "marker": sum(page.marker for page in found) * PAGE,
        "file": sum(page.file for page in found if page.frame not in zero) * PAGE,
        # smaps does not show it for pages of a pool.
        "anonymous": sum(page.present and not page.file for page in found) * PAGE
        if "ht" in area.flags
        else area.counters["Anonymous"],
        "zero": sum(page.frame in zero for page in found if page.present) * PAGE,
        "hidden": 0,
        "exclusive": sum(word >> 63 and word >> 56 & 1 for word in inside.values()) * PAGE,
        "runs": len(pieces),
        "largest": max((length for *_, length in pieces), default=0),
        "ascending": sum(before < after for before, after in pairwise(frames)),
        "descending": sum(before > after for before, after in pairwise(frames)),
        "resident": area.resident,
        "swapped": area.counters["Swap"],
        "lazy_free": area.counters["LazyFree"],
        "locked": area.resident if "lo" in area.flags else 0,
        "huge": area.huge,
        "folios": folios,
    }


def differing(theirs: dict[Any, Any], ours: dict[Any, Any]) -> dict[Any, Any]:
    """Return the first few differences, because pytest would take minutes to compare a million entries."""
    found: dict[Any, Any] = {}
    for key in sorted({*theirs, *ours}):
        if theirs.get(key) != ours.get(key):
            found[hex(key) if isinstance(key, int) else key] = theirs.get(key), ours.get(key)
            if len(found) == 5:
                break
    return found
