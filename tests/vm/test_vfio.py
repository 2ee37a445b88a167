"""Devices attached to VFIO: their registers, their configuration space, their interrupts, and exports as dma-bufs."""

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import edu, pci
from support.child import in_child
from support.errors import code_of, refusal
from support.proof import PAGE

import iobmd
from iobmd import IOReturn
from iobmd.iommu import IOMapper

pytestmark = pytest.mark.needs("edu", "iommu")
RAISE, LOWER = 0x60, 0x64  # registers of the edu device


@pytest.fixture
def registers(mapper: IOMapper) -> Iterator[iobmd.IOMemoryMap]:
    pci.switch_on_through(mapper)
    with iobmd.IODeviceMemory.ofVFIO(mapper, 0) as memory, memory.map() as mapped:
        yield mapped


def test_registers_through_vfio(mapper: IOMapper, registers: iobmd.IOMemoryMap) -> None:
    assert registers.read32(0) == 0x010000ED
    registers.write32(4, 1)
    assert registers.read32(4) == 0xFFFFFFFE
    memory = registers.getMemoryDescriptor()
    assert memory.wiring is iobmd.Wiring.DEVICE
    assert memory.cache_mode[1] == iobmd.kIOMapInhibitCache
    bar = (pci.DEVICES / mapper.name / "resource").read_text().split()[0]
    assert memory.getPhysicalAddress() == int(bar, 16)


def test_the_configuration_space_is_read_and_written_but_not_mapped(mapper: IOMapper) -> None:
    with iobmd.IODeviceMemory.ofVFIO(mapper, pci.CONFIGURATION) as config:
        assert config.readBytes(0, 4) == struct.pack("<HH", edu.VENDOR, edu.DEVICE)
        config.writeBytes(0x3C, b"\x05")  # the interrupt line, which has no effect
        assert config.readBytes(0x3B, 3)[1] == 5
        assert code_of(config.map) == IOReturn.kIOReturnUnsupported
        assert code_of(lambda: config.readBytes(0, len(config) + 1)) == IOReturn.kIOReturnBadArgument
    for number in (3, -1, 1 << 32):
        code, message = refusal(lambda number=number: iobmd.IODeviceMemory.ofVFIO(mapper, number))
        assert (code, f"region {number}" in message) == (IOReturn.kIOReturnBadArgument, True)


def test_a_disabled_device_is_not_mapped(mapper: IOMapper) -> None:
    """Its mapping would raise SIGBUS."""
    with iobmd.IODeviceMemory.ofVFIO(mapper, pci.CONFIGURATION) as config:
        config.writeBytes(pci.COMMAND, b"\0\0")
        with iobmd.IODeviceMemory.ofVFIO(mapper, 0) as memory:
            code, message = refusal(memory.map)
            assert (code, "command register" in message) == (IOReturn.kIOReturnNotReady, True)
            pci.switch_on_through(mapper)
            with memory.map() as mapped:
                assert mapped.read32(0) == 0x010000ED


def test_a_region_outlives_its_mapper(name: str) -> None:
    with IOMapper(name) as mapper:
        pci.switch_on_through(mapper)
        memory = iobmd.IODeviceMemory.ofVFIO(mapper, 0)
    with memory, memory.map() as mapped:
        assert mapped.read32(0) == 0x010000ED
        assert code_of(lambda: IOMapper(name)) == IOReturn.kIOReturnBusy
    IOMapper(name).close()


@pytest.mark.parametrize("kind", ["msi", "intx", None])
def test_interrupts(mapper: IOMapper, registers: iobmd.IOMemoryMap, kind: str | None) -> None:
    with iobmd.IOInterruptEventSource.ofVFIO(mapper, kind=kind) as source:
        assert source.getAutoDisable() is (kind == "intx")
        assert source.wait(0.2) == 0
        for number in (1, 2, 3):
            registers.write32(RAISE, 1)
            assert source.wait(20) == 1
            assert source.wait(0.2) == 0
            registers.write32(LOWER, 1)
            source.enable()
            assert source.count == number
        source.disable()
        registers.write32(RAISE, 1)
        assert source.wait(0.3) == 0
        registers.write32(LOWER, 1)
        source.enable()
        source.read()
        registers.write32(RAISE, 2)
        assert source.wait(20) == 1
        registers.write32(LOWER, 2)


def test_interrupts_are_counted_while_they_are_not_read(mapper: IOMapper, registers: iobmd.IOMemoryMap) -> None:
    with iobmd.IOInterruptEventSource.ofVFIO(mapper, kind="msi") as source:
        for _ in range(5):
            registers.write32(RAISE, 1)
            registers.write32(LOWER, 1)
            time.sleep(0.2)  # a processor may combine two messages that it has not handled
        assert source.read() == source.count == 5


def test_refusals_of_interrupts(mapper: IOMapper) -> None:
    source = iobmd.IOInterruptEventSource.ofVFIO(mapper, kind="msi")
    assert code_of(lambda: iobmd.IOInterruptEventSource.ofVFIO(mapper, kind="msi")) == IOReturn.kIOReturnBusy
    assert code_of(lambda: iobmd.IOInterruptEventSource.ofVFIO(mapper, kind="intx")) == IOReturn.kIOReturnBusy
    source.close()
    source.close()
    assert code_of(source.read) == IOReturn.kIOReturnNotOpen
    code, message = refusal(lambda: iobmd.IOInterruptEventSource.ofVFIO(mapper, 9, kind="msi"))
    assert (code, "msi 1" in message) == (IOReturn.kIOReturnBadArgument, True)
    code, message = refusal(lambda: iobmd.IOInterruptEventSource.ofVFIO(mapper, kind="nonsense"))
    assert (code, "intx 1" in message) == (IOReturn.kIOReturnBadArgument, True)
    iobmd.IOInterruptEventSource.ofVFIO(mapper, kind="msi")  # collected
    with (
        iobmd.IOInterruptEventSource.ofVFIO(mapper, kind="intx"),
        iobmd.IOInterruptEventSource.ofVFIO(mapper, kind="request"),
    ):
        code, message = refusal(lambda: iobmd.IOInterruptEventSource.ofVFIO(mapper, kind="request"))
        assert (code, "has a user" in message) == (IOReturn.kIOReturnBusy, True)
    iobmd.IOInterruptEventSource.ofVFIO(mapper, kind="request").close()


def test_a_forked_child_does_not_disable_interrupts_of_its_parent(
    mapper: IOMapper, registers: iobmd.IOMemoryMap
) -> None:
    with iobmd.IOInterruptEventSource.ofVFIO(mapper, kind="msi") as source:
        in_child(source.close)
        registers.write32(RAISE, 1)
        assert source.wait(20) == 1
        registers.write32(LOWER, 1)


def test_dma_completes_with_an_interrupt(mapper: IOMapper, registers: iobmd.IOMemoryMap) -> None:
    """The device writes to memory, and its interrupt follows: what it wrote is there."""
    with (
        iobmd.IOInterruptEventSource.ofVFIO(mapper) as source,
        iobmd.allocate(PAGE) as buffer,
        mapper.prepare(buffer) as prepared,
    ):
        buffer.writeBytes(0, b"before")
        for register, value in ((0x80, 0x40000), (0x88, prepared.address), (0x90, 6), (0x98, 1 | 2 | 4)):
            registers.write64(register, value)
        assert source.wait(20) == 1
        assert registers.read32(0x24) == 0x100  # the cause
        assert buffer.readBytes(0, 6) != b"before"
        registers.write32(LOWER, 0x100)


def test_memory_of_a_device_is_not_mapped_for_another(mapper: IOMapper) -> None:
    """Nothing remains prepared or mapped after the refusal."""
    folder = pci.find(0x1AF4, 0x1110)[0]
    with iobmd.IODeviceMemory.ofPCI(folder.name, 2) as memory:
        code, message = refusal(lambda: mapper.prepare(memory, iobmd.kIODirectionInOut))
        assert (code, "exportDMABuffer" in message) == (IOReturn.kIOReturnUnsupported, True)


def test_export_as_a_dma_buf(mapper: IOMapper, registers: iobmd.IOMemoryMap, record_property) -> None:
    """Where the kernel exports regions (Linux 6.19), or refused with the reason."""
    memory = registers.getMemoryDescriptor()
    try:
        number = memory.exportDMABuffer(PAGE, 2 * PAGE)
    except iobmd.IOReturnError as error:
        assert error.code == IOReturn.kIOReturnUnsupported
        assert "6.19" in str(error)
        record_property("export of a VFIO region as a dma-buf", "no")
        return
    assert number > 2
    try:
        shown = Path(f"/proc/self/fdinfo/{number}").read_text()
        assert f"size:\t{2 * PAGE}\n" in shown
        assert "exp_name:\tvfio" in shown, shown
    finally:
        os.close(number)
    assert code_of(lambda: memory.exportDMABuffer(1, PAGE)) == IOReturn.kIOReturnBadArgument
    record_property("export of a VFIO region as a dma-buf", "works")
