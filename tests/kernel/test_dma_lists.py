"""Scatter/gather lists: the six formats, functions for segments, cursors, and the limits of IOKit's tests."""

import mmap
import struct
from typing import Any

import pytest
from support.errors import code_of
from support.kernel import frames
from support.scattered import ScatteredDescriptor

import iobmd
from iobmd import IODMACommand, IOReturn, PhysicalSegment, kIODirectionIn, kIODirectionInOut, kIODirectionOut

PAGE = mmap.PAGESIZE
FORMATS = {
    "OutputHost32": "=II", "OutputBig32": ">II", "OutputLittle32": "<II",
    "OutputHost64": "=QQ", "OutputBig64": ">QQ", "OutputLittle64": "<QQ",
}  # fmt: skip
CURSORS = {
    iobmd.IOMemoryCursor: "=QQ",
    iobmd.IONaturalMemoryCursor: "=QQ",
    iobmd.IOBigMemoryCursor: ">QQ",
    iobmd.IOLittleMemoryCursor: "<QQ",
}
PIECES = [(3 * PAGE + 100, 50), (9 * PAGE, PAGE), (0x12345000, 7)]
pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str) -> None:
    """The bytes are those of struct, in the buffer that is passed, as far as it has room."""
    packed = [struct.pack(FORMATS[name], *piece) for piece in PIECES]
    kind = getattr(IODMACommand, name)
    assert getattr(iobmd, f"kIODMACommand{name}") is kind
    with IODMACommand.withSpecification(32, outSegFunc=kind) as command:
        command.setMemoryDescriptor(ScatteredDescriptor(PIECES))
        room = bytearray(b"\xee" * 100)
        segments = command.genIOVMSegments(segments=room)
        assert [tuple(one) for one in segments] == PIECES
        assert bytes(room) == b"".join(packed).ljust(100, b"\xee")
        assert kind.encode(segments) == b"".join(packed)
        assert kind.size == len(packed[0])
        short = bytearray(2 * kind.size + 1)
        assert command.genIOVMSegments(0, None, segments=short) == segments[:2]
        assert bytes(short) == packed[0] + packed[1] + b"\0"
        assert command.genIOVMSegments(50, 1, IODMACommand.OutputBig64, short) == segments[1:2]
        assert bytes(short[:16]) == struct.pack(">QQ", *PIECES[1])[: len(short[:16])]


def test_a_32_bit_format_and_more_address_bits() -> None:
    with pytest.raises(iobmd.BadArgumentError, match="at most 32 address bits"):
        IODMACommand.withSpecification(33, outSegFunc=IODMACommand.OutputBig32)
    command = IODMACommand.withSpecification(0, outSegFunc=IODMACommand.OutputBig32)
    assert command.getNumAddressBits() == 32


def test_a_function_receives_each_segment() -> None:
    calls: list[tuple[object, ...]] = []

    def function(*arguments: object) -> bool:
        calls.append(arguments)
        return len(calls) < 3

    with IODMACommand.withSpecification() as command:
        command.setMemoryDescriptor(ScatteredDescriptor(PIECES))
        there = object()
        assert command.genIOVMSegments(0, 2, function, there) == [PhysicalSegment(*piece) for piece in PIECES[:2]]
        assert calls == [(command, PhysicalSegment(*piece), there, index) for index, piece in enumerate(PIECES[:2])]
        assert command.genIOVMSegments(50, None, function) == []  # the third call returned False
        assert calls[2][1:] == (PhysicalSegment(*PIECES[1]), None, 0)
        assert len(calls) == 3


@pytest.mark.needs("frames")
@pytest.mark.parametrize(
    "ranges",
    [[(0, 0x2FFC)], [(0, 0x10), (0x3000, 0xFF0)], [(0, 0x2FFC), (-1, 0x800)]],
    ids=["one range", "two that continue a page", "a second at the start of the page"],
)
@pytest.mark.parametrize("start", [0x10, 0x7D4, 0xFFC])
def test_lengths_and_internal_segments_are_aligned(ranges: list[tuple[int, int]], start: int) -> None:
    """The ranges and limits of IOKit's test that are disabled there (TestIOMemoryDescriptor.cpp)."""
    with iobmd.allocate(5 * PAGE) as memory:
        memory.writeBytes(0, bytes(range(256)) * (5 * PAGE // 256))
        base = memory.getBytesNoCopy()
        places = [(start + offset if offset >= 0 else 0, length) for offset, length in ranges]
        expected = b"".join(memory.readBytes(place, length) for place, length in places)
        described = iobmd.IOMemoryDescriptor.withAddressRanges(
            [(base + place, length) for place, length in places], int(kIODirectionOut), iobmd.kernel_task
        )
        with (
            described,
            IODMACommand.withSpecification(
                64, PAGE, 0, 128 << 10, 4, alignmentLength=4, alignmentInternalSegments=0x1000
            ) as command,
        ):
            assert (command.getAlignmentLength(), command.getAlignmentInternalSegments()) == (4, 0x1000)
            described.prepare()
            command.setMemoryDescriptor(described)
            segments = command.genIOVMSegments()
            assert sum(segment.length for segment in segments) == len(expected)
            assert segments[0].address % 4 == 0
            assert not [segment for segment in segments[1:] if segment.address % 0x1000]
            assert not [segment for segment in segments if segment.length % 4 or segment.length > PAGE]
            seen = dict(zip(frames(base, 5 * PAGE), range(5), strict=True))
            if command.getIOMemoryDescriptor() is described:  # not bounced: the bytes of these frames
                found = b"".join(
                    memory.readBytes(seen[at // PAGE] * PAGE + at % PAGE, length) for at, length in segments
                )
                assert found == expected
            assert command.readBytes(0, len(expected)) == expected
            command.complete()
            described.complete()


def test_a_length_that_is_not_a_multiple() -> None:
    with IODMACommand.withSpecification(alignmentLength=4) as command:
        memory = ScatteredDescriptor([(PAGE, 10)])
        assert code_of(lambda: command.setMemoryDescriptor(memory)) == IOReturn.kIOReturnNotAligned
        assert memory.prepared == 1
        command.setMemoryDescriptor(memory, autoPrepare=False)
        command.prepare(2, 8)
        assert [tuple(one) for one in command.genIOVMSegments()] == [(PAGE + 2, 8)]


@pytest.mark.needs("frames")
@pytest.mark.parametrize("direction", [kIODirectionIn, kIODirectionOut, kIODirectionInOut])
def test_a_forced_double_buffer_is_one_segment(direction: int) -> None:
    with (
        iobmd.IOBufferMemoryDescriptor.withOptions(int(direction), 8 * PAGE) as memory,
        IODMACommand.withSpecification() as command,
    ):
        command.setMemoryDescriptor(memory)
        command.synchronize(0, forceDoubleBuffer=True)
        (segment,) = command.genIOVMSegments()
        bounce: Any = command.getIOMemoryDescriptor()
        first, *rest = frames(bounce.getBytesNoCopy(), 8 * PAGE)
        assert (segment.address, segment.length) == (first * PAGE, 8 * PAGE)
        assert rest == list(range(first + 1, first + 8))
        command.complete()


@pytest.mark.parametrize("cursor", CURSORS)
def test_cursors(cursor: type[iobmd.IOMemoryCursor]) -> None:
    memory: Any = ScatteredDescriptor([(3 * PAGE + 100, 52), (9 * PAGE, PAGE), (0x12345000, 8)])
    one = cursor.withSpecification(1000, 4000, 4)
    room = bytearray(48)
    whole = one.getPhysicalSegments(memory, 0, 100)
    assert sum(segment.length for segment in whole) == 4000
    assert all(segment.length <= 1000 for segment in whole)
    assert one.genPhysicalSegments(memory, 0, room, 100) == (3, sum(segment.length for segment in whole[:3]))
    assert bytes(room) == b"".join(struct.pack(CURSORS[cursor], *segment) for segment in whole[:3])
    found, position = [], 0
    while more := one.getPhysicalSegments(memory, position, 2, 900):
        assert len(more) <= 2
        assert sum(segment.length for segment in more) <= 900
        found += more
        position += sum(segment.length for segment in more)
    assert position == memory.getLength()
    assert [address for address, _ in found if address % 4] == []
    assert one.getPhysicalSegments(memory, position, 1) == []


@pytest.mark.needs("frames")
def test_cursors_of_real_memory() -> None:
    cursor = iobmd.IONaturalMemoryCursor.withSpecification(0)
    with iobmd.allocate(5 * PAGE) as memory:
        assert cursor.getPhysicalSegments(memory, 10, 100) == memory.segments(10)
    with iobmd.allocate(PAGE, wired=False) as memory:
        assert code_of(lambda: cursor.getPhysicalSegments(memory, 0, 1)) == IOReturn.kIOReturnNotReady


def test_cursors_that_are_refused() -> None:
    memory: Any = ScatteredDescriptor([(PAGE + 2, 10)])
    cursor = iobmd.IOMemoryCursor.withSpecification(0, 0, 4)
    assert code_of(lambda: cursor.getPhysicalSegments(memory, 0, 1)) == IOReturn.kIOReturnNotAligned
    for wrong in ((-1, 1, 0), (0, 0, 0), (0, 1, -1)):
        assert (
            code_of(lambda wrong=wrong: cursor.getPhysicalSegments(memory, *wrong)) == IOReturn.kIOReturnBadArgument
        )
    with pytest.raises(iobmd.BadArgumentError):
        iobmd.IOMemoryCursor.withSpecification(2, 0, 4)
    with pytest.raises(TypeError):
        cursor.getPhysicalSegments(b"bytes", 0, 1)  # type: ignore[arg-type]
