"""`iobmd.iommu` without a device: addresses, and messages about missing prerequisites."""

import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
from support.errors import code_of

import iobmd
from iobmd import IOBufferMemoryDescriptor, IOReturn, IOReturnError, iommu
from iobmd.descriptors.ownership import MemoryOwner
from iobmd.iommu import IOMapper, absence, device_pages, vfio
from iobmd.iommu.addresses import Addresses

MIB = 1 << 20


def test_addresses_are_taken_from_below_and_given_back() -> None:
    addresses = Addresses([(0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1)], (1 << 32) - 1)
    assert addresses.allocate(4096, 4096) == 4096  # many devices treat 0 as no address
    assert addresses.allocate(4 * MIB, 2 * MIB) == 2 * MIB
    assert addresses.allocate(4096, 4096) == 8192  # the gap that the alignment left
    addresses.release(2 * MIB, 4 * MIB)
    assert addresses.allocate(8 * MIB, 2 * MIB) == 2 * MIB


def test_no_address_above_the_limit_nor_in_a_hole() -> None:
    addresses = Addresses([(0, 0xFEDFFFFF), (0xFEF00000, (1 << 39) - 1)], (1 << 32) - 1)
    assert addresses.allocate(0xFEE00000 - 4096, 4096) == 4096  # all addresses below the interrupts
    assert addresses.allocate(16 * MIB, 4096) == 0xFEF00000
    assert addresses.allocate(2 * MIB, 4096) is None
    assert Addresses([(1 << 32, (1 << 39) - 1)], (1 << 32) - 1).allocate(4096, 4096) is None


def test_what_the_kernel_tells_of_addresses() -> None:
    header = struct.pack("=IIQI4x", 0, 2, 0, 24)
    other = struct.pack("=HHI", 3, 1, 32)  # another capability comes first
    ranges = struct.pack("=HHIII", 1, 1, 0, 2, 0) + struct.pack("=QQQQ", 0, 0xFFF, 0x10000, 0x1FFFF)
    assert vfio._iova_ranges(bytearray(header + other + ranges)) == [(0, 0xFFF), (0x10000, 0x1FFFF)]
    assert vfio._iova_ranges(bytearray(struct.pack("=IIQI4x", 0, 0, 0, 0))) == []


def test_no_such_device() -> None:
    with pytest.raises(IOReturnError, match="lspci -D") as caught:
        IOMapper("0000:ff:1f.7")
    assert caught.value.code == IOReturn.kIOReturnNoDevice


@pytest.mark.parametrize("bits", [12, 65, 0, -1])
def test_bad_numbers_of_bits(bits: int) -> None:
    with pytest.raises(IOReturnError) as caught:
        IOMapper("0000:00:00.0", address_bits=bits)
    assert caught.value.code == IOReturn.kIOReturnBadArgument


class Attached:
    """An attachment without a device, which records the addresses at which memory is mapped."""

    interface, device = "none", -1
    recorded: list[int]

    def __init__(self, name: str) -> None:
        self.name, self.recorded = name, []

    def ranges(self) -> list[tuple[int, int]]:
        return [(0, (1 << 39) - 1)]

    def map(self, _virtual: int, address: int, _size: int, _access: int) -> None:
        assert type(address) is int
        self.recorded.append(address)

    def unmap(self, address: int, _size: int) -> None:
        if address in self.recorded:
            self.recorded.remove(address)

    def close(self) -> None:
        pass


@pytest.fixture
def attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iommu, "attach", Attached)


@pytest.fixture
def mapper(attached: None) -> Iterator[IOMapper]:
    with IOMapper("0000:00:01.0") as one:
        yield one


@pytest.mark.needs("numpy")
@pytest.mark.usefixtures("attached")
@pytest.mark.parametrize("kind", ["uint8", "int32", "int64"])
def test_a_narrow_number_of_bits(kind: str) -> None:
    """1 << n is 0 for 32 as a uint8, and for 64 as an int64."""
    import numpy

    bits = 64 if kind == "int64" else 32
    with (
        IOMapper("0000:00:01.0", address_bits=getattr(numpy, kind)(bits)) as mapper,
        iobmd.allocate(MIB, wired=False) as buffer,
        mapper.prepare(buffer) as prepared,
    ):
        assert prepared.address == 4096


@pytest.mark.needs("numpy")
def test_a_narrow_alignment(mapper: IOMapper) -> None:
    """The second address would be negative."""
    import numpy

    with iobmd.allocate(4096) as buffer:
        first, second = (mapper.prepare(buffer, alignment=numpy.int32(1 << 30)) for _ in range(2))
        assert (first.address, second.address) == (1 << 30, 2 << 30)
        first.complete()
        second.complete()


@pytest.mark.parametrize("alignment", [0, -1, 3, 3 << 12])
def test_bad_alignments(mapper: IOMapper, alignment: int) -> None:
    with iobmd.allocate(4096) as buffer:
        assert code_of(lambda: mapper.prepare(buffer, alignment=alignment)) == IOReturn.kIOReturnBadArgument


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda mapper, _buffer: mapper.prepare("x"), "descriptor must be an IOMemoryDescriptor"),
        (lambda mapper, _buffer: mapper.iovmMapMemory(None), "memory must be an IOMemoryDescriptor"),
        (lambda mapper, buffer: mapper.prepare(buffer, "out"), "forDirection must be an integer"),
        (lambda mapper, buffer: mapper.prepare(buffer, alignment=4096.0), "alignment must be an integer"),
        (lambda mapper, buffer: mapper.prepare(buffer, highest=1.5), "highest must be an integer"),
    ],
)
def test_bad_types(
    mapper: IOMapper, call: Callable[[IOMapper, iobmd.IOMemoryDescriptor], object], words: str
) -> None:
    with iobmd.allocate(4096) as buffer:
        with pytest.raises(TypeError, match=words):
            call(mapper, buffer)
        buffer.free()  # it is not prepared


def test_addresses_are_translated_while_others_are_mapped(mapper: IOMapper) -> None:
    """Enumerating the ranges raised RuntimeError when another thread added one."""
    before, end = sys.getswitchinterval(), threading.Event()
    with iobmd.allocate(4096) as buffer:

        def map_and_unmap() -> None:
            while not end.is_set():
                mapper.prepare(buffer).complete()

        threads = [threading.Thread(target=map_and_unmap) for _ in range(3)]
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for _ in range(20_000):
                assert mapper.mapToPhysicalAddress(1) == 0
        finally:
            end.set()
            for thread in threads:
                thread.join()
            sys.setswitchinterval(before)


def test_two_threads_complete_a_range_once(mapper: IOMapper) -> None:
    """The addresses may already be those of another range when the second thread enters."""
    with iobmd.allocate(4096) as buffer:
        prepared = mapper.prepare(buffer)
        with mapper._guard:
            threads = [threading.Thread(target=prepared.complete) for _ in range(2)]
            for thread in threads:
                thread.start()
                thread.join(0.1)  # it waits for the guard
        for thread in threads:
            thread.join()
        buffer.free()


@pytest.mark.needs("frames")
def test_a_buffer_that_is_shortened_remains_mapped(mapper: IOMapper) -> None:
    with iobmd.allocate(64 << 10) as buffer, mapper.prepare(buffer) as prepared:
        expected = [buffer.getPhysicalSegment(offset)[0] for offset in (0, 40_000, (64 << 10) - 1)]
        buffer.setLength(100)
        found = [mapper.mapToPhysicalAddress(prepared.address + offset) for offset in (0, 40_000, (64 << 10) - 1)]
        assert found == expected
        assert mapper.mapToPhysicalAddress(prepared.address + (64 << 10)) == 0


def test_an_interrupt_after_the_mapping_undoes_it(mapper: IOMapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the temporary mapping of memory that is mapped in no task ends."""
    of_memory = device_pages.of_memory

    @contextmanager
    def interrupted(memory: MemoryOwner, length: int) -> Iterator[list[device_pages.Pages]]:
        with of_memory(memory, length) as parts:
            yield parts
        raise KeyboardInterrupt

    monkeypatch.setattr(device_pages, "of_memory", interrupted)
    with iobmd.allocate(4096, task=None) as buffer:
        with pytest.raises(KeyboardInterrupt):
            mapper.prepare(buffer)
        assert not cast("Attached", mapper._attachment).recorded
        monkeypatch.undo()
        with mapper.prepare(buffer) as prepared:
            assert prepared.address == 4096
        buffer.free()  # it was unpinned once for each pin


@pytest.mark.usefixtures("attached")
def test_the_name_of_a_device_in_capitals() -> None:
    """VFIO finds a device by its name as the kernel writes it."""
    with IOMapper("0000:0A:00.0") as mapper:
        assert mapper.name == "0000:0a:00.0"
        assert IOMapper.copyMapperForDevice("0000:0A:00.0") is mapper
        assert IOMapper.copyMapperForDevice("0000:0a:00.0") is mapper


def test_memory_that_no_device_may_access() -> None:
    """It is refused before it is prepared, or the device is touched."""
    mapper = IOMapper.__new__(IOMapper)
    for options, mapper_options, code in (
        (iobmd.kIOMemoryHostOnly, 0, IOReturn.kIOReturnNotPermitted),
        (0, iobmd.kIOMapperUncached, IOReturn.kIOReturnUnsupported),
    ):
        with IOBufferMemoryDescriptor.withOptions(iobmd.kIODirectionInOut | options, 4096) as buffer:
            buffer.setMapperOptions(mapper_options)
            with pytest.raises(IOReturnError) as caught:
                mapper.prepare(buffer)
            assert caught.value.code == code
            with pytest.raises(IOReturnError, match="not prepared"):
                buffer.complete()


@pytest.mark.parametrize("name", ["DeviceMemory", "IdentityMap", "FixedAddress"])
def test_options_of_iokit_that_vfio_lacks(name: str) -> None:
    """They are refused by name, before the memory is prepared."""
    mapper = IOMapper.__new__(IOMapper)
    with iobmd.allocate(4096) as buffer:
        option = iobmd.IODMAMapOptions[f"kIODMAMap{name}"] | iobmd.kIODMAMapReadAccess
        with pytest.raises(iobmd.UnsupportedError, match=f"kIODMAMap{name}: "):
            mapper.iovmMapMemory(buffer, 0, 0, option)


@pytest.mark.parametrize("size", [100, 4096, 1 << 20])
def test_parts_of_memory_that_no_device_may_access(size: int) -> None:
    """Neither parts nor concatenations make it accessible."""
    mapper, inout = IOMapper.__new__(IOMapper), iobmd.kIODirectionInOut
    with (
        IOBufferMemoryDescriptor.withOptions(inout | iobmd.kIOMemoryHostOnly, size) as host_only,
        iobmd.allocate(size) as other,
        iobmd.IOSubMemoryDescriptor.withSubRange(host_only, 0, 50, inout) as part,
        iobmd.IOMultiMemoryDescriptor.withDescriptors([other, part], inout) as whole,
        iobmd.IOSubMemoryDescriptor.withSubRange(whole, size, 1, inout) as end,
    ):
        for refused in (host_only, part, whole, end):
            with pytest.raises(iobmd.NotPermittedError, match="kIOMemoryHostOnly"):
                mapper.prepare(refused)


@pytest.mark.parametrize(
    ("machine", "vendor", "active", "remedy"),
    [
        ("x86_64", "GenuineIntel", (), "boot with intel_iommu=on, and enable VT-d"),
        ("x86_64", "AuthenticAMD", (), "enable AMD-Vi"),
        ("aarch64", "", (), "iommu-map"),
        ("riscv64", "", (), "enable it in the firmware"),
        ("aarch64", "", ("smmu3.0x9050000",), r"\(smmu3.0x9050000\): .* bind it, as root: modprobe vfio-pci;"),
    ],
)
def test_a_device_without_an_iommu(
    machine: str, vendor: str, active: tuple[str, ...], remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy is that of the host's IOMMU; none of the others is mentioned."""
    (tmp_path / "device").mkdir()
    for name in active:
        (tmp_path / "iommus" / name).mkdir(parents=True)
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n" if vendor else "processor\t: 0\n")
    monkeypatch.setattr(vfio.Device, "folder", tmp_path / "device")
    monkeypatch.setattr(absence, "ALL_IOMMUS", tmp_path / "iommus")
    monkeypatch.setattr(absence, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "", "", "", machine)))
    with pytest.raises(IOReturnError, match=remedy) as caught:
        IOMapper("device")
    assert caught.value.code == IOReturn.kIOReturnUnsupported
    assert ("intel_iommu" in str(caught.value)) == (vendor == "GenuineIntel")
