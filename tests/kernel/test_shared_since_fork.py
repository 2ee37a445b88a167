"""Reading memory that tasks share since a fork: the kernel copies a page before process_vm_readv(2) pins it.

The oracle is pagemap: as long as both tasks map the same frame, the entry of neither shows the page as exclusive.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import kernel, rawmemory
from support.child import die_with_parent, in_child
from support.moving import again_if_pages_move
from support.python_source import PATIENCE, Source, leave

import iobmd
from iobmd import IOReturn, IOReturnError, Task, kernel_task

MIB = 1 << 20
SIZE = 4 * MIB
HUGE = 2 * MIB
EXCLUSIVE, SOFT_DIRTY = 1 << 56, 1 << 55
CODE = """
import signal
m = mmap.mmap(-1, {size}, flags=PRIVATE | ANONYMOUS | {flags})
{advice}
for offset in range(0, len(m), 4096): m[offset:offset + 2] = (offset >> 12).to_bytes(2, "little")
{then}
near, far = os.pipe()
child = os.fork()
if not child:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    {child}
    os.write(far, b"x")
    while True: signal.pause()
os.read(near, 1)
result = [at(m), child]
"""


class Forked(Source):
    """A program that shares `SIZE` bytes with its child since a fork; page N of them begins with the number N."""

    def __init__(
        self,
        advice: str = "m.madvise(mmap.MADV_NOHUGEPAGE)",
        *,
        flags: str = "0",
        then: str = "pass",
        child: str = "pass",
        size: int = SIZE,
    ) -> None:
        self.size = size
        super().__init__(CODE.format(size=size, flags=flags, advice=advice, then=then, child=child))
        self.address, self.child = self.addresses

    def entries(self) -> list[list[int]]:
        """Return the pagemap entries of both, without the bit that changes when soft-dirty bits are cleared."""
        return [
            [entry & ~SOFT_DIRTY for entry in kernel.entries(self.address, self.size, pid)]
            for pid in (self.pid, self.child)
        ]


def content(size: int) -> bytes:
    return b"".join(
        (page % 65536).to_bytes(2, "little") + bytes(kernel.PAGE - 2) for page in range(size // kernel.PAGE)
    )


def copied(pid: int, at: int, size: int, *, freeze: bool = False, timeout: float | None = None) -> bytes:
    with iobmd.copy(pid, at, size, wired=False, freeze=freeze, timeout=timeout) as buffer:
        return bytes(buffer)


def small_reads(pid: int, at: int, size: int) -> bytes:
    step = 32 << 10
    return b"".join(Task(pid).read(at + offset, step) for offset in range(0, size, step))


def existing(pid: int, at: int, size: int) -> bytes:
    return iobmd.IOMemoryDescriptor.withAddressRange(at, size, 3, pid).readBytes(0, size)


def wired(pid: int, at: int, size: int) -> bytes:
    with iobmd.IOBufferMemoryDescriptor.withCopy(kernel_task, 3, Task(pid), at, size) as buffer:
        return buffer.readBytes(0, size)


WAYS: dict[str, Callable[[int, int, int], bytes]] = {
    "read": lambda pid, at, size: Task(pid).read(at, size),
    "small reads": small_reads,
    "read with a time limit": lambda pid, at, size: Task(pid).read(at, size, timeout=PATIENCE),
    "copy": copied,
    "frozen copy": lambda pid, at, size: copied(pid, at, size, freeze=True),
    "copy with a time limit": lambda pid, at, size: copied(pid, at, size, timeout=PATIENCE),
    "wired copy": wired,
    "existing": existing,
}


@pytest.mark.parametrize("advice", ["NOHUGEPAGE", "HUGEPAGE"])
@pytest.mark.parametrize("way", WAYS)
@again_if_pages_move
def test_reading_copies_no_page(way: str, advice: str) -> None:
    with Forked(f"m.madvise(mmap.MADV_{advice})") as tasks:
        before = tasks.entries()
        assert not any(entry & EXCLUSIVE for entry in before[0]), "the control: all pages are shared"
        for pid in (tasks.child, tasks.pid):
            assert WAYS[way](pid, tasks.address, SIZE) == content(SIZE)
        assert tasks.entries() == before


def test_the_call_would_copy_them() -> None:
    """A control: what the tests of this module would see."""
    with Forked() as tasks:
        libc = ctypes.CDLL(None)
        byte = ctypes.c_char()
        here, there = (ctypes.c_size_t * 2)(ctypes.addressof(byte), 1), (ctypes.c_size_t * 2)(tasks.address, 1)
        assert libc.process_vm_readv(tasks.child, here, 1, there, 1, 0) == 1
        assert kernel.entries(tasks.address, 1, tasks.child)[0] & EXCLUSIVE


@pytest.mark.parametrize("way", WAYS)
@again_if_pages_move
def test_pages_written_since_are_read_between_shared_ones(way: str) -> None:
    child = "\n    ".join(
        (f"for offset in range(0, {SIZE}, 3 << 12): m[offset] = 251", "m.madvise(4, 5 << 12, 2 << 12)")  # DONTNEED
    )
    with Forked(child=child) as tasks:
        before = tasks.entries()
        expected = bytearray(content(SIZE))
        for offset in range(0, SIZE, 3 * kernel.PAGE):
            expected[offset] = 251
        expected[5 * kernel.PAGE : 7 * kernel.PAGE] = bytes(2 * kernel.PAGE)
        assert sum(bool(entry & EXCLUSIVE) for entry in before[1]) > SIZE // kernel.PAGE // 4, "the control"
        assert WAYS[way](tasks.child, tasks.address, SIZE) == expected
        after = tasks.entries()
        # A small read of an absent private page maps the zero page, see extents.SMALL.
        for entries in (*before, *after):
            del entries[5:7]
        assert after == before


PROTECTED = """libc = ctypes.CDLL(None)
    for page in (3, 700): libc.mprotect(ctypes.c_void_p(at(m) + page * 4096), ctypes.c_size_t(4096), 0)
    libc.munmap(ctypes.c_void_p(at(m) + 900 * 4096), ctypes.c_size_t(4096))"""


@pytest.mark.parametrize("timeout", [None, PATIENCE])
@again_if_pages_move
def test_protections_of_the_task_hold(timeout: float | None) -> None:
    """/proc/PID/mem would read pages that the task itself may not read."""
    page = kernel.PAGE
    with Forked(child=PROTECTED) as tasks:
        before = tasks.entries()
        child = Task(tasks.child)
        for start, bad, end in ((0, 3, 5), (0, 3, 1024), (4, 700, 1024), (695, 700, 702), (701, 900, 1024)):
            with pytest.raises(IOReturnError) as caught:
                child.read(tasks.address + start * page, (end - start) * page, timeout=timeout)
            assert caught.value.code == IOReturn.kIOReturnVMError
            assert caught.value.address == tasks.address + bad * page
        with iobmd.copy(tasks.child, tasks.address, SIZE, wired=False, unreadable="zero", timeout=timeout) as buffer:
            assert buffer.holes == [(number * page, page) for number in (3, 700, 900)]
            expected = bytearray(content(SIZE))
            for offset, size in buffer.holes:
                expected[offset : offset + size] = bytes(size)
            assert bytes(buffer) == expected
        assert tasks.entries() == before


@pytest.mark.needs("memory_cgroup")
def test_a_worker_in_a_full_cgroup_lives_on(memory_cgroup: Callable[[int], Path]) -> None:
    """The copies would be charged to the child, which owns almost no memory."""
    group = memory_cgroup(16 * MIB)
    usage = group.parent / ("memory.usage_in_bytes" if "memory/" in str(group) else "memory.current")
    with Forked(child=f"open({str(group)!r}, 'w').write('0')", size=64 * MIB) as tasks:
        before = int(usage.read_text())
        assert before < 8 * MIB, "the control"
        for way in ("read", "small reads", "copy", "wired copy"):
            assert WAYS[way](tasks.child, tasks.address, 64 * MIB) == content(64 * MIB)
        # The counters of cgroups lag by a batch of pages per processor.
        assert int(usage.read_text()) - before < MIB
        os.kill(tasks.child, 0)
    leave(group)


@pytest.mark.needs("hugetlb")
@pytest.mark.parametrize("way", WAYS)
def test_no_page_of_a_pool_is_taken(hugetlb_pool: int, way: str) -> None:
    """The copy of a private hugetlb page comes from the pool."""
    assert hugetlb_pool >= 4
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    with Forked("pass", flags="HUGETLB", size=2 * HUGE) as tasks:
        before = pool.read_text(), tasks.entries()
        assert WAYS[way](tasks.child, tasks.address, 2 * HUGE) == content(2 * HUGE)
        assert (pool.read_text(), tasks.entries()) == before


@pytest.mark.needs("swap")
@pytest.mark.parametrize("way", ["read", "read with a time limit", "copy"])
def test_shared_pages_in_swap(swap: None, way: str) -> None:
    """They return to the swap space that both tasks share."""
    # MADV_PAGEOUT skips pages that several tasks map, and therefore precedes the fork.
    with Forked(then="m.madvise(21)") as tasks:
        before = [kernel.smaps(tasks.address, pid) for pid in (tasks.pid, tasks.child)]
        assert before[0]["Swap"] > SIZE * 3 // 4, "the control"
        assert before[0]["SwapPss"] <= before[0]["Swap"] // 2 + kernel.PAGE, "the control: both refer to it"
        assert WAYS[way](tasks.child, tasks.address, SIZE) == content(SIZE)
        after = [kernel.smaps(tasks.address, pid) for pid in (tasks.pid, tasks.child)]
        for was, now in zip(before, after, strict=True):
            assert abs(now["Swap"] - was["Swap"]) <= 64 * kernel.PAGE
            assert abs(now["SwapPss"] - was["SwapPss"]) <= 64 * kernel.PAGE


@contextlib.contextmanager
def sleeping_child() -> Iterator[int]:
    """Fork a child of this process, which does nothing."""
    if not (pid := os.fork()):
        die_with_parent()
        while True:
            signal.pause()
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("way", [*(way for way in WAYS if way != "frozen copy"), "readinto"])
@again_if_pages_move
def test_memory_of_this_process(way: str) -> None:
    """A forked child, such as a worker of multiprocessing, shares it."""
    address = rawmemory.map_memory(SIZE)
    ctypes.memmove(address, content(SIZE), SIZE)
    with sleeping_child() as child:
        before = [kernel.entries(address, SIZE, pid) for pid in (os.getpid(), child)]
        assert not any(entry & EXCLUSIVE for entry in before[0]), "the control"
        if way == "readinto":
            room = bytearray(SIZE)
            assert kernel_task.readinto(address, room) == SIZE
            assert room == content(SIZE)
        else:
            assert WAYS[way](os.getpid(), address, SIZE) == content(SIZE)
        if way == "existing":
            memory = iobmd.IOMemoryDescriptor.withAddressRange(address, SIZE, 3, kernel_task)
            assert memory.readBytes(3, 40) == content(SIZE)[3:43]
        assert [kernel.entries(address, SIZE, pid) for pid in (os.getpid(), child)] == before
    rawmemory.unmap(address, SIZE)


def test_the_zero_page_is_shared_with_all() -> None:
    """Its pages are read, and none is created."""
    with Source("m = mmap.mmap(-1, 1 << 22, flags=PRIVATE | ANONYMOUS); sum(m[::4096]); result = [at(m)]") as one:
        (at,) = one.addresses
        before = kernel.entries(at, SIZE, one.pid)
        assert sum(entry >> 63 for entry in before) == SIZE // kernel.PAGE, "the control"
        for way in WAYS.values():
            assert not any(way(one.pid, at, SIZE))
        assert kernel.entries(at, SIZE, one.pid) == before


@pytest.mark.needs("root")
def test_identical_pages_stay_merged(setting: Callable[[str, object], None]) -> None:
    """KSM maps one page at all addresses with the same contents. The call would separate them again."""
    code = "m = mmap.mmap(-1, 1 << 18, flags=PRIVATE | ANONYMOUS); m[:] = b'same' * (1 << 16); m.madvise(12)"
    with Source(code + "; result = [at(m)]") as one:
        (at,) = one.addresses
        for name, value in (("sleep_millisecs", 1), ("pages_to_scan", 10_000), ("run", 1)):
            setting(f"/sys/kernel/mm/ksm/{name}", value)
        end = time.monotonic() + PATIENCE
        while any(entry & EXCLUSIVE for entry in kernel.entries(at, 1 << 18, one.pid)):
            assert time.monotonic() < end, "the control: they are merged"
            time.sleep(0.01)
        setting("/sys/kernel/mm/ksm/run", 0)
        before = kernel.entries(at, 1 << 18, one.pid)
        for way in ("read", "small reads", "read with a time limit", "copy"):
            assert WAYS[way](one.pid, at, 1 << 18) == b"same" * (1 << 16)
        assert kernel.entries(at, 1 << 18, one.pid) == before


@pytest.mark.needs("root")
def test_where_the_memory_file_cannot_be_opened() -> None:
    """A security module may forbid it: the call reads them, although it copies them."""
    with Forked() as tasks:
        covered = f"/proc/{tasks.child}/mem"

        def read() -> bytes:
            assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            device = Path(f"/dev/shm/iobmd-test-{os.getpid()}")
            os.mknod(device, 0o020600, os.makedev(60, 60))  # no driver has this number: ENXIO
            try:
                subprocess.run(["mount", "--bind", device, covered], check=True)
            finally:
                device.unlink()
            with pytest.raises(OSError):
                os.open(covered, os.O_RDONLY)
            task = Task(tasks.child)
            return task.read(tasks.address, 100) + task.read(tasks.address, SIZE)[100:]

        assert in_child(read) == content(SIZE)


@again_if_pages_move
def test_writing_copies_the_pages_of_the_writer() -> None:
    """As after its own write: the other task keeps its contents."""
    with Forked() as tasks:
        before = tasks.entries()
        Task(tasks.child).write(tasks.address, b"new" * 100)
        after = tasks.entries()
        assert after[0][1:] == before[0][1:]
        assert after[1][0] & EXCLUSIVE
        assert after[1][1:] == before[1][1:]
        assert Task(tasks.pid).read(tasks.address, 2) == bytes(2)
        assert Task(tasks.child).read(tasks.address, 3) == b"new"


@pytest.mark.needs("memory_cgroup")
@pytest.mark.parametrize("timeout", [None, PATIENCE])
def test_writing_more_than_fits_the_cgroup_is_refused(
    memory_cgroup: Callable[[int], Path], timeout: float | None
) -> None:
    """The copies are charged to the task, which the kernel would kill."""
    group = memory_cgroup(32 * MIB)
    size = 256 * MIB  # also more than fits the swap space of other tests
    with Forked(child=f"open({str(group)!r}, 'w').write('0')", size=size) as tasks:
        child = Task(tasks.child)
        with pytest.raises(IOReturnError, match=group.parent.name) as caught:
            child.write(tasks.address, bytes(size), timeout=timeout)
        assert caught.value.code == IOReturn.kIOReturnNoMemory
        assert child.write(tasks.address, b"y" * 4 * MIB, timeout=timeout) == 4 * MIB
        # Pages that it has copied already need no more room.
        assert child.write(tasks.address, b"z" * 4 * MIB, timeout=timeout) == 4 * MIB
        assert child.read(tasks.address + 4 * MIB - 1, 1) == b"z"
        assert child.alive
    leave(group)
