"""Options of maps: overwrite, reference, read-only at any offset, cache modes; and the options of DriverKit."""

import ctypes
import mmap
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import kernel, rawmemory
from support.child import sleeping
from support.errors import code_of, refusal
from support.faulting import faults
from support.kernel import frames
from support.targets import need_ptrace

import iobmd
from iobmd import (
    IODMACommand,
    IOMapOptions,
    IOMemoryDescriptor,
    IOMemoryMapOptions,
    IOReturn,
    IOSubMemoryDescriptor,
    kernel_task,
    procfs,
)

PAGE = kernel.PAGE
INOUT, OUT = iobmd.kIODirectionInOut, iobmd.kIODirectionOut
ANYWHERE, READ_ONLY, UNIQUE = IOMapOptions.kIOMapAnywhere, IOMapOptions.kIOMapReadOnly, IOMapOptions.kIOMapUnique
REFERENCE, OVERWRITE = IOMapOptions.kIOMapReference, IOMapOptions.kIOMapOverwrite
SMALL = IOMapOptions.kIOMapGuardedSmall


def permissions(address: int) -> str:
    """Return the permissions of the area at an address, from /proc/self/maps; empty if nothing is mapped."""
    return next((area.perms for area in procfs.areas("self", address, address + 1)), "")


# --- overwrite


@pytest.mark.usefixtures("nothing_left")
def test_overwritten_address_space_is_reserved_again() -> None:
    at = rawmemory.map_memory(8 * PAGE, 0, rawmemory.PRIVATE | rawmemory.ANONYMOUS | rawmemory.NORESERVE)
    with iobmd.allocate(3 * PAGE, shared=True, wired=False) as buffer:
        buffer.writeBytes(0, data := os.urandom(3 * PAGE))
        with buffer.createMappingInTask(kernel_task, at + PAGE, OVERWRITE) as mapped:
            assert mapped.getAddress() == at + PAGE
            assert bytes(mapped) == data
            assert permissions(at) == permissions(at + 4 * PAGE) == "---p"
            if os.geteuid() == 0:
                assert frames(at + PAGE, 3 * PAGE) == frames(buffer.getBytesNoCopy(), 3 * PAGE)
            again = lambda: buffer.createMappingInTask(kernel_task, at, OVERWRITE)  # noqa: E731
            code, message = refusal(again)
            assert code == IOReturn.kIOReturnBadArgument, "half of it is a map now"
            assert f"{at + PAGE:#x}" in message
            assert bytes(mapped) == data
        assert permissions(at + PAGE) == "---p", "reserved again, so that no other thread maps memory there"
        part = IOSubMemoryDescriptor.withSubRange(buffer, 5, 100, INOUT | iobmd.kIOMemoryMapCopyOnWrite)
        with part.createMappingInTask(kernel_task, at + 5, OVERWRITE | READ_ONLY) as copied:
            assert bytes(copied) == data[5:105]
            assert faults(at, write=True)
        assert permissions(at) == "---p"
        part.free()
    rawmemory.unmap(at, 8 * PAGE)


@pytest.mark.usefixtures("nothing_left")
def test_nothing_else_is_overwritten() -> None:
    theirs = mmap.mmap(-1, 2 * PAGE)
    theirs[:] = data = os.urandom(2 * PAGE)
    held = ctypes.c_char.from_buffer(theirs)
    at = ctypes.addressof(held)
    with iobmd.allocate(2 * PAGE, shared=True, wired=False) as buffer:
        for options, code in (
            (OVERWRITE, IOReturn.kIOReturnBadArgument),
            (OVERWRITE | ANYWHERE, IOReturn.kIOReturnBadArgument),
            (OVERWRITE | REFERENCE, IOReturn.kIOReturnBadArgument),
        ):
            assert code_of(lambda: buffer.createMappingInTask(kernel_task, at, options)) == code  # noqa: B023
    assert theirs[:] == data


@pytest.mark.usefixtures("nothing_left")
def test_overwrite_is_of_this_process() -> None:
    need_ptrace()
    with sleeping() as program, iobmd.allocate(PAGE, shared=True) as buffer:
        there = lambda: buffer.createMappingInTask(program.pid, 1 << 32, OVERWRITE)  # noqa: E731
        assert code_of(there) == IOReturn.kIOReturnUnsupported


# --- reference


@pytest.mark.usefixtures("nothing_left")
def test_reference_needs_an_existing_map() -> None:
    with iobmd.allocate(4 * PAGE, shared=True, wired=False) as buffer:
        refer = lambda: buffer.map(REFERENCE)  # noqa: E731
        assert code_of(refer) == IOReturn.kIOReturnNotReady
        with buffer.map(), refer() as second:
            assert second.getAddress() == buffer.getBytesNoCopy()
        assert code_of(refer) == IOReturn.kIOReturnNotReady
        place = rawmemory.map_memory(4 * PAGE, 0, rawmemory.PRIVATE | rawmemory.ANONYMOUS)
        rawmemory.unmap(place, 4 * PAGE)
        first = buffer.createMappingInTask(kernel_task, place, READ_ONLY)
        inner = buffer.createMappingInTask(kernel_task, 0, ANYWHERE | READ_ONLY | REFERENCE, PAGE, PAGE)
        assert inner.getAddress() == place + PAGE
        assert (inner.getOffset(), first.getOffset()) == (PAGE, 0)
        first.unmap()
        assert permissions(place + PAGE) == "r--s", "the reference keeps the addresses"
        inner.unmap()
        assert not permissions(place)
        for options in (UNIQUE, SMALL):
            assert code_of(lambda: buffer.map(REFERENCE | options)) == IOReturn.kIOReturnBadArgument  # noqa: B023


# --- read-only


@pytest.mark.parametrize("elsewhere", [UNIQUE, SMALL], ids=["unique", "guarded"])
@given(data=st.data())
def test_read_only_at_any_offset(elsewhere: IOMapOptions, data: st.DataObject) -> None:
    """Exactly the bytes of the range, at the same offset in a page; the kernel refuses stores on all of its pages."""
    offset = data.draw(st.integers(0, 3 * PAGE - 1))
    length = data.draw(st.integers(1, 3 * PAGE - offset))
    with iobmd.allocate(3 * PAGE, shared=True, wired=False) as buffer:
        buffer.writeBytes(0, content := os.urandom(3 * PAGE))
        options = ANYWHERE | READ_ONLY | elsewhere
        with buffer.createMappingInTask(kernel_task, 0, options, offset, length) as seen:
            start = seen.getAddress()
            assert start % PAGE == offset % PAGE
            assert (bytes(seen), seen.getOffset()) == (content[offset : offset + length], offset)
            assert memoryview(seen).readonly
            for page in range(start // PAGE, (start + length - 1) // PAGE + 1):
                assert permissions(page * PAGE) == "r--s"
            buffer.writeBytes(offset, bytes(length))
            assert bytes(seen) == bytes(length)


@pytest.mark.usefixtures("nothing_left")
def test_offsets_of_maps() -> None:
    with iobmd.allocate(4 * PAGE, shared=True, wired=False) as first, iobmd.allocate(8 * PAGE, shared=True) as second:
        part = IOSubMemoryDescriptor.withSubRange(first, 100, 2 * PAGE, INOUT)
        with part.createMappingInTask(kernel_task, 0, ANYWHERE, 7, 9) as own:
            assert own.getOffset() == 7
        with first.createMappingInTask(kernel_task, 0, ANYWHERE | UNIQUE, PAGE, PAGE) as mapped:
            assert mapped.getOffset() == PAGE
            mapped.redirect(second, 0, 5 * PAGE)
            assert mapped.getOffset() == 5 * PAGE
        part.free()


# --- cache modes


@pytest.mark.usefixtures("nothing_left")
def test_main_memory_is_mapped_cached_only() -> None:
    with iobmd.allocate(PAGE, shared=True, cache="inhibit") as buffer:
        for mode in (IOMapOptions.kIOMapDefaultCache, IOMapOptions.kIOMapCopybackCache):
            with buffer.map(UNIQUE | mode) as mapped:
                assert bytes(mapped) == bytes(PAGE)
        for mode in (0x100, 0x200, 0x400, 0x500, 0x600, 0x700, 0x800, 0x900):
            code, message = refusal(lambda: buffer.map(mode))  # noqa: B023
            assert code == IOReturn.kIOReturnUnsupported
            assert "kIOMapCopybackCache" in message
        for mode in (0xA00, 0xF00):
            assert code_of(lambda: buffer.map(mode)) == IOReturn.kIOReturnBadArgument  # noqa: B023
        assert code_of(lambda: buffer.map(IOMapOptions.kIOMapStatic)) == IOReturn.kIOReturnUnsupported


# --- DriverKit


@pytest.mark.usefixtures("nothing_left")
def test_create_mapping() -> None:
    with iobmd.allocate(3 * PAGE, shared=True, wired=False) as buffer:
        buffer.writeBytes(0, data := os.urandom(3 * PAGE))
        with buffer.CreateMapping(0, 0, 5, PAGE) as plain:
            assert plain.getAddress() == buffer.getBytesNoCopy() + 5
            assert bytes(plain) == data[5 : 5 + PAGE]
        options = IOMemoryMapOptions.kIOMemoryMapReadOnly | IOMemoryMapOptions.kIOMemoryMapCacheModeCopyback
        with buffer.CreateMapping(options | IOMemoryMapOptions.kIOMemoryMapGuardedSmall) as mapped:
            start = mapped.getAddress()
            assert [permissions(start + page * PAGE) for page in range(-1, 4)] == ["---p", *["r--s"] * 3, "---p"]
        with buffer.CreateMapping(IOMemoryMapOptions.kIOMemoryMapGuardedLarge) as mapped:
            at = mapped.getAddress()
            assert permissions(at - (64 << 10)) == permissions(at + 3 * PAGE) == "---p"
        with buffer.CreateMapping(IOMemoryMapOptions.kIOMemoryMapFixedAddress, at) as mapped:
            assert mapped.getAddress() == at
        buffer.setDirection(OUT)
        with buffer.CreateMapping(IOMemoryMapOptions.kIOMemoryMapGuardedSmall) as mapped:
            assert permissions(mapped.getAddress()) == "r--s", "as DriverKit maps memory that is only written out"
        for mode in ("Inhibit", "WriteThrough", "RealTime"):
            wrong = lambda: buffer.CreateMapping(IOMemoryMapOptions[f"kIOMemoryMapCacheMode{mode}"])  # noqa: B023, E731
            assert code_of(wrong) == IOReturn.kIOReturnUnsupported
        for options, alignment in ((0x10, 0), (0x300, 0), (1 << 16, 0), (-1, 0), (0, PAGE)):
            wrong = lambda: buffer.CreateMapping(options, 0, 0, 0, alignment)  # noqa: B023, E731
            assert code_of(wrong) == IOReturn.kIOReturnBadArgument


@pytest.mark.usefixtures("nothing_left")
def test_memory_of_a_client_is_copied_when_mapped() -> None:
    create = IOMemoryDescriptor.CreateMemoryDescriptorFromClient
    with iobmd.allocate(2 * PAGE, shared=True, wired=False) as theirs:
        at = theirs.getBytesNoCopy()
        for options, expected in ((iobmd.kIOMemoryDisableCopyOnWrite, b"new"), (0, b"old")):
            theirs.writeBytes(PAGE, b"old")
            with create(iobmd.kIOMemoryDirectionOut | options, [(at + PAGE, 9), (at, 3)], os.getpid()) as md:
                assert md.getDirection() == OUT
                with md.createMappingInTask(kernel_task, 0, ANYWHERE | UNIQUE, 0, 9) as mapped:
                    theirs.writeBytes(PAGE, b"new")
                    assert bytes(mapped)[:3] == expected
        assert code_of(lambda: create(0x20, [(at, 1)], os.getpid())) == IOReturn.kIOReturnBadArgument


@pytest.mark.needs("frames")
def test_operations_on_a_transfer() -> None:
    operation = iobmd.IODMACommandOperation
    read = operation.kIODMACommandPerformOperationOptionRead
    write = operation.kIODMACommandPerformOperationOptionWrite
    zero = operation.kIODMACommandPerformOperationOptionZero
    with iobmd.allocate(3 << 20) as memory, iobmd.allocate(PAGE) as data:
        memory.writeBytes(0, b"\xff" * (3 << 20))
        command = IODMACommand.withSpecification(64)
        assert code_of(lambda: command.performOperation(zero, 0, 1)) == IOReturn.kIOReturnNotReady
        memory.prepare()
        command.setMemoryDescriptor(memory, False)
        command.prepare(PAGE, 2 << 20)
        command.performOperation(zero, 5, (1 << 20) + 9)
        start, end = PAGE + 5, PAGE + 5 + (1 << 20) + 9
        assert memory.readBytes(start, end - start) == bytes(end - start)
        assert memory.readBytes(start - 1, 1) == memory.readBytes(end, 1) == b"\xff"
        data.writeBytes(3, b"from data")
        command.performOperation(write, 100, 9, 3, data)
        assert memory.readBytes(PAGE + 100, 9) == b"from data"
        command.performOperation(read, 100, 9, 1000, data)
        assert data.readBytes(1000, 9) == b"from data"
        for options, offset, length, place, into in (
            (zero, 0, (2 << 20) + 1, 0, None),
            (read, 0, 1, 0, None),
            (read, 0, 9, PAGE - 8, data),
            (write, 0, 9, PAGE - 8, data),
            (read | write, 0, 1, 0, data),
            (0, 0, 1, 0, data),
            (8, 0, 1, 0, data),
        ):
            wrong = lambda: command.performOperation(options, offset, length, place, into)  # noqa: B023, E731
            assert code_of(wrong) == IOReturn.kIOReturnBadArgument
        command.clearMemoryDescriptor()
        memory.complete()
