"""Segments of IODMACommand: every byte once, in order, within the device's limits, from any offset."""

import mmap
from collections.abc import Iterable

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.scattered import ScatteredDescriptor

import iobmd
from iobmd import IODMACommand, IOReturn, IOReturnError, PhysicalSegment
from iobmd.pagemap import segment

PAGE = mmap.PAGESIZE
POWERS = [1 << shift for shift in range(14)]
limits = st.tuples(
    st.sampled_from([0, 64, 48]),  # address bits that cover all of a host's memory, and thus bounce buffers
    st.one_of(st.just(0), st.integers(64, 3 * PAGE)),  # the largest segment
    st.one_of(st.just(1), st.sampled_from(POWERS)),  # alignment
    st.sampled_from([0, 64, 512, PAGE, 1 << 16]),  # boundary
)
pieces = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 2 * PAGE), st.integers(1, 3 * PAGE)),  # page, position, length
    min_size=1,
    max_size=6,
)


def ranges_at(found: list[tuple[int, int, int]], high: int = 0, alignment: int = 1) -> list[tuple[int, int]]:
    return [(high + (page * PAGE + place) // alignment * alignment, length) for page, place, length in found]


def all_segments(command: IODMACommand, count: int, at_a_time: int | None) -> list[PhysicalSegment]:
    """Return the segments by iterating over offsets, as a driver does."""
    segments: list[PhysicalSegment] = []
    offset = 0
    while offset < count:
        more = command.genIOVMSegments(offset, at_a_time)
        assert 0 < len(more) <= (at_a_time or len(more))
        segments += more
        offset += sum(segment.length for segment in more)
    return segments


def joined(segments: Iterable[PhysicalSegment]) -> list[tuple[int, int]]:
    """Join adjacent pieces: results are equal if they contain the same bytes in the same order."""
    found: list[tuple[int, int]] = []
    for address, length in segments:
        if found and sum(found[-1]) == address:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((address, length))
    return found


def check_limits(segments: list[PhysicalSegment], bits: int, largest: int, alignment: int, boundary: int) -> None:
    for address, length in segments:
        assert length > 0
        assert address + length <= 1 << (bits or 64)
        assert not largest or length <= largest
        assert address % alignment == 0
        assert not boundary or address // boundary == (address + length - 1) // boundary


def made(bits: int, largest: int, alignment: int, boundary: int, options: int = 0) -> IODMACommand:
    assume(not largest or largest >= alignment)
    assume(not boundary or boundary >= alignment)
    return IODMACommand.withSpecification(bits, largest, options, 0, alignment, boundary=boundary)


@settings(max_examples=100, deadline=None)
@given(limits, pieces, st.sampled_from([None, 1, 2, 7]), st.data())
def test_in_reach_every_byte_once_in_order_within_limits(limit, found, at_a_time, data) -> None:
    """If the device can start at every piece, the segments are the memory itself, wherever iteration begins."""
    memory = ScatteredDescriptor(ranges_at(found, alignment=limit[2]))
    first = data.draw(st.integers(0, len(found) - 1))
    into = data.draw(st.integers(0, memory.pieces[first][1] - 1))
    offset = sum(length for _, length in memory.pieces[:first]) + into // limit[2] * limit[2]
    length = len(memory.bytes) - offset
    start = data.draw(st.integers(0, length - 1))
    with made(*limit) as command:
        command.setMemoryDescriptor(memory, autoPrepare=False)
        command.prepare(offset)
        segments = all_segments(command, length, at_a_time)
        check_limits(segments, *limit)
        assert joined(segments) == joined(memory.segments(offset, length))
        assert command.genIOVMSegments(0) == segments
        if memory.segments(offset + start, 1)[0].address % limit[2] == 0:
            rest = command.genIOVMSegments(start)
            check_limits(rest, *limit)
            assert joined(rest) == joined(memory.segments(offset + start, length - start))
    assert memory.prepared == 1


@pytest.mark.needs("frames")
@settings(max_examples=50, deadline=None)
@given(limits, pieces, st.booleans(), st.sampled_from([None, 1, 3]))
@example((48, 0, 1, 0), [(0, PAGE - 3, 6)], True, None)  # two bytes of three pages
@example((48, 700, 512, 1024), [(0, 1, 5000)], True, 1)
@example((48, 0, 1, 0), [(8, PAGE - 6, 10), (20, 0, 10)], True, None)  # the end of a page and the start of the next
@example(
    (48, 0, 2 * PAGE, 0), [(8, 0, PAGE), (0, 0, PAGE), (20, 0, PAGE)], True, None
)  # bounce pages would be misaligned
def test_out_of_reach_or_alignment_the_limits_hold(limit, found, high, at_a_time) -> None:
    """Memory above the device's reach, or at which it cannot start: all bytes are covered, within its limits."""
    bits = 48 if high else limit[0]
    # The last page that 48 bits reach, and those above.
    memory = ScatteredDescriptor(ranges_at(found, (1 << 48) - 4 * PAGE if high else 0))
    limit = (bits, *limit[1:])
    length = len(memory.bytes)
    forced = any(address % limit[2] for address, _ in memory.pieces)
    beyond = any(address + size > 1 << (bits or 64) for address, size in memory.pieces)
    with made(*limit) as command:
        command.setMemoryDescriptor(memory)
        segments = all_segments(command, length, at_a_time)
        check_limits(segments, *limit)
        assert sum(segment.length for segment in segments) == length
        assert command.readBytes(0, length) == memory.bytes
        assert (joined(segments) != joined(memory.segments(0, length))) == (forced or beyond)
        assert ("bounced" in repr(command)) == (forced or beyond)
    assert memory.prepared == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5000), st.integers(0, 3 * PAGE))
def test_largest_segment_of_one_piece(largest: int, length: int, place: int) -> None:
    memory = ScatteredDescriptor([(place, length)])
    with IODMACommand.withSpecification(maxSegmentSize=largest) as command:
        command.setMemoryDescriptor(memory)
        segments = command.genIOVMSegments()
    assert len(segments) == -(-length // largest)
    assert all(segment.length == largest for segment in segments[:-1])


@pytest.mark.needs("frames")
def test_segments_of_real_memory_are_those_of_the_descriptor() -> None:
    with iobmd.allocate(3 * PAGE + 100) as memory, IODMACommand.withSpecification(64, PAGE // 2) as command:
        command.setMemoryDescriptor(memory, autoPrepare=False)
        command.prepare(100, 2 * PAGE)
        assert joined(command.genIOVMSegments()) == joined(memory.segments(100, 2 * PAGE))
        assert command.getPreparedOffsetAndLength() == (100, 2 * PAGE)


def test_pieces_that_touch_are_one_segment() -> None:
    with IODMACommand.withSpecification() as command:
        command.setMemoryDescriptor(ScatteredDescriptor([(PAGE, 10), (PAGE + 10, 20), (9 * PAGE, 5)]))
        assert command.genIOVMSegments() == [PhysicalSegment(PAGE, 30), PhysicalSegment(9 * PAGE, 5)]


def test_iterate_only_has_no_bounce_buffers() -> None:
    """Segments before the one out of reach, or with an unsuitable start, are returned before the error."""
    memory = ScatteredDescriptor([(PAGE, 100), (1 << 40, 100), (2 * PAGE + 1, 7)])
    with IODMACommand.withSpecification(32, mappingOptions=IODMACommand.kIterateOnly) as command:
        command.setMemoryDescriptor(memory)
        assert command.genIOVMSegments(0, 1) == [PhysicalSegment(PAGE, 100)]
        with pytest.raises(IOReturnError) as caught:
            command.genIOVMSegments(100)
        assert caught.value.code == IOReturn.kIOReturnMessageTooLarge
        assert command.genIOVMSegments(200) == [PhysicalSegment(2 * PAGE + 1, 7)]
        with pytest.raises(IOReturnError) as caught:
            command.synchronize(0, forceDoubleBuffer=True)
        assert caught.value.code == IOReturn.kIOReturnUnsupported
    with IODMACommand.withSpecification(64, 0, IODMACommand.kIterateOnly, alignment=2) as command:
        command.setMemoryDescriptor(memory)
        with pytest.raises(IOReturnError) as caught:
            command.genIOVMSegments(200)
        assert caught.value.code == IOReturn.kIOReturnNotAligned


@pytest.mark.parametrize("offset", [100, 101, 1 << 70])
def test_nothing_left(offset: int) -> None:
    with IODMACommand.withSpecification() as command:
        command.setMemoryDescriptor(ScatteredDescriptor([(PAGE, 100)]))
        with pytest.raises(IOReturnError) as caught:
            command.genIOVMSegments(offset)
    assert caught.value.code == IOReturn.kIOReturnOverrun


@pytest.mark.parametrize(("offset", "count"), [(-1, None), (0, 0), (0, -1)])
def test_what_cannot_be_had(offset: int, count: int | None) -> None:
    with IODMACommand.withSpecification() as command:
        command.setMemoryDescriptor(ScatteredDescriptor([(PAGE, 100)]))
        with pytest.raises(IOReturnError) as caught:
            command.genIOVMSegments(offset, count)
    assert caught.value.code == IOReturn.kIOReturnBadArgument


@pytest.mark.parametrize(
    "limit",
    [
        {"numAddressBits": 11},
        {"numAddressBits": 65},
        {"numAddressBits": -1},
        {"alignment": 3},
        {"alignment": -4},
        {"numAddressBits": 20, "alignment": 1 << 20},
        {"maxSegmentSize": 511, "alignment": 512},
        {"boundary": 256, "alignment": 512},
        {"boundary": 3 * PAGE},
        {"maxSegmentSize": -1},
        {"maxTransferSize": -1},
        {"mappingOptions": 4},
        {"mappingOptions": 0x100},
    ],
)
def test_limits_that_no_transfer_can_keep(limit: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        IODMACommand.withSpecification(**limit)
    assert caught.value.code == IOReturn.kIOReturnBadArgument


def test_options_without_effect() -> None:
    options = iobmd.kIODMAMapOptionNoCacheStore | iobmd.kIODMAMapOptionOnChip | iobmd.kIODMAMapOptionDextOwner
    with IODMACommand.withSpecification(32, mappingOptions=options) as command:
        command.setMemoryDescriptor(ScatteredDescriptor([(PAGE, 100)]))
        assert command.genIOVMSegments() == [PhysicalSegment(PAGE, 100)]


def test_zeros_are_no_limits() -> None:
    command = IODMACommand.withSpecification(0, 0, 0, 0, 0)
    assert (command.getNumAddressBits(), command.getAlignment()) == (64, 1)


@pytest.mark.needs("frames")
def test_many_segments_come_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte has two million segments of 512 bytes; only the requested few are generated."""
    with IODMACommand.withSpecification(maxSegmentSize=512) as command:
        command.setMemoryDescriptor(ScatteredDescriptor([(PAGE, 1 << 20)]))
        transfer = command._transfer
        assert transfer is not None
        cut, pieces = segment.cut, []
        monkeypatch.setattr(segment, "cut", lambda *limits: (pieces.append(one) or one for one in cut(*limits)))
        found = transfer.segments(512 * 1000, 2)
        assert [address for address, _ in found] == [PAGE + 512 * 1000, PAGE + 512 * 1001]
        assert len(pieces) <= 3
