"""The kernel's interfaces of `iobmd.iommu`: iommufd with VFIO's character devices, and groups with containers."""

import os
import time
from pathlib import Path

import pytest
from support import pci
from support.child import NOBODY, in_child
from support.errors import refusal
from support.kernel import status
from support.proof import PAGE

import iobmd
from iobmd import IOReturn
from iobmd.iommu import IOMapper, vfio

pytestmark = pytest.mark.needs("edu", "iommu")
MIB = 1 << 20


def path_of(mapper: IOMapper) -> str:
    """Return the file that the kernel shows for the device of a mapper."""
    return str(Path(f"/proc/self/fd/{mapper.fileno()}").readlink())


def test_iommufd_is_used_where_the_kernel_has_it(mapper: IOMapper, record_property) -> None:
    has_it = Path("/dev/iommu").exists()
    assert mapper.interface == ("iommufd" if has_it else "container")
    assert path_of(mapper).startswith("/dev/vfio/devices/vfio" if has_it else "anon_inode:[vfio-device]")
    record_property("interface of IOMapper", mapper.interface)


@pytest.mark.parametrize("pages", ["huge", "4 KiB"])
def test_256_mib_are_mapped(mapper: IOMapper, pages: str, record_property) -> None:
    """The times are reported, for the documentation; no test depends on them."""
    size = 256 * MIB
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    before = huge.read_text().split("[")[1].split("]")[0]
    huge.write_text("always" if pages == "huge" else "never")
    try:
        buffer = iobmd.allocate(size, wired=False)
        buffer.prepare()
    finally:
        huge.write_text(before)
    begin = time.perf_counter()
    prepared = mapper.prepare(buffer)
    mapped = time.perf_counter()
    for offset in (0, size // 2 + 5, size - 1):
        assert mapper.mapToPhysicalAddress(prepared.address + offset) == buffer.getPhysicalSegment(offset)[0]
    end = time.perf_counter()
    prepared.complete()
    unmapped = time.perf_counter() - end
    buffer.complete()
    buffer.free()
    taken = f"{(mapped - begin) * 1e3:.0f} ms, unmapped in {unmapped * 1e3:.0f} ms"
    record_property(f"256 MiB in {pages} pages mapped for a device", taken)


def test_complete_is_called_again_after_an_interrupt(mapper: IOMapper) -> None:
    """Ctrl-C during the system call that unmaps the memory is raised after it: iommufd then finds no mapping."""
    with iobmd.allocate(PAGE) as buffer:
        prepared = mapper.prepare(buffer)
        mapper._attachment.unmap(prepared.address, PAGE)
        prepared.complete()
        buffer.free()
        mapper.close()


@pytest.fixture
def node(name: str) -> Path:
    """The character device of VFIO."""
    (found,) = (pci.DEVICES / name).glob("vfio-dev/vfio*")
    return Path("/dev/vfio/devices") / found.name


@pytest.mark.needs("iommufd")
def test_a_device_is_in_use_by_either_interface(mapper: IOMapper, name: str, node: Path) -> None:
    """The kernel excludes the group while the character device is in use, and the reverse; each error says so."""
    assert mapper.interface == "iommufd"
    code, message = refusal(lambda: vfio.Container(vfio.Device(name)))
    assert (code, "in use" in message) == (IOReturn.kIOReturnBusy, True)
    code, message = refusal(lambda: IOMapper(name))
    assert (code, f"{node} is in use" in message) == (IOReturn.kIOReturnBusy, True)
    mapper.close()
    container = vfio.Container(vfio.Device(name))
    code, message = refusal(lambda: IOMapper(name))
    assert (code, f"{node} is in use" in message) == (IOReturn.kIOReturnBusy, True)
    container.close()
    with IOMapper(name) as again:
        assert again.interface == "iommufd"


@pytest.mark.needs("iommufd")
@pytest.mark.parametrize("files", [("device", "iommu"), ("device",), ("iommu", "group"), ("group",)], ids="+".join)
def test_an_ordinary_user_and_the_interfaces(name: str, node: Path, files: tuple[str, ...]) -> None:
    """iommufd requires both of its files; otherwise the group is used, or the error names it."""
    group = Path("/dev/vfio") / (pci.DEVICES / name / "iommu_group").readlink().name
    paths = [{"device": node, "iommu": Path("/dev/iommu"), "group": group}[each] for each in files]

    def used() -> str:
        with IOMapper(name) as one, iobmd.allocate(64 << 10) as buffer, one.prepare(buffer):
            return one.interface

    for path in paths:
        os.chown(path, NOBODY, NOBODY)
    try:
        if files == ("device",):
            code, message = in_child(lambda: refusal(used), uid=NOBODY)
            assert (code, str(group) in message) == (IOReturn.kIOReturnNotPrivileged, True)
        else:
            expected = "container" if "group" in files else "iommufd"
            assert in_child(used, uid=NOBODY, memlock=8 * MIB) == expected
    finally:
        for path in paths:
            os.chown(path, 0, 0)


@pytest.mark.needs("iommufd")
def test_iommufd_at_the_limit_of_locked_memory(name: str, node: Path) -> None:
    """It counts the pins of the user, among them those of wired memory; refused requests leave nothing."""
    size = 400 << 10

    def refused() -> tuple[IOReturn, str, int, int]:
        with IOMapper(name) as mapper, iobmd.allocate(size) as large, iobmd.allocate(64 << 10) as small:
            before = status("VmPin")
            for _ in range(2):
                code, message = refusal(lambda: mapper.prepare(large))
            with mapper.prepare(small) as first:
                return code, message, status("VmPin") - before, first.address

    for path in (node, Path("/dev/iommu")):
        os.chown(path, NOBODY, NOBODY)
    try:
        code, message, pinned, address = in_child(refused, uid=NOBODY, memlock=MIB * 3 // 4)
    finally:
        for path in (node, Path("/dev/iommu")):
            os.chown(path, 0, 0)
    assert code == IOReturn.kIOReturnCannotWire, message
    assert f"RLIMIT_MEMLOCK is {MIB * 3 // 4} bytes, {size + (64 << 10)} of them in use" in message
    assert "prlimit --memlock" in message
    assert pinned == 64 << 10
    assert address == PAGE
