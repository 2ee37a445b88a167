"""The grid of pictures: whatever the input, nothing is lost, nothing is counted twice, and it remains small."""

import mmap
from collections import Counter
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st
from iobmd.tools.pagemap.grid import Grid

PAGE = mmap.PAGESIZE
STATES = ("huge", "present", "swapped")


class Pages(NamedTuple):
    address: int
    physical: int | None
    length: int
    state: str


@st.composite
def spans(draw: st.DrawFn) -> list[Pages]:
    """Ascending ranges of pages, some adjacent and some far apart."""
    found = []
    address = draw(st.integers(0, 1 << 34))
    for _ in range(draw(st.integers(0, 30))):
        address += draw(st.sampled_from([0, 0, 1, 7, 512, 1 << 20, 1 << 33]))
        length = draw(st.sampled_from([1, 2, 5, 511, 512, PAGE, 1 << 15]))
        physical = draw(st.none() | st.integers(0, 1 << 24))
        state = draw(st.sampled_from(STATES))
        found.append(Pages(address * PAGE, None if physical is None else physical * PAGE, length * PAGE, state))
        address += length
    return found


def expected(
    ranges: list[Pages], block: int, physical_block: int
) -> tuple[dict[int, Counter[str]], dict[tuple[int, int], Counter[str]]]:
    """Compute the same sums in steps of the smaller of the two blocks, or page by page where necessary."""
    blocks: dict[int, Counter[str]] = {}
    cells: dict[tuple[int, int], Counter[str]] = {}
    position = 0
    for _address, physical, length, state in ranges:
        for first in range(position // block * block, position + length, block):
            start, end = max(first, position), min(first + block, position + length)
            blocks.setdefault(first // block, Counter())[state] += end - start
            if physical is None:
                continue
            low, high = physical + start - position, physical + end - position
            for row in range(low // physical_block * physical_block, high, physical_block):
                part = min(row + physical_block, high) - max(row, low)
                cells.setdefault((first // block, row // physical_block), Counter())[state] += part
        position += length
    return blocks, cells


@given(spans(), st.integers(1, 40), st.integers(1, 40))
def test_everything_is_counted_once_where_it_is(ranges: list[Pages], limit: int, physical_limit: int) -> None:
    grid = Grid(limit, physical_limit=physical_limit)
    for one in ranges:
        grid.add(*one)
    blocks, cells = expected(ranges, grid.block, grid.physical_block)
    assert {number: block.sums for number, block in enumerate(grid.blocks())} == blocks
    assert {(column, row): sums for column, row, sums in grid.cells()} == cells
    assert grid.length == sum(one.length for one in ranges)
    assert grid.columns <= limit
    assert grid.physical_blocks <= physical_limit
    for number, block in enumerate(grid.blocks()):
        first, last = (
            address_at(ranges, min(place, grid.length) - back)
            for place, back in ((number * grid.block, 0), ((number + 1) * grid.block, PAGE))
        )
        assert (block.start, block.end) == (first, last + PAGE)


def address_at(ranges: list[Pages], position: int) -> int:
    """Return the address of the page before which there are `position` bytes of pages."""
    for one in ranges:
        if position < one.length:
            return one.address + position
        position -= one.length
    raise AssertionError("no page has this position")


@given(spans(), st.integers(1, 40))
def test_blocks_are_no_larger_than_they_must_be(ranges: list[Pages], limit: int) -> None:
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
