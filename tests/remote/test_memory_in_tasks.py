"""Buffers in another task and in none, and maps in another task: the same frames in both tasks' pagemap."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import contiguous_memory, kernel
from support.child import NOBODY, in_child, sleeping, until_asleep
from support.errors import code_of
from support.kernel import frames
from support.source_process import SourceProcess
from support.targets import until

import iobmd
from iobmd import IOMapOptions, IOReturn, IOReturnError, Task
from iobmd.memory import pinning
from iobmd.pagemap import pages
from iobmd.remote import pin
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
ANYWHERE, UNIQUE = IOMapOptions.kIOMapAnywhere, IOMapOptions.kIOMapUnique
READ_ONLY, PREFAULT = IOMapOptions.kIOMapReadOnly, IOMapOptions.kIOMapPrefault
SMALL, LARGE = IOMapOptions.kIOMapGuardedSmall, IOMapOptions.kIOMapGuardedLarge
Buffer = iobmd.IOBufferMemoryDescriptor


@pytest.fixture
def target() -> Iterator[subprocess.Popen[bytes]]:
    """A sleeping program, which must still sleep at the end, without remains of iobmd in it."""
    with sleeping() as program:
        before = snapshot(program.pid)
        yield program
        if program.poll() is None:
            assert snapshot(program.pid) == before


def snapshot(pid: int) -> tuple[list[str], set[str]]:
    """The mappings and open files of a program."""
    areas = [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "[heap]" not in line]
    return areas, {entry.name for entry in Path(f"/proc/{pid}/fd").iterdir()}


def area(pid: int, address: int) -> str:
    """Return the line of /proc/PID/maps for an address, or ""."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        if start <= address < end:
            return line
    return ""


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("wired", [False, True], ids=["pageable", "wired"])
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize("size", [1, 5000, 64 << 10, 3 * MIB + 5], ids=str)  # two may count towards 8 MiB
def test_buffer_in_a_task(target: subprocess.Popen[bytes], size: int, shared: bool, wired: bool) -> None:
    task = Task(target.pid)
    with iobmd.allocate(size, task=target.pid, wired=wired, shared=shared) as buffer:
        address = buffer.getBytesNoCopy()
        assert ("rw-s" if shared else "rw-p") in area(target.pid, address)
        assert not any(task.read(address, size))
        data = os.urandom(size)
        assert buffer.writeBytes(0, data) == size
        assert task.read(address, size) == data
        task.write(address + size - 1, b"!")
        assert buffer.readBytes(size - 1, 1) == b"!"
        assert buffer.getBytesNoCopy(size - 1) == address + size - 1
        assert f"task {target.pid} at {address:#x}" in repr(buffer)
        assert buffer.wiring is (iobmd.Wiring.PINNED if wired else iobmd.Wiring.PAGEABLE)
        assert 0 < buffer.task_stopped_ns < 5 * 10**9
        assert code_of(lambda: memoryview(buffer)) == IOReturn.kIOReturnUnsupported
    assert not area(target.pid, address)
    buffer.free()
    assert code_of(buffer.getLength) == IOReturn.kIOReturnNotOpen


@pytest.mark.needs("root")
def test_pins_that_have_ended_and_still_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel uncharges the ring of a pin in another task some time after it was closed."""
    for module in (pin, pinning):
        monkeypatch.setattr(module, "_LATE", 20)

    def pinned() -> set[iobmd.Wiring]:
        found = set()
        with sleeping() as program:
            for _ in range(5):
                for task in (program.pid, iobmd.kernel_task):
                    with iobmd.allocate(5 * MIB, task=task) as buffer:
                        found.add(buffer.wiring)
                    iobmd.trim()
        return found

    assert in_child(pinned, uid=NOBODY - 34, memlock=8 * MIB) == {iobmd.Wiring.PINNED}


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_frames_are_the_same(target: subprocess.Popen[bytes]) -> None:
    with iobmd.allocate(64 << 10, task=target.pid, shared=True) as buffer, buffer.map() as here:
        memoryview(here)[:] = bytes(64 << 10)
        there = frames(buffer.getBytesNoCopy(), 64 << 10, target.pid)
        assert there == frames(here.getAddress(), 64 << 10)
        assert all(there), "a wired buffer is in the page tables of its task"
        reported = [
            address // kernel.PAGE + page
            for address, length in buffer.segments()
            for page in range(length // kernel.PAGE)
        ]
        assert reported == there
        assert buffer.getPhysicalSegment(5)[0] == there[0] * kernel.PAGE + 5
        buffer.verify()
        Path("/proc/sys/vm/compact_memory").write_text("1")
        assert frames(buffer.getBytesNoCopy(), 64 << 10, target.pid) == there
        buffer.verify()


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("size", [PAGE_SIZE, MIB, 8 * MIB], ids=str)
def test_contiguous_in_a_task(target: subprocess.Popen[bytes], size: int) -> None:
    with iobmd.allocate(size, task=target.pid, contiguous=True, alignment=64 << 10) as buffer:
        address = buffer.getBytesNoCopy()
        physical = buffer.getPhysicalAddress()
        assert buffer.getPhysicalSegment(0) == (physical, size)
        assert physical % (64 << 10) == address % (64 << 10) == 0
        first = physical // kernel.PAGE
        assert frames(address, size, target.pid) == list(range(first, first + size // kernel.PAGE))
        buffer.writeBytes(size - 5, b"hello")
        assert Task(target.pid).read(address + size - 5, 5) == b"hello"
        assert not any(buffer.readBytes(0, size - 5))
    assert not area(target.pid, address)


@pytest.mark.needs("root", "frames")
@pytest.mark.usefixtures("nothing_left")
def test_contiguous_in_pieces_of_the_object(
    target: subprocess.Popen[bytes],
) -> None:
    """8 MiB are rarely found in order: the pieces are mapped one by one, in both tasks, and also in part."""
    with iobmd.policy(memory_budget=1 << 30, time_budget=10):
        buffer = contiguous_memory.allocated(
            lambda: iobmd.allocate(8 * MIB, contiguous=True, shared=True),
            lambda: contiguous_memory.is_found(8 * MIB, 1 << 30),
        )
    if buffer is None:
        return
    with buffer:
        assert buffer.getPhysicalSegment(0)[1] == 8 * MIB
        for offset in range(0, 8 * MIB, 2 * MIB):
            buffer.writeBytes(offset, offset.to_bytes(8))
        offset = 2 * MIB + PAGE_SIZE
        with buffer.createMappingInTask(target.pid, 0, ANYWHERE | PREFAULT, offset, 4 * MIB) as part:
            address = part.getAddress()
            assert Task(target.pid).read(address + 2 * MIB - PAGE_SIZE, 8) == (4 * MIB).to_bytes(8)
            expected = (buffer.getPhysicalAddress() + offset) // kernel.PAGE
            assert frames(address, 4 * MIB, target.pid) == list(range(expected, expected + 1024))


@pytest.mark.needs("hugetlb", "frames")
@pytest.mark.usefixtures("nothing_left", "hugetlb_pool")
def test_memory_of_a_pool(target: subprocess.Popen[bytes]) -> None:
    """Shared memory in hugetlb pages is mapped in whole pages, in the chosen order."""
    from iobmd.backing.remote import RemoteBacking
    from iobmd.physical.hugetlb import PoolBlocks

    pool = next(pool for pool in iobmd.host.hugetlb_pools() if pool.size == 2 * MIB)
    source = PoolBlocks(pool, reserve=False)
    try:
        found = source.more(2, 2 * MIB)
        shared = source.share(sorted(found.values(), reverse=True), 2 * MIB)
    finally:
        source.close()
    backing = RemoteBacking(shared, Task(target.pid), wired=True)
    backing.write(0, b"first")
    backing.write(2 * MIB, b"second")
    assert Task(target.pid).read(backing.address + 2 * MIB, 6) == b"second"
    assert backing.runs is not None
    assert (
        backing.runs.segment(backing.address, PAGE_SIZE)[0] // kernel.PAGE
        == frames(backing.address, 1, target.pid)[0]
    )
    with pytest.raises(IOReturnError, match="in whole pages"):
        shared.cut(PAGE_SIZE, PAGE_SIZE)
    backing.close()
    assert kernel.nothing_is_pinned()
    free = next(pool.free for pool in iobmd.host.hugetlb_pools() if pool.size == 2 * MIB)
    assert free == pool.free


@pytest.mark.needs("frames", "root")
def test_masked_in_a_task(target: subprocess.Popen[bytes]) -> None:
    mask = (1 << 40) - 1
    with iobmd.allocate(MIB, task=target.pid, physical_mask=mask) as buffer:
        assert all(address + length - 1 <= mask for address, length in buffer.segments())
    with iobmd.policy(memory_budget=64 * MIB, time_budget=0.5):
        refused = code_of(lambda: iobmd.allocate(64 * MIB, task=target.pid, physical_mask=(1 << 24) - 1))
    assert refused == IOReturn.kIOReturnNoResources


@pytest.mark.usefixtures("nothing_left")
def test_purgeable_in_a_task(target: subprocess.Popen[bytes]) -> None:
    state = iobmd.IOPurgeable
    with iobmd.allocate(MIB, task=target.pid, wired=False, purgeable=True) as buffer:
        buffer.writeBytes(0, b"x" * MIB)
        assert buffer.setPurgeable(state.kIOMemoryPurgeableVolatile) == state.kIOMemoryPurgeableNonVolatile
        assert iobmd.purge() == MIB
        assert buffer.setPurgeable(state.kIOMemoryPurgeableNonVolatile) == state.kIOMemoryPurgeableEmpty
        assert not any(Task(target.pid).read(buffer.getBytesNoCopy(), MIB))


@pytest.mark.usefixtures("nothing_left")
def test_prepare_in_a_task(target: subprocess.Popen[bytes]) -> None:
    with iobmd.allocate(64 << 10, task=target.pid, wired=False) as buffer:
        buffer.writeBytes(0, b"y" * PAGE_SIZE)
        assert buffer.getPageCounts() == (1, 1)
        assert code_of(buffer.segments) == IOReturn.kIOReturnNotReady
        buffer.prepare()
        assert buffer.wiring is iobmd.Wiring.PINNED
        assert buffer.getPageCounts() == (16, 16)
        assert code_of(buffer.free) == IOReturn.kIOReturnBusy
        assert area(target.pid, buffer.getBytesNoCopy()), "nothing is unmapped in that case"
        buffer.complete()


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_mapped_in_no_task(target: subprocess.Popen[bytes]) -> None:
    def mapped_here() -> list[str]:
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if "iobmd (" in line]

    with iobmd.allocate(64 << 10, task=None) as buffer:
        assert not mapped_here()
        assert "in no task" in repr(buffer)
        assert code_of(buffer.getBytesNoCopy) == IOReturn.kIOReturnUnsupported
        assert code_of(lambda: memoryview(buffer)) == IOReturn.kIOReturnUnsupported
        assert buffer.writeBytes(10, b"nowhere") == 7
        assert buffer.readBytes(10, 7) == b"nowhere"
        into = bytearray(7)
        buffer.readBytesInto(10, into)
        assert into == b"nowhere"
        assert buffer.getPageCounts() == (16, 16)
        segments = [address for address, _ in buffer.segments()]
        Path("/proc/sys/vm/compact_memory").write_text("1")
        buffer.verify()
        assert buffer.wiring is iobmd.Wiring.PINNED
        assert not mapped_here()
        with buffer.map() as here, buffer.createMappingInTask(target.pid, 0, ANYWHERE | PREFAULT) as there:
            assert len(mapped_here()) == 1
            assert bytes(memoryview(here)[10:17]) == b"nowhere"
            assert Task(target.pid).read(there.getAddress() + 10, 7) == b"nowhere"
            assert [frame * kernel.PAGE for frame in frames(there.getAddress(), 1, target.pid)] == segments[:1]
        assert not mapped_here()
    with iobmd.allocate(5000, task=None, wired=False) as pageable:
        assert pageable.appendBytes(b"") == 0
        pageable.setLength(0)
        assert pageable.appendBytes(b"z" * 6000) == 5000
        assert pageable.readBytes(4999, 1) == b"z"
        pageable.prepare()
        pageable.verify()
        pageable.complete()


@pytest.mark.usefixtures("nothing_left")
def test_no_pin_no_wired_memory_of_no_task() -> None:
    """Locked pages would need a mapping, which the buffer lacks."""

    def make() -> IOReturn:
        return code_of(lambda: iobmd.allocate(PAGE_SIZE, task=None))

    assert in_child(make, deny={"io_uring_setup": 1}) == IOReturn.kIOReturnCannotWire


# --- copies


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.needs("compiler")
def test_copy_between_two_tasks(start_source: Callable[..., SourceProcess], target: subprocess.Popen[bytes]) -> None:
    with start_source() as source:
        region = source["anonymous"]
        expected = Task(source.pid).read(region.address, region.size)
        for into in (target.pid, source.pid, None):
            with Buffer.withCopy(into, 0, source.pid, region.address, region.size) as copied:
                assert copied.readBytes(0, region.size) == expected
                if into:
                    assert Task(into).read(copied.getBytesNoCopy(), region.size) == expected
        before = snapshot(target.pid)
        bad = lambda: Buffer.withCopy(target.pid, 0, source.pid, region.address, 1 << 40)  # noqa: E731
        assert code_of(bad) in (IOReturn.kIOReturnVMError, IOReturn.kIOReturnNoMemory)
        assert snapshot(target.pid) == before


# --- maps


@pytest.mark.usefixtures("nothing_left")
def test_maps_in_a_task(target: subprocess.Popen[bytes]) -> None:
    task = Task(target.pid)
    with iobmd.allocate(16 * PAGE_SIZE, shared=True, wired=False) as buffer:
        data = os.urandom(16 * PAGE_SIZE)
        buffer.writeBytes(0, data)
        first = buffer.createMappingInTask(task, 0, ANYWHERE)
        second = buffer.createMappingInTask(task, 0, ANYWHERE, PAGE_SIZE, 100)
        unique = buffer.createMappingInTask(task, 0, ANYWHERE | UNIQUE | READ_ONLY, 4100, 100)
        assert second.getAddress() == first.getAddress() + PAGE_SIZE, "a compatible map has the same addresses"
        assert (first.getAddressTask(), first.getLength()) == (task, 16 * PAGE_SIZE)
        assert "r--s" in area(target.pid, unique.getAddress())
        assert unique.getAddress() % PAGE_SIZE == 4
        assert task.read(unique.getAddress(), 100) == data[4100:4200]
        assert code_of(lambda: task.write(unique.getAddress(), b"x")) == IOReturn.kIOReturnVMError
        assert code_of(lambda: memoryview(first)) == IOReturn.kIOReturnUnsupported
        assert code_of(buffer.free) == IOReturn.kIOReturnBusy
        first.unmap()
        assert task.read(second.getAddress(), 100) == data[PAGE_SIZE:4196], "other maps still use the addresses"
        second.unmap()
        unique.unmap()
        unique.unmap()
    with iobmd.allocate(PAGE_SIZE, task=target.pid) as there, there.createMappingInTask(task, 0, ANYWHERE) as static:
        assert static.getAddress() == there.getBytesNoCopy(), "in its own task, anywhere: at its own address"


@pytest.mark.usefixtures("nothing_left")
def test_at_an_address(target: subprocess.Popen[bytes]) -> None:
    with iobmd.allocate(4 * PAGE_SIZE, shared=True, wired=False) as buffer:
        with buffer.createMappingInTask(target.pid, 0, ANYWHERE) as found:
            free = found.getAddress()
        with buffer.createMappingInTask(target.pid, free + 5, 0, PAGE_SIZE + 5, PAGE_SIZE) as fixed:
            assert fixed.getAddress() == free + 5
            taken = lambda: buffer.createMappingInTask(target.pid, free, 0, 0, PAGE_SIZE)  # noqa: E731
            with pytest.raises(IOReturnError, match="is not free") as caught:
                taken()
            assert caught.value.code == IOReturn.kIOReturnNoResources
        code = int(Path(f"/proc/{target.pid}/maps").read_text().split("-")[0], 16)
        was = Task(target.pid).read(code, PAGE_SIZE)
        assert code_of(lambda: buffer.createMappingInTask(target.pid, code, 0)) == IOReturn.kIOReturnNoResources
        assert Task(target.pid).read(code, PAGE_SIZE) == was
        odd = lambda: buffer.createMappingInTask(target.pid, free + 1, 0)  # noqa: E731
        assert code_of(odd) == IOReturn.kIOReturnBadArgument


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("option", "margin"), [(SMALL, PAGE_SIZE), (LARGE, 64 << 10)], ids=["small", "large"])
def test_guarded_in_a_task(target: subprocess.Popen[bytes], option: int, margin: int) -> None:
    with iobmd.allocate(4 * PAGE_SIZE, shared=True, wired=False) as buffer:
        with buffer.createMappingInTask(target.pid, 0, ANYWHERE | option) as guarded:
            begin, end = guarded.getAddress(), guarded.getAddress() + 4 * PAGE_SIZE
            for address in (begin - margin, begin - 1, end, end + margin - 1):
                assert " ---p " in area(target.pid, address)
            Task(target.pid).write(begin, b"inside")
        assert not area(target.pid, begin - margin)
        assert not area(target.pid, end + margin - 1)


def all_present(pid: int, address: int, size: int) -> bool:
    """Return whether all pages are present, and compaction is not trying to move one of them at this moment."""
    return all(page.present for page in pages(pid, address, size))


@pytest.mark.usefixtures("nothing_left")
def test_prefault(target: subprocess.Popen[bytes]) -> None:
    with iobmd.allocate(MIB, shared=True) as buffer:
        with buffer.createMappingInTask(target.pid, 0, ANYWHERE | PREFAULT) as mapped:
            assert until(lambda: all_present(target.pid, mapped.getAddress(), MIB))
        with buffer.createMappingInTask(target.pid, 0, ANYWHERE) as mapped:
            assert not any(page.present for page in pages(target.pid, mapped.getAddress(), MIB))
            with buffer.createMappingInTask(target.pid, 0, ANYWHERE | PREFAULT) as again:
                assert again.getAddress() == mapped.getAddress()
                assert until(lambda: all_present(target.pid, mapped.getAddress(), MIB))


@pytest.mark.usefixtures("nothing_left")
def test_redirect(target: subprocess.Popen[bytes]) -> None:
    task = Task(target.pid)
    with (
        iobmd.allocate(8 * PAGE_SIZE, shared=True, wired=False) as old,
        iobmd.allocate(16 * PAGE_SIZE, task=None) as new,
    ):
        old.writeBytes(0, b"old" * 1000)
        new.writeBytes(PAGE_SIZE, b"new" * 1000)
        with old.createMappingInTask(task, 0, ANYWHERE | UNIQUE) as mapped:
            address = mapped.getAddress()
            mapped.redirect(new, 0, PAGE_SIZE)
            assert mapped.getAddress() == address
            assert task.read(address, 6) == b"newnew"
            assert mapped.getMemoryDescriptor() is new
            task.write(address, b"NEW")
            assert new.readBytes(PAGE_SIZE, 3) == b"NEW"
            old.free()
            assert code_of(new.free) == IOReturn.kIOReturnBusy
            assert code_of(lambda: mapped.redirect(new, 0, 12 * PAGE_SIZE)) == IOReturn.kIOReturnBadArgument
        assert not area(target.pid, address)


def test_a_forked_child_takes_nothing_away(target: subprocess.Popen[bytes]) -> None:
    with iobmd.allocate(8192, task=target.pid, wired=False) as buffer:
        address = buffer.getBytesNoCopy()
        buffer.writeBytes(0, b"mine")
        seen = in_child(lambda: (buffer.readBytes(0, 4), buffer.free(), buffer._owner))
        assert seen == (b"mine", None, None)
        assert Task(target.pid).read(address, 4) == b"mine"


# --- changes by the task itself


@pytest.mark.usefixtures("nothing_left")
def test_task_that_exits(target: subprocess.Popen[bytes]) -> None:
    buffer = iobmd.allocate(64 << 10, task=target.pid, shared=True)
    private = [iobmd.allocate(8192, task=target.pid, wired=wired) for wired in (True, False)]
    shared = iobmd.allocate(PAGE_SIZE, shared=True, wired=False)
    mapped = shared.createMappingInTask(target.pid, 0, ANYWHERE)
    buffer.writeBytes(0, b"stays")
    target.kill()
    target.wait()
    assert buffer.readBytes(0, 5) == b"stays"
    buffer.free()
    for gone in private:
        assert code_of(lambda gone=gone: gone.readBytes(0, 1)) == IOReturn.kIOReturnNotFound  # type: ignore[misc]
        gone.free()
    mapped.unmap()
    shared.free()
    assert code_of(lambda: iobmd.allocate(PAGE_SIZE, task=target.pid)) == IOReturn.kIOReturnNotFound


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_task_that_runs_another_program(shared: bool) -> None:
    """An exec removes the memory; whatever the new program maps at the address must not be unmapped."""
    program = subprocess.Popen(["sh", "-c", "read line; exec sleep 1000"], stdin=subprocess.PIPE)
    try:
        buffer = iobmd.allocate(64 << 10, task=program.pid, shared=shared)
        assert program.stdin
        program.stdin.write(b"\n")
        program.stdin.close()
        until_asleep(program.pid)
        before = snapshot(program.pid)
        buffer.free()
        assert snapshot(program.pid) == before
    finally:
        program.kill()
        program.wait()
