"""`IOGuardPageMemoryDescriptor`: inaccessible pages around and between memory, according to the kernel."""

import ctypes
import os
from pathlib import Path

import pytest
from support import kernel
from support.child import sleeping
from support.errors import code_of
from support.faulting import faults
from support.kernel import frames
from support.targets import need_ptrace

import iobmd
from iobmd import (
    IOGuardPageMemoryDescriptor,
    IOMapOptions,
    IOMultiMemoryDescriptor,
    IOReturn,
    IOSubMemoryDescriptor,
    kernel_task,
    procfs,
)

PAGE = kernel.PAGE
INOUT = iobmd.kIODirectionInOut
ANYWHERE, PREFAULT, SMALL = IOMapOptions.kIOMapAnywhere, IOMapOptions.kIOMapPrefault, IOMapOptions.kIOMapGuardedSmall
guards, sub = IOGuardPageMemoryDescriptor.withSize, IOSubMemoryDescriptor.withSubRange
multi = IOMultiMemoryDescriptor.withDescriptors


def page_permissions(address: int, pages: int, pid: int | str = "self") -> list[str]:
    """Return the permissions of each page, from /proc/PID/maps; empty where nothing is mapped."""
    found = [""] * pages
    for area in procfs.areas(pid, address, address + pages * PAGE):
        for page in range(pages):
            if area.start <= address + page * PAGE < area.end:
                found[page] = area.perms
    return found


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("left", range(1, 5))
@pytest.mark.parametrize("right", range(1, 5))
def test_guards_around_a_page(left: int, right: int) -> None:
    """The facts of XNU's IOGuardPageMDTest: length, contents and protection, with 1 to 4 pages on each side."""
    data = bytes(range(256)) * (PAGE // 256)
    with iobmd.allocate(PAGE, shared=True) as buffer:
        buffer.writeBytes(0, data)
        whole = multi([guards(left * PAGE), buffer, guards(right * PAGE)], INOUT)
        assert len(whole) == (left + 1 + right) * PAGE
        with whole.createMappingInTask(kernel_task, 0, ANYWHERE, 0, len(whole)) as mapped:
            start = mapped.getAddress()
            assert mapped.getLength() == len(whole)
            assert page_permissions(start, left + 1 + right) == ["---p"] * left + ["rw-s"] + ["---p"] * right
            assert ctypes.string_at(start + left * PAGE, PAGE) == data
            if os.geteuid() == 0:
                assert frames(start + left * PAGE, PAGE) == frames(buffer.getBytesNoCopy(), PAGE)
            assert faults(start + left * PAGE - 1)
            assert faults(start + (left + 1) * PAGE)
            assert not faults(start + left * PAGE, write=True)
        whole.free()


@pytest.mark.usefixtures("nothing_left")
def test_map_of_guards_only() -> None:
    with guards(PAGE + 1) as alone:
        assert len(alone) == 2 * PAGE
        with alone.map() as mapped, alone.map(SMALL) as guarded:
            assert page_permissions(mapped.getAddress(), 2) == ["---p"] * 2
            assert page_permissions(guarded.getAddress() - PAGE, 4) == ["---p"] * 4
            assert kernel.smaps(mapped.getAddress())["Rss"] == 0
            assert code_of(lambda: memoryview(mapped)) == IOReturn.kIOReturnUnsupported
            assert alone.getPageCounts() == (0, 0)


@pytest.mark.usefixtures("nothing_left")
def test_what_has_no_bytes_and_no_frames() -> None:
    with iobmd.allocate(2 * PAGE, shared=True) as buffer:
        buffer.writeBytes(0, data := os.urandom(2 * PAGE))
        whole = multi([guards(PAGE), sub(buffer, PAGE, PAGE, INOUT), guards(3 * PAGE), buffer], INOUT)
        assert whole.readBytes(PAGE, PAGE) == data[PAGE:]
        assert whole.readBytes(5 * PAGE, 2 * PAGE) == data
        for offset in (0, PAGE - 1, 2 * PAGE - 1, 4 * PAGE + 7):
            assert code_of(lambda: whole.readBytes(offset, 2)) == IOReturn.kIOReturnVMError  # noqa: B023
            assert code_of(lambda: whole.writeBytes(offset, b"xy")) == IOReturn.kIOReturnVMError  # noqa: B023
        assert bytes(buffer) == data
        whole.prepare()
        assert whole.getDMAMapLength() == (7 * PAGE, 0)
        if os.geteuid() == 0:
            segments = [tuple(one) for one in whole.segments(5 * PAGE, 2 * PAGE)]
            assert segments == [tuple(one) for one in buffer.segments()]
            assert whole.getPhysicalSegment(PAGE)[0] == frames(buffer.getBytesNoCopy(), 2 * PAGE)[1] * PAGE
            for ask in (whole.segments, lambda: whole.getPhysicalSegment(0), lambda: whole.segments(PAGE, PAGE + 1)):
                assert code_of(ask) == IOReturn.kIOReturnUnsupported
        whole.complete()
        with whole.createMappingInTask(kernel_task, 0, ANYWHERE | PREFAULT, PAGE, PAGE) as between:
            assert bytes(between) == data[PAGE:], "a map of the part between guards can be viewed"
        whole.free()


@pytest.mark.usefixtures("nothing_left")
def test_prefault_skips_guards() -> None:
    with iobmd.allocate(2 * PAGE, shared=True, wired=False) as buffer:
        whole = multi([buffer, guards(PAGE), buffer], INOUT)
        with whole.map(PREFAULT) as mapped:
            at = mapped.getAddress()
            assert [kernel.present(at + page * PAGE, PAGE) for page in range(5)] == [1, 1, 0, 1, 1]
        whole.free()


@pytest.mark.usefixtures("nothing_left")
def test_guards_in_another_task() -> None:
    need_ptrace()
    with sleeping() as program, iobmd.allocate(PAGE, shared=True) as buffer:
        before = Path(f"/proc/{program.pid}/maps").read_text().count("\n")
        for options in (ANYWHERE, ANYWHERE | SMALL | PREFAULT):
            for parts in ([guards(PAGE), buffer, guards(2 * PAGE)], [buffer, guards(PAGE), buffer], [guards(PAGE)]):
                whole = multi(parts, INOUT)
                wanted = [
                    word for one in parts for word in [("rw-s" if one is buffer else "---p")] * (len(one) // PAGE)
                ]
                with whole.createMappingInTask(program.pid, 0, options) as there:
                    assert page_permissions(there.getAddress(), len(wanted), program.pid) == wanted
                assert Path(f"/proc/{program.pid}/maps").read_text().count("\n") == before
                whole.free()


def test_refused() -> None:
    for size in (0, -1, 1 << 48):
        assert code_of(lambda: guards(size)) == IOReturn.kIOReturnBadArgument  # noqa: B023
    with pytest.raises(TypeError, match="size"):
        guards(1.5)  # type: ignore[arg-type]
    with iobmd.allocate(PAGE, shared=True, wired=False) as buffer, buffer.map(IOMapOptions.kIOMapUnique) as mapped:
        assert code_of(lambda: mapped.redirect(guards(PAGE))) == IOReturn.kIOReturnUnsupported
        again = guards(PAGE)
        assert again.initWithSize(3 * PAGE)
        assert len(again) == 3 * PAGE
