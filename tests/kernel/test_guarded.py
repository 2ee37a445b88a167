"""Buffers with guard pages: a child that touches either side is killed, and the memory between them is complete."""

import os
from pathlib import Path

import pytest
from support import kernel
from support.child import in_child, sleeping
from support.errors import code_of
from support.faulting import faults
from support.targets import need_ptrace

import iobmd
from iobmd import IOBufferMemoryDescriptor, IOMapOptions, IOReturn, Wiring, kernel_task

PAGE = kernel.PAGE
INOUT = iobmd.kIODirectionInOut
guarded = IOBufferMemoryDescriptor.inTaskWithGuardPages


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("capacity", [1, PAGE - 1, PAGE, PAGE + 1, 10 * PAGE, (2 << 20) + 1])
def test_either_side_faults(capacity: int) -> None:
    with guarded(kernel_task, INOUT, capacity) as buffer:
        size = -(-capacity // PAGE) * PAGE
        assert (buffer.getCapacity(), buffer.getLength()) == (size, size)
        start = buffer.getBytesNoCopy()
        assert start % PAGE == 0
        for outside in (start - 1, start - PAGE, start + size, start + size + PAGE - 1):
            assert faults(outside)
            assert faults(outside, write=True)
        assert not any(memoryview(buffer))
        for inside in (start, start + capacity - 1, start + size - 1):
            assert not faults(inside, write=True)


@pytest.mark.usefixtures("nothing_left")
def test_wired_and_mapped_once_more() -> None:
    """The sequence of IOKit's IOGuardPageMDTest."""
    before = kernel.status("VmLck")
    for capacity in range(PAGE // 8, 10 * PAGE, 7 * PAGE // 8):
        with guarded(kernel_task, INOUT, capacity) as buffer:
            assert buffer.wiring in (Wiring.PINNED, Wiring.RESIDENT)
            assert kernel.status("VmLck") - before == len(buffer)
            data = os.urandom(len(buffer))
            buffer.writeBytes(0, data)
            with buffer.map(IOMapOptions.kIOMapUnique) as mapped:
                assert len(mapped) == len(buffer)
                assert bytes(mapped) == data


@pytest.mark.usefixtures("nothing_left")
def test_guards_go_with_it() -> None:
    areas = Path("/proc/self/maps").read_text().count("\n")
    buffer = guarded(kernel_task, INOUT, PAGE)
    address = buffer.getBytesNoCopy()
    buffer.free()
    assert Path("/proc/self/maps").read_text().count("\n") == areas
    assert not kernel.smaps(address - 1)
    assert not kernel.smaps(address + PAGE)


def test_it_is_there_in_a_forked_child() -> None:
    with guarded(kernel_task, INOUT | iobmd.kIOMemoryKernelUserShared, PAGE) as buffer:
        address = buffer.getBytesNoCopy()
        assert in_child(lambda: faults(address + PAGE) and faults(address - 1))


@pytest.mark.needs("root")
@pytest.mark.usefixtures("nothing_left")
def test_in_another_task() -> None:
    need_ptrace()
    with sleeping() as program:
        before = Path(f"/proc/{program.pid}/maps").read_text()
        with guarded(program.pid, INOUT, PAGE + 1) as buffer:
            address = buffer.getBytesNoCopy()
            around = [
                line for line in Path(f"/proc/{program.pid}/maps").read_text().splitlines() if line not in before
            ]
            spans = {tuple(int(end, 16) for end in line.split()[0].split("-")): line.split()[1] for line in around}
            assert spans == {
                (address - PAGE, address): "---p",
                (address, address + 2 * PAGE): "rw-s",
                (address + 2 * PAGE, address + 3 * PAGE): "---p",
            }
            buffer.writeBytes(2 * PAGE - 4, b"seen")
            assert iobmd.Task(program.pid).read(address + 2 * PAGE - 4, 4) == b"seen"
        assert Path(f"/proc/{program.pid}/maps").read_text() == before


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("task", "options", "capacity"),
    [
        (kernel_task, iobmd.kIOMemoryPageable, PAGE),
        (kernel_task, iobmd.kIOMemoryPhysicallyContiguous, PAGE),
        (kernel_task, iobmd.kIOMemoryHostPhysicallyContiguous, PAGE),
        (kernel_task, iobmd.kIOMemoryPurgeable, PAGE),
        (kernel_task, iobmd.kIOMemoryPurgeable | iobmd.kIOMemoryPageable, PAGE),
        (None, INOUT, PAGE),
        (kernel_task, INOUT, 0),
        (kernel_task, INOUT, -PAGE),
        (kernel_task, INOUT, (1 << 64) - 1),
        (kernel_task, 1 << 28, PAGE),
    ],
)
def test_refused(task: iobmd.Task | None, options: int, capacity: int) -> None:
    assert code_of(lambda: guarded(task, options, capacity)) == IOReturn.kIOReturnBadArgument
