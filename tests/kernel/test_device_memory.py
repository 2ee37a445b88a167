"""Registers in maps of main memory, and what is refused without a device. Devices: tests/vm."""

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import kernel, rawmemory
from support.child import in_child
from support.errors import code_of, refusal

import iobmd
from iobmd import (
    IODeviceMemory,
    IODMACommand,
    IOInterruptEventSource,
    IOMapOptions,
    IOMemoryDescriptor,
    IOMemoryMap,
    IOReturn,
    Wiring,
)
from iobmd.units import PAGE_SIZE

START = 0xFEDC_B000_0010


@pytest.fixture
def mapped() -> Iterator[IOMemoryMap]:
    with iobmd.allocate(2 * kernel.PAGE, wired=False, shared=True) as buffer, buffer.map() as one:
        yield one


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_every_width_at_every_aligned_offset(mapped: IOMemoryMap, width: int) -> None:
    """Numbers are little-endian, and the adjacent bytes keep their values."""
    read: Callable[[int], int] = getattr(mapped, f"read{width}")
    write: Callable[[int, int], None] = getattr(mapped, f"write{width}")
    size = width // 8
    with memoryview(mapped) as view:
        for offset in (0, size, kernel.PAGE - size, kernel.PAGE, len(mapped) - size):
            view[:] = expected = bytearray(os.urandom(len(mapped)))
            assert read(offset) == int.from_bytes(expected[offset : offset + size], "little")
            value = int.from_bytes(os.urandom(size), "little")
            write(offset, value)
            expected[offset : offset + size] = value.to_bytes(size, "little")
            assert view == expected


@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_what_is_refused_changes_nothing(mapped: IOMemoryMap, width: int) -> None:
    read: Callable[[int], int] = getattr(mapped, f"read{width}")
    write: Callable[[int, int], None] = getattr(mapped, f"write{width}")
    size = width // 8
    before = bytes(mapped)
    assert read(0) == 0  # also after the first access, whose position is reused
    for offset in (-1, -size, len(mapped) - size + 1, len(mapped), 1 << 70, *range(1, size)):
        assert code_of(lambda offset=offset: read(offset)) == IOReturn.kIOReturnBadArgument
        assert code_of(lambda offset=offset: write(offset, 1)) == IOReturn.kIOReturnBadArgument
    for value in (-1, 1 << width):
        assert code_of(lambda value=value: write(0, value)) == IOReturn.kIOReturnBadArgument
    with pytest.raises(TypeError, match="offset must be an integer"):
        read(0.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="value must be an integer"):
        write(0, "1")  # type: ignore[arg-type]
    assert bytes(mapped) == before


def test_alignment_is_that_of_the_address(mapped: IOMemoryMap) -> None:
    """Not that of the offset: the map may begin anywhere."""
    memory = mapped.getMemoryDescriptor()
    with memory.createMappingInTask(iobmd.kernel_task, 0, IOMapOptions.kIOMapAnywhere, 2, 100) as part:
        memory.writeBytes(4, b"\1\2\3\4")
        assert part.read32(2) == 0x04030201
        assert code_of(lambda: part.read32(0)) == IOReturn.kIOReturnBadArgument
        assert code_of(lambda: part.read8(100)) == IOReturn.kIOReturnBadArgument  # of the buffer, not of the map


def test_maps_that_cannot_be_written_or_are_ended(mapped: IOMemoryMap) -> None:
    memory = mapped.getMemoryDescriptor()
    with memory.map(IOMapOptions.kIOMapReadOnly | IOMapOptions.kIOMapUnique) as readable:
        assert readable.read32(0) == 0
        assert code_of(lambda: readable.write32(0, 1)) == IOReturn.kIOReturnNotWritable
    for access in (lambda: readable.read32(0), lambda: readable.write32(0, 1)):
        assert code_of(access) in (IOReturn.kIOReturnNotOpen, IOReturn.kIOReturnNotWritable)


def test_a_redirected_map(mapped: IOMemoryMap) -> None:
    """Accesses follow the map to other memory."""
    memory = mapped.getMemoryDescriptor()
    with iobmd.allocate(len(mapped), wired=False, shared=True) as other, memory.map(IOMapOptions.kIOMapUnique) as one:
        one.write32(4, 1)
        one.redirect(other)
        assert one.read32(4) == 0
        one.write32(4, 2)
        assert (memory.readBytes(4, 1), other.readBytes(4, 1)) == (b"\1", b"\2")


def test_existing_memory_that_is_unmapped_is_no_signal() -> None:
    """The access is made by a child process, which the fault ends instead."""
    size = 2 * kernel.PAGE
    address = rawmemory.map_memory(size)
    described = IOMemoryDescriptor.withAddressRange(address, size, iobmd.kIODirectionInOut, iobmd.kernel_task)
    with described, described.map() as one:
        one.write64(8, 0x0102030405060708)
        assert one.read16(8) == 0x0708
        rawmemory.unmap(address + kernel.PAGE, kernel.PAGE)
        assert one.read64(8) == 0x0102030405060708
        for access in (lambda: one.read32(kernel.PAGE), lambda: one.write8(kernel.PAGE + 1, 1)):
            assert code_of(access) == IOReturn.kIOReturnVMError
    rawmemory.unmap(address, kernel.PAGE)


# --- descriptors of physical addresses, which need no privilege until they are mapped


def test_addresses_are_available_without_a_device() -> None:
    with IODeviceMemory.withRange(START, 10_000) as memory:
        assert memory.getLength() == len(memory) == 10_000
        assert memory.wiring is Wiring.DEVICE
        assert memory.getDirection() == iobmd.kIODirectionNone
        assert [tuple(one) for one in memory.segments()] == [(START, 10_000)]
        assert memory.getPhysicalSegment(9_000) == (START + 9_000, 1_000)
        assert memory.getPhysicalSegment(10_000) == (0, 0)
        assert list(memory.page_addresses(0, 5_000)) == [START - 16, START - 16 + kernel.PAGE]
        assert memory.getDMAMapLength() == (3 * kernel.PAGE, 16)
        assert memory.getPageCounts() == (0, 0)
        assert memory.cache_mode == (iobmd.kIOMapDefaultCache, iobmd.kIOMapInhibitCache)
        memory.verify()
        assert "DEVICE" not in repr(memory)


def test_prepare_only_counts() -> None:
    with IODeviceMemory.withRange(START, 100) as memory:
        memory.prepare()
        memory.prepare()
        assert code_of(memory.free) == IOReturn.kIOReturnBusy
        memory.complete()
        memory.complete()
        assert code_of(memory.complete) == IOReturn.kIOReturnNotReady
        assert code_of(lambda: memory.prepare(iobmd.kIODirectionPrepareToPhys32)) == IOReturn.kIOReturnNoResources
        assert in_child(memory.getPhysicalAddress) == START


def test_physical_ranges_without_a_task() -> None:
    """In IOKit, addresses of no task are physical: one range, several, or none, also of `withOptions`."""
    word = iobmd.kIODirectionOut | iobmd.kIOMemoryMapperNone
    with IOMemoryDescriptor.withAddressRange(START, 10_000, word, None) as one:
        assert one.getFlags() == word
        assert one.wiring is Wiring.DEVICE
        assert [tuple(segment) for segment in one.segments()] == [(START, 10_000)]
        assert code_of(lambda: one.map(IOMapOptions.kIOMapWriteCombineCache)) == IOReturn.kIOReturnUnsupported
    ranges = [(1 << 40, 50), (START, 0), (START, 100)]
    physical = word | iobmd.kIOMemoryTypePhysical
    for several in (
        IOMemoryDescriptor.withAddressRanges(ranges, word, None),
        IOMemoryDescriptor.withOptions(ranges, 3, 0, None, physical),
    ):
        with several:
            assert several.getLength() == 150
            assert [tuple(segment) for segment in several.segments()] == [(1 << 40, 50), (START, 100)]
            assert several.getPhysicalSegment(60) == (START + 10, 90)
            assert several.wiring is Wiring.DEVICE
            assert several.initWithOptions([(START, 8)], 1, 0, None, physical)
            assert several.getPhysicalAddress() == START
    with IOMemoryDescriptor.withAddressRanges([], 0, None) as nothing:
        assert nothing.getLength() == 0
    for wrong in ([(START, -1)], [(1 << 64, 1)], [(START, 1), (-1, 1)]):
        ranges_of = lambda: IOMemoryDescriptor.withAddressRanges(wrong, word, None)  # noqa: B023, E731
        assert code_of(ranges_of) == IOReturn.kIOReturnBadArgument
    client = lambda: IOMemoryDescriptor.CreateMemoryDescriptorFromClient(1, [(START, 8)], None)  # type: ignore[arg-type] # noqa: E731
    assert code_of(client) == IOReturn.kIOReturnBadArgument


def test_parts_lists_and_concatenations() -> None:
    first, second = IODeviceMemory.arrayFromList([(START, 100), (1 << 40, 50)])
    with first, second, IODeviceMemory.withSubRange(first, 90, 10) as part:
        assert type(part) is IODeviceMemory
        assert [tuple(one) for one in part.segments()] == [(START + 90, 10)]
        assert code_of(lambda: IODeviceMemory.withSubRange(first, 90, 11)) == IOReturn.kIOReturnBadArgument
        both = iobmd.IOMultiMemoryDescriptor.withDescriptors([part, second], iobmd.kIODirectionOut)
        assert [tuple(one) for one in both.segments()] == [(START + 90, 10), (1 << 40, 50)]
        assert both.wiring is Wiring.DEVICE
        with iobmd.allocate(kernel.PAGE, wired=False) as buffer:
            mixed = iobmd.IOMultiMemoryDescriptor.withDescriptors([part, buffer], iobmd.kIODirectionOut)
            assert mixed.wiring is Wiring.PAGEABLE
        with pytest.raises(TypeError, match="IODeviceMemory"):
            IODeviceMemory.withSubRange(buffer, 0, 1)  # type: ignore[arg-type]


def test_a_command_for_another_device() -> None:
    """Devices may access each other's memory (peer to peer): its addresses are split to the limits of the device."""
    memory = IOMemoryDescriptor.withPhysicalAddress(1 << 40, 10_000, iobmd.kIODirectionOut)
    with memory, IODMACommand.withSpecification(64, maxSegmentSize=PAGE_SIZE) as command:
        memory.prepare()
        command.setMemoryDescriptor(memory)
        assert [tuple(one) for one in command.genIOVMSegments()] == [
            (1 << 40, PAGE_SIZE), ((1 << 40) + PAGE_SIZE, PAGE_SIZE), ((1 << 40) + 8192, 1808),
        ]  # fmt: skip
        command.clearMemoryDescriptor()
        memory.complete()


@pytest.mark.parametrize(("start", "length"), [(0, 0), (-1, 10), (1 << 64, 1), ((1 << 64) - 1, 2), (PAGE_SIZE, -1)])
def test_ranges_that_do_not_exist(start: int, length: int) -> None:
    for describe in (
        lambda: IODeviceMemory.withRange(start, length),
        lambda: IOMemoryDescriptor.withPhysicalAddress(start, length, iobmd.kIODirectionIn),
    ):
        assert code_of(describe) == IOReturn.kIOReturnBadArgument


@pytest.mark.parametrize("start", [(1 << 63) - PAGE_SIZE, 1 << 63, (1 << 64) - 2 * PAGE_SIZE])
def test_addresses_that_no_processor_generates(start: int) -> None:
    """They are refused before the file is opened."""
    with IODeviceMemory.withRange(start, 2 * PAGE_SIZE) as memory:
        assert memory.getPhysicalAddress() == start
        for access in (
            memory.map,
            lambda: memory.readBytes(PAGE_SIZE, 1),
            lambda: memory.writeBytes(PAGE_SIZE, b"x"),
        ):
            assert code_of(access) == IOReturn.kIOReturnBadArgument


def test_more_bytes_than_memory_are_not_collected() -> None:
    """The size is checked before memory is allocated for the copy: the kernel would end processes later."""
    with IODeviceMemory.withRange(0, 1 << 60) as memory:
        assert code_of(lambda: memory.readBytes(0, 1 << 46)) == IOReturn.kIOReturnNoMemory
    with contextlib.ExitStack() as stack:
        whole: IOMemoryDescriptor = stack.enter_context(iobmd.allocate(1 << 20, wired=False))
        while len(whole) < 1 << 46:
            doubled = iobmd.IOMultiMemoryDescriptor.withDescriptors([whole, whole], iobmd.kIODirectionInOut)
            whole = stack.enter_context(doubled)
        assert code_of(lambda: whole.readBytes(0, 1 << 46)) == IOReturn.kIOReturnNoMemory


def test_main_memory_is_not_mapped_by_its_physical_address() -> None:
    """Whatever the kernel lacks or forbids, the error states it, and there is no mapping."""
    before = Path("/proc/self/maps").read_text().count("/dev/mem")
    with IOMemoryDescriptor.withPhysicalAddress(0x200000, kernel.PAGE, iobmd.kIODirectionInOut) as memory:
        for access in (memory.map, lambda: memory.readBytes(0, 1), lambda: memory.writeBytes(0, b"x")):
            code, message = refusal(access)
            assert code in (
                IOReturn.kIOReturnUnsupported,
                IOReturn.kIOReturnNotPrivileged,
                IOReturn.kIOReturnNotPermitted,
            )
            assert "/dev/mem" in message
        assert code_of(lambda: memory.readBytes(0, kernel.PAGE + 1)) == IOReturn.kIOReturnBadArgument
    assert Path("/proc/self/maps").read_text().count("/dev/mem") == before


def test_devices_that_do_not_exist() -> None:
    for describe, code, word in (
        (lambda: IODeviceMemory.ofPCI("ffff:ff:1f.7", 0), IOReturn.kIOReturnNoDevice, "lspci"),
        (lambda: IODeviceMemory.ofPCI("04:00.0", 0), IOReturn.kIOReturnBadArgument, "domain"),
        (lambda: IODeviceMemory.ofPCI("../../etc", 0), IOReturn.kIOReturnBadArgument, "domain"),
        (lambda: IODeviceMemory.ofUIO("uio99"), IOReturn.kIOReturnNoDevice, "/sys/class/uio"),
        (lambda: IODeviceMemory.ofUIO("../uio0"), IOReturn.kIOReturnBadArgument, "uio0"),
        (lambda: IOInterruptEventSource.ofUIO("uio99"), IOReturn.kIOReturnNoDevice, "/sys/class/uio"),
        (lambda: IODeviceMemory.withRange(START, 8).exportDMABuffer(), IOReturn.kIOReturnUnsupported, "VFIO"),
    ):
        found, message = refusal(describe)
        assert (found, word in message) == (code, True), message


def test_cache_modes_of_maps() -> None:
    """Main memory is mapped cached, memory of a device as the descriptor states; other modes are refused by name."""
    with iobmd.allocate(kernel.PAGE, wired=False) as buffer, buffer.map(IOMapOptions.kIOMapCopybackCache):
        code, message = refusal(lambda: buffer.map(IOMapOptions.kIOMapInhibitCache))
        assert (code, "kIOMapCopybackCache" in message) == (IOReturn.kIOReturnUnsupported, True)
    with IODeviceMemory.withRange(START, 8) as memory:
        code, message = refusal(lambda: memory.map(IOMapOptions.kIOMapWriteCombineCache))
        assert (code, "write_combine" in message) == (IOReturn.kIOReturnUnsupported, True)


def test_a_store_is_not_torn() -> None:
    """A forked process that reads continuously sees no number but those that are stored."""
    with (
        mmap.mmap(-1, kernel.PAGE) as state,
        iobmd.allocate(kernel.PAGE, shared=True, wired=False) as buffer,
        buffer.map() as one,
    ):

        def torn() -> int:
            found, state[1] = 0, 1
            while not state[0]:
                found += one.read64(8) not in (0, (1 << 64) - 1)
            return found

        counted: list[int] = []
        reader = threading.Thread(target=lambda: counted.append(in_child(torn)))
        reader.start()
        while not state[1]:
            time.sleep(0.001)
        for _ in range(20_000):
            one.write64(8, (1 << 64) - 1)
            one.write64(8, 0)
        state[0] = 1
        reader.join()
        assert counted == [0]
