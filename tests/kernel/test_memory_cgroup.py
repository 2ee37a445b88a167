"""Memory that would exceed a memory cgroup is refused before the kernel kills a process (by its counters)."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from support.child import in_child

import iobmd
from iobmd import IODMACommand, IOMapOptions, IOMemoryDescriptor, IOReturn, IOReturnError
from iobmd.host import cgroup
from iobmd.physical import zones
from iobmd.physical.shmem_pages import FileBlocks
from iobmd.physical.thp import TransparentBlocks
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.needs("memory_cgroup"), pytest.mark.usefixtures("nothing_left")]

MIB = 1 << 20
LIMIT = 256 * MIB
CLONE_NEWCGROUP = 0x02000000
NO_MEMORY = IOReturn.kIOReturnNoMemory


def refused(action: Callable[[], object]) -> str:
    """Call a function that must be refused for lack of memory; return the message."""
    with pytest.raises(IOReturnError) as caught:
        action()
    assert caught.value.code == NO_MEMORY, str(caught.value)
    return str(caught.value)


def address_range(memory: mmap.mmap) -> IOMemoryDescriptor:
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return IOMemoryDescriptor.withAddressRange(address, len(memory), 3, os.getpid())


def two_prepared(*, shared: bool) -> None:
    with (
        iobmd.allocate(150 * MIB, wired=False, shared=shared) as first,
        iobmd.allocate(150 * MIB, wired=False, shared=shared) as second,
    ):
        first.prepare()
        message = refused(second.prepare)
        for part in ("150 MiB", "iobmd-test-", "of this process", "256 MiB"):
            assert part in message
        assert second.getPageCounts()[0] == 0
        first.complete()
        first.prepare()  # it is resident and needs no more memory, although as much again would not fit
        first.complete()


def many_prepared() -> None:
    with contextlib.ExitStack() as stack:
        count = 0
        while count < 12:
            buffer = stack.enter_context(iobmd.allocate(32 * MIB, wired=False))
            try:
                buffer.prepare()
            except IOReturnError as error:
                assert error.code == NO_MEMORY
                break
            stack.callback(buffer.complete)
            count += 1
    assert 5 <= count <= 8, "memory that fits is not refused"


def many_small() -> None:
    held = []
    try:
        with pytest.raises(IOReturnError) as caught:
            while len(held) < 5000:
                held.append(iobmd.allocate(96 << 10))
    finally:
        count = len(held)
        for buffer in held:
            buffer.free()
    assert caught.value.code == NO_MEMORY
    assert count * (96 << 10) > 180 * MIB, "memory that fits is not refused"


def existing() -> None:
    for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED):
        large = mmap.mmap(-1, 1 << 30, flags | mmap.MAP_ANONYMOUS)
        with address_range(large) as memory:
            refused(memory.prepare)
            assert memory.getPageCounts()[0] == 0
        small = mmap.mmap(-1, 100 * MIB, flags | mmap.MAP_ANONYMOUS)
        with address_range(small) as memory:
            memory.prepare()
            memory.complete()
            small.madvise(mmap.MADV_DONTNEED)


def mapped() -> None:
    with iobmd.allocate(300 * MIB, wired=False, shared=True) as buffer:
        refused(lambda: buffer.map(IOMapOptions.kIOMapPrefault | IOMapOptions.kIOMapUnique))
        assert buffer.getPageCounts()[0] == 0
    with iobmd.allocate(300 * MIB, wired=False) as buffer:
        refused(lambda: buffer.map(IOMapOptions.kIOMapPrefault))


def allocated() -> None:
    for keywords in ({}, {"shared": True}, {"task": None}):
        refused(lambda keywords=keywords: iobmd.allocate(300 * MIB, **keywords))


def searched(**keywords: bool) -> None:
    """A search that holds more and more memory ends before the limit."""
    with (
        pytest.MonkeyPatch.context() as patch,
        iobmd.policy(memory_budget=1 << 40, time_budget=20),
        pytest.raises(IOReturnError) as caught,
    ):
        patch.setattr(zones, "without_memory", lambda *_: "")  # as if the host had memory there
        iobmd.allocate(32 * MIB, alignment=1 << 40, **keywords)
    assert caught.value.code == IOReturn.kIOReturnNoResources
    assert "iobmd-test-" in str(caught.value)
    assert "memory_budget" not in str(caught.value), "no budget would help"


def searched_beside_another(*, shared: bool) -> None:
    """A search adapts to memory that is allocated concurrently, here after each of its batches."""
    filled: list[mmap.mmap] = []
    source: type[TransparentBlocks | FileBlocks] = FileBlocks if shared else TransparentBlocks
    more = source.more

    def more_on_both_sides(self: Any, count: int, alignment: int, *each: Any) -> dict[int, int]:
        filled.append(mmap.mmap(-1, 12 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        filled[-1].write(bytes(12 * MIB))
        return more(self, count, alignment, *each)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "more", more_on_both_sides)
        searched(shared=shared)
    assert len(filled) > 4, "the search ended before it reached any limit"


def attached() -> None:
    near, far = socket.socketpair()
    with near, far, iobmd.allocate(300 * MIB, wired=False, shared=True) as sparse:
        with iobmd.share(sparse, near):
            pass
        refused(lambda: iobmd.attach(far, wired=True))


def written() -> None:
    with mmap.mmap(-1, 300 * MIB) as zeroes, iobmd.allocate(300 * MIB, wired=False) as private:
        source = memoryview(zeroes)[: 16 * MIB]
        for offset in range(0, 300 * MIB, len(source)):
            try:
                private.writeBytes(offset, source)
            except IOReturnError as error:
                assert error.code == NO_MEMORY
                break
        assert 160 * MIB < offset < 256 * MIB
        private.writeBytes(0, source)  # resident memory can be written to
        source.release()
    with iobmd.allocate(300 * MIB, wired=False, shared=True) as shared, mmap.mmap(-1, PAGE_SIZE) as small:
        refused(lambda: shared.readBytes(0, 300 * MIB))
        small[:] = shared.readBytes(0, PAGE_SIZE)
        assert shared.getPageCounts()[0] < PAGE_SIZE


def bounced() -> None:
    with iobmd.allocate(150 * MIB, direction="out") as memory, IODMACommand.withSpecification(64) as command:
        command.setMemoryDescriptor(memory)
        refused(lambda: command.synchronize(2, forceDoubleBuffer=True))
        assert command.getPreparedOffsetAndLength() == (0, 150 * MIB)
        command.clearMemoryDescriptor()


def taken_back() -> None:
    """Intact volatile memory needs no additional memory to become non-volatile."""
    with iobmd.allocate(150 * MIB, wired=False, purgeable=True) as buffer:
        for offset in range(0, 150 * MIB, 16 * MIB):
            buffer.writeBytes(offset, b"x" * min(16 * MIB, 150 * MIB - offset))
        buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableVolatile)
        with contextlib.suppress(IOReturnError):
            iobmd.allocate(120 * MIB).free()
        buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableNonVolatile)
        refused(lambda: iobmd.allocate(LIMIT))


def copied() -> None:
    with iobmd.allocate(150 * MIB) as source:
        refused(lambda: iobmd.copy(os.getpid(), source.getBytesNoCopy(), 150 * MIB))


SCENES: dict[str, Callable[[], None]] = {
    "two private buffers": lambda: two_prepared(shared=False),
    "two shared buffers": lambda: two_prepared(shared=True),
    "many buffers": many_prepared,
    "many small buffers": many_small,
    "existing memory": existing,
    "maps": mapped,
    "wired buffers": allocated,
    "a search": searched,
    "a search concurrent with another process": lambda: searched_beside_another(shared=False),
    "a search for shared memory concurrent with another process": lambda: searched_beside_another(shared=True),
    "attached memory": attached,
    "writes": written,
    "a bounce buffer": bounced,
    "volatile memory": taken_back,
    "a copy": copied,
}


def kills(procs: Path) -> int:
    """Return how often the kernel killed a process in a cgroup."""
    for name in ("memory.oom_control", "memory.events"):
        with contextlib.suppress(OSError):
            counters = dict(line.split() for line in (procs.parent / name).read_text().splitlines())
            return int(counters["oom_kill"])
    raise AssertionError("no counter of kills")


@pytest.mark.needs("memlock")
@pytest.mark.parametrize(
    ("scene", "namespace"),
    # In a cgroup namespace the limits are found in another way, always by the same code.
    [*((scene, False) for scene in SCENES), *((scene, True) for scene in ("two private buffers", "a search"))],
)
def test_nothing_is_killed(memory_cgroup: Callable[[int], Path], scene: str, namespace: bool) -> None:
    procs = memory_cgroup(LIMIT)

    def child() -> None:
        procs.write_text(str(os.getpid()))
        if namespace:
            assert ctypes.CDLL(None).unshare(CLONE_NEWCGROUP) == 0
            own = next(line for line in cgroup.membership().splitlines() if "memory" in line or line[0] == "0")
            assert own.endswith(":/")
        SCENES[scene]()

    in_child(child)
    assert kills(procs) == 0


@pytest.mark.needs("memlock", "swap")
@pytest.mark.usefixtures("swap")
def test_what_is_pinned_cannot_be_swapped_out(memory_cgroup: Callable[[int], Path]) -> None:
    """The 64 MiB of swap would make room for the second buffer if the first one could be moved there."""
    procs = memory_cgroup(LIMIT)

    def child() -> None:
        procs.write_text(str(os.getpid()))
        two_prepared(shared=False)

    in_child(child)
    assert kills(procs) == 0


TARGET = """
import ctypes, mmap, sys
areas = [mmap.mmap(-1, 1 << 30, flags | mmap.MAP_ANONYMOUS) for flags in (mmap.MAP_PRIVATE, mmap.MAP_SHARED)]
for area in areas:
    area[: 16 << 20] = b"x" * (16 << 20)
print(*(ctypes.addressof(ctypes.c_char.from_buffer(area)) for area in areas), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def limited_target(memory_cgroup: Callable[[int], Path]) -> Iterator[tuple[subprocess.Popen[str], list[int], Path]]:
    """A program in a cgroup of 256 MiB, the addresses of 1 GiB of its private and shared memory, and the cgroup."""
    procs = memory_cgroup(LIMIT)
    command = [sys.executable, "-c", f"open({str(procs)!r}, 'w').write('0')\n{TARGET}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout
        try:
            yield program, [int(word) for word in program.stdout.readline().split()], procs
        finally:
            program.send_signal(signal.SIGKILL)


def used(procs: Path) -> int:
    names = ("memory.usage_in_bytes", "memory.current")
    return next(int((procs.parent / name).read_text()) for name in names if (procs.parent / name).exists())


@pytest.mark.needs("memlock")
def test_another_task_is_not_killed(limited_target: tuple[subprocess.Popen[str], list[int], Path]) -> None:
    program, addresses, procs = limited_target
    before = used(procs)
    for address in addresses:
        with IOMemoryDescriptor.withAddressRange(address, 1 << 30, 3, program.pid) as memory:
            message = refused(memory.prepare)
            assert f"of task {program.pid}" in message
            assert procs.parent.name in message
        with IOMemoryDescriptor.withAddressRange(address, 16 * MIB, 3, program.pid) as memory:
            memory.prepare()
            memory.complete()
    assert program.poll() is None
    assert kills(procs) == 0
    assert used(procs) < before + 8 * MIB


@pytest.mark.needs("memlock")
def test_pages_in_another_task_are_charged_to_this_one(
    limited_target: tuple[subprocess.Popen[str], list[int], Path],
) -> None:
    """Prefaulted maps and wired memory in a task with a limit are populated, and charged, in this process."""
    program, _addresses, procs = limited_target
    before = used(procs)
    ahead = IOMapOptions.kIOMapAnywhere | IOMapOptions.kIOMapPrefault
    with (
        iobmd.allocate(300 * MIB, wired=False, shared=True) as buffer,
        buffer.createMappingInTask(program.pid, 0, ahead),
    ):
        assert buffer.getPageCounts()[0] == 300 * MIB // mmap.PAGESIZE
    with iobmd.allocate(300 * MIB, task=program.pid, shared=True):
        pass
    assert program.poll() is None
    assert kills(procs) == 0
    assert used(procs) < before + 8 * MIB
