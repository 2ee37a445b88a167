"""Device memory: accesses of exactly the requested width, as QEMU's devices count them, and mappings of all kinds.

After the guest has ended, the host compares each access to the registers of the edu device and the network card that
is recorded here with QEMU's trace (tools/vm/accesses.py). All accesses of this guest to these regions are recorded.
"""

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from iobmd.tools.vm import accesses
from iobmd.tools.vm.accesses import Access
from support import edu, pci
from support.child import NOBODY, in_child
from support.errors import code_of, refusal
from support.registers import REPORT, Recorded, widest

import iobmd
from iobmd import (
    IODeviceMemory,
    IOInterruptEventSource,
    IOMapOptions,
    IOMemoryDescriptor,
    IOReturn,
    Wiring,
    kIOMemoryIncoherentIOStore,
)

pytestmark = pytest.mark.needs("registers")
PAGE = os.sysconf("SC_PAGE_SIZE")
COMBINE = IOMapOptions.kIOMapWriteCombineCache
INHIBIT = IOMapOptions.kIOMapInhibitCache
ADDRESSES, INVERTED, FACTORIAL, RAISE, LOWER = 0x00, 0x04, 0x08, 0x60, 0x64  # of the edu device
SOURCE = 0x80  # its 64-bit register
UNLOCK, MAC = 0x50, 0x00  # of the RTL8139: 9346CR, IDR0


@pytest.fixture(scope="module", autouse=True)
def recorded() -> Iterator[dict[str, Recorded]]:
    """The registers of both devices; at the end, the accesses are reported to the host."""
    found = {}
    for name, folder, region in (("edu-mmio", edu_device(), 0), ("rtl8139", card(), 1)):
        pci.switch_on(folder)
        found[name] = Recorded(IODeviceMemory.ofPCI(folder.name, region).map())
    yield found
    for name, one in found.items():
        # QEMU's region of the card is at its I/O ports, and the memory region is an alias of it.
        bar = (card() / "resource").read_text().split()[0] if name == "rtl8139" else ""
        start = int(bar, 16) if bar else one.registers.getPhysicalAddress()
        REPORT.extend(accesses.report(name, start, len(one.registers), one.made))
        one.registers.unmap()


@pytest.fixture
def device(recorded: dict[str, Recorded]) -> Recorded:
    return recorded["edu-mmio"]


def edu_device() -> Path:
    return pci.find(edu.VENDOR, edu.DEVICE)[0]


def card() -> Path:
    return pci.find(0x10EC, 0x8139)[0]


def shared_memory() -> Path:
    return pci.find(0x1AF4, 0x1110)[0]


# --- one access of exactly the width


def test_the_registers_of_the_edu_device(device: Recorded) -> None:
    """It reads as ones, and ignores stores, if the width is not that of the register."""
    assert device.read(4, ADDRESSES) == 0x010000ED
    assert device.read(8, ADDRESSES) == (1 << 64) - 1
    device.write(4, INVERTED, 0x12345678)
    assert device.read(4, INVERTED) == 0xEDCBA987
    device.write(8, SOURCE, 0x0123456789ABCDEF)
    assert device.read(8, SOURCE) == 0x0123456789ABCDEF
    assert device.read(4, SOURCE) == 0x89ABCDEF


def test_every_width(recorded: dict[str, Recorded]) -> None:
    """The network card has registers of 8 bits, which the others contain, at every alignment."""
    registers = recorded["rtl8139"]
    registers.write(1, UNLOCK, 0xC0)
    registers.write(4, MAC, 0x44332211)
    assert registers.read(4, MAC) == 0x44332211
    assert [registers.read(2, MAC + offset) for offset in (0, 2)] == [0x2211, 0x4433]
    assert [registers.read(1, MAC + offset) for offset in range(4)] == [0x11, 0x22, 0x33, 0x44]
    for offset in range(4):
        registers.write(1, MAC + offset, 0xA0 + offset)
    registers.write(2, MAC + 2, 0xBBAA)
    assert registers.read(4, MAC) == 0xBBAAA1A0


def test_no_access_is_repeated(device: Recorded) -> None:
    """Each store to this register starts a computation, which a repeated one would change."""
    for number, result in ((5, 120), (10, 3628800)):
        device.write(4, FACTORIAL, number)
        end = time.monotonic() + 20
        while device.read(4, FACTORIAL) != result:
            assert time.monotonic() < end


def test_misaligned_accesses_are_refused_and_not_made(device: Recorded) -> None:
    registers = device.registers
    for access in (
        lambda: registers.read32(2),
        lambda: registers.read64(4),
        lambda: registers.write16(1, 0),
        lambda: registers.write32(len(registers), 0),
        lambda: registers.read8(-1),
        lambda: registers.write32(0, 1 << 32),
    ):
        assert code_of(access) == IOReturn.kIOReturnBadArgument


def test_bytes_are_accessed_once_by_the_widest_accesses(recorded: dict[str, Recorded]) -> None:
    """Only the edu device counts accesses of 64 bits; QEMU splits those to the network card."""
    registers = recorded["edu-mmio"]
    memory = registers.registers.getMemoryDescriptor()
    for offset, length in ((0x80, 8), (0x84, 12), (0x80, 32)):
        memory.readBytes(offset, length)
        registers.made += widest("read", offset, length)
    memory.writeBytes(SOURCE, struct.pack("<QQ", 0x1122334455667788, 2))
    registers.made += widest("write", SOURCE, 16)
    assert registers.read(8, SOURCE) == 0x1122334455667788

    registers = recorded["rtl8139"]
    memory = registers.registers.getMemoryDescriptor()
    for offset, length in ((MAC + 1, 1), (MAC + 1, 3), (MAC + 2, 2), (MAC + 3, 4)):
        memory.readBytes(offset, length)
        registers.made += widest("read", offset, length)
    memory.writeBytes(MAC + 1, b"\x01\x02\x03")
    registers.made += widest("write", MAC + 1, 3)
    assert registers.read(4, MAC) == 0x030201A0


def test_a_view_of_32_bit_numbers(device: Recorded) -> None:
    """An element of a memoryview is one access, as the documentation states."""
    with memoryview(device.registers) as view, view.cast("I") as numbers:
        numbers[INVERTED // 4] = 2
        assert numbers[INVERTED // 4] == 0xFFFFFFFD
    device.made += [Access("write", INVERTED, 4), Access("read", INVERTED, 4)]


# --- all kinds of mappings show the same memory, with the cache mode of their kind


@pytest.fixture(scope="module")
def pattern() -> Iterator[bytes]:
    """What the memory of the ivshmem device contains, which has no registers there."""
    pci.switch_on(shared_memory())
    data = os.urandom(1 << 20)
    with IODeviceMemory.ofPCI(shared_memory().name, 2) as memory:
        memory.writeBytes(0, data)
    yield data


def cache_type(address: int) -> str:
    """Return how the kernel maps a physical address, while it is mapped (x86's page attribute table)."""
    debug = Path("/sys/kernel/debug")
    if not (debug / "x86").exists():
        os.system("mount -t debugfs debug /sys/kernel/debug")
    lines = (debug / "x86/pat_memtype_list").read_text().splitlines()
    (line,) = {line for line in lines if f"{address:x}-" in line}
    return next(kind for kind in ("uncached-minus", "write-combining", "write-back") if kind in line)


@pytest.mark.parametrize(
    ("combine", "mode", "kind"), [(False, INHIBIT, "uncached-minus"), (True, COMBINE, "write-combining")]
)
def test_a_prefetchable_region(pattern: bytes, combine: bool, mode: IOMapOptions, kind: str, record_property) -> None:
    with IODeviceMemory.ofPCI(shared_memory().name, 2, write_combine=combine) as memory:
        assert memory.cache_mode[1] == mode
        assert memory.wiring is Wiring.DEVICE
        assert memory.getLength() == 1 << 20
        with memory.map(mode) as mapped, memoryview(mapped) as view:
            assert cache_type(memory.getPhysicalAddress()) == kind
            assert view == pattern == memory.readBytes(0, 1 << 20)
            assert mapped.read64(8) == int.from_bytes(pattern[8:16], "little")
            begin = time.perf_counter()
            view[:] = pattern
            memory.performOperation(kIOMemoryIncoherentIOStore, 0, len(memory))
            record_property(f"ms to store a MiB, {kind}", round(1000 * (time.perf_counter() - begin)))
        other = INHIBIT if combine else COMBINE
        assert code_of(lambda: memory.map(other)) == IOReturn.kIOReturnUnsupported


def test_parts_at_any_offset(pattern: bytes) -> None:
    """Maps at offsets that are no multiples of the page size show the right bytes, as in XNU's test."""
    with IODeviceMemory.ofPCI(shared_memory().name, 2) as memory:
        for offset, length in ((0, 1), (1, PAGE), (4095, 2), (8192, 12288), (12345, 54321), ((1 << 20) - 7, 7)):
            with IODeviceMemory.withSubRange(memory, offset, length) as part, part.map() as mapped:
                assert bytes(mapped) == part.readBytes(0, length) == pattern[offset : offset + length]
                assert mapped.getPhysicalAddress() == memory.getPhysicalAddress() + offset
                assert part.segments() == memory.segments(offset, length)
                changed = bytes(byte ^ 0x5A for byte in pattern[offset : offset + length])
                part.writeBytes(0, changed)
                assert bytes(mapped) == changed
                part.writeBytes(0, pattern[offset : offset + length])


def test_a_concatenation_of_device_and_main_memory(pattern: bytes) -> None:
    with (
        IODeviceMemory.ofPCI(shared_memory().name, 2) as memory,
        iobmd.allocate(2 * PAGE, shared=True) as buffer,
        IODeviceMemory.withSubRange(memory, PAGE, PAGE) as part,
        iobmd.IOMultiMemoryDescriptor.withDescriptors([buffer, part], iobmd.kIODirectionInOut) as both,
    ):
        buffer.writeBytes(0, b"buffer")
        with both.map() as mapped:
            assert bytes(mapped)[:6] == b"buffer"
            assert bytes(mapped)[2 * PAGE :] == pattern[PAGE : 2 * PAGE]
        assert both.readBytes(2 * PAGE - 1, 3) == b"\0" + pattern[PAGE : PAGE + 2]
        assert [segment.address for segment in both.segments()][-1] == part.getPhysicalAddress()


def test_it_has_no_frames_and_no_pins(pattern: bytes) -> None:
    with IODeviceMemory.ofPCI(shared_memory().name, 2) as memory, memory.map() as mapped:
        assert memory.getPageCounts() == (0, 0)
        start = mapped.getAddress() // PAGE * 8
        with Path("/proc/self/pagemap").open("rb") as pagemap:
            entries = struct.unpack("256Q", os.pread(pagemap.fileno(), 256 * 8, start))
        assert not any(entry & (1 << 55) - 1 for entry in entries)
        before = Path("/proc/self/status").read_text().split("VmPin:")[1].split()[0]
        memory.prepare()
        memory.prepare()
        assert Path("/proc/self/status").read_text().split("VmPin:")[1].split()[0] == before
        memory.complete()
        memory.complete()
        memory.verify()
        address, length = memory.segments()[0]
        assert (length, address % (1 << 20)) == (1 << 20, 0)
        bar = (shared_memory() / "resource").read_text().splitlines()[2].split()[0]
        assert address == int(bar, 16)


def test_maps_are_unmapped_once(pattern: bytes) -> None:
    name = f"{shared_memory().name}/resource2"
    with IODeviceMemory.ofPCI(shared_memory().name, 2) as memory:
        with memory.map(IOMapOptions.kIOMapGuardedSmall), memory.map() as second, memory.map() as third:
            assert second.getAddress() == third.getAddress()
            assert Path("/proc/self/maps").read_text().count(name) == 2
        assert name not in Path("/proc/self/maps").read_text()
        memory.map()  # collected
        assert name not in Path("/proc/self/maps").read_text()


def test_a_redirected_map(pattern: bytes) -> None:
    """A driver whose device disappears lets its map show main memory, and the reverse."""
    with (
        IODeviceMemory.ofPCI(shared_memory().name, 2) as memory,
        iobmd.allocate(1 << 20, shared=True) as buffer,
        memory.map(IOMapOptions.kIOMapUnique) as mapped,
    ):
        mapped.redirect(buffer)
        mapped.write32(4, 0x01020304)
        assert buffer.readBytes(4, 4) == b"\4\3\2\1"
        assert memory.readBytes(4, 4) == pattern[4:8]
        mapped.redirect(memory)
        assert mapped.read32(4) == int.from_bytes(pattern[4:8], "little")


def test_a_read_only_map(pattern: bytes) -> None:
    with IODeviceMemory.ofPCI(shared_memory().name, 2) as memory, memory.map(IOMapOptions.kIOMapReadOnly) as mapped:
        assert mapped.read8(1) == pattern[1]
        assert code_of(lambda: mapped.write8(1, 0)) == IOReturn.kIOReturnNotWritable


def test_dev_mem(pattern: bytes) -> None:
    """A region without a driver is mapped, main memory is not."""
    with IODeviceMemory.ofPCI(shared_memory().name, 2) as memory:
        address = memory.getPhysicalAddress()
    (first, second) = IODeviceMemory.arrayFromList([(address + 5, 5000), (address + 9000, 4)])
    with first, second, first.map() as mapped:
        assert bytes(mapped) == first.readBytes(0, 5000) == pattern[5:5005]
        assert second.readBytes(0, 4) == pattern[9000:9004]
        assert cache_type(address) == "uncached-minus"
    ranges = [(address + 2 * PAGE, PAGE), (address, PAGE)]
    with IOMemoryDescriptor.withAddressRanges(ranges, iobmd.kIODirectionInOut, None) as both, both.map() as mapped:
        assert bytes(mapped) == pattern[2 * PAGE : 3 * PAGE] + pattern[:PAGE] == both.readBytes(0, 2 * PAGE)
        both.writeBytes(PAGE - 1, b"across")
        assert mapped.read8(PAGE) == ord("c")
        both.writeBytes(PAGE - 1, pattern[3 * PAGE - 1 : 3 * PAGE] + pattern[:5])
    with iobmd.allocate(PAGE) as buffer:
        described = IOMemoryDescriptor.withPhysicalAddress(buffer.getPhysicalAddress(), PAGE, iobmd.kIODirectionIn)
        assert described.getDirection() == iobmd.kIODirectionIn
        assert described.segments() == buffer.segments()
        code, message = refusal(lambda: described.readBytes(0, 1))
        assert (code, "CONFIG_STRICT_DEVMEM" in message) == (IOReturn.kIOReturnNotPermitted, True)
    with IODeviceMemory.withRange(1 << 55, 8) as absent:
        code, message = refusal(absent.map)
        assert (code, "cannot generate the address" in message) == (IOReturn.kIOReturnBadArgument, True)


def test_a_uio_map(pattern: bytes) -> None:
    """uio_cif maps the regions 0 and 2 of any device whose ids it is given."""
    folder = shared_memory()
    driver = pci.DRIVERS / "hilscher"
    (driver / "new_id").write_text("1af4 1110")
    try:
        with IODeviceMemory.ofUIO(folder.name, 1) as memory, memory.map() as mapped:
            assert bytes(mapped) == memory.readBytes(0, len(memory)) == pattern
            assert mapped.getPhysicalAddress() == int(
                (folder / "resource").read_text().splitlines()[2].split()[0], 16
            )
            assert memory.readBytes(3 * PAGE + 5, 10) == pattern[3 * PAGE + 5 : 3 * PAGE + 15]
            part = IODeviceMemory.withSubRange(memory, 2 * PAGE, PAGE)
            assert code_of(part.map) == IOReturn.kIOReturnUnsupported
        name = next((folder / "uio").iterdir()).name
        code, message = refusal(lambda: IODeviceMemory.ofUIO(name, 7))
        assert (code, "0, 1" in message) == (IOReturn.kIOReturnBadArgument, True)
        assert code_of(lambda: IOInterruptEventSource.ofUIO(name)) == IOReturn.kIOReturnNoDevice  # it has none
    finally:
        (driver / "unbind").write_text(folder.name)
        (driver / "remove_id").write_text("1af4 1110")


# --- refusals


def test_refusals_name_the_reason() -> None:
    name = card().name
    assert refusal(lambda: IODeviceMemory.ofPCI(name, 0)) == (IOReturn.kIOReturnUnsupported, any_with("I/O ports"))
    assert refusal(lambda: IODeviceMemory.ofPCI(name, 4)) == (IOReturn.kIOReturnBadArgument, any_with("0, 1"))
    assert refusal(lambda: IODeviceMemory.ofPCI(name, 1, write_combine=True)) == (
        IOReturn.kIOReturnUnsupported,
        any_with("not prefetchable"),
    )
    assert refusal(lambda: IODeviceMemory.ofPCI("0000:00:1e.7", 0)) == (IOReturn.kIOReturnNoDevice, any_with("lspci"))
    assert in_child(lambda: refusal(lambda: IODeviceMemory.ofPCI(name, 1))[0], uid=NOBODY) == (
        IOReturn.kIOReturnNotPrivileged
    )


class any_with(str):  # noqa: N801 (a matcher)
    """Equal to any text that contains it."""

    def __eq__(self, other: object) -> bool:
        return str(self) in str(other)

    __hash__ = str.__hash__


def test_a_disabled_device_is_not_mapped() -> None:
    folder = card()
    config = os.open(folder / "config", os.O_RDWR)
    before = os.pread(config, 2, pci.COMMAND)
    os.pwrite(config, bytes((before[0] & ~2, before[1])), pci.COMMAND)
    try:
        with IODeviceMemory.ofPCI(folder.name, 1) as memory:
            code, message = refusal(lambda: memory.map(IOMapOptions.kIOMapUnique))
        assert (code, "enable" in message) == (IOReturn.kIOReturnNotReady, True)
    finally:
        os.pwrite(config, before, pci.COMMAND)
        os.close(config)


def test_a_forked_child_uses_it_too(pattern: bytes) -> None:
    with IODeviceMemory.ofPCI(shared_memory().name, 2) as memory, memory.map() as mapped:
        mapped.write32(0, 1)
        in_child(lambda: mapped.write32(0, mapped.read32(0) + 1))
        assert mapped.read32(0) == 2
        assert in_child(lambda: memory.readBytes(0, 4)) == b"\2\0\0\0"
        memory.writeBytes(0, pattern[:4])


# --- interrupts


@pytest.fixture
def interrupts() -> Iterator[IOInterruptEventSource]:
    folder = edu_device()
    with IOInterruptEventSource.ofUIO(pci.bind(folder, "uio_pci_generic")) as source:
        yield source
    pci.unbind(folder)
    pci.switch_on(folder)


def test_interrupts_by_uio(device: Recorded, interrupts: IOInterruptEventSource) -> None:
    assert interrupts.getAutoDisable()
    assert interrupts.wait(0.2) == interrupts.read() == 0
    for number in range(1, 4):
        device.write(4, RAISE, 1)
        assert interrupts.wait(20) == 1
        assert interrupts.wait(0.2) == 0  # masked: the device still asserts the line
        device.write(4, LOWER, 1)
        interrupts.enable()
        assert interrupts.count == number
    interrupts.disable()
    device.write(4, RAISE, 1)
    assert interrupts.wait(0.2) == 0
    interrupts.enable()
    assert interrupts.wait(20) == 1
    device.write(4, LOWER, 1)


def test_interrupts_in_an_event_loop(device: Recorded, interrupts: IOInterruptEventSource) -> None:
    import asyncio

    async def main() -> int:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(interrupts, arrived.set)
        device.write(4, RAISE, 2)
        await asyncio.wait_for(arrived.wait(), 20)
        loop.remove_reader(interrupts)
        device.write(4, LOWER, 2)
        return interrupts.read()

    assert asyncio.run(main()) == 1


def test_no_interrupts_without_a_driver() -> None:
    code, message = refusal(lambda: IOInterruptEventSource.ofUIO(card().name))
    assert (code, "modprobe uio_pci_generic" in message) == (IOReturn.kIOReturnNoDevice, True)
