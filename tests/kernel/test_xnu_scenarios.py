"""The scenarios of XNU's kernel test of memory descriptors (TestIOMemoryDescriptor.cpp), from their facts.

Those of other modules: copy-on-write maps (test_copy_on_write), guard pages around a page
(test_guard_page_descriptors), addresses of another bus (test_descriptors).
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import kernel, rawmemory
from support.errors import code_of
from support.faulting import faults
from support.kernel import frames

import iobmd
from iobmd import (
    IOBufferMemoryDescriptor,
    IODirection,
    IODMACommand,
    IOMapOptions,
    IOMemoryDescriptor,
    IOMultiMemoryDescriptor,
    IOReturn,
    IOSubMemoryDescriptor,
    Wiring,
    kernel_task,
)

PAGE = kernel.PAGE
IN, OUT, INOUT = iobmd.kIODirectionIn, iobmd.kIODirectionOut, iobmd.kIODirectionInOut
PAGEABLE, SHARED = iobmd.kIOMemoryPageable, iobmd.kIOMemoryKernelUserShared
ANYWHERE, UNIQUE, SMALL = IOMapOptions.kIOMapAnywhere, IOMapOptions.kIOMapUnique, IOMapOptions.kIOMapGuardedSmall
describe, describe_all = IOMemoryDescriptor.withAddressRange, IOMemoryDescriptor.withAddressRanges
in_task = IOBufferMemoryDescriptor.inTaskWithOptions
sub, multi = IOSubMemoryDescriptor.withSubRange, IOMultiMemoryDescriptor.withDescriptors


@pytest.mark.usefixtures("nothing_left")
def test_multi_memory() -> None:
    """The parts are released before the memory is mapped, which is released before the map is read."""
    buffer = iobmd.allocate(8 * PAGE, shared=True)
    for page in range(8):
        buffer.writeBytes(page * PAGE, bytes([0xD0 | page]) * PAGE)
    at = buffer.getBytesNoCopy()
    for address, length, expected in ((at, 2, (PAGE, 0)), (at + PAGE - 2, 4, (2 * PAGE, PAGE - 2))):
        with describe(address, length, INOUT, kernel_task) as small:
            assert small.getDMAMapLength() == expected
    ranges = describe_all([(at + 4 * PAGE, 4 * PAGE), (at, 4 * PAGE)], INOUT, kernel_task)
    assert ranges.getDMAMapLength() == (8 * PAGE, 0)
    parts = [ranges, sub(ranges, 3 * PAGE, 2 * PAGE, INOUT), sub(ranges, 7 * PAGE, PAGE, INOUT)]
    assert parts[1].getDMAMapLength() == (2 * PAGE, 0)
    whole = multi(parts, INOUT, False)
    assert whole.getDMAMapLength() == (11 * PAGE, 0)
    for one in (*reversed(parts), buffer):
        one.release()
    mapped = whole.createMappingInTask(kernel_task, 0, ANYWHERE | SMALL, 7 * PAGE, whole.getLength() - 7 * PAGE)
    assert mapped.getLength() == 4 * PAGE
    assert bytes(mapped) == b"".join(bytes([byte]) * PAGE for byte in (0xD3, 0xD7, 0xD0, 0xD3))
    mapped.unmap()
    whole.release()


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("direction", [IN, OUT, INOUT])
def test_force_double_buffer(direction: int) -> None:
    """What the device writes to the bounce buffer arrives in the memory only if it reads from the device."""
    with in_task(kernel_task, direction | PAGEABLE, 8 * PAGE) as buffer:
        assert buffer.getDMAMapLength() == (8 * PAGE, 0)
        before = (0x53535300 | direction).to_bytes(4, "little")
        buffer.writeBytes(0, before)
        buffer.prepare(direction)
        with IODMACommand.withSpecification(64, 0x2000, IODMACommand.kMapped, 128 << 10) as command:
            command.setMemoryDescriptor(buffer)
            own = buffer.getPhysicalSegment(0)[0]
            command.synchronize(IODMACommand.kForceDoubleBuffer | OUT)
            (segment,) = command.genIOVMSegments(0, 1)
            assert segment.address != own, "it is other memory"
            if direction & OUT:
                assert command.readBytes(0, 4) == before
            if direction & IN:
                command.writeBytes(0, (0x11223300 | direction).to_bytes(4, "little"))
                assert buffer.readBytes(0, 4) == before
        buffer.complete(direction)
        expected = 0x11223300 | direction if direction & IN else 0x53535300 | direction
        assert int.from_bytes(buffer.readBytes(0, 4), "little") == expected


@pytest.mark.usefixtures("nothing_left")
def test_prefault() -> None:
    """A prepared map is present before it is touched, as a thread that may not fault requires."""
    with in_task(iobmd.current_task(), INOUT | PAGEABLE, 8 * PAGE) as buffer:
        buffer.prepare()
        with buffer.map(IOMapOptions.kIOMapPrefault) as mapped:
            assert kernel.present(mapped.getVirtualAddress(), 8 * PAGE) == 8
            assert bytes(mapped)[:4] == bytes(4)
        buffer.complete()


def test_overflow() -> None:
    allocate = lambda: IOBufferMemoryDescriptor.inTaskWithPhysicalMask(  # noqa: E731
        kernel_task, PAGEABLE | OUT, (1 << 64) - 1, 0
    )
    assert code_of(allocate) == IOReturn.kIOReturnBadArgument


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_set_length_and_map() -> None:
    with in_task(kernel_task, INOUT | SHARED, 0x4000, 0x4000) as buffer:
        for length in (0x100, 0x200):
            buffer.setLength(length)
            with buffer.createMappingInTask(iobmd.current_task(), 0, ANYWHERE, 0, 0) as mapped:
                assert mapped.getLength() == length


@pytest.mark.usefixtures("nothing_left")
def test_zero_length() -> None:
    with describe(0, 0, iobmd.kIODirectionNone, iobmd.current_task()) as nothing:
        nothing.prepare()
        nothing.complete()
        assert (nothing.getLength(), nothing.segments()) == (0, [])


@pytest.mark.usefixtures("nothing_left")
def test_refused_fixed_addresses() -> None:
    """Linux, unlike XNU's kernel map, has memory for root at 0x2000: these addresses are refused to everyone."""
    with in_task(None, IN | PAGEABLE, PAGE) as buffer:
        taken = rawmemory.map_memory(PAGE)
        for at, code in (
            (taken, IOReturn.kIOReturnNoResources),
            (0x2001, IOReturn.kIOReturnBadArgument),
            (0, IOReturn.kIOReturnBadArgument),
            ((1 << 64) - PAGE, IOReturn.kIOReturnBadArgument),
            (1 << 62, IOReturn.kIOReturnNoMemory),
        ):
            assert code_of(lambda: buffer.createMappingInTask(kernel_task, at, 0)) == code  # noqa: B023
        rawmemory.unmap(taken, PAGE)


@pytest.mark.usefixtures("nothing_left")
def test_prepared_without_zero_fill() -> None:
    with in_task(None, IN | PAGEABLE, 24 * PAGE) as buffer:
        buffer.prepare(IN | IODirection.kIODirectionPrepareNoZeroFill)
        buffer.prepare(IN)
        buffer.complete(IN | IODirection.kIODirectionCompleteWithDataValid)
        assert buffer.wiring is Wiring.PINNED
        assert kernel.pinned(24 * PAGE) == 24 * PAGE
        buffer.complete(IN)
        assert kernel.pinned() == 0
        assert buffer.readBytes(0, 24 * PAGE) == bytes(24 * PAGE)


@pytest.mark.usefixtures("nothing_left")
def test_allocation_names() -> None:
    """A name is given with the allocation, where XNU takes that of the thread; it shows where memory is mapped."""
    with in_task(None, INOUT | PAGEABLE | SHARED, 13 * PAGE, 1, 77) as buffer:
        buffer.prepare()
        with buffer.map() as mapped:
            found = [line for line in Path("/proc/self/maps").read_text().splitlines() if "iobmd:77" in line]
            assert [int(line.split("-")[0], 16) for line in found] == [mapped.getAddress()]
        buffer.complete()


@pytest.mark.usefixtures("nothing_left")
def test_guarded_buffers_through_a_second_map() -> None:
    for capacity in range(PAGE // 8, 10 * PAGE, PAGE // 8):
        with IOBufferMemoryDescriptor.inTaskWithGuardPages(kernel_task, INOUT, capacity) as buffer:
            whole = -(-capacity // PAGE) * PAGE
            address = buffer.getBytesNoCopy()
            assert (buffer.getLength(), address % PAGE) == (whole, 0)
            content = bytes(byte & 0xFF for byte in range(capacity))
            ctypes.memmove(address, content, capacity)
            with buffer.createMappingInTask(kernel_task, 0, ANYWHERE | UNIQUE, 0, whole) as mapped:
                assert mapped.getLength() == whole
                assert ctypes.string_at(mapped.getAddress(), capacity) == content
            if capacity % PAGE == 0:
                assert faults(address - 1)
                assert faults(address + whole)


@pytest.mark.usefixtures("nothing_left")
def test_contexts() -> None:
    """The object is retained while it is set, and returned as it is."""
    first, second = [object()], [object()]
    counts = sys.getrefcount(first), sys.getrefcount(second)
    with in_task(None, INOUT | PAGEABLE | SHARED, 13 * PAGE) as buffer:
        assert buffer.copyContext() is None
        buffer.setContext(None)
        assert buffer.copyContext() is None
        buffer.setContext(first)
        assert buffer.copyContext() is first
        assert sys.getrefcount(first) == counts[0] + 1
        buffer.setContext(None)
        assert buffer.copyContext() is None
        buffer.setContext(second)
        assert buffer.copyContext() is second
    del buffer
    assert (sys.getrefcount(first), sys.getrefcount(second)) == counts


@pytest.mark.usefixtures("nothing_left")
def test_redirect() -> None:
    """The map shows the other memory, and then its own again. XNU exchanges the memory of both; here only one map
    changes, and the second remains as it is."""
    with (
        in_task(None, INOUT | PAGEABLE, 64 << 10, PAGE) as one,
        in_task(None, INOUT | PAGEABLE, 64 << 10, PAGE) as two,
    ):
        anywhere = ANYWHERE | UNIQUE
        with (
            one.createMappingInTask(kernel_task, 0, anywhere) as first,
            two.createMappingInTask(kernel_task, 0, anywhere) as second,
        ):
            ctypes.memset(first.getVirtualAddress(), 0x11, 64 << 10)
            ctypes.memset(second.getVirtualAddress(), 0x22, 64 << 10)
            first.redirect(two, 0, 0)
            assert bytes(first) == bytes(second) == b"\x22" * (64 << 10)
            assert one.readBytes(0, 64 << 10) == b"\x11" * (64 << 10)
            first.redirect(one, 0, 0)
            assert bytes(first) == b"\x11" * (64 << 10)
            assert bytes(second) == b"\x22" * (64 << 10)


@pytest.mark.usefixtures("nothing_left")
def test_nested_multis_mapped_guarded() -> None:
    """1, 2 and 3 pages in one concatenation, after a page of another."""
    buffers = [in_task(kernel_task, INOUT | SHARED, pages * PAGE) for pages in (1, 2, 3, 1)]
    for number, buffer in enumerate(buffers):
        buffer.writeBytes(0, bytes([number]) * len(buffer))
    inner = multi(buffers[:3], INOUT, False)
    whole = multi([buffers[3], inner], INOUT, False)
    with whole.createMappingInTask(kernel_task, 0, ANYWHERE | SMALL) as mapped:
        assert bytes(mapped) == b"".join(
            bytes([number]) * (pages * PAGE) for number, pages in ((3, 1), (0, 1), (1, 2), (2, 3))
        )
        at = mapped.getAddress()
        assert faults(at - 1)
        assert faults(at + 7 * PAGE)
        if os.geteuid() == 0:
            wanted = [frame for one in (buffers[3], *buffers[:3]) for frame in frames(one.getBytesNoCopy(), len(one))]
            assert frames(at, 7 * PAGE) == wanted
    for one in (whole, inner, *buffers):
        one.release()


@pytest.mark.usefixtures("nothing_left")
def test_256_mib_of_mappings() -> None:
    """As many maps of 1 MiB at a time, each of the right pages, and each is unmapped."""
    size = 256 << 20
    with in_task(None, INOUT | PAGEABLE, size) as buffer:
        for number in range(256):
            buffer.writeBytes(number << 20, number.to_bytes(4, "little"))
        maps = [
            buffer.createMappingInTask(kernel_task, 0, ANYWHERE | UNIQUE, number << 20, 1 << 20)
            for number in range(256)
        ]
        for number, mapped in enumerate(maps):
            assert ctypes.string_at(mapped.getAddress(), 4) == number.to_bytes(4, "little")
        addresses = [mapped.getAddress() for mapped in maps]
        assert len(set(addresses)) == 256
        for mapped in maps:
            mapped.unmap()


# --- every offset and size of 16 MiB, in one range or three, in order or with two exchanged

SIZE = 16 << 20


def growing(start: int, end: int, shift: int, step: int) -> Iterator[int]:
    while start < end:
        yield start
        start = (start << shift) + step


def as_ranges(offset: int, size: int) -> list[tuple[int, int]]:
    """Return the ranges of XNU's test, as offsets and lengths."""
    if size > 5 * PAGE:
        return [(offset, 7634), (offset + 7634, 9870), (offset + 17504, size - 17504)]
    if size > 2 * PAGE and not offset % PAGE:
        return [(offset + PAGE, PAGE), (offset, PAGE), (offset + 2 * PAGE, size - 2 * PAGE)]
    return [(offset, size)]


@pytest.mark.needs("memlock")
@pytest.mark.usefixtures("nothing_left")
def test_every_offset_and_size() -> None:
    """Each range is mapped guarded at several offsets, and the map and `readBytes` are compared with the contents."""
    with iobmd.allocate(SIZE, shared=True, wired=False) as buffer:
        content = b"".join(number.to_bytes(4, "little") for number in range(SIZE // 4))
        buffer.writeBytes(0, content)
        at = buffer.getBytesNoCopy()
        for page, count in ((1, 1), (16, 4)):  # split the areas, as vm_inherit does in XNU's test
            iobmd._native.mman.advise(at + page * PAGE, count * PAGE, iobmd._native.mman.MADV_DONTFORK)
        compared = 0
        for offset in growing(0, SIZE, 2, 0x40C):
            for size in growing(4, SIZE - offset - 1, 2, 0x3FC):
                ranges = as_ranges(offset, size)
                model = b"".join(content[start : start + length] for start, length in ranges)
                with describe_all([(at + start, length) for start, length in ranges], INOUT, kernel_task) as md:
                    compared += compare(md, model)
        assert compared > 1500


def compare(md: IOMemoryDescriptor, model: bytes) -> int:
    compared = 0
    assert len(md) == len(model)
    for offset in growing(0, len(model), 1, 0xF00):
        for size in growing(4, len(model) - offset - 1, 2, 0x200):
            with md.createMappingInTask(kernel_task, 0, ANYWHERE | SMALL, offset, size) as mapped:
                md.prepare()
                expected = model[offset : offset + size]
                assert memoryview(mapped) == expected
                assert md.readBytes(offset, size) == expected
                md.complete()
            compared += 1
    return compared
