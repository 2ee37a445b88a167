"""Segments: exact for any offset and length, compared with frames read one by one; runs of any task."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import kernel
from support.kernel import frames
from support.moving import again_if_pages_move
from support.source_process import SourceProcess

import iobmd
from iobmd import IOReturn, IOReturnError, PhysicalSegment, pagemap
from iobmd.physical.layout import Layout
from iobmd.units import PAGE_SIZE

Start = Callable[..., SourceProcess]
MIB = 1 << 20

pytestmark = pytest.mark.needs("frames")


def expected(address: int, length: int, offset: int) -> list[tuple[int, int]]:
    """Compute byte-exact segments from single pages."""
    start = address + offset
    cut: list[tuple[int, int]] = []
    if not length:
        return cut
    for index, frame in enumerate(frames(start, length)):
        page = start // PAGE_SIZE * PAGE_SIZE + index * PAGE_SIZE
        first, last = max(start, page), min(start + length, page + PAGE_SIZE)
        physical = frame * PAGE_SIZE + first - page
        if cut and sum(cut[-1]) == physical:
            cut[-1] = (cut[-1][0], cut[-1][1] + last - first)
        else:
            cut.append((physical, last - first))
    return cut


def test_exact_at_any_offset() -> None:
    with iobmd.allocate(300_000) as small, iobmd.allocate(5 * MIB + 77) as large:

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.sampled_from([small, large]), st.data())
        def check(buffer: iobmd.IOBufferMemoryDescriptor, data: st.DataObject) -> None:
            offset = data.draw(st.integers(0, len(buffer)))
            length = data.draw(st.integers(0, len(buffer) - offset))
            wanted = expected(buffer.getBytesNoCopy(), length, offset)
            assert [tuple(segment) for segment in buffer.segments(offset, length)] == wanted
            assert sum(segment.length for segment in buffer.segments(offset)) == len(buffer) - offset
            if length:
                rest = expected(buffer.getBytesNoCopy(), len(buffer) - offset, offset)
                assert buffer.getPhysicalSegment(offset) == rest[0]

        check()


def test_ends() -> None:
    with iobmd.allocate(10_000) as buffer:
        assert buffer.getPhysicalSegment(10_000) == (0, 0)
        assert buffer.getPhysicalSegment(1 << 40) == (0, 0)
        assert buffer.getPhysicalSegment(-1) == (0, 0)
        assert buffer.segments(10_000) == []
        buffer.setLength(5000)
        assert sum(segment.length for segment in buffer.segments()) == 5000
        assert buffer.getPhysicalSegment(5000) == (0, 0)
        for offset, length in ((0, 5001), (-1, 1), (5001, 0)):
            with pytest.raises(IOReturnError) as caught:
                buffer.segments(offset, length)
            assert caught.value.code == IOReturn.kIOReturnBadArgument


def test_what_a_segment_is() -> None:
    one, same, other = PhysicalSegment(PAGE_SIZE, 10), PhysicalSegment(PAGE_SIZE, 10), PhysicalSegment(PAGE_SIZE, 11)
    assert one == same != other
    assert len({one, same, other}) == 2
    address, length = one
    assert (address, length) == (one.address, one.length) == (PAGE_SIZE, 10)
    assert repr(one) == "PhysicalSegment(address=0x1000, length=0xa)"
    assert one != (PAGE_SIZE, 10)


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("kind", ["anonymous", "thp", "memfd", "stack", "untouched"])
@again_if_pages_move
def test_runs_of_another_task(start_source: Start, kind: str) -> None:
    source = start_source(40 * MIB)
    address, size = source[kind]
    wanted: list[list[int]] = []
    for index, entry in enumerate(kernel.entries(address, size, source.pid)):
        virtual, frame = address // PAGE_SIZE * PAGE_SIZE + index * PAGE_SIZE, entry & kernel.FRAME
        if not entry >> 63:
            continue
        if wanted and wanted[-1][0] + wanted[-1][2] == virtual and wanted[-1][1] + wanted[-1][2] == frame * PAGE_SIZE:
            wanted[-1][2] += PAGE_SIZE
        else:
            wanted.append([virtual, frame * PAGE_SIZE, PAGE_SIZE])
    assert [list(run) for run in pagemap.runs(source.pid, address, size)] == wanted
    assert bool(wanted) == (kind != "untouched")


def test_layout() -> None:
    with iobmd.allocate(16 * MIB) as buffer:
        layout = buffer.layout()
        actual = frames(buffer.getBytesNoCopy(), len(buffer))
        assert layout.size == len(buffer)
        assert layout.runs == len(buffer.segments())
        assert layout.largest == max(segment.length for segment in buffer.segments())
        assert (layout.lowest, layout.highest) == (min(actual) * PAGE_SIZE, max(actual) * PAGE_SIZE + 4095)
        assert layout.huge == kernel.smaps(buffer.getBytesNoCopy())["AnonHugePages"]


@pytest.mark.parametrize(
    ("runs", "huge", "said"),
    [
        (1, 0, "contiguous, 0x1000…0x200fff, 0 B in huge pages"),
        (3, 2 * MIB, "3 runs, the largest 1 MiB, 0x1000…0x200fff, 2 MiB in huge pages"),
    ],
)
def test_layout_for_people(runs: int, huge: int, said: str) -> None:
    assert str(Layout(2 * MIB, runs, MIB, huge, 0x1000, 0x200FFF)) == said


@pytest.mark.parametrize("keywords", [{}, {"contiguous": True}, {"shared": True}], ids=str)
def test_page_addresses_are_those_of_pagemap(keywords: dict[str, bool]) -> None:
    with iobmd.allocate(40000, **keywords) as buffer:
        if buffer.wiring is not iobmd.Wiring.PINNED:
            pytest.skip("this kernel pins no memory here")
        pages = [frame * PAGE_SIZE for frame in kernel.frames(buffer.getBytesNoCopy(), 40000)]
        addresses = buffer.page_addresses()
        assert (addresses.typecode, addresses.itemsize) == ("Q", 8)
        assert addresses.tolist() == pages
        assert buffer.page_addresses(4095, 2).tolist() == pages[:2]
        assert buffer.page_addresses(PAGE_SIZE, PAGE_SIZE).tolist() == pages[1:2]
        assert buffer.page_addresses(39999).tolist() == pages[-1:]
        assert buffer.page_addresses(8192, 0).tolist() == []
        with pytest.raises(iobmd.BadArgumentError):
            buffer.page_addresses(1, 40000)
        part = iobmd.IOSubMemoryDescriptor.withSubRange(buffer, 5000, 9000, iobmd.kIODirectionIn)
        part.prepare()
        assert part.page_addresses().tolist() == pages[1:4]
        assert part.page_addresses()[0] + part.getPhysicalSegment(0)[0] % PAGE_SIZE == part.getPhysicalAddress()
        part.complete()
    with iobmd.allocate(8192, wired=False) as pageable, pytest.raises(iobmd.NotReadyError):
        pageable.page_addresses()


def test_a_part_that_is_not_pinned_comes_before_hidden_frames() -> None:
    """A concatenation of pinned and pageable memory has no addresses, whether or not this process may see frames."""
    with iobmd.allocate(PAGE_SIZE) as pinned, iobmd.allocate(PAGE_SIZE, wired=False) as pageable:
        both = iobmd.IOMultiMemoryDescriptor.withDescriptors([pinned, pageable], iobmd.kIODirectionInOut)
        with both, pytest.raises(IOReturnError) as caught:
            both.segments()
        assert caught.value.code == IOReturn.kIOReturnNotReady
