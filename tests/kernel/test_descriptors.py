"""Descriptors by IOKit's initializers, their numbers, and the flags of prepare and complete; other buses."""

import ctypes
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import kernel
from support.errors import code_of, refusal

import iobmd
from iobmd import (
    IOBufferMemoryDescriptor,
    IODeviceMemory,
    IODirection,
    IODMACommand,
    IOMemoryDescriptor,
    IOMemoryTypes,
    IOMultiMemoryDescriptor,
    IOOptionBits,
    IOReturn,
    IOSubMemoryDescriptor,
    Wiring,
    kernel_task,
)

PAGE = kernel.PAGE
INOUT, REMOTE = iobmd.kIODirectionInOut, IOOptionBits.kIOMemoryRemote
VIRTUAL, PHYSICAL = IOMemoryTypes.kIOMemoryTypeVirtual, IOMemoryTypes.kIOMemoryTypePhysical
sub, multi = IOSubMemoryDescriptor.withSubRange, IOMultiMemoryDescriptor.withDescriptors


# --- initializers


@pytest.mark.usefixtures("nothing_left")
def test_ranges_by_the_designated_initializer() -> None:
    with iobmd.allocate(4 * PAGE, wired=False) as buffer:
        buffer.writeBytes(0, data := os.urandom(4 * PAGE))
        at = buffer.getBytesNoCopy()
        ranges = [(at + PAGE, 10), (at, 5), (at + 99, 99)]
        word = INOUT | VIRTUAL | IOMemoryTypes.kIOMemoryAsReference | IOMemoryTypes.kIOMemoryPersistent
        word |= IOMemoryTypes.kIOMemoryBufferPageable
        with IOMemoryDescriptor.withOptions(ranges, 2, 0, kernel_task, word) as md:
            assert md.readBytes(0, 15) == data[PAGE : PAGE + 10] + data[:5]
            assert md.getFlags() == INOUT, "the bits of the type are not options of the descriptor"
            assert md.initWithOptions(ranges, 3, 0, os.getpid(), iobmd.kIODirectionOut | VIRTUAL)
            assert md.readBytes(15, 99) == data[99:198]
            assert md.getDirection() == iobmd.kIODirectionOut
            md.prepare()
            again = lambda: md.initWithOptions(ranges, 1, 0, kernel_task, VIRTUAL)  # noqa: E731
            assert code_of(again) == IOReturn.kIOReturnBusy
            assert md.readBytes(0, 10) == data[PAGE : PAGE + 10]
            md.complete()


@pytest.mark.parametrize(
    ("count", "offset", "task", "options", "code"),
    [
        (2, 0, kernel_task, VIRTUAL, IOReturn.kIOReturnBadArgument),
        (1, 1, kernel_task, VIRTUAL, IOReturn.kIOReturnBadArgument),
        (1, 0, kernel_task, PHYSICAL, IOReturn.kIOReturnBadArgument),
        (1, 0, None, VIRTUAL, IOReturn.kIOReturnBadArgument),
        (1, 0, kernel_task, 0, IOReturn.kIOReturnBadArgument),
        (1, 0, None, PHYSICAL | IOOptionBits.kIOMemoryUseReserve, IOReturn.kIOReturnUnsupported),
        (1, 0, kernel_task, IOMemoryTypes.kIOMemoryTypeUPL, IOReturn.kIOReturnUnsupported),
        (1, 0, kernel_task, IOMemoryTypes.kIOMemoryTypeUIO, IOReturn.kIOReturnUnsupported),
        (1, 0, kernel_task, IOMemoryTypes.kIOMemoryTypePersistentMD, IOReturn.kIOReturnUnsupported),
        (1, 0, kernel_task, VIRTUAL | IOOptionBits.kIOMemoryClearEncrypt, IOReturn.kIOReturnUnsupported),
        (1, 0, kernel_task, VIRTUAL | REMOTE, IOReturn.kIOReturnBadArgument),
    ],
)
def test_options_that_describe_nothing(
    count: int, offset: int, task: iobmd.Task | None, options: int, code: IOReturn
) -> None:
    memory = ctypes.create_string_buffer(9)
    ranges = [(ctypes.addressof(memory), 9)]
    assert code_of(lambda: IOMemoryDescriptor.withOptions(ranges, count, offset, task, options)) == code


def test_classes_have_their_own_initializers() -> None:
    for made in (IOBufferMemoryDescriptor(), IOSubMemoryDescriptor(), IOMultiMemoryDescriptor(), IODeviceMemory()):
        code, message = refusal(lambda: made.initWithOptions([], 0, 0, kernel_task, VIRTUAL))  # noqa: B023
        assert code == IOReturn.kIOReturnUnsupported
        assert made._initializer in message
    with iobmd.allocate(PAGE) as buffer:
        mapped = lambda: IOMemoryDescriptor.withOptions([], 0, 0, kernel_task, VIRTUAL, object())  # noqa: E731
        assert code_of(mapped) == IOReturn.kIOReturnUnsupported
        assert bytes(buffer) == bytes(PAGE)


@pytest.mark.usefixtures("nothing_left")
def test_parts_can_be_initialized_again() -> None:
    first, second = iobmd.allocate(2 * PAGE, shared=True, wired=False), iobmd.allocate(PAGE, wired=False)
    first.writeBytes(0, os.urandom(2 * PAGE))
    before = kernel.maps_of_iobmd()
    part = IOSubMemoryDescriptor()
    assert code_of(part.getLength) == IOReturn.kIOReturnNotOpen
    assert part.initSubRange(first, PAGE - 3, 9, INOUT)
    assert part.readBytes(0, 9) == first.readBytes(PAGE - 3, 9)
    with part.map():
        assert code_of(lambda: part.initSubRange(second, 0, 1, INOUT)) == IOReturn.kIOReturnBusy
    assert code_of(lambda: part.initSubRange(second, 0, PAGE + 1, INOUT)) == IOReturn.kIOReturnBadArgument
    whole = IOMultiMemoryDescriptor()
    assert whole.initWithDescriptors([first, part], INOUT)
    assert len(whole) == 2 * PAGE + 9
    first.free()
    assert kernel.maps_of_iobmd() == before, "two dependents"
    assert part.initSubRange(second, 1, 5, INOUT)
    assert kernel.maps_of_iobmd() == before, "one dependent"
    assert whole.initWithDescriptors([part], INOUT)
    assert kernel.maps_of_iobmd() == before - 1, "the memory had no other user"
    part.free()
    assert whole.readBytes(0, 5) == bytes(5)
    whole.free()
    second.free()


# --- numbers


def test_descriptor_ids_are_unique() -> None:
    with iobmd.allocate(PAGE) as buffer:
        parts = [sub(buffer, 0, 1, INOUT) for _ in range(3)]
        numbers = [one.getDescriptorID() for one in (buffer, *parts)]
        assert len(set(numbers)) == 4
        assert all(numbers)
        assert [one.getDescriptorID() for one in (buffer, *parts)] == numbers


@pytest.mark.usefixtures("nothing_left")
def test_preparation_ids() -> None:
    """The same number for the same preparation, which no other preparation ever has."""
    with iobmd.allocate(PAGE, wired=False) as buffer, iobmd.allocate(PAGE) as wired:
        part, both = sub(buffer, 3, 9, INOUT), multi([buffer, wired], INOUT)
        assert [one.getPreparationID() for one in (buffer, part, both)] == [iobmd.kIOPreparationIDUnprepared] * 3
        seen = set()
        for _ in range(3):
            part.prepare()
            buffer.prepare()
            number = buffer.getPreparationID()
            assert number == part.getPreparationID() > iobmd.kIOPreparationIDAlwaysPrepared
            buffer.complete()
            assert buffer.getPreparationID() == number, "the part still has it prepared"
            part.complete()
            assert buffer.getPreparationID() == 0
            seen.add(number)
        always = wired.getPreparationID()
        wired.prepare()
        wired.complete()
        assert wired.getPreparationID() == always != 0
        both.prepare()
        seen |= {both.getPreparationID(), buffer.getPreparationID(), always}
        assert len(seen) == 6
        both.complete()
        assert both.getPreparationID() == 0


def test_mapper_options() -> None:
    with iobmd.allocate(PAGE) as buffer:
        assert buffer.getMapperOptions() == 0
        buffer.setMapperOptions(iobmd.kIOMapperUncached)
        assert buffer.getMapperOptions() == 1
        for wrong in (-1, 1 << 16):
            assert code_of(lambda: buffer.setMapperOptions(wrong)) == IOReturn.kIOReturnBadArgument  # noqa: B023
        assert buffer.getMapperOptions() == 1


# --- flags


@pytest.mark.usefixtures("nothing_left")
def test_prepared_for_a_device_that_does_not_snoop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines of the whole range are written back and dropped, after it is pinned; a refusal unpins it."""
    with iobmd.allocate(3 * PAGE, wired=False, shared=True) as buffer:
        flushed = []
        with buffer.map(iobmd.IOMapOptions.kIOMapUnique) as other:
            lines = type(buffer._memory().require_backing()).write_back

            def write_back(backing: object, offset: int, length: int, *, drop: bool) -> None:
                flushed.append((offset, length, drop, kernel.pinned(3 * PAGE)))
                lines(backing, offset, length, drop=drop)

            monkeypatch.setattr(type(buffer._memory().require_backing()), "write_back", write_back)
            buffer.writeBytes(5, b"written")
            buffer.prepare(INOUT | IODirection.kIODirectionPrepareNonCoherent)
            assert flushed == [(0, 3 * PAGE, True, 3 * PAGE)]
            assert bytes(other)[5:12] == b"written"
            buffer.complete(INOUT | IODirection.kIODirectionCompleteWithError)
            assert kernel.pinned() == 0
        monkeypatch.setattr("iobmd._native.mapping.BEST_FLUSH", 0)
        refused = lambda: buffer.prepare(IODirection.kIODirectionPrepareNonCoherent)  # noqa: E731
        assert code_of(refused) == IOReturn.kIOReturnUnsupported
        assert kernel.pinned() == 0
        assert code_of(buffer.complete) == IOReturn.kIOReturnNotReady


@pytest.mark.usefixtures("nothing_left")
def test_flags_without_effect_and_unknown_ones() -> None:
    with iobmd.allocate(2 * PAGE, wired=False) as buffer:
        buffer.prepare(INOUT | IODirection.kIODirectionPrepareReserved1)
        assert bytes(buffer) == bytes(2 * PAGE), "it is zeroed nevertheless"
        for wrong in (0x100, 1 << 30, -1):
            assert code_of(lambda: buffer.prepare(wrong)) == IOReturn.kIOReturnBadArgument  # noqa: B023
            assert code_of(lambda: buffer.complete(wrong)) == IOReturn.kIOReturnBadArgument  # noqa: B023
        only_of_complete = IODirection.kIODirectionCompleteWithError
        assert code_of(lambda: buffer.prepare(only_of_complete)) == IOReturn.kIOReturnBadArgument
        assert kernel.pinned(2 * PAGE) == 2 * PAGE
        buffer.complete(
            INOUT | IODirection.kIODirectionCompleteWithDataValid | IODirection.kIODirectionPrepareNoFault
        )
        assert kernel.pinned() == 0


def test_refused_by_name() -> None:
    """The message says what the option means, and that Linux has nothing like it."""
    for option in (IOOptionBits.kIOMemoryClearEncrypt, IOOptionBits.kIOMemoryUseReserve):
        code, message = refusal(lambda: IOBufferMemoryDescriptor.withOptions(INOUT | option, PAGE))  # noqa: B023
        assert code == IOReturn.kIOReturnUnsupported
        assert option.name in message
        assert "yet" not in message
    with iobmd.allocate(PAGE) as buffer:
        for operation in (iobmd.kIOMemoryClearEncrypted, iobmd.kIOMemorySetEncrypted, 3):
            refused = lambda: buffer.performOperation(operation, 0, 1)  # noqa: B023, E731
            assert code_of(refused) == IOReturn.kIOReturnUnsupported


# --- other buses

Ranges = list[tuple[int, int]]


def test_addresses_of_another_bus() -> None:
    ranges = [(0x1234567890123456, 0x1000), (0x5432109876543210, 0x2000)]
    with IOMemoryDescriptor.withAddressRanges(ranges, INOUT | REMOTE, None) as md:
        assert md.getFlags() & REMOTE
        md.prepare()
        assert [tuple(segment) for segment in md.segments()] == ranges
        assert md.getPhysicalSegment(0x1800) == (0x5432109876543A10, 0x1800)
        assert md.getPhysicalSegment(0x3000) == (0, 0)
        assert md.getDMAMapLength() == (0x2000 + 0x3000, 0x456)
        command = IODMACommand.withSpecification(64, 0x2000, IODMACommand.kUnmapped | IODMACommand.kIterateOnly)
        command.setMemoryDescriptor(md)
        assert [tuple(segment) for segment in command.genIOVMSegments()] == ranges
        command.clearMemoryDescriptor()
        assert code_of(md.free) == IOReturn.kIOReturnBusy
        md.complete()
        for use in (md.map, lambda: md.readBytes(0, 1), lambda: md.writeBytes(0, b"x"), lambda: md[5]):
            assert code_of(use) == IOReturn.kIOReturnUnsupported
        assert md.getPageCounts() == (0, 0)
        assert md.wiring is Wiring.PINNED
        md.verify()
        with iobmd.allocate(PAGE) as buffer, multi([buffer, sub(md, 5, 10, INOUT)], INOUT) as both:
            assert both.readBytes(0, PAGE) == bytes(PAGE)
            assert code_of(lambda: both.readBytes(PAGE - 1, 2)) == IOReturn.kIOReturnUnsupported


@pytest.mark.needs("frames")
def test_bus_addresses_after_memory() -> None:
    with (
        iobmd.allocate(PAGE) as buffer,
        IOMemoryDescriptor.withAddressRange(0x1234567890123456, 99, REMOTE, None) as md,
        multi([buffer, sub(md, 5, 10, INOUT)], INOUT) as both,
    ):
        first, second = both.segments()
        assert (first.address, first.length) == (buffer.getPhysicalAddress(), PAGE)
        assert (second.address, second.length) == (0x123456789012345B, 10)


@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 40)), max_size=8), st.data())
def test_bus_addresses_are_never_changed(ranges: Ranges, data: st.DataObject) -> None:
    ranges = [(address, min(length, (1 << 64) - address)) for address, length in ranges]
    whole = [(address, length) for address, length in ranges if length]
    with IOMemoryDescriptor.withAddressRanges(ranges, REMOTE, None) as md:
        total = sum(length for _, length in ranges)
        assert len(md) == total
        offset = data.draw(st.integers(0, total))
        found = [tuple(segment) for segment in md.segments(offset, total - offset)]
        wanted: list[tuple[int, int]] = []
        for address, length in whole:
            skipped = min(offset, length)
            offset -= skipped
            if skipped < length:
                if wanted and sum(wanted[-1]) == address + skipped:
                    wanted[-1] = wanted[-1][0], wanted[-1][1] + length - skipped
                else:
                    wanted.append((address + skipped, length - skipped))
        assert found == wanted


@pytest.mark.parametrize("ranges", [[((1 << 64) - 1, 2)], [(-1, 2)], [(0, -1)], [(0, 1 << 64), (0, 1)]])
def test_no_bus_has_these_addresses(ranges: Ranges) -> None:
    made = lambda: IOMemoryDescriptor.withAddressRanges(ranges, REMOTE, None)  # noqa: E731
    assert code_of(made) == IOReturn.kIOReturnBadArgument


def test_remote_is_of_no_task() -> None:
    describe = IOMemoryDescriptor.withAddressRange
    assert code_of(lambda: describe(0, 9, REMOTE, kernel_task)) == IOReturn.kIOReturnBadArgument
    made = lambda: IOBufferMemoryDescriptor.withOptions(INOUT | REMOTE, PAGE)  # noqa: E731
    assert code_of(made) == IOReturn.kIOReturnBadArgument
