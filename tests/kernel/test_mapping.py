"""`IOMemoryMap`: the same pages at additional addresses, according to pagemap, and the end of maps."""

import errno
import gc
import os
import threading
from pathlib import Path

import pytest
from support import kernel
from support.child import in_child
from support.errors import code_of
from support.faulting import faults
from support.memory_mark import is_there, mark
from support.threads import run_all

import iobmd
from iobmd import IOMapOptions, IOReturn, IOReturnError
from iobmd._native.mapping import Mapping
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
ANYWHERE = IOMapOptions.kIOMapAnywhere
UNIQUE = IOMapOptions.kIOMapUnique
READ_ONLY = IOMapOptions.kIOMapReadOnly
PREFAULT = IOMapOptions.kIOMapPrefault
SMALL, LARGE = IOMapOptions.kIOMapGuardedSmall, IOMapOptions.kIOMapGuardedLarge
Buffer = iobmd.IOBufferMemoryDescriptor


def shared(size: int = 16 * kernel.PAGE, *, wired: bool = False) -> tuple[Buffer, bytes]:
    buffer, data = iobmd.allocate(size, wired=wired, shared=True), os.urandom(size)
    buffer.writeBytes(0, data)
    return buffer, data


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("is_shared", [False, True], ids=["private", "shared"])
def test_static_mapping(is_shared: bool) -> None:
    """In the descriptor's own task, "anywhere" returns the descriptor's addresses, as in IOKit."""
    with iobmd.allocate(5000, shared=is_shared, wired=False) as buffer:
        buffer.writeBytes(0, b"0123456789")
        with buffer.map() as whole, buffer.createMappingInTask(iobmd.kernel_task, 0, ANYWHERE, 3, 5) as part:
            assert whole.getAddress() == whole.getVirtualAddress() == buffer.getBytesNoCopy()
            assert (whole.getLength(), whole.getSize(), len(whole)) == (5000, 5000, 5000)
            assert (part.getAddress(), part.getLength()) == (buffer.getBytesNoCopy() + 3, 5)
            assert bytes(part) == b"34567"
            assert whole.getMemoryDescriptor() is buffer
            assert whole.getAddressTask() is iobmd.kernel_task
            assert whole.getMapOptions() == ANYWHERE
            with memoryview(part) as view:
                view[0] = ord("x")
            assert buffer.readBytes(0, 5) == b"012x4"
            with pytest.raises(BufferError, match="map count 2"):
                buffer.free()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("options", [UNIQUE, UNIQUE | PREFAULT, SMALL, LARGE | PREFAULT])
def test_second_place_shows_the_same_pages(options: IOMapOptions) -> None:
    buffer, data = shared()
    with buffer, buffer.map(options) as mapped:
        assert mapped.getAddress() != buffer.getBytesNoCopy()
        assert bytes(mapped) == data
        with memoryview(mapped) as view:
            view[5000] ^= 0xFF
        assert buffer.readBytes(5000, 1)[0] == data[5000] ^ 0xFF
        if os.geteuid() == 0:
            assert kernel.entries(mapped.getAddress(), 16 * kernel.PAGE) == [
                entry & ~(1 << 56) for entry in kernel.entries(buffer.getBytesNoCopy(), 16 * kernel.PAGE)
            ]


@pytest.mark.usefixtures("nothing_left")
def test_prefault() -> None:
    buffer, _ = shared()
    with buffer, buffer.map(UNIQUE) as lazy, buffer.map(UNIQUE | PREFAULT) as there:
        assert kernel.present(lazy.getAddress(), 16 * kernel.PAGE) == 0
        assert kernel.present(there.getAddress(), 16 * kernel.PAGE) == 16


NO_ADVICE = {"madvise": errno.EINVAL}  # as of MADV_POPULATE_WRITE before Linux 5.14


@pytest.mark.parametrize("options", [UNIQUE, UNIQUE | READ_ONLY, SMALL, LARGE | READ_ONLY], ids=str)
def test_prefault_without_advice(options: IOMapOptions) -> None:
    def look() -> tuple[int, bool, int]:
        buffer, data = shared(64 * kernel.PAGE)
        offset, length = 3 * kernel.PAGE + 5, 40 * kernel.PAGE
        with (
            buffer,
            buffer.createMappingInTask(os.getpid(), 0, PREFAULT | ANYWHERE | options, offset, length) as mapped,
        ):
            there = kernel.present(mapped.getAddress(), length)
            return there, bytes(mapped) == data[offset : offset + length], kernel.present(mapped.getAddress(), length)

    assert in_child(look, deny=NO_ADVICE) == (41, True, 41)


@pytest.mark.parametrize("kind", ["private", "shared"])
def test_prefault_in_place_without_advice(kind: str) -> None:
    def look() -> tuple[int, int, bytes, bool]:
        with iobmd.allocate(64 * kernel.PAGE, wired=False, shared=kind == "shared") as buffer:
            buffer.writeBytes(kernel.PAGE, b"kept")
            with buffer.map(PREFAULT) as mapped:
                own = [entry >> 56 & 1 for entry in kernel.entries(mapped.getAddress(), 64 * kernel.PAGE)]
                there = kernel.present(mapped.getAddress(), 64 * kernel.PAGE)
                kept = bytes(mapped)[kernel.PAGE :][:5]
            return there, sum(own), kept, kernel.nothing_is_pinned()

    # Each page is mapped exclusively, unlike the kernel's zero page.
    assert in_child(look, deny=NO_ADVICE) == (64, 64, b"kept\0", True)
    unpinnable = {**NO_ADVICE, "io_uring_setup": errno.ENOSYS}
    assert in_child(look, deny=unpinnable)[0] == 64
    assert in_child(look, deny={**unpinnable, "process_vm_readv": errno.ENOSYS})[0] == 1, "not refused even then"


@pytest.mark.needs("memlock")
def test_prefault_without_advice_leaves_wired_memory_wired() -> None:
    def look() -> tuple[int, int]:
        with iobmd.allocate(64 * kernel.PAGE) as buffer:
            locked = kernel.status("VmLck")
            with buffer.map(PREFAULT):
                buffer.verify()
            return locked, kernel.status("VmLck")

    before, after = in_child(look, deny=NO_ADVICE)
    assert before == after >= 64 * kernel.PAGE


@pytest.mark.usefixtures("nothing_left")
def test_part_at_an_odd_offset() -> None:
    buffer, data = shared()
    with buffer, buffer.createMappingInTask(os.getpid(), 0, ANYWHERE | UNIQUE, 5001, 9000) as part:
        assert part.getAddress() % kernel.PAGE == 5001 % kernel.PAGE
        assert bytes(part) == data[5001:14001]
        area = next(
            line for line in Path("/proc/self/maps").read_text().splitlines() if holds(line, part.getAddress())
        )
        start, end = (int(text, 16) for text in area.split()[0].split("-"))
        assert end - start == -(-(5001 % kernel.PAGE + 9000) // kernel.PAGE) * kernel.PAGE


def holds(line: str, address: int) -> bool:
    start, end = (int(text, 16) for text in line.split(maxsplit=1)[0].split("-"))
    return start <= address < end


@pytest.mark.usefixtures("nothing_left")
def test_fixed_address() -> None:
    buffer, data = shared()
    free = Mapping.reserve(32 * kernel.PAGE, kernel.PAGE)
    address = free.address
    with buffer:
        taken = code_of(lambda: buffer.createMappingInTask(iobmd.kernel_task, address, 0))
        assert taken == IOReturn.kIOReturnNoResources
        free.close()
        with buffer.createMappingInTask(iobmd.kernel_task, address + 5, 0, kernel.PAGE + 5) as mapped:
            assert mapped.getAddress() == address + 5
            assert bytes(mapped) == data[kernel.PAGE + 5 :]
            again = buffer.createMappingInTask(iobmd.kernel_task, address + 5, 0, kernel.PAGE + 5)
            assert again.getAddress() == mapped.getAddress()
            again.unmap()
            assert bytes(mapped) == data[kernel.PAGE + 5 :]
        for wrong in (address, address + 6, 0, -kernel.PAGE + 5, (1 << 63) + 5):
            code = code_of(lambda: buffer.createMappingInTask(iobmd.kernel_task, wrong, 0, kernel.PAGE + 5))  # noqa: B023
            assert code == IOReturn.kIOReturnBadArgument


@pytest.mark.usefixtures("nothing_left")
def test_read_only() -> None:
    buffer, data = shared()
    with buffer, buffer.map(UNIQUE | READ_ONLY) as mapped, buffer.map(READ_ONLY) as static:
        for one in (mapped, static):
            with memoryview(one) as view:
                assert view.readonly
                assert view == data
            with pytest.raises((TypeError, BufferError)):
                memoryview(one)[0] = 1
        assert not faults(mapped.getAddress())
        assert faults(mapped.getAddress(), write=True)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("options", "guard"), [(SMALL, kernel.PAGE), (LARGE, 64 << 10)])
def test_guards(options: IOMapOptions, guard: int) -> None:
    buffer, _ = shared()
    with buffer, buffer.map(options) as mapped:
        start, end = mapped.getAddress(), mapped.getAddress() + 16 * kernel.PAGE
        assert not faults(start, write=True)
        for outside in (start - 1, start - guard, end, end + guard - 1):
            assert faults(outside)
    with pytest.raises(IOReturnError):
        buffer.map(options)


@pytest.mark.needs("own_footprint")
@pytest.mark.usefixtures("nothing_left")
def test_compatible_maps_share_addresses() -> None:
    buffer, _ = shared()
    place = Mapping.reserve(16 * kernel.PAGE, kernel.PAGE)
    address = place.address
    place.close()
    with buffer:
        first = buffer.createMappingInTask(iobmd.kernel_task, address, 0)
        inside = buffer.createMappingInTask(iobmd.kernel_task, address + kernel.PAGE, 0, kernel.PAGE, kernel.PAGE)
        assert inside.getAddress() == address + kernel.PAGE
        reading = code_of(lambda: buffer.createMappingInTask(iobmd.kernel_task, address, READ_ONLY))
        assert reading == IOReturn.kIOReturnNoResources, "a read-only map is incompatible, and the address is in use"
        first.unmap()
        first.unmap()
        assert bytes(inside)[:0] == b"", "the last map unmaps the addresses"
        assert kernel.smaps(address)
        inside.unmap()
        assert not kernel.smaps(address)


@pytest.mark.usefixtures("nothing_left")
def test_redirect() -> None:
    first, old = shared()
    second, new = shared(32 * kernel.PAGE)
    with first, second:
        mapped = first.map(UNIQUE)
        view, address = memoryview(mapped), mapped.getAddress()
        mapped.redirect(second, 0, 4 * kernel.PAGE)
        assert mapped.getAddress() == address
        assert bytes(view) == new[4 * kernel.PAGE : 20 * kernel.PAGE]
        assert mapped.getMemoryDescriptor() is second
        view[0] ^= 0xFF
        assert second.readBytes(4 * kernel.PAGE, 1)[0] == new[4 * kernel.PAGE] ^ 0xFF
        assert bytes(first) == old
        with pytest.raises(BufferError):
            second.free()
        mapped.redirect(first)
        assert bytes(view) == old
        view.release()
        with iobmd.allocate(16 * kernel.PAGE, wired=False) as private, first.map() as static:
            assert code_of(lambda: mapped.redirect(private)) == IOReturn.kIOReturnUnsupported
            assert code_of(lambda: static.redirect(second)) == IOReturn.kIOReturnUnsupported
            for offset in (1, 17 * kernel.PAGE, -kernel.PAGE):
                assert code_of(lambda: mapped.redirect(second, 0, offset)) == IOReturn.kIOReturnBadArgument  # noqa: B023
            assert code_of(lambda: mapped.redirect(second, 1)) == IOReturn.kIOReturnBadArgument
        assert bytes(mapped) == old
        mapped.unmap()
        assert code_of(lambda: mapped.redirect(second)) == IOReturn.kIOReturnNotOpen


def test_redirect_under_readers() -> None:
    """A concurrent reader sees the old or the new memory in each page, and never unmapped addresses."""
    first, second = (iobmd.allocate(64 * kernel.PAGE, wired=False, shared=True) for _ in range(2))
    first.writeBytes(0, b"1" * len(first))
    second.writeBytes(0, b"2" * len(second))
    stop, seen, failures = threading.Event(), set(), []
    with first, second, first.map(UNIQUE) as mapped:

        def read() -> None:
            with memoryview(mapped) as view:
                while not stop.is_set():
                    seen.update(bytes(view[:: kernel.PAGE]))

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(300):
            mapped.redirect(second)
            mapped.redirect(first)
        stop.set()
        reader.join()
    assert seen <= set(b"12")
    assert not failures


@pytest.mark.needs("frames")
def test_physical_addresses_are_those_of_the_buffer() -> None:
    buffer, _ = shared(wired=True)
    with buffer, buffer.createMappingInTask(iobmd.kernel_task, 0, ANYWHERE | UNIQUE, 5000, 20000) as mapped:
        assert mapped.getPhysicalAddress() == buffer.getPhysicalSegment(5000)[0]
        assert mapped.getPhysicalSegment(19_999, iobmd.kIOMemoryMapperNone)[1] == 1
        assert mapped.getPhysicalSegment(20_000) == mapped.getPhysicalSegment(-1) == (0, 0)
        assert len(bytes(mapped)) == 20000  # fault in the pages
        frames = {entry & kernel.FRAME for entry in kernel.entries(mapped.getAddress(), 20000)}
        assert mapped.getPhysicalAddress() // kernel.PAGE in frames


@pytest.mark.usefixtures("nothing_left")
def test_end() -> None:
    buffer, data = shared()
    mapped = buffer.map(UNIQUE)
    view = memoryview(mapped)
    for action in (mapped.unmap, buffer.free):
        assert code_of(action) == IOReturn.kIOReturnBusy
    assert view == data
    view.release()
    mapped.unmap()
    assert repr(mapped) == "<IOMemoryMap unmapped>"
    for use in (mapped.getAddress, mapped.getLength, lambda: memoryview(mapped), mapped.__enter__):
        assert code_of(use) == IOReturn.kIOReturnNotOpen  # type: ignore[arg-type]
    offset = mark(buffer) - buffer.getBytesNoCopy()
    forgotten = buffer.map(UNIQUE)
    address = forgotten.getAddress() + offset
    assert is_there(address)
    del forgotten
    gc.collect()
    assert not is_there(address)
    buffer.free()
    assert code_of(buffer.map) == IOReturn.kIOReturnNotOpen


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("options", "offset", "length", "code"),
    [
        (1 << 20, 0, 0, IOReturn.kIOReturnBadArgument),
        (SMALL | LARGE, 0, 0, IOReturn.kIOReturnBadArgument),
        (0, 16 * kernel.PAGE, 0, IOReturn.kIOReturnBadArgument),
        (0, 0, 16 * kernel.PAGE + 1, IOReturn.kIOReturnBadArgument),
        (0, -1, 1, IOReturn.kIOReturnBadArgument),
        (IOMapOptions.kIOMapInhibitCache, 0, 0, IOReturn.kIOReturnUnsupported),
    ],
)
def test_refused(options: int, offset: int, length: int, code: IOReturn) -> None:
    buffer, _ = shared()
    with buffer:
        action = lambda: buffer.createMappingInTask(iobmd.kernel_task, 0, ANYWHERE | options, offset, length)  # noqa: E731
        assert code_of(action) == code
    with iobmd.allocate(PAGE_SIZE, wired=False) as private:
        assert code_of(lambda: private.map(UNIQUE)) == IOReturn.kIOReturnUnsupported
        other = lambda: private.createMappingInTask(os.getppid(), 0, ANYWHERE)  # noqa: E731
        assert code_of(other) == IOReturn.kIOReturnUnsupported


@pytest.mark.needs("own_footprint")
def test_maps_come_and_go_in_threads() -> None:
    """Maps in reference cycles end at any garbage collection, in any thread."""

    def churn() -> int:
        gc.set_threshold(10, 2, 2)
        buffer, data = shared()
        before = len(Path("/proc/self/maps").read_text().splitlines())

        def work() -> None:
            for turn in range(300):
                mapped = buffer.map(UNIQUE if turn % 2 else 0)
                mapped.itself = mapped  # type: ignore[attr-defined]
                with memoryview(mapped) as view:
                    assert view[:16] == data[:16]
                if turn % 3:
                    mapped.unmap()

        run_all(*[work] * 4)
        gc.collect()
        after = len(Path("/proc/self/maps").read_text().splitlines())
        buffer.free()
        return after - before

    assert in_child(churn) < 20


def test_fork() -> None:
    buffer, data = shared()
    with buffer, buffer.map(UNIQUE) as mapped:

        def child() -> bytes:
            with memoryview(mapped) as view:
                view[0] = data[0] ^ 0xFF
            mapped.unmap()
            return buffer.readBytes(1, 3)

        assert in_child(child) == data[1:4]
        assert bytes(mapped)[0] == data[0] ^ 0xFF
