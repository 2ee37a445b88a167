"""The native readers of the kernel's binary tables, on files with arbitrary words, as from a faulty kernel.

Their counts are compared with those of a reader that decodes entry by entry. Accesses outside their buffers are
detected by the address sanitizer (`make test-asan`).
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from support.fuzzing import fuzzed, numbers

from iobmd._native import pagemap

if TYPE_CHECKING:
    from pathlib import Path

PAGE = mmap.PAGESIZE
PRESENT, SWAPPED, FILE, GUARD, EXCLUSIVE, DIRTY = 1 << 63, 1 << 62, 1 << 61, 1 << 58, 1 << 56, 1 << 55
PFN = DIRTY - 1
HEAD, TAIL, THP = 1 << 15, 1 << 16, 1 << 22

REAL = ~(0x3F << 49)  # frames whose addresses have 61 bits, although processors have at most 52
words = (
    st.integers(0, 40).map(lambda frame: PRESENT | frame)
    | st.sampled_from([0, SWAPPED, SWAPPED | GUARD, PRESENT, PRESENT | FILE | 7, PRESENT | EXCLUSIVE | PFN & REAL])
    | st.integers(0, (1 << 64) - 1).map(lambda word: word & REAL)
)
# Long runs of equal words, and of words that count up, for which the readers have fast paths.
repeated_words = st.tuples(words, st.sampled_from([1, 1, 2, 7, 8, 9, 16, 511, 513]), st.integers(0, 1))
tables = st.lists(repeated_words, max_size=12).map(
    lambda found: [word + index * step & REAL for word, count, step in found for index in range(count)]
)


def file_of(folder: Path, table: list[int], rest: bytes = b"") -> int:
    path = folder / "table"
    path.write_bytes(struct.pack(f"={len(table)}Q", *table) + rest)
    return os.open(path, os.O_RDONLY)


bounds = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 600)), min_size=1, max_size=5)


@fuzzed(
    50,
    table=tables,
    ranges=bounds,
    rest=st.binary(max_size=7),
    inside=st.booleans(),
    thorough=st.booleans(),
    scans=st.booleans(),
)
def test_walks(
    tmp_path: Path, table: list[int], ranges: list[tuple[int, int]], rest: bytes, inside: bool, thorough: bool,
    scans: bool,
) -> None:  # fmt: skip
    fd = file_of(tmp_path, table, rest)
    try:
        walker = pagemap.Walk(
            fd, PAGE, 2 << 20, 7, 1024, thorough, scans
        )  # PAGEMAP_SCAN fails on an ordinary file: without it
        most = len(table) if inside else 1 << 20
        asked = [(min(first, most) * PAGE, min(first + many, most) * PAGE) for first, many in sorted(ranges)]
        try:
            tallies = walker.totals(asked)
        except OSError:
            assert any(end > len(table) * PAGE for _start, end in asked), "an error is raised only past the end"
            return
        for (start, end), tally in zip(asked, tallies, strict=True):
            part = table[start // PAGE : end // PAGE]
            assert tally.present == PAGE * sum(word >> 63 for word in part)
            assert tally.hidden == PAGE * sum(word >> 63 and not word & PFN for word in part)
            assert tally.exclusive == PAGE * sum(word >> 63 and bool(word & EXCLUSIVE) for word in part)
            swapped = sum(not word >> 63 and bool(word & SWAPPED) for word in part)
            assert tally.swapped + tally.guard + tally.marker == PAGE * swapped
            assert tally.soft_dirty == PAGE * sum(word >> 62 > 0 and bool(word & DIRTY) for word in part)
        check_spans(walker, asked, table)
    finally:
        os.close(fd)


def check_spans(walker: pagemap.Walk, asked: list[tuple[int, int]], table: list[int]) -> None:
    """The same walk in steps: spans are ascending, and cover exactly the pages that are present or in swap."""
    for start, end in asked:
        walker.clear()
        at = start
        while at < end:
            at = walker.step(at, end)
        walker.finish()
        found = [walker[index] for index in range(len(walker))]
        assert walker.raw() == b"".join(struct.pack("=4Q", *span) for span in found)
        covered = {
            page for virtual, _, length, _ in found for page in range(virtual // PAGE, (virtual + length) // PAGE)
        }
        assert covered == {page for page in range(start // PAGE, end // PAGE) if table[page] >> 62}
        for virtual, physical, length, flags in found:
            if physical and not flags & pagemap.ZERO:
                for offset in range(0, length, PAGE):
                    assert physical + offset == (table[(virtual + offset) // PAGE] & PFN) * PAGE
    walker.collect()


@fuzzed(50, table=tables, first=st.integers(0, 3000), many=st.integers(0, 3000), gaps=st.booleans())
def test_runs(tmp_path: Path, table: list[int], first: int, many: int, gaps: bool) -> None:
    fd = file_of(tmp_path, table)
    try:
        try:
            found = pagemap.read_runs(fd, first * PAGE, many * PAGE, PAGE, gaps=gaps)
        except OSError:
            assert first + many > len(table)
            return
        inside = table[first : first + many]
        assert found.pages == sum(word >> 63 for word in inside)
        assert found.hidden == sum(word >> 63 and not word & PFN for word in inside)
        assert sum(found[index][2] for index in range(len(found))) == PAGE * (found.pages - found.hidden)
        assert isinstance(found.holds(fd, PAGE), bool)
        assert found.difference(pagemap.read_runs(fd, first * PAGE, many * PAGE, PAGE)) is None
        covered = sum(length for _address, length in found.segments(0, 1 << 62))
        assert covered == PAGE * (found.pages - found.hidden)
        joined = pagemap.concatenated([(found, first * PAGE + 1, many * PAGE)], 0)
        assert joined.pages == found.pages
        found.common(joined)
        found.highest()
    finally:
        os.close(fd)


# No memory has the frame whose number is all ones; the number after it would change the flags.
possible = st.integers(0, (1 << 64) - 1).filter(lambda entry: ~entry & ((1 << 55) - 1))


@fuzzed(40, table=st.lists(possible, max_size=150))
def test_entries(tmp_path: Path, table: list[int]) -> None:
    fd = file_of(tmp_path, table)
    try:
        found = pagemap.read_entries(fd, 0, 200)
        tally = pagemap.Walk(fd, PAGE, 0, 0, 0, False, False).total(0, len(table) * PAGE)
        for mask, value in (pagemap.ABSENT, pagemap.GUARDED, (3, 1)):
            first = next((page for page, entry in enumerate(table) if entry & mask == value), None)
            assert pagemap.first_entry(fd, 0, 200, mask, value) == first
    finally:
        os.close(fd)
    assert len(found) == len(table)
    assert tally.present == sum(entry[0] for entry in found) * PAGE
    assert tally.hidden == sum(entry[0] and entry[2] is None for entry in found) * PAGE
    assert tally.swapped == sum(entry[1] for entry in found) * PAGE
    assert tally.exclusive == sum(entry[0] and entry[4] for entry in found) * PAGE


flags = st.lists(
    st.tuples(
        st.sampled_from([0, HEAD | THP, TAIL | THP, HEAD, TAIL, (1 << 64) - 1]) | st.integers(0, (1 << 64) - 1),
        st.sampled_from([1, 2, 511, 600]),
    ),
    max_size=6,
).map(lambda found: [word for word, count in found for _ in range(count)])
addresses = st.integers(0, 5000) | numbers().filter(lambda number: 0 <= number < 1 << 64)


@fuzzed(
    50,
    table=flags,
    frame=addresses.map(lambda address: address // PAGE) | st.integers(0, 5000),
    many=st.integers(0, 5000),
    spans=st.lists(st.tuples(addresses, st.integers(0, 1 << 24)), max_size=4),
)
def test_frames(tmp_path: Path, table: list[int], frame: int, many: int, spans: list[tuple[int, int]]) -> None:
    fd = file_of(tmp_path, table)
    try:
        every, some, _least, _most, groups = pagemap.describe(fd, fd, -1, frame, many)
        inside = table[frame : frame + many]
        assert some == (0 if not inside else inside[0] | some)
        assert every & ~some == 0
        assert groups == set()
        sums: dict[int, int] = {}
        raw = b"".join(struct.pack("=4Q", 0, physical, length, pagemap.PRESENT) for physical, length in spans)
        pagemap.folios(fd, raw + b"rest", pagemap.PRESENT, pagemap.ZERO, PAGE, sums)
        assert sum(sums.values()) <= sum(length for _physical, length in spans)
        assert all(size >= PAGE and not size & (size - 1) for size in sums)
    finally:
        os.close(fd)
