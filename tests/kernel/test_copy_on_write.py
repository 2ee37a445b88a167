"""Copy-on-write maps: what the source contains later does not reach them, nor what they contain the source."""

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import kernel, rawmemory
from support.child import in_child, sleeping
from support.errors import code_of, error_of
from support.faulting import faults
from support.kernel import frames
from support.lazy import Source, is_incomplete
from support.targets import need_ptrace
from support.threads import running

import iobmd
from iobmd import IOMapOptions, IOMemoryDescriptor, IOReturn, kernel_task

PAGE = kernel.PAGE
INOUT, OUT, COPY = iobmd.kIODirectionInOut, iobmd.kIODirectionOut, iobmd.kIOMemoryMapCopyOnWrite
ANYWHERE, READ_ONLY, UNIQUE = IOMapOptions.kIOMapAnywhere, IOMapOptions.kIOMapReadOnly, IOMapOptions.kIOMapUnique
SMALL, PREFAULT = IOMapOptions.kIOMapGuardedSmall, IOMapOptions.kIOMapPrefault
describe = IOMemoryDescriptor.withAddressRange
KINDS = {
    "private": {"wired": False},
    "wired": {},
    "small": {},
    "shared": {"wired": False, "shared": True},
    "in no task": {"wired": False, "task": None},
    "volatile": {"wired": False, "purgeable": True},
    "theirs": {},
}


@pytest.fixture(params=[*KINDS, "another task"])
def source(request: pytest.FixtureRequest) -> Iterator[IOMemoryDescriptor]:
    """Memory of each kind, 5 pages and 100 bytes of random bytes from offset 300 of a page on."""
    size = 100 if request.param == "small" else 6 * PAGE
    if request.param == "theirs":
        theirs = mmap.mmap(-1, size)
        theirs[:] = os.urandom(size)
        held = ctypes.c_char.from_buffer(theirs)
        with describe(ctypes.addressof(held) + 300, 5 * PAGE + 100, INOUT | COPY, kernel_task) as md:
            yield md
        return
    if request.param == "another task":
        need_ptrace()
        with sleeping() as program, iobmd.allocate(size, task=program.pid, shared=True) as buffer:
            buffer.writeBytes(0, os.urandom(size))
            with describe(buffer.getBytesNoCopy() + 300, 5 * PAGE + 100, INOUT | COPY, program.pid) as md:
                yield md
        return
    with iobmd.allocate(size, **KINDS[request.param]) as buffer:
        buffer.writeBytes(0, os.urandom(size))
        if request.param == "volatile":
            buffer.setPurgeable(iobmd.kIOMemoryPurgeableVolatile)
        start, length = (300, 5 * PAGE + 100) if size > PAGE else (0, size)
        with iobmd.IOSubMemoryDescriptor.withSubRange(buffer, start, length, INOUT | COPY) as md:
            yield md


def test_old_contents_remain(source: IOMemoryDescriptor) -> None:
    old = source.readBytes(0, len(source))
    with source.map() as copied, source.map(READ_ONLY) as seen:
        assert copied.getAddress() != seen.getAddress(), "each is a copy"
        assert copied.getLength() == len(source)
        source.writeBytes(0, new := os.urandom(len(source)))
        assert bytes(copied) == bytes(seen) == old
        with memoryview(copied) as view:
            view[7:11] = b"mine"
        assert bytes(copied) == old[:7] + b"mine" + old[11:]
        assert bytes(seen) == old
        assert source.readBytes(0, len(source)) == new, "what is written to a copy stays in it"
        assert faults(seen.getAddress(), write=True)
        assert not faults(seen.getAddress())
        with source.map() as later:
            assert bytes(later) == new
        assert code_of(source.free) == IOReturn.kIOReturnBusy


@pytest.mark.usefixtures("nothing_left")
def test_plain_map_shows_the_new_contents() -> None:
    """The facts of XNU's IOMemoryMapTest, once per kind of map: four numbers on four pages, one replaced."""
    with iobmd.allocate(0x4018 + 0x800, wired=False) as buffer:
        for page, byte in enumerate(b"\x11\x22\x33\x44"):
            buffer.writeBytes(0x800 + page * 0x1000, bytes([byte]) * 4)
        for options, expected in ((0, 0x99), (COPY, 0x33)):
            buffer.writeBytes(0x2800, b"\x33" * 4)
            at = buffer.getBytesNoCopy() + 0x800
            with describe(at, 0x4018, OUT | options, kernel_task) as md, md.map(READ_ONLY) as seen:
                assert [memoryview(seen)[page * PAGE] for page in range(4)] == [0x11, 0x22, 0x33, 0x44]
                buffer.writeBytes(0x2800, b"\x99" * 4)
                assert [memoryview(seen)[page * PAGE] for page in range(4)] == [0x11, 0x22, expected, 0x44]
                assert seen.getAddress() % PAGE == at % PAGE


@pytest.mark.usefixtures("nothing_left")
def test_a_copy_is_other_memory() -> None:
    """It has other frames and no physical addresses, is not the source at its addresses, and is as sparse."""
    with iobmd.allocate(64 * PAGE, shared=True, wired=False) as buffer:
        buffer.writeBytes(10 * PAGE, b"here")
        with describe(buffer.getBytesNoCopy(), 64 * PAGE, INOUT | COPY, kernel_task) as md:
            assert kernel.present(buffer.getBytesNoCopy(), 64 * PAGE) == 1
            with md.map(UNIQUE) as copied:
                assert kernel.present(buffer.getBytesNoCopy(), 64 * PAGE) == 1, "no page of the source was created"
                if os.geteuid() == 0:
                    assert frames(copied.getAddress() + 10 * PAGE, PAGE) != frames(
                        buffer.getBytesNoCopy() + 10 * PAGE, PAGE
                    )
                at = copied.getAddress()
                assert bytes(copied)[10 * PAGE :][:4] == b"here"
                for ask in (copied.getPhysicalAddress, lambda: copied.getPhysicalSegment(9)):
                    assert code_of(ask) == IOReturn.kIOReturnUnsupported
                with describe(at, PAGE, INOUT, kernel_task) as theirs:
                    theirs.writeBytes(0, b"copy")
                assert bytes(copied)[:4] == b"copy"
                assert buffer.readBytes(0, 4) == bytes(4)


@pytest.mark.usefixtures("nothing_left")
def test_copies_of_a_buffer_are_not_the_buffer() -> None:
    """Maps of a buffer are recognized by their addresses, but not its copies: these are other memory."""
    options = INOUT | COPY | iobmd.kIOMemoryPageable | iobmd.kIOMemoryKernelUserShared
    with iobmd.IOBufferMemoryDescriptor.withOptions(options, 2 * PAGE) as buffer, buffer.map() as copied:
        with describe(copied.getAddress() + PAGE, 9, INOUT, kernel_task) as there:
            there.writeBytes(0, b"the copy!")
        assert bytes(copied)[PAGE : PAGE + 9] == b"the copy!"
        assert bytes(buffer) == bytes(2 * PAGE)


def test_absent_pages_stay_absent() -> None:
    with iobmd.allocate(1 << 36, wired=False, shared=True) as buffer:
        buffer.writeBytes(1 << 35, b"one page")
        md = iobmd.IOSubMemoryDescriptor.withSubRange(buffer, 0, 1 << 36, INOUT | COPY)
        with md.map() as copied:
            assert kernel.smaps(copied.getAddress())["Rss"] <= 2 << 21
            assert memoryview(copied)[1 << 35 : (1 << 35) + 8] == b"one page"
        md.free()


@pytest.mark.usefixtures("nothing_left")
def test_placed_and_guarded_copies() -> None:
    with iobmd.allocate(4 * PAGE, shared=True, wired=False) as buffer:
        buffer.writeBytes(0, data := os.urandom(4 * PAGE))
        md = iobmd.IOSubMemoryDescriptor.withSubRange(buffer, PAGE + 5, 2 * PAGE, INOUT | COPY)
        with md.createMappingInTask(kernel_task, 0, ANYWHERE | SMALL | PREFAULT, 3, 4000) as copied:
            start = copied.getAddress()
            assert start % PAGE == 8
            assert bytes(copied) == data[PAGE + 8 : PAGE + 4008]
            assert copied.getOffset() == 3
            assert kernel.present(start - 8, PAGE) == 1
            assert faults(start - 9)
            assert faults(start - 8 + PAGE)
        place = iobmd._native.mapping.Mapping.reserve(8 * PAGE, PAGE)
        address = place.address
        place.close()
        with md.createMappingInTask(kernel_task, address + 5, 0) as copied:
            assert copied.getAddress() == address + 5
            assert bytes(copied) == data[PAGE + 5 : 3 * PAGE + 5]
            with memoryview(copied) as view:
                view[:] = bytes(2 * PAGE)
        assert bytes(buffer) == data
        md.free()


@pytest.mark.usefixtures("nothing_left")
def test_copy_in_another_task() -> None:
    need_ptrace()
    with sleeping() as program, iobmd.allocate(3 * PAGE, wired=False) as buffer:
        before = Path(f"/proc/{program.pid}/maps").read_text().count("\n")
        buffer.writeBytes(0, data := os.urandom(3 * PAGE))
        md = iobmd.IOSubMemoryDescriptor.withSubRange(buffer, 7, 2 * PAGE, INOUT | COPY)
        task = iobmd.Task(program.pid)
        with md.createMappingInTask(program.pid, 0, ANYWHERE | PREFAULT) as there:
            buffer.writeBytes(0, bytes(3 * PAGE))
            assert task.read(there.getAddress(), 2 * PAGE) == data[7 : 7 + 2 * PAGE]
            task.write(there.getAddress(), b"theirs")
            assert buffer.readBytes(7, 6) == bytes(6)
        assert Path(f"/proc/{program.pid}/maps").read_text().count("\n") == before
        md.free()


@pytest.mark.usefixtures("nothing_left")
def test_redirected_to_a_copy_and_back() -> None:
    with iobmd.allocate(2 * PAGE, shared=True, wired=False) as first, iobmd.allocate(2 * PAGE, wired=False) as second:
        first.writeBytes(0, one := os.urandom(2 * PAGE))
        second.writeBytes(0, two := os.urandom(2 * PAGE))
        copied = iobmd.IOSubMemoryDescriptor.withSubRange(second, 0, 2 * PAGE, INOUT | COPY)
        with first.map(UNIQUE) as seen:
            assert code_of(lambda: seen.redirect(second)) == IOReturn.kIOReturnUnsupported
            seen.redirect(copied)
            second.writeBytes(0, bytes(2 * PAGE))
            assert bytes(seen) == two
            assert code_of(seen.getPhysicalAddress) == IOReturn.kIOReturnUnsupported
            with memoryview(seen) as view:
                view[:] = bytes(2 * PAGE)
            assert bytes(first) == one
            seen.redirect(first)
            assert bytes(seen) == one
        copied.free()


@pytest.mark.usefixtures("nothing_left")
def test_views_of_a_copy_outlive_the_source() -> None:
    buffer = iobmd.allocate(2 * PAGE, wired=False)
    buffer.writeBytes(0, data := os.urandom(2 * PAGE))
    with iobmd.IOSubMemoryDescriptor.withSubRange(buffer, 0, 2 * PAGE, INOUT | COPY) as md, md.map() as copied:
        view = memoryview(copied)
    buffer.free()
    assert view == data
    view.release()


@pytest.mark.usefixtures("nothing_left")
def test_other_maps_come_and_go_during_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of much memory takes long, and must not hold up the maps of other memory."""
    copying, copied = threading.Event(), threading.Event()
    with (
        iobmd.allocate(PAGE, wired=False) as slow,
        iobmd.allocate(PAGE, shared=True, wired=False) as other,
        iobmd.IOSubMemoryDescriptor.withSubRange(slow, 0, PAGE, INOUT | COPY) as md,
    ):
        copy_to = type(slow._memory().require_backing()).copy_to

        def wait(*arguments: Any) -> int:
            copying.set()
            assert copied.wait(30)
            return copy_to(*arguments)

        monkeypatch.setattr(type(slow._memory().require_backing()), "copy_to", wait)
        with running(lambda: md.map().unmap()):
            assert copying.wait(30)
            other.map(UNIQUE).unmap()
            copied.set()


@pytest.mark.needs("lazy_copies")
def test_copy_of_a_lazy_copy() -> None:
    """Pages that are not here yet are fetched before they are copied."""
    with Source(16 << 20) as source, source.copied_while(is_incomplete) as lazy:
        md = iobmd.IOSubMemoryDescriptor.withSubRange(lazy, 5, (16 << 20) - 5, INOUT | COPY)
        with md.map() as copied:
            lazy.writeBytes(0, bytes(16 << 20))
            assert bytes(copied) == source.contents[5:]
        md.free()


def test_fork() -> None:
    """A child shares a copy that existed before, as any map, and makes its own of pageable memory."""
    with iobmd.allocate(PAGE, wired=False) as buffer:
        buffer.writeBytes(0, b"old")
        with iobmd.IOSubMemoryDescriptor.withSubRange(buffer, 0, PAGE, INOUT | COPY) as md, md.map() as copied:

            def child() -> bool:
                buffer.writeBytes(0, b"new")
                with md.map() as own:
                    return bytes(copied)[:3] == b"old" and bytes(own)[:3] == b"new"

            assert in_child(child)
            assert bytes(copied)[:3] == b"old"


@pytest.mark.usefixtures("nothing_left")
def test_refused() -> None:
    """Nothing is left of a copy that fails: unreadable memory, guard pages, other buses, a place that is in use."""
    theirs = mmap.mmap(-1, 4 * PAGE)
    held = ctypes.c_char.from_buffer(theirs)
    at = ctypes.addressof(held)
    with describe(at, 4 * PAGE, INOUT | COPY, kernel_task) as md:
        assert code_of(lambda: md.createMappingInTask(kernel_task, at, 0)) == IOReturn.kIOReturnNoResources
        reference = ANYWHERE | IOMapOptions.kIOMapReference
        assert code_of(lambda: md.createMappingInTask(kernel_task, 0, reference)) == IOReturn.kIOReturnBadArgument
        rawmemory.protect(at + 2 * PAGE, PAGE, 0)
        assert error_of(md.map).address == at + 2 * PAGE
        rawmemory.protect(at + 2 * PAGE, PAGE, rawmemory.READ | rawmemory.WRITE)
        md.map().unmap()
    guard = iobmd.IOGuardPageMemoryDescriptor.withSize(PAGE)
    with iobmd.allocate(PAGE, shared=True) as buffer:
        both = iobmd.IOMultiMemoryDescriptor.withDescriptors([guard, buffer], INOUT | COPY)
        assert code_of(both.map) == IOReturn.kIOReturnUnsupported
        buffer.writeBytes(0, b"next to a guard")
        neighbour = iobmd.IOSubMemoryDescriptor.withSubRange(both, PAGE, PAGE, INOUT | COPY)
        with neighbour.map() as copied:
            assert bytes(copied) == buffer.readBytes(0, PAGE)
        neighbour.free()
        both.free()
    bus = describe(1 << 40, PAGE, iobmd.kIOMemoryRemote | COPY, None)
    assert code_of(bus.map) == IOReturn.kIOReturnUnsupported
    bus.free()
