"""The grid of pictures: whatever the input, nothing is lost, nothing is counted twice, and it remains small."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from iobmd.tools.pagemap.grid import Grid

PAGE = 4096
STATES = ("huge", "present", "swapped")


@st.composite
def spans(draw: st.DrawFn) -> list[tuple[int, int | None, int, str]]:
    """Ascending ranges of pages, some adjacent and some far apart: virtual, physical, length, state."""
    found = []
    virtual = draw(st.integers(0, 1 << 34))
    for _ in range(draw(st.integers(0, 30))):
        virtual += draw(st.sampled_from([0, 0, 1, 7, 512, 1 << 20, 1 << 33]))
        length = draw(st.sampled_from([1, 2, 5, 511, 512, 4096, 1 << 15]))
        physical = draw(st.none() | st.integers(0, 1 << 24))
        state = draw(st.sampled_from(STATES))
        found.append((virtual * PAGE, None if physical is None else physical * PAGE, length * PAGE, state))
        virtual += length
    return found


def expected(
    ranges: list[tuple[int, int | None, int, str]], block: int, physical_block: int
) -> tuple[dict[int, Counter[str]], dict[tuple[int, int], Counter[str]]]:
    """Compute the same sums in steps of the smaller of the two blocks, or page by page where necessary."""
    blocks: dict[int, Counter[str]] = {}
    cells: dict[tuple[int, int], Counter[str]] = {}
    for virtual, physical, length, state in ranges:
        for first in range(virtual // block * block, virtual + length, block):
            start, end = max(first, virtual), min(first + block, virtual + length)
            blocks.setdefault(first, Counter())[state] += end - start
            if physical is None:
                continue
            low, high = physical + start - virtual, physical + end - virtual
            for row in range(low // physical_block * physical_block, high, physical_block):
                part = min(row + physical_block, high) - max(row, low)
                cells.setdefault((first, row), Counter())[state] += part
    return blocks, cells


@given(spans(), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 8, 64]))
def test_everything_is_counted_once_where_it_is(
    ranges: list[tuple[int, int | None, int, str]], limit: int, physical_limit: int, row: int
) -> None:
    grid = Grid(limit, row=row, physical_limit=physical_limit)
    for one in ranges:
        grid.add(*one)
    blocks, cells = expected(ranges, grid.block, grid.physical_block)
    assert dict(grid.blocks()) == blocks
    assert {(virtual, physical): sums for virtual, physical, sums in grid.cells()} == cells
    assert grid.totals() == sum(blocks.values(), Counter())
    rows = list(grid.rows())
    assert len(rows) <= limit
    assert grid.physical_blocks <= physical_limit
    kept = [(start + index * grid.block, sums) for start, some in rows for index, sums in enumerate(some) if sums]
    assert kept == list(grid.blocks())
    assert [start % (grid.block * row) for start, _some in rows] == [0] * len(rows)


@given(spans(), st.integers(1, 40))
def test_blocks_are_no_larger_than_they_must_be(ranges: list[tuple[int, int | None, int, str]], limit: int) -> None:
    grid = Grid(limit)
    for one in ranges:
        grid.add(*one)
    if grid.block > PAGE:
        assert len(expected(ranges, grid.block // 2, PAGE << 40)[0]) > limit


def test_where_memory_reaches_to_is_kept() -> None:
    grid = Grid(8, physical_limit=10)
    grid.reach(100 * PAGE)
    grid.add(0, 5 * PAGE, PAGE, "huge")
    assert (grid.physical_block, grid.physical_blocks) == (16 * PAGE, 7)
    grid.reach(50 * PAGE)
    assert grid.physical_blocks == 7
