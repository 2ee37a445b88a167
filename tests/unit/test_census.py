"""The census of page frames, on files of flags as /proc/kpageflags has them, compared with a count frame by frame."""

import os
import random
import struct
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from iobmd._native.pagemap import KINDS, WINDOW_STATES, Census
from iobmd.host import zoneinfo
from iobmd.pagemap import census as module
from iobmd.pagemap import frame
from iobmd.units import PAGE_SIZE

BLOCK = 16
HEAD, TAIL, THP = 1 << 15, 1 << 16, 1 << 22
LRU, ANON, SWAPBACKED, UPTODATE = 1 << 5, 1 << 12, 1 << 14, 1 << 3
WORDS = {
    # As Linux 6.18 shows them. Slab pages may look anonymous or KSM, and free pages keep flags of their last use.
    "free": 1 << 10 | UPTODATE,
    "anonymous": LRU | ANON | SWAPBACKED,
    "file": LRU | UPTODATE | 1 << 34,
    "shared": LRU | SWAPBACKED,
    "hugetlb": 1 << 17,
    "slab": 1 << 7 | ANON | 1 << 21,
    "page_tables": 1 << 26,
    "kernel": 0,
    "reserved": 1 << 32,
    "offline": 1 << 23,
    "poisoned": 1 << 19 | LRU,
}
MOVABLE = ("anonymous", "file", "shared")


def made(path: Path, words: list[int]) -> int:
    path.write_bytes(struct.pack(f"={len(words)}Q", *words))
    return len(words)


def random_frames(source: random.Random, count: int) -> Iterator[tuple[str, int]]:
    """Yield a kind, and the number of frames of a compound page, or 1, until there are `count` frames."""
    left = count
    while left:
        kind = source.choice(["free"] * 4 + ["file"] * 4 + list(WORDS))
        run = min(left, source.choice([1, 1, 3, BLOCK, 5 * BLOCK]))
        # A huge page is aligned, as all compound pages are.
        order = source.choice([1, 1, 1, 2, BLOCK, 2 * BLOCK]) if kind != "free" else 1
        at = count - left
        if order > 1 and at % order == 0 and order <= left:
            yield kind, order
            left -= order
        else:
            yield from ((kind, 1) for _ in range(run))
            left -= run


def longest(frames: list[bool]) -> tuple[int, int]:
    """Return the first of the longest runs of True: its start, and its length."""
    at, best = 0, (0, 0)
    for value, group in groupby(frames):
        length = len(list(group))
        if value and length > best[1]:
            best = at, length
        at += length
    return best


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("tail_flags", [True, False], ids=["full", "bare"])
def test_counts_are_those_of_single_frames(tmp_path: Path, seed: int, tail_flags: bool) -> None:
    """Before Linux 6.9, the tails of a compound page lack the flags of its head."""
    source = random.Random(seed)
    units = list(random_frames(source, 64 * BLOCK + source.choice([0, 3])))
    words: list[int] = []
    kinds: list[str] = []
    is_huge: list[bool] = []
    for kind, size in units:
        flags = WORDS[kind] | (THP if size > 1 and kind in MOVABLE else 0)
        words.append(flags | (HEAD if size > 1 else 0))
        words += [(flags if tail_flags else 0) | TAIL] * (size - 1)
        kinds += [kind] * size
        is_huge += [size >= BLOCK] * size
    count = made(tmp_path / "flags", words)
    with (tmp_path / "flags").open("rb") as file:
        census = Census(file.fileno(), BLOCK, 9, 128)
        census.begin(0, 1)
        for end in sorted({source.randrange(1, count) for _ in range(5)} | {count + 100}):
            assert census.read(end) == min(end, count)
        census.finish()
    frames, huge, windows, _runs, in_runs = census.collect()
    assert dict(zip(KINDS, frames, strict=True)) == {kind: kinds.count(kind) for kind in KINDS}
    in_huge = Counter(kind for kind, whole in zip(kinds, is_huge, strict=True) if whole)
    assert dict(zip(KINDS, huge, strict=True)) == {kind: in_huge[kind] for kind in KINDS}
    assert sum(in_runs) == kinds.count("free")
    (free, free_length, _), (movable, movable_length, free_part) = census.longest()
    assert (free, free_length) == longest([kind == "free" for kind in kinds])
    can_move = [k == "free" or (k in MOVABLE and not whole) for k, whole in zip(kinds, is_huge, strict=True)]
    assert (movable, movable_length) == longest(can_move)
    assert free_part == kinds[movable : movable + movable_length].count("free")
    for level in range(5):
        assert dict(zip(WINDOW_STATES, windows[level], strict=True)) == windows_of(units, BLOCK << level)
    cells = struct.unpack(f"={9 * (len(KINDS) + 1)}I", census.cell_counts())
    found = [cells[at : at + len(KINDS) + 1] for at in range(0, len(cells), len(KINDS) + 1)]
    assert sum(found[0]) == 0
    for index, cell in enumerate(found[1:]):
        there = slice(index * 128, (index + 1) * 128)
        shown = Counter(
            "huge" if whole and kind in MOVABLE else kind
            for kind, whole in zip(kinds[there], is_huge[there], strict=True)
        )
        assert dict(zip((*KINDS, "huge"), cell, strict=True)) == {kind: shown[kind] for kind in (*KINDS, "huge")}


def windows_of(units: list[tuple[str, int]], size: int) -> dict[str, int]:
    """Return the numbers of aligned windows of a size by state."""
    states: Counter[str] = Counter()
    parts: list[list[tuple[str, int, int]]] = [[]]
    at = 0
    for kind, length in units:
        left = length
        while left:
            part = min(left, size - at % size)
            parts[-1].append((kind, part, length))
            at += part
            left -= part
            if at % size == 0:
                parts.append([])
    for window in parts[:-1]:
        unmovable = [
            part for kind, part, whole in window
            if kind not in ("free", *MOVABLE) and not (kind == "hugetlb" and whole >= BLOCK)
        ]  # fmt: skip
        moved = [part for kind, part, whole in window if kind in MOVABLE and whole < BLOCK]
        huge = [part for kind, part, whole in window if kind in (*MOVABLE, "hugetlb") and whole >= BLOCK]
        if unmovable:
            lonely = size == BLOCK and len(unmovable) == 1 and unmovable[0] <= 8
            states["one_short" if lonely else "unmovable"] += 1
        else:
            states["huge" if huge else "movable" if moved else "free"] += 1
    return {state: states[state] for state in WINDOW_STATES}


def test_the_lonely_page_and_the_closest_window_are_named(tmp_path: Path) -> None:
    kinds = ["free"] * (8 * BLOCK)
    for at in (BLOCK + 3, 4 * BLOCK, 4 * BLOCK + 9, 6 * BLOCK, 6 * BLOCK + 1, 6 * BLOCK + 2):
        kinds[at] = "slab"
    kinds[2 * BLOCK] = "anonymous"
    made(tmp_path / "flags", [WORDS[kind] for kind in kinds])
    with (tmp_path / "flags").open("rb") as file:
        census = Census(file.fileno(), BLOCK, 0, 1)
        census.begin(0, 0)
        census.read(len(kinds))
        census.finish()
    assert census.nearly_free() == [(BLOCK + 3, 1, KINDS.index("slab"))]
    assert census.closest_window(0) == 0
    assert census.closest_window(1) == 2 * BLOCK  # one page to move, none that is unmovable
    assert census.closest_window(2) == 0  # one unmovable page; five in the other
    assert census.closest_window(4) is None
    assert census.closest_window(99) is None


def test_frames_that_are_skipped_are_uninitialized(tmp_path: Path) -> None:
    """No window contains them, and no run."""
    count = made(tmp_path / "flags", [WORDS["free"]] * (BLOCK + 1))
    with (tmp_path / "flags").open("rb") as file:
        census = Census(file.fileno(), BLOCK, 4, BLOCK)
        census.begin(0, 0)
        census.read(count)
        census.skip(4 * BLOCK)
        census.finish()
    frames, _huge, windows, runs, _in_runs = census.collect()
    counts = {kind: many for kind, many in zip(KINDS, frames, strict=True) if many}
    assert counts == {"free": count, "uninitialized": 4 * BLOCK - count}
    assert dict(zip(WINDOW_STATES, windows[0], strict=True))["free"] == sum(windows[0]) == 1
    assert sum(windows[1]) == sum(windows[2]) == 0
    assert sum(runs) == 1
    assert census.longest() == ((0, count, count), (0, count, count))
    assert census.nearly_free() == []
    cells = struct.unpack(f"={4 * (len(KINDS) + 1)}I", census.cell_counts())
    assert cells[KINDS.index("uninitialized") :: len(KINDS) + 1] == (0, BLOCK - 1, BLOCK, BLOCK)


@pytest.mark.parametrize("flagged", [0, 1, 40_000, 70_000, 70_001, 100_000])
def test_the_end_of_flags(flagged: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found across the parts that are read; zeros before the last flag do not count."""
    words = [0] * 100_000
    words[flagged - 1 : flagged] = [1] * min(flagged, 1)
    made(tmp_path / "flags", words)
    opened = os.open(tmp_path / "flags", os.O_RDONLY)
    monkeypatch.setattr("iobmd.pagemap.frame.os.open", lambda _path, _flags: os.dup(opened))
    with frame.Frames() as frames:
        assert frames.end_of_flags(0, 100_000 * PAGE_SIZE) == flagged * PAGE_SIZE
        assert frames.end_of_flags(99_999 * PAGE_SIZE, 100_000 * PAGE_SIZE) == max(flagged, 99_999) * PAGE_SIZE
    os.close(opened)


@pytest.mark.parametrize("counted", [True, False])
def test_memory_without_flags_is_uninitialized_if_memfree_counts_it(
    counted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator has received half of a zone of 64 MiB: without flags, the rest may be a driver's as well."""
    half = 32 << 20
    made(tmp_path / "flags", [WORDS["free"]] * (half // PAGE_SIZE) + [0] * (half // PAGE_SIZE))
    opened = os.open(tmp_path / "flags", os.O_RDONLY)
    monkeypatch.setattr("iobmd.pagemap.frame.os.open", lambda _path, _flags: os.dup(opened))
    zone = zoneinfo.Zone(0, "Normal", 0, 2 * half, 2 * half, half, half, 0, 0, {})
    monkeypatch.setattr(zoneinfo, "SECTION", half // 2)
    monkeypatch.setattr(zoneinfo, "zones", lambda: [zone])
    monkeypatch.setattr(zoneinfo, "ram", lambda: [(0, 2 * half)])
    monkeypatch.setattr(zoneinfo, "offline_blocks", list)
    monkeypatch.setattr("iobmd.host.zoneinfo.procfs.meminfo", lambda: {"MemFree": 2 * half if counted else half})
    memory = module.host_memory()
    os.close(opened)
    rest = "uninitialized" if counted else "kernel"
    assert {kind: held for kind, held in memory.kinds.items() if held} == {"free": half, rest: half}
    assert memory.windows[2 << 20]["unmovable"] == (0 if counted else half // (2 << 20))
    assert memory.longest_movable == (0, half, half)


@pytest.mark.parametrize("arguments", [(0, 0, 1), (16, 0, 0)])
def test_empty_blocks_and_cells_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        Census(0, *arguments)


def test_a_map_has_at_most_the_requested_rows() -> None:
    gib = 1 << 30
    for ram in (
        [(PAGE_SIZE, 640 << 10), (1 << 20, 3 * gib), (4 * gib, 25 * gib)],
        [(0, 64 << 20)],
        [(4 * gib, 1 << 42)],
    ):
        for rows in (1, 8, 24):
            for cells in (8, 56, 280):
                layout = module._Map(ram, rows, cells)
                assert 1 <= len(layout.rows) <= max(rows, len(ram))
                for start, end in ram:
                    assert 0 <= layout.cell_of(start) <= layout.cell_of(end - 1) < len(layout.rows) * cells
    assert module._Map([(0, gib)], 0, 64).rows == []
