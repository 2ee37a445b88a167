"""Descriptors of existing memory of another program: it is held there and released, according to its /proc files."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support import kernel
from support.child import NOBODY, in_child
from support.errors import code_of
from support.kernel import frames
from support.source_process import SourceProcess

import iobmd
from iobmd import IOMapOptions, IOMemoryDescriptor, IOReturn, IOReturnError, Task, Wiring
from iobmd.remote.pin import RemotePin

Start = Callable[..., SourceProcess]
PAGE, MIB = kernel.PAGE, 1 << 20
INOUT, OUT = 3, 2

pytestmark = [pytest.mark.needs("compiler"), pytest.mark.usefixtures("may_trace", "nothing_left")]


def resources(pid: int) -> tuple[list[str], set[str]]:
    """The mappings and open files of a program."""
    areas = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return areas, {entry.name for entry in Path(f"/proc/{pid}/fd").iterdir()}


def uncharged(pid: int) -> bool:
    """Return whether no page of a program is pinned."""
    return not kernel.pinned(pid=pid)


@pytest.mark.parametrize("kind", ["anonymous", "thp", "memfd", "stack"])
def test_bytes(start_source: Start, kind: str) -> None:
    source = start_source()
    address, size = source[kind]
    task, half = Task(source.pid), size // 2
    model = task.read(address, size)
    ranges = [(address + half + 3, 70_001), (address + 1, 5), (address + size - 9, 9)]
    with IOMemoryDescriptor.withAddressRanges(ranges, INOUT, source.pid) as md:
        expected = model[half + 3 : half + 70_004] + model[1:6] + model[-9:]
        assert md.readBytes(0, len(md)) == expected
        md.writeBytes(70_000, b"0123456789")
        assert task.read(address, size) == b"".join([
            model[:1], b"12345", model[6 : half + 70_003], b"0", model[half + 70_004 : -9], b"6789", model[-5:],
        ])  # fmt: skip
        md.writeBytes(70_000, expected[70_000:70_010])
        assert task.read(address, size) == model


@pytest.mark.needs("frames", "hugetlb")
@pytest.mark.usefixtures("hugetlb_pool")
@pytest.mark.parametrize("kind", ["anonymous", "thp", "memfd", "untouched", "hugetlb"])
def test_pinned_in_its_task(start_source: Start, kind: str) -> None:
    """Memory is pinned by a ring that is moved out of the task: frames are constant, and the task keeps nothing."""
    source = start_source()
    address, size = source[kind].address, min(source[kind].size, 2 * MIB)
    before = resources(source.pid)
    with IOMemoryDescriptor.withAddressRange(address + 9, size - 9, INOUT, source.pid) as md:
        md.prepare()
        assert md.wiring is Wiring.PINNED
        assert resources(source.pid) == before
        assert kernel.status("VmPin", source.pid) >= size
        expected = frames(address, size, source.pid)
        assert all(expected)
        reported = [
            page for start, length in md.segments() for page in range(start // PAGE, -(-(start + length) // PAGE))
        ]
        assert reported == expected
        assert md.getPhysicalAddress() == expected[0] * PAGE + 9
        Path("/proc/sys/vm/compact_memory").write_text("1")
        assert frames(address, size, source.pid) == expected
        md.verify()
        assert md.layout().size == -(-size // PAGE) * PAGE
        md.complete()
        assert uncharged(source.pid)
    assert resources(source.pid) == before
    source.command(f"dump {kind} /dev/null")


@pytest.mark.needs("disk_files")
def test_locked_where_it_cannot_be_pinned(start_source: Start) -> None:
    """The kernel does not permit long-term pins of memory of a file."""
    source = start_source()
    address, size = source["file"].address, MIB
    before = resources(source.pid)
    with IOMemoryDescriptor.withAddressRange(address + 5, size - 5, INOUT, source.pid) as md:
        md.prepare()
        assert md.wiring is Wiring.RESIDENT
        assert kernel.status("VmLck", source.pid) == size
        assert code_of(md.segments) == IOReturn.kIOReturnNotReady
        assert code_of(md.free) == IOReturn.kIOReturnBusy
        assert resources(source.pid)[1] == before[1]
        md.prepare()
        md.complete()
        assert kernel.status("VmLck", source.pid) == size, "the first prepare() is not completed yet"
        assert md.wiring is Wiring.RESIDENT
        md.complete()
        assert md.wiring is Wiring.PAGEABLE
        assert kernel.status("VmLck", source.pid) == 0
    assert resources(source.pid) == before


def test_read_only_memory_is_locked(start_source: Start) -> None:
    source = start_source()
    address, size = source["readonly"]
    assert code_of(lambda: IOMemoryDescriptor.withAddressRange(address, size, INOUT, source.pid)) == (
        IOReturn.kIOReturnVMError
    )
    with IOMemoryDescriptor.withAddressRange(address, size, OUT, source.pid) as md:
        md.prepare()
        assert kernel.status("VmLck", source.pid) == size
        md.complete()


@pytest.mark.needs("disk_files")
def test_what_it_has_locked_itself_stays_locked(start_source: Start) -> None:
    source = start_source()
    address = source["file"].address
    inner = RemotePin(Task(source.pid), address + 2 * PAGE, PAGE)
    assert kernel.status("VmLck", source.pid) == PAGE
    outer = RemotePin(Task(source.pid), address, 4 * PAGE)
    assert kernel.status("VmLck", source.pid) == 4 * PAGE
    outer.release()
    assert kernel.status("VmLck", source.pid) == PAGE, "the pin of the previous one still exists"
    inner.release()
    assert kernel.status("VmLck", source.pid) == 0


def test_nothing_is_held_where_part_of_it_cannot_be(start_source: Start) -> None:
    source = start_source()
    file, hole = source["file"], source["past-end"]
    before = resources(source.pid)
    ranges = [(file.address, PAGE), (hole.address + hole.size - PAGE, PAGE)]
    with IOMemoryDescriptor.withAddressRanges(ranges, INOUT, source.pid) as md:
        error = None
        try:
            md.prepare()
        except IOReturnError as refusal:
            error = refusal
        assert error is not None
        assert error.code == IOReturn.kIOReturnVMError
        assert "past the end of its file" in str(error)
        assert kernel.status("VmLck", source.pid) == kernel.pinned(pid=source.pid) == 0
    assert resources(source.pid) == before


def test_it_is_not_mapped_here(start_source: Start) -> None:
    source = start_source()
    with IOMemoryDescriptor.withAddressRange(source["anonymous"].address, PAGE, INOUT, source.pid) as md:
        assert code_of(md.map) == IOReturn.kIOReturnUnsupported
        there = md.createMappingInTask(source.pid, 0, IOMapOptions.kIOMapAnywhere)
        assert there.getAddress() == source["anonymous"].address
        assert code_of(lambda: memoryview(there)) == IOReturn.kIOReturnUnsupported
        there.unmap()


@pytest.mark.needs("frames")
def test_memory_of_iobmd_in_a_task_is_known_again(start_source: Start) -> None:
    source = start_source()
    with iobmd.allocate(4 * PAGE, task=source.pid, shared=True) as buffer:
        md = IOMemoryDescriptor.withAddressRange(buffer.getBytesNoCopy() + PAGE, PAGE, INOUT, source.pid)
        with md, md.map() as here:
            memoryview(here)[0] = 0x5A
            assert Task(source.pid).read(buffer.getBytesNoCopy() + PAGE, 1) == b"\x5a"
            assert md.getPhysicalAddress() == buffer.getPhysicalSegment(PAGE)[0]


def test_task_that_ends_while_held(start_source: Start) -> None:
    source = start_source()
    pinned = IOMemoryDescriptor.withAddressRange(source["anonymous"].address, MIB, INOUT, source.pid)
    locked = IOMemoryDescriptor.withAddressRange(source["file"].address, MIB, INOUT, source.pid)
    pinned.prepare()
    locked.prepare()
    source.process.kill()
    source.process.wait()
    assert code_of(lambda: pinned.readBytes(0, 1)) == IOReturn.kIOReturnNotFound
    for md in (pinned, locked):
        md.complete()
        assert code_of(md.prepare) == IOReturn.kIOReturnNotFound
        md.free()
    assert (
        code_of(lambda: IOMemoryDescriptor.withAddressRange(PAGE, 1, INOUT, source.pid)) == IOReturn.kIOReturnNotFound
    )


@pytest.mark.needs("root")
def test_who_may_not(start_source: Start) -> None:
    source = start_source()
    address = source["anonymous"].address

    def another_user() -> IOReturn:
        return code_of(lambda: IOMemoryDescriptor.withAddressRange(address, 1, INOUT, source.pid))

    assert in_child(another_user, uid=NOBODY) == IOReturn.kIOReturnNotPermitted
    thread = next(iter(Path("/proc/2/task").iterdir())).name
    assert code_of(lambda: IOMemoryDescriptor.withAddressRange(PAGE, 1, INOUT, int(thread))) in (
        IOReturn.kIOReturnUnsupported,
        IOReturn.kIOReturnNotPermitted,
    )
