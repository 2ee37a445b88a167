"""`iobmd.iommu`: devices access any buffer as one range of device addresses, and nothing else."""

import ctypes
import errno
import gc
import mmap
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import edu, pci, rawmemory
from support.child import NOBODY, in_child
from support.errors import code_of, refusal
from support.kernel import nothing_is_pinned
from support.proof import PAGE, pieces_of

import iobmd
from iobmd import IOReturn, procfs
from iobmd._native import mman
from iobmd.iommu import IOMapper

pytestmark = pytest.mark.needs("edu", "iommu")
MIB = 1 << 20
FAULT = re.compile(rb"DMAR: \[DMA|arm-smmu-v3 \S+: event 0x10 |arm-smmu-v3 \S+: event: F_TRANSLATION")
"""A fault of a device, as the kernel logs it for VT-d, for an SMMU, and for an SMMU since Linux 6.14."""


def through(mapper: IOMapper) -> edu.Edu:
    """Return the enabled device of a mapper."""
    pci.switch_on_through(mapper)
    return edu.Edu(iobmd.IODeviceMemory.ofVFIO(mapper, 0).map())


@pytest.fixture
def device(mapper: IOMapper) -> edu.Edu:
    return through(mapper)


@pytest.fixture
def page(mapper: IOMapper) -> Iterator[tuple[iobmd.IOBufferMemoryDescriptor, int]]:
    """A page to and from which the device copies, and its address for the device."""
    with iobmd.allocate(PAGE) as buffer, mapper.prepare(buffer) as prepared:
        yield buffer, prepared.address


class Window:
    """Reads and writes through the device at device addresses."""

    def __init__(self, device: edu.Edu, page: tuple[iobmd.IOBufferMemoryDescriptor, int], record) -> None:
        self._devices = edu.Devices([device])
        self._page, self._address = page
        self._record = record

    def read(self, address: int, length: int) -> bytes:
        self._page.writeBytes(0, os.urandom(PAGE))
        self._copy(edu.Copy(address, self._address, length))
        return self._page.readBytes(0, length)

    def write(self, address: int, data: bytes) -> None:
        self._page.writeBytes(0, data)
        self._copy(edu.Copy(self._address, address, len(data)))

    def _copy(self, copy: edu.Copy) -> None:
        self._devices.copy([copy])
        self._record("DMA transfers", 2)


@pytest.fixture
def window(device: edu.Edu, page: tuple[iobmd.IOBufferMemoryDescriptor, int], record_property) -> Window:
    return Window(device, page, record_property)


@pytest.mark.usefixtures("moving_memory")
@pytest.mark.parametrize(
    ("size", "keywords"),
    [
        (100, {}),
        (256 << 10, {"wired": False}),
        (256 << 10, {"wired": False, "shared": True}),
        (256 << 10, {"task": None}),
        (5 * MIB + 1, {}),
    ],
    ids=str,
)
def test_any_memory_is_one_piece(mapper: IOMapper, window: Window, size: int, keywords: dict[str, object]) -> None:
    with iobmd.allocate(size, **keywords) as buffer, mapper.prepare(buffer) as prepared:
        assert prepared.length == size
        for offset, address, length in pieces_of(prepared.segments(), 0):
            data = os.urandom(length)
            buffer.writeBytes(offset, data)
            assert window.read(address, length) == data
            data = os.urandom(length)
            window.write(address, data)
            assert buffer.readBytes(offset, length) == data


def test_memory_that_was_there_already(mapper: IOMapper, window: Window) -> None:
    """The memory begins in the middle of a page, and so does the device's range."""
    with mmap.mmap(-1, 4 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as own:
        own[:] = data = os.urandom(4 * PAGE)
        address = ctypes.addressof(view := ctypes.c_char.from_buffer(own))
        with (
            iobmd.IOMemoryDescriptor.withAddressRange(
                address + 100, 2 * PAGE, iobmd.kIODirectionInOut, iobmd.kernel_task
            ) as described,
            mapper.prepare(described) as prepared,
        ):
            assert prepared.address % PAGE == (address + 100) % PAGE
            assert window.read(prepared.address, 1000) == data[100:1100]
            window.write(prepared.address + PAGE, b"written")
        assert own[100 + PAGE : 107 + PAGE] == b"written"
        del view


def test_pages_that_lie_apart_are_read_across_their_borders(mapper: IOMapper, window: Window) -> None:
    size = 64 * PAGE
    with iobmd.allocate(size, wired=False) as buffer:
        with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as between:
            for offset in range(0, size, PAGE):
                between[offset] = 1
                buffer.writeBytes(offset, os.urandom(PAGE))
        with mapper.prepare(buffer) as prepared:
            assert len(buffer.segments()) > 8, "it is contiguous anyway"
            for offset in (PAGE - 2000, 7 * PAGE - 100, size - 4000):
                assert window.read(prepared.address + offset, 4000) == buffer.readBytes(offset, 4000)


@pytest.mark.parametrize("bits", [24, 28, 32])
def test_below_the_limit_of_the_device(name: str, bits: int) -> None:
    """Independent of the physical addresses: a request with a physical mask could only be refused."""
    with IOMapper(name, address_bits=bits) as mapper, iobmd.allocate(4 * MIB) as buffer:
        device = through(mapper)
        with mapper.prepare(buffer) as prepared, iobmd.allocate(PAGE) as page, mapper.prepare(page) as other:
            assert prepared.address + len(buffer) <= 1 << bits
            buffer.writeBytes(3 * MIB, b"below")
            device_copy(device, prepared.address + 3 * MIB, other.address, 5)
            assert page.readBytes(0, 5) == b"below"


def test_more_than_the_device_can_address(name: str) -> None:
    with IOMapper(name, address_bits=24) as mapper, iobmd.allocate(20 * MIB, wired=False) as buffer:
        assert code_of(lambda: mapper.prepare(buffer)) == IOReturn.kIOReturnNoResources
        assert nothing_is_pinned()
        with iobmd.allocate(9 * MIB, wired=False) as half:
            for _ in range(3):  # the addresses are released each time
                with mapper.prepare(half):
                    assert code_of(lambda: mapper.prepare(half)) == IOReturn.kIOReturnNoResources


def device_copy(device: edu.Edu, source: int, destination: int, length: int) -> None:
    edu.Devices([device]).copy([edu.Copy(source, destination, length)])


# --- memory that must not be accessible


def test_a_physical_address_is_not_reached(mapper: IOMapper, window: Window) -> None:
    with iobmd.allocate(PAGE) as buffer:
        buffer.writeBytes(0, b"unseen" * 600)
        assert window.read(buffer.getPhysicalAddress(), 3600) != buffer.readBytes(0, 3600)
        assert is_faulted(lambda: window.write(buffer.getPhysicalAddress(), os.urandom(3600)))
        assert buffer.readBytes(0, 3600) == b"unseen" * 600


def test_a_device_that_nobody_mapped_for_reaches_nothing(record_property) -> None:
    """A device without VFIO or another driver: physical addresses are meaningless to it."""
    bystander = pci.find(edu.VENDOR, edu.DEVICE)[1]
    pci.switch_on(bystander)
    device = edu.Edu(edu.registers_of(bystander))
    with iobmd.allocate(2 * PAGE) as buffer:
        content = os.urandom(2 * PAGE)
        buffer.writeBytes(0, content)
        places = [buffer.getPhysicalSegment(offset)[0] for offset in (0, PAGE)]
        if platform.machine() == "x86_64":
            assert is_faulted(lambda: device_copy(device, places[0], places[1], 4000))
        else:  # an SMMU aborts transfers of a device without a driver, and reports no event
            device_copy(device, places[0], places[1], 4000)
        record_property("DMA transfers", 2)
        assert buffer.readBytes(0, 2 * PAGE) == content


def test_use_after_complete_faults(mapper: IOMapper, window: Window) -> None:
    with iobmd.allocate(PAGE) as buffer:
        with mapper.prepare(buffer) as prepared:
            address = prepared.address
            window.write(address, b"while prepared")
            assert buffer.readBytes(0, 14) == b"while prepared"
        assert is_faulted(lambda: window.write(address, b"afterwards!!!!"))
        assert buffer.readBytes(0, 14) == b"while prepared"


def is_faulted(action: Callable[[], object]) -> bool:
    """Return whether the kernel reports a fault of a device; it reports at most ten in five seconds."""
    for wait in (6, 6, 0):
        before = faults()
        action()
        if faults() > before:
            return True
        time.sleep(wait)
    return False


def faults() -> int:
    """Count the lines about faults in the kernel's log."""
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    count = 0
    try:
        while True:
            try:
                count += bool(FAULT.search(os.read(log, 8192)))
            except BlockingIOError:
                return count
            except OSError as error:  # older lines were overwritten in the meantime
                if error.errno != errno.EPIPE:
                    raise
    finally:
        os.close(log)


@pytest.mark.parametrize(("direction", "reads", "writes"), [("out", True, False), ("in", None, True)])
def test_only_in_the_direction(
    mapper: IOMapper, window: Window, direction: str, reads: bool | None, writes: bool
) -> None:
    with iobmd.allocate(PAGE, direction=direction) as buffer, mapper.prepare(buffer) as prepared:
        buffer.writeBytes(0, b"before")
        if reads is not None:  # VT-d may let a device read what it may write
            assert (window.read(prepared.address, 6) == b"before") is reads
        window.write(prepared.address, b"device")
        assert (buffer.readBytes(0, 6) == b"device") is writes


# --- errors, and their consequences


def test_prepared_memory_cannot_be_freed_and_a_mapper_in_use_not_closed(name: str) -> None:
    mapper, buffer = IOMapper(name), iobmd.allocate(MIB, wired=False)
    prepared = mapper.prepare(buffer)
    for action in (buffer.free, mapper.close):
        assert code_of(action) == IOReturn.kIOReturnBusy
    assert code_of(buffer.complete) == IOReturn.kIOReturnNotReady, "what the mapper has prepared"
    assert code_of(buffer.free) == IOReturn.kIOReturnBusy
    prepared.complete()
    prepared.complete()
    assert nothing_is_pinned()
    mapper.close()
    mapper.close()
    assert code_of(lambda: mapper.prepare(buffer)) == IOReturn.kIOReturnNotOpen
    buffer.free()


def test_a_second_mapper_of_a_device_is_refused(mapper: IOMapper, name: str) -> None:
    assert code_of(lambda: IOMapper(name)) == IOReturn.kIOReturnBusy


def test_no_direction(mapper: IOMapper) -> None:
    with iobmd.allocate(PAGE, direction="none") as buffer:
        assert code_of(lambda: mapper.prepare(buffer)) == IOReturn.kIOReturnBadArgument
        with mapper.prepare(buffer, iobmd.IOOptionBits.kIODirectionIn):
            pass
        buffer.free()  # nothing remains prepared


def test_what_is_missing_is_said(name: str) -> None:
    other = pci.find(edu.VENDOR, edu.DEVICE)[-1].name
    code, message = refusal(lambda: IOMapper(other))  # without a driver, VFIO has no group for it
    assert code == IOReturn.kIOReturnUnsupported
    assert f"echo {other} > /sys/bus/pci/drivers_probe" in message
    code, message = refusal(lambda: IOMapper("0000:ff:1f.7"))
    assert (code, "lspci" in message) == (IOReturn.kIOReturnNoDevice, True)
    code, message = in_child(lambda: refusal(lambda: IOMapper(name)), uid=NOBODY)
    assert code == IOReturn.kIOReturnNotPrivileged
    assert "chown" in message
    assert "/dev/vfio/" in message


@pytest.fixture
def given(name: str) -> Iterator[str]:
    """The device, temporarily assigned to an ordinary user."""
    group = Path("/dev/vfio") / (pci.DEVICES / name / "iommu_group").readlink().name
    os.chown(group, NOBODY, NOBODY)
    yield name
    os.chown(group, 0, 0)


def test_an_ordinary_user_whom_the_device_was_given(given: str) -> None:
    assert in_child(lambda: prepared_once(given), uid=NOBODY, memlock=8 * MIB) == 64 << 10


def test_at_the_limit_of_locked_memory(given: str) -> None:
    """Wired memory and VFIO's mappings use the same counter; refused requests leave nothing in it."""

    def refused() -> tuple[IOReturn, str, list[int]]:
        with IOMapper(given) as mapper, iobmd.allocate(640 << 10) as large, iobmd.allocate(64 << 10) as small:
            with mapper.prepare(small) as before:
                lowest = before.address
            code, message = refusal(lambda: mapper.prepare(large))
            with mapper.prepare(small) as first, mapper.prepare(small) as second:
                return code, message, [each.address - lowest for each in (first, second)]

    code, message, places = in_child(refused, uid=NOBODY, memlock=MIB)
    assert code == IOReturn.kIOReturnCannotWire
    assert f"RLIMIT_MEMLOCK is {MIB} bytes, {704 << 10} of them in use" in message
    assert "prlimit --memlock" in message
    assert places == [0, 64 << 10]


def prepared_once(name: str) -> int:
    with IOMapper(name) as mapper, iobmd.allocate(64 << 10) as buffer, mapper.prepare(buffer) as prepared:
        return prepared.length


def test_a_forked_child_must_not_use_it(mapper: IOMapper) -> None:
    def in_the_child() -> IOReturn:
        with iobmd.allocate(PAGE) as buffer:
            return code_of(lambda: mapper.prepare(buffer))

    assert in_child(in_the_child) == IOReturn.kIOReturnNotOpen
    with iobmd.allocate(PAGE) as buffer, mapper.prepare(buffer):
        pass


# --- concatenations and parts


def test_a_concatenation_is_one_range(mapper: IOMapper, window: Window) -> None:
    """Its parts are of different memory, one repeatedly; the device sees them end to end, also across borders."""
    with (
        iobmd.allocate(3 * PAGE) as wired,
        iobmd.allocate(2 * PAGE, wired=False, shared=True) as shared,
        iobmd.allocate(4 * PAGE, wired=False) as pageable,
        iobmd.IOSubMemoryDescriptor.withSubRange(pageable, PAGE + 100, PAGE - 100, iobmd.kIODirectionInOut) as begin,
        iobmd.IOMultiMemoryDescriptor.withDescriptors([shared, wired], iobmd.kIODirectionInOut) as nested,
        iobmd.IOMultiMemoryDescriptor.withDescriptors([begin, nested, shared], iobmd.kIODirectionInOut) as whole,
    ):
        content = os.urandom(len(whole) - 2 * PAGE)
        whole.writeBytes(0, content)
        content += content[PAGE - 100 : 3 * PAGE - 100]
        with mapper.prepare(whole) as prepared:
            assert (prepared.address % PAGE, prepared.length) == (100, len(whole))
            for offset in range(0, len(whole), 4000):
                length = min(4000, len(whole) - offset)
                assert window.read(prepared.address + offset, length) == content[offset : offset + length]
            window.write(prepared.address + 3 * PAGE - 105, b"borders of parts")
            assert whole.readBytes(3 * PAGE - 105, 16) == b"borders of parts"
            assert wired.readBytes(0, 11) == b"rs of parts"
            for offset in (0, PAGE, 4 * PAGE, len(whole) - 1):
                assert mapper.mapToPhysicalAddress(prepared.address + offset) == whole.getPhysicalSegment(offset)[0]
        assert is_faulted(lambda: window.write(prepared.address, b"after"))
        assert whole.readBytes(0, 5) != b"after"


def test_a_part_exposes_only_its_pages(mapper: IOMapper, window: Window) -> None:
    with iobmd.allocate(4 * PAGE, wired=False) as buffer:
        buffer.writeBytes(0, bytes(4 * PAGE))
        part = iobmd.IOSubMemoryDescriptor.withSubRange(buffer, PAGE, PAGE, iobmd.kIODirectionInOut)
        with part, mapper.prepare(part) as prepared:
            window.write(prepared.address, b"within")
            assert is_faulted(lambda: window.write(prepared.address + PAGE, b"beyond"))
            assert buffer.readBytes(0, 4 * PAGE) == bytes(PAGE) + b"within" + bytes(3 * PAGE - 6)


def test_parts_that_meet_inside_a_page(mapper: IOMapper, window: Window) -> None:
    """The mapper refuses them by name; a command with the mapper maps a bounce buffer instead."""
    with (
        iobmd.allocate(PAGE + 100, wired=False) as first,
        iobmd.allocate(2 * PAGE, wired=False) as second,
        iobmd.IOMultiMemoryDescriptor.withDescriptors([first, second], iobmd.kIODirectionInOut) as whole,
    ):
        code, message = refusal(lambda: mapper.prepare(whole))
        assert (code, f"offset {PAGE + 100}" in message) == (IOReturn.kIOReturnBadArgument, True)
        assert "IODMACommand" in message
        content = os.urandom(len(whole))
        whole.writeBytes(0, content)
        whole.prepare()
        with iobmd.IODMACommand.withSpecification(64, mapper=mapper) as command:
            command.setMemoryDescriptor(whole)
            ((address, length),) = command.genIOVMSegments()
            assert length == len(whole)
            assert window.read(address + PAGE, 200) == content[PAGE : PAGE + 200]
            window.write(address + PAGE + 98, b"both")
            command.complete()
        whole.complete()
        assert first.readBytes(PAGE + 98, 2) + second.readBytes(0, 2) == b"both"


def test_a_mapped_command_of_a_concatenation(mapper: IOMapper, window: Window) -> None:
    with (
        scattered(16 * PAGE) as first,
        scattered(8 * PAGE) as second,
        iobmd.IOMultiMemoryDescriptor.withDescriptors([first, second], iobmd.kIODirectionInOut) as whole,
        iobmd.IODMACommand.withSpecification(32, mapper=mapper) as command,
    ):
        command.setMemoryDescriptor(whole, autoPrepare=False)
        command.prepare(0xA00, 20 * PAGE)
        ((address, length),) = command.genIOVMSegments()
        assert length == 20 * PAGE
        assert "bounced" not in repr(command)
        assert window.read(address + 15 * PAGE, 4000) == whole.readBytes(0xA00 + 15 * PAGE, 4000)
        command.complete()
        first.complete()
        second.complete()


def test_a_refused_part_leaves_nothing_mapped(mapper: IOMapper) -> None:
    """The parts before it are unmapped, and their addresses are free again."""
    with iobmd.allocate(2 * PAGE, wired=False) as first, mapper.prepare(first) as alone:
        lowest = alone.address
    folder = pci.find(0x1AF4, 0x1110)[0]
    guard = iobmd.IOGuardPageMemoryDescriptor.withSize(PAGE)
    with iobmd.allocate(2 * PAGE, wired=False) as first, iobmd.IODeviceMemory.ofPCI(folder.name, 2) as memory:
        for last, code in ((guard, IOReturn.kIOReturnVMError), (memory, IOReturn.kIOReturnUnsupported)):
            whole = iobmd.IOMultiMemoryDescriptor.withDescriptors([first, last], iobmd.kIODirectionInOut)
            assert code_of(lambda whole=whole: mapper.prepare(whole)) == code
            whole.free()
        assert nothing_is_pinned()
        with mapper.prepare(first) as prepared:
            assert prepared.address == lowest
        empty = iobmd.IOMultiMemoryDescriptor.withDescriptors([], iobmd.kIODirectionInOut)
        assert code_of(lambda: mapper.prepare(empty)) == IOReturn.kIOReturnBadArgument


# --- DMA commands with a mapper, and IOKit's names


def scattered(size: int) -> iobmd.IOBufferMemoryDescriptor:
    """Return a buffer in 4 KiB pages that are not contiguous."""
    buffer = iobmd.allocate(size, wired=False)
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as between:
        for offset in range(0, size, PAGE):
            between[offset] = 1
            buffer.writeBytes(offset, os.urandom(PAGE))
    buffer.prepare()
    assert len(buffer.segments()) > 4, "it is contiguous anyway"
    return buffer


def test_a_mapped_command_is_one_segment_at_an_address_of_the_mapper(mapper: IOMapper, window: Window) -> None:
    with scattered(32 * PAGE) as buffer:
        with iobmd.IODMACommand.withSpecification(64, mapper=mapper) as command:
            command.setMemoryDescriptor(buffer, autoPrepare=False)
            command.prepare(0xA00, 0x2000)
            ((address, length),) = command.genIOVMSegments()
            assert length == 0x2000
            assert address != buffer.getPhysicalSegment(0xA00)[0]
            assert mapper.mapToPhysicalAddress(address) == buffer.getPhysicalSegment(0xA00)[0]
            assert window.read(address, 4000) == buffer.readBytes(0xA00, 4000)
            window.write(address + 0x1800, b"by the device")
            assert buffer.readBytes(0xA00 + 0x1800, 13) == b"by the device"
            command.complete()
            assert mapper.mapToPhysicalAddress(address) == 0
            before = buffer.readBytes(0, len(buffer))
            window.write(address, os.urandom(100))
            assert buffer.readBytes(0, len(buffer)) == before
        buffer.complete()


def test_a_mapped_range_across_split_areas(mapper: IOMapper, window: Window) -> None:
    """The facts of XNU's IODMACommandLocalMappedNonContig: one segment, which is not the physical address."""
    start = rawmemory.map_memory(4 * PAGE)
    mman.advise(start + PAGE, PAGE, mman.MADV_DONTFORK)
    assert len(list(procfs.areas("self", start, start + 4 * PAGE))) == 3
    described = iobmd.IOMemoryDescriptor.withAddressRange(
        start + 0xA00, 0x2000, iobmd.kIODirectionOutIn, iobmd.kernel_task
    )
    described.writeBytes(0, data := os.urandom(0x2000))
    described.prepare(iobmd.kIODirectionOutIn)
    physical = described.getPhysicalSegment(0, 0)[0]
    with iobmd.IODMACommand.withSpecification(
        64, 128 << 10, iobmd.kIODMAMapOptionMapped, 128 << 10, mapper=mapper
    ) as command:
        command.setMemoryDescriptor(described, True)
        ((address, length),) = command.genIOVMSegments(0, 1)
        assert length == 0x2000
        assert address != physical == mapper.mapToPhysicalAddress(address)
        assert window.read(address + 0xFF0, 4000) == data[0xFF0 : 0xFF0 + 4000]
        window.write(address + 0x600 - 5, b"from one area to the next")
        assert described.readBytes(0x600 - 5, 25) == b"from one area to the next"
        command.clearMemoryDescriptor(True)
    described.complete(iobmd.kIODirectionOutIn)
    described.release()
    rawmemory.unmap(start, 4 * PAGE)


def test_a_bypassed_command_has_physical_addresses(mapper: IOMapper) -> None:
    with scattered(16 * PAGE) as buffer:
        for option in (iobmd.IODMACommand.kBypassed, iobmd.IODMACommand.kUnmapped):
            with iobmd.IODMACommand.withSpecification(64, 0, option, mapper=mapper) as command:
                command.setMemoryDescriptor(buffer)
                assert command.genIOVMSegments() == buffer.segments()
        buffer.complete()


@pytest.mark.parametrize("bits", [24, 28])
def test_address_bits_apply_to_the_addresses_of_the_mapper(mapper: IOMapper, window: Window, bits: int) -> None:
    """The memory is out of reach by its physical addresses, and nevertheless not bounced."""
    with (
        scattered(16 * PAGE) as buffer,
        iobmd.IODMACommand.withSpecification(bits, mapper=mapper) as command,
    ):
        command.setMemoryDescriptor(buffer)
        ((address, length),) = command.genIOVMSegments()
        assert address + length <= 1 << bits
        assert command.getIOMemoryDescriptor() is buffer
        assert "bounced" not in repr(command)
        assert window.read(address, 3000) == buffer.readBytes(0, 3000)
        command.complete()
        buffer.complete()


@pytest.mark.parametrize("alignment", [512, PAGE, 1 << 16])
def test_alignment_applies_to_the_addresses_of_the_mapper(mapper: IOMapper, window: Window, alignment: int) -> None:
    with (
        scattered(16 * PAGE) as buffer,
        iobmd.IODMACommand.withSpecification(64, alignment=alignment, mapper=mapper) as command,
    ):
        command.setMemoryDescriptor(buffer)
        ((address, _),) = command.genIOVMSegments()
        assert address % alignment == 0
        assert command.getIOMemoryDescriptor() is buffer
        command.complete()
        command.prepare(100, 2 * PAGE)  # not aligned in the memory: bounced
        ((address, _),) = command.genIOVMSegments()
        assert address % alignment == 0
        assert command.getIOMemoryDescriptor() is not buffer
        assert window.read(address, 3000) == buffer.readBytes(100, 3000)
        window.write(address + PAGE, b"by the device")
        command.complete()
        assert buffer.readBytes(100 + PAGE, 13) == b"by the device"
        buffer.complete()


def test_a_forced_double_buffer_is_mapped(mapper: IOMapper, window: Window) -> None:
    with (
        scattered(16 * PAGE) as buffer,
        iobmd.IODMACommand.withSpecification(32, mapper=mapper) as command,
    ):
        command.setMemoryDescriptor(buffer)
        command.synchronize(0, forceDoubleBuffer=True)
        ((address, length),) = command.genIOVMSegments()
        assert length == 16 * PAGE
        assert window.read(address + PAGE, 3000) == buffer.readBytes(PAGE, 3000)
        window.write(address, b"by the device")
        assert buffer.readBytes(0, 13) != b"by the device"
        command.complete()
        assert buffer.readBytes(0, 13) == b"by the device"
        buffer.complete()


def test_a_command_that_is_collected(mapper: IOMapper) -> None:
    buffer = scattered(16 * PAGE)
    command = iobmd.IODMACommand.withSpecification(64, mapper=mapper)
    command.setMemoryDescriptor(buffer)
    with pytest.warns(ResourceWarning, match="IODMACommand.* was never completed"):
        del command
    buffer.complete()
    buffer.free()
    mapper.close()


def test_names_of_iokit(mapper: IOMapper, window: Window, name: str) -> None:
    assert IOMapper.checkForSystemMapper()
    assert IOMapper.copyMapperForDevice(name) is mapper
    assert mapper.getPageSize() == PAGE
    with scattered(16 * PAGE) as buffer:
        address, length = mapper.iovmMapMemory(buffer, 0x1234)
        assert length == 16 * PAGE - 0x1234
        for offset in (0, 5 * PAGE):
            physical = buffer.getPhysicalSegment(0x1234 + offset)[0]
            assert mapper.mapToPhysicalAddress(address + offset) == physical
        assert window.read(address, 3000) == buffer.readBytes(0x1234, 3000)
        assert code_of(lambda: mapper.iovmUnmapMemory(buffer, address, 1)) == IOReturn.kIOReturnBadArgument
        assert mapper.iovmUnmapMemory(buffer, address, length) == iobmd.kIOReturnSuccess
        assert code_of(lambda: mapper.iovmUnmapMemory(buffer, address, length)) == IOReturn.kIOReturnBadArgument
        assert mapper.mapToPhysicalAddress(address) == 0
        options = iobmd.kIODMAMapReadAccess | iobmd.kIODMAMapPagingPath
        address, length = mapper.iovmMapMemory(buffer, 0, PAGE, options)
        window.write(address, b"not written")
        assert buffer.readBytes(0, 11) != b"not written"
        mapper.iovmUnmapMemory(buffer, address, length)
        for wrong in ((0, 17 * PAGE), (-1, 1), (0, 0, 0x400)):
            assert code_of(lambda wrong=wrong: mapper.iovmMapMemory(buffer, *wrong)) == IOReturn.kIOReturnBadArgument
        buffer.complete()


def test_a_closed_mapper_is_not_shared(name: str) -> None:
    gc.collect()  # expected errors of an earlier test refer to its registers, which are mapped as long
    with IOMapper.copyMapperForDevice(name) as first:
        assert IOMapper.copyMapperForDevice(name) is first
    with IOMapper.copyMapperForDevice(name) as second:
        assert second is not first
