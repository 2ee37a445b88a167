"""Descriptors of existing memory of this process: bytes, frames and pins, according to the kernel."""

import contextlib
import ctypes
import gc
import itertools
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import kernel
from support.child import in_child
from support.errors import code_of
from support.kernel import frames

import iobmd
from iobmd import IOMapOptions, IOMemoryDescriptor, IOReturn, IOReturnError, Wiring, kernel_task

PAGE = kernel.PAGE
IN, OUT, INOUT, NONE = 1, 2, 3, 0
UNIQUE, SMALL = IOMapOptions.kIOMapUnique, IOMapOptions.kIOMapGuardedSmall


class ForeignPages:
    """16 pages of memory that another library of this process has mapped."""

    def __init__(self, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> None:
        self.map = mmap.mmap(-1, 16 * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.map[:] = os.urandom(16 * PAGE)
        self._held = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._held)
        self.protect(0, 16 * PAGE, protection)

    def protect(self, offset: int, size: int, protection: int) -> None:
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(self.address + offset), size, protection) == 0

    def close(self) -> None:
        self.protect(0, 16 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
        del self._held
        self.map.close()


@pytest.fixture
def foreign() -> Iterator[ForeignPages]:
    one = ForeignPages()
    yield one
    one.close()


Ranges = list[tuple[int, int]]


@st.composite
def ranges(draw: st.DrawFn) -> Ranges:
    """Up to five ranges of the 16 pages: odd, empty, adjacent, overlapping, in any order."""
    found: Ranges = []
    for _ in range(draw(st.integers(0, 5))):
        start = sum(found[-1]) if found and draw(st.booleans()) else draw(st.integers(0, 16 * PAGE))
        start = min(start, 16 * PAGE)
        found.append((start, draw(st.integers(0, min(5 * PAGE, 16 * PAGE - start)))))
    return found


def test_bytes_across_ranges(foreign: ForeignPages) -> None:
    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(ranges(), st.data())
    def check(chosen: Ranges, data: st.DataObject) -> None:
        places = [index for start, length in chosen for index in range(start, start + length)]
        offset = data.draw(st.integers(0, len(places)))
        length = data.draw(st.integers(0, len(places) - offset))
        absolute = [(foreign.address + start, size) for start, size in chosen]
        with IOMemoryDescriptor.withAddressRanges(absolute, INOUT, os.getpid()) as md:
            assert len(md) == md.getLength() == len(places)
            model = bytes(foreign.map[place] for place in places)
            assert md.readBytes(0, len(places)) == model
            filled = bytearray(length)
            assert md.readBytesInto(offset, filled) == length
            assert filled == model[offset : offset + length]
            wanted = bytearray(foreign.map)
            new = os.urandom(length)
            for place, byte in zip(places[offset : offset + length], new, strict=True):
                wanted[place] = byte
            assert md.writeBytes(offset, new) == length
            assert foreign.map[:] == wanted
            assert code_of(lambda: md.readBytes(offset, len(places) - offset + 1)) == IOReturn.kIOReturnBadArgument

    check()


@pytest.mark.needs("frames")
def test_segments_across_ranges(foreign: ForeignPages) -> None:
    """Each byte has the address that pagemap shows, for ranges that begin and end anywhere in a page."""

    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
    @given(ranges(), st.data())
    def check(chosen: Ranges, data: st.DataObject) -> None:
        absolute = [(foreign.address + start, size) for start, size in chosen]
        with IOMemoryDescriptor.withAddressRanges(absolute, INOUT, kernel_task) as md:
            offset = data.draw(st.integers(0, len(md)))
            length = data.draw(st.integers(0, len(md) - offset))
            md.prepare()
            actual = frames(foreign.address, 16 * PAGE)
            places = [index for start, size in chosen for index in range(start, start + size)]
            wanted = [actual[place // PAGE] * PAGE + place % PAGE for place in places[offset : offset + length]]
            got = md.segments(offset, length)
            assert [at for address, size in got for at in range(address, address + size)] == wanted
            assert all(sum(one) != other.address for one, other in itertools.pairwise(got)), "they touch"
            if length:
                address, size = md.getPhysicalSegment(offset)
                assert address == wanted[0]
                assert size >= got[0].length
            md.verify()
            md.complete()

    check()


@pytest.mark.usefixtures("nothing_left")
def test_prepare_pins_and_complete_lets_go(foreign: ForeignPages) -> None:
    with IOMemoryDescriptor.withAddressRange(foreign.address + 5, 3 * PAGE, INOUT, kernel_task) as md:
        assert md.wiring is Wiring.PAGEABLE
        assert code_of(md.segments) == IOReturn.kIOReturnNotReady
        md.prepare()
        md.prepare(IN)
        assert md.wiring is Wiring.PINNED
        assert kernel.pinned(4 * PAGE) == 4 * PAGE
        assert code_of(md.free) == IOReturn.kIOReturnBusy
        md.complete()
        assert kernel.pinned(4 * PAGE) == 4 * PAGE
        md.complete()
        assert kernel.pinned() == 0
        assert code_of(md.complete) == IOReturn.kIOReturnNotReady
        ranges = [(foreign.address, PAGE), (foreign.address + 8 * PAGE + 1, PAGE)]
        with IOMemoryDescriptor.withAddressRanges(ranges, INOUT, kernel_task) as several:
            several.prepare()
            several.prepare()
            assert kernel.pinned(3 * PAGE) == 3 * PAGE
            several.complete()
            assert kernel.pinned(3 * PAGE) == 3 * PAGE
            several.complete()
            assert kernel.pinned() == 0


@pytest.mark.needs("frames")
def test_pinned_pages_do_not_move(foreign: ForeignPages) -> None:
    with IOMemoryDescriptor.withAddressRange(foreign.address, 16 * PAGE, INOUT, kernel_task) as md:
        md.prepare()
        before = frames(foreign.address, 16 * PAGE)
        Path("/proc/sys/vm/compact_memory").write_text("1")
        assert frames(foreign.address, 16 * PAGE) == before
        md.verify()
        md.complete()


@pytest.mark.usefixtures("nothing_left")
def test_zero_length() -> None:
    for address, task in ((0, iobmd.current_task()), (0xFFFF, os.getppid()), ((1 << 64) - 1, kernel_task)):
        with IOMemoryDescriptor.withAddressRange(address, 0, NONE, task) as md:
            md.prepare()
            md.complete()
            assert (md.getLength(), md.segments(), md.readBytes(0, 0)) == (0, [], b"")
            assert (md.getPhysicalSegment(0), md.getPhysicalAddress()) == ((0, 0), 0)
            assert md.getDMAMapLength() == (0, 0)
            assert md.getPageCounts() == (0, 0)
            assert code_of(md.map) == IOReturn.kIOReturnBadArgument
            assert code_of(lambda: md.readBytes(0, 1)) == IOReturn.kIOReturnBadArgument
    with IOMemoryDescriptor.withAddressRanges([], NONE, kernel_task) as none:
        assert len(none) == 0


def test_dma_map_length(foreign: ForeignPages) -> None:
    at = foreign.address

    def map_length(*ranges: tuple[int, int]) -> tuple[int, int]:
        with IOMemoryDescriptor.withAddressRanges(ranges, INOUT, kernel_task) as md:
            return md.getDMAMapLength()

    assert map_length((at, 2)) == (PAGE, 0)
    assert map_length((at + PAGE - 2, 4)) == (2 * PAGE, PAGE - 2)
    assert map_length((at + 4 * PAGE, 4 * PAGE), (at, 4 * PAGE)) == (8 * PAGE, 0)
    assert map_length((at + 1, 1), (at + 3, 1), (at + 2 * PAGE - 1, 2)) == (4 * PAGE, 1)
    with iobmd.allocate(5000, wired=False) as buffer:
        assert buffer.getDMAMapLength() == (2 * PAGE, 0)
        buffer.setLength(5)
        assert buffer.getDMAMapLength() == (PAGE, 0)


def test_directions_and_access(foreign: ForeignPages) -> None:
    foreign.protect(4 * PAGE, PAGE, mmap.PROT_READ)
    foreign.protect(8 * PAGE, PAGE, 0)
    at = foreign.address
    for direction in (NONE, OUT):
        with IOMemoryDescriptor.withAddressRange(at, 8 * PAGE, direction, kernel_task) as md:
            assert (md.getDirection(), md.getFlags()) == (direction, direction)
            assert md.readBytes(4 * PAGE, 9) == foreign.map[4 * PAGE : 4 * PAGE + 9]
            with pytest.raises(IOReturnError) as caught:
                md.writeBytes(4 * PAGE - 5, b"0123456789")
            assert (caught.value.code, caught.value.address) == (IOReturn.kIOReturnVMError, at + 4 * PAGE)
    for direction in (IN, INOUT):
        with pytest.raises(IOReturnError) as caught:
            IOMemoryDescriptor.withAddressRange(at + 9, 8 * PAGE - 9, direction, kernel_task)
        assert (caught.value.code, caught.value.address) == (IOReturn.kIOReturnVMError, at + 4 * PAGE)
    for direction in (NONE, IN, OUT, INOUT):
        with pytest.raises(IOReturnError) as caught:
            IOMemoryDescriptor.withAddressRanges([(at, 9), (at + 8 * PAGE + 7, 1)], direction, kernel_task)
        assert (caught.value.code, caught.value.address) == (IOReturn.kIOReturnVMError, at + 8 * PAGE + 7)


@pytest.mark.usefixtures("nothing_left")
def test_read_only_memory_is_not_pinned(foreign: ForeignPages) -> None:
    """If one part cannot be prepared, no other part remains pinned."""
    foreign.protect(4 * PAGE, PAGE, mmap.PROT_READ)
    ranges = [(foreign.address, PAGE), (foreign.address + 3 * PAGE, 2 * PAGE)]
    with IOMemoryDescriptor.withAddressRanges(ranges, OUT, kernel_task) as md:
        with pytest.raises(IOReturnError, match="is not writable") as caught:
            md.prepare()
        assert caught.value.code == IOReturn.kIOReturnCannotWire
        assert kernel.pinned() == 0
        assert code_of(md.complete) == IOReturn.kIOReturnNotReady


def test_memory_that_goes_away() -> None:
    one = ForeignPages()
    md = IOMemoryDescriptor.withAddressRange(one.address + PAGE, PAGE, INOUT, kernel_task)
    hole = one.address + PAGE
    assert ctypes.CDLL(None).munmap(ctypes.c_void_p(hole), PAGE) == 0
    for action in (lambda: md.readBytes(0, 1), lambda: md.writeBytes(5, b"x"), md.prepare):
        with pytest.raises(IOReturnError) as caught:
            action()
        assert caught.value.code == IOReturn.kIOReturnVMError
    assert caught.value.address == hole
    assert kernel.pinned() == 0
    md.free()


@pytest.mark.parametrize(
    ("ranges", "options", "code"),
    [
        ([(1 << 64, 1)], INOUT, IOReturn.kIOReturnBadArgument),
        ([(-1, 1)], INOUT, IOReturn.kIOReturnBadArgument),
        ([(PAGE, -1)], INOUT, IOReturn.kIOReturnBadArgument),
        ([((1 << 64) - 1, 2)], INOUT, IOReturn.kIOReturnBadArgument),
        ([(0, 1)], INOUT, IOReturn.kIOReturnVMError),
        ([(1 << 63, PAGE)], INOUT, IOReturn.kIOReturnVMError),
        ([(0, 0)], 1 << 28, IOReturn.kIOReturnBadArgument),
        ([(0, 0)], iobmd.kIOMemoryPageable, IOReturn.kIOReturnBadArgument),
        ([(0, 0)], iobmd.kIOMemoryPhysicallyContiguous, IOReturn.kIOReturnBadArgument),
        ([(0, 0)], iobmd.kIOMemoryPageable | iobmd.kIOMemoryPurgeable, IOReturn.kIOReturnBadArgument),
    ],
)
def test_refused(ranges: Ranges, options: int, code: IOReturn) -> None:
    assert code_of(lambda: IOMemoryDescriptor.withAddressRanges(ranges, options, kernel_task)) == code


@pytest.mark.usefixtures("nothing_left")
def test_private_memory_has_its_own_addresses_and_no_other(foreign: ForeignPages) -> None:
    with IOMemoryDescriptor.withAddressRange(foreign.address + 7, 5000, INOUT, kernel_task) as md:
        with md.map() as static, md.createMappingInTask(kernel_task, 0, IOMapOptions.kIOMapAnywhere, 100, 10) as part:
            assert (static.getAddress(), part.getAddress()) == (foreign.address + 7, foreign.address + 107)
            with memoryview(static) as view:
                view[0] = foreign.map[7] ^ 0xFF
                assert foreign.map[7] == view[0]
                assert code_of(static.unmap) == IOReturn.kIOReturnBusy
            assert code_of(md.free) == IOReturn.kIOReturnBusy
        for options in (UNIQUE, SMALL):
            assert code_of(lambda: md.map(options)) == IOReturn.kIOReturnUnsupported  # noqa: B023
        other = lambda: md.createMappingInTask(os.getppid(), 0, IOMapOptions.kIOMapAnywhere)  # noqa: E731
        assert code_of(other) == IOReturn.kIOReturnUnsupported
        assert code_of(lambda: md.setPurgeable(1)) == IOReturn.kIOReturnUnsupported
        assert "length 5000" in repr(md)
    assert code_of(md.getLength) == IOReturn.kIOReturnNotOpen
    foreign.protect(0, PAGE, mmap.PROT_READ)
    with (
        IOMemoryDescriptor.withAddressRange(foreign.address, 9, OUT, kernel_task) as md,
        md.map() as mapped,
        memoryview(mapped) as view,
    ):
        assert view.readonly


# --- memory of iobmd


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("options", [UNIQUE, SMALL | IOMapOptions.kIOMapPrefault])
def test_shared_memory_is_known_again(options: IOMapOptions) -> None:
    with iobmd.allocate(16 * PAGE, shared=True, wired=False) as buffer:
        buffer.writeBytes(0, os.urandom(16 * PAGE))
        at = buffer.getBytesNoCopy()
        ranges = [(at + 8 * PAGE + 5, 3 * PAGE - 5), (at, 2 * PAGE), (at + 4 * PAGE, 77)]
        with IOMemoryDescriptor.withAddressRanges(ranges, INOUT, os.getpid()) as md, md.map(options) as mapped:
            assert mapped.getAddress() % PAGE == 5
            assert len(mapped) == 5 * PAGE - 5 + 77
            model = bytes(memoryview(buffer)[8 * PAGE + 5 : 11 * PAGE]) + buffer.readBytes(0, 2 * PAGE)
            assert bytes(mapped) == model + buffer.readBytes(4 * PAGE, 77)
            actual = frames(at, 16 * PAGE)
            assert frames(mapped.getAddress(), len(mapped)) == [actual[page] for page in (8, 9, 10, 0, 1, 4)]
            with memoryview(mapped) as view:
                view[3 * PAGE - 5] ^= 0xFF
            assert buffer.readBytes(0, 1)[0] == model[3 * PAGE - 5] ^ 0xFF


def test_misplaced_ranges_cannot_be_mapped_together() -> None:
    with iobmd.allocate(8 * PAGE, shared=True, wired=False) as buffer:
        at = buffer.getBytesNoCopy()
        ranges = [(at, PAGE), (at + 3 * PAGE + 1, PAGE)]
        with IOMemoryDescriptor.withAddressRanges(ranges, INOUT, kernel_task) as md:
            assert code_of(lambda: md.map(UNIQUE)) == IOReturn.kIOReturnBadArgument
            part = md.createMappingInTask(kernel_task, 0, IOMapOptions.kIOMapAnywhere, PAGE + 2, 9)
            assert part.getAddress() % PAGE == 3, "one of them can"
            buffer.writeBytes(3 * PAGE + 3, b"right one")
            assert bytes(part) == b"right one"
            part.unmap()
        with IOMemoryDescriptor.withAddressRanges([(at, 100), (at + 100, 2 * PAGE)], INOUT, kernel_task) as md:
            md.map(UNIQUE).unmap()


@pytest.mark.usefixtures("nothing_left")
def test_known_by_the_addresses_of_a_map() -> None:
    with iobmd.allocate(8 * PAGE, shared=True, wired=False) as buffer, buffer.map(UNIQUE) as seen:
        md = IOMemoryDescriptor.withAddressRange(seen.getAddress() + PAGE, PAGE, INOUT, kernel_task)
        with md, md.map(UNIQUE) as mapped:
            buffer.writeBytes(PAGE, b"here")
            assert bytes(mapped)[:4] == b"here"


@pytest.mark.usefixtures("nothing_left")
def test_what_is_behind_a_map_is_not_taken_for_more_of_its_buffer() -> None:
    """A map of one page of three is directly followed by a map of another buffer."""

    def free_address() -> int:
        with mmap.mmap(-1, 2 * PAGE) as area:
            return ctypes.addressof(ctypes.c_char.from_buffer(area))

    with contextlib.ExitStack() as opened:
        for _ in range(8):  # buffers are searched in no particular order
            one = opened.enter_context(iobmd.allocate(3 * PAGE, wired=False, shared=True))
            other = opened.enter_context(iobmd.allocate(PAGE, wired=False, shared=True))
            at = free_address()
            opened.enter_context(one.createMappingInTask(kernel_task, at, 0, 0, PAGE))
            opened.enter_context(other.createMappingInTask(kernel_task, at + PAGE, 0, 0, PAGE))
            with IOMemoryDescriptor.withAddressRange(at + PAGE + 5, 10, INOUT, kernel_task) as md:
                md.writeBytes(0, b"other")
            assert (other.readBytes(5, 5), one.readBytes(PAGE + 5, 5)) == (b"other", bytes(5))


@pytest.mark.usefixtures("nothing_left")
def test_it_keeps_memory_of_iobmd() -> None:
    buffer = iobmd.allocate(4 * PAGE)
    buffer.writeBytes(PAGE, b"kept")
    address = buffer.getBytesNoCopy()
    md = IOMemoryDescriptor.withAddressRange(address + PAGE, 4, INOUT, kernel_task)
    buffer.free()
    assert code_of(buffer.getLength) == IOReturn.kIOReturnNotOpen
    again = IOMemoryDescriptor.withAddressRange(address + PAGE + 1, 2, INOUT, kernel_task)
    assert (md.readBytes(0, 4), again.readBytes(0, 2)) == (b"kept", b"ep")
    assert kernel.smaps(address)
    md.free()
    assert kernel.smaps(address)
    again.free()
    iobmd.trim()
    assert not kernel.smaps(address)


def test_volatile_memory_is_written_as_through_its_buffer() -> None:
    """A write through the descriptor of its addresses does not make volatile memory count as lost."""
    with iobmd.allocate(4 * PAGE, wired=False, purgeable=True) as buffer:
        buffer.writeBytes(0, b"x" * 4 * PAGE)
        md = IOMemoryDescriptor.withAddressRange(buffer.getBytesNoCopy() + PAGE, 5, INOUT, kernel_task)
        assert md.setPurgeable(3) == 2
        assert buffer.setPurgeable(1) == 3
        assert code_of(md.prepare) == IOReturn.kIOReturnNotReady
        md.writeBytes(0, b"12345")
        assert md.setPurgeable(2) == 3
        assert buffer.readBytes(PAGE - 1, 7) == b"x12345x"
        md.free()


def test_fork(foreign: ForeignPages) -> None:
    """In a forked child, the descriptor describes the child's memory."""
    md = IOMemoryDescriptor.withAddressRange(foreign.address, 4, INOUT, kernel_task)
    md.writeBytes(0, b"ours")

    def child() -> bytes:
        foreign.map[0:4] = b"mine"
        return md.readBytes(0, 4)

    assert in_child(child) == b"mine"
    assert md.readBytes(0, 4) == b"ours"
    md.prepare()
    with pytest.raises(IOReturnError, match="fork"):
        in_child(child)
    md.complete()
    md.free()
    gc.collect()


def test_forgotten_while_prepared(foreign: ForeignPages) -> None:
    with iobmd.allocate(PAGE, wired=False) as buffer:
        at = buffer.getBytesNoCopy()
        for ranges in (
            [(foreign.address, 9)],
            [(at, 9)],
            [(foreign.address, 9), (at, 9), (foreign.address + PAGE, 9)],
        ):
            md = IOMemoryDescriptor.withAddressRanges(ranges, INOUT, kernel_task)
            md.prepare()
            md.prepare()
            assert kernel.status("VmPin")
            with pytest.warns(ResourceWarning, match="never completed"):
                del md
            assert buffer.wiring is Wiring.PAGEABLE
            assert kernel.pinned() == 0
