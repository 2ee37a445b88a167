"""Reading another task leaves it unchanged: its pages, page tables, cgroup, swap, and the hugetlb pools."""

import contextlib
import fcntl
import gc
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import kernel
from support.child import NOBODY, in_child
from support.fuse import FILE_SYSTEM
from support.python_source import PATIENCE, Source, leave

import iobmd
from iobmd import IOReturn, IOReturnError, Task, kernel_task
from iobmd._native.crosstask import HeldBuffer
from iobmd.memory import residency
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
HUGE = 2 << 20
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@pytest.fixture
def source() -> Iterator[Callable[..., Source]]:
    started: list[Source] = []

    def start(code: str, **options: object) -> Source:
        started.append(Source(code, **options))  # type: ignore[arg-type]
        return started[-1]

    yield start
    for one in started:
        one.end()


ANONYMOUS = "m = mmap.mmap(-1, 1 << 30, flags=PRIVATE | ANONYMOUS | NORESERVE); m[5 << 20:(5 << 20) + 4] = b'here'"
MEMFD = "fd = memfd(1 << 30); m = mmap.mmap(fd, 1 << 30); m[5 << 20:(5 << 20) + 4] = b'here'"
PRIVATE_OF_MEMFD = (
    "fd = memfd(1 << 30); os.pwrite(fd, b'here', 5 << 20); m = mmap.mmap(fd, 1 << 30, flags=PRIVATE | NORESERVE)"
)
WRITTEN_BY_OTHERS = "fd = memfd(1 << 30); os.pwrite(fd, b'here', 5 << 20); m = mmap.mmap(fd, 1 << 30)"
SHARED_ANONYMOUS = "m = mmap.mmap(-1, 1 << 30); m[5 << 20:(5 << 20) + 4] = b'here'"
KINDS = {
    "anonymous": ANONYMOUS,
    "memfd": MEMFD,
    "private mapping of a memfd": PRIVATE_OF_MEMFD,
    "written through the descriptor": WRITTEN_BY_OTHERS,
    "shared anonymous": SHARED_ANONYMOUS,
}


def copied(pid: int, at: int, size: int, *, freeze: bool = False) -> bytes:
    with iobmd.copy(pid, at, size, wired=False, freeze=freeze) as buffer:
        return buffer.readBytes(5 * MIB, 4)


WAYS: dict[str, Callable[[int, int, int], bytes]] = {
    "read": lambda pid, at, size: Task(pid).read(at, size)[5 * MIB : 5 * MIB + 4],
    "copy": copied,
    "frozen copy": lambda pid, at, size: copied(pid, at, size, freeze=True),
    "existing": lambda pid, at, size: iobmd.IOMemoryDescriptor.withAddressRange(at, size, 3, pid).readBytes(
        5 * MIB, 4
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_sparse_memory_stays_sparse(source: Callable[..., Source], kind: str, way: str) -> None:
    """The object of shared memory is opened through map_files as root, otherwise through the open descriptor."""
    if kind == "shared anonymous" and os.geteuid():
        pytest.skip("memory without a descriptor is found through map_files, which requires root")
    one = source(KINDS[kind] + "; result = [at(m)]")
    (at,) = one.addresses
    before = one.held()
    assert WAYS[way](one.pid, at, 512 * MIB) == b"here"
    after = one.held()
    if way == "frozen copy":  # it has executed a system call in its vDSO, which is a page of the kernel
        for name in ("RssFile", "VmRSS"):
            assert 0 <= after[name] - before.pop(name) <= kernel.PAGE
            del after[name]
    assert after == before


@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
def test_small_reads_create_nothing_in_shared_memory(source: Callable[..., Source], kind: str) -> None:
    one = source(KINDS[kind] + "; result = [at(m)]")
    (at,) = one.addresses
    before = one.held()
    task = Task(one.pid)
    for offset in range(0, 64 * MIB, 4 * MIB):
        assert task.read(at + offset + 1, 100) == bytes(100)
    after = one.held()
    if kind == "anonymous":  # each may add a page table, see extents.SMALL
        assert after.pop("VmPTE") - before.pop("VmPTE") <= 16 * kernel.PAGE
    assert after == before


def test_a_pageable_copy_is_as_sparse_as_its_source(source: Callable[..., Source]) -> None:
    code = "m = mmap.mmap(-1, 256 << 20, flags=PRIVATE | ANONYMOUS)\n"
    code += "for offset in range(0, 64 << 20, 1 << 20): m[offset] = 1\n"  # scattered
    code += "m[128 << 20:160 << 20] = bytes(1) * (32 << 20)\nresult = [at(m)]"  # dense
    one = source(code)
    (at,) = one.addresses
    with iobmd.copy(one.pid, at, 256 * MIB, wired=False) as buffer:
        here = buffer.getBytesNoCopy()
        assert kernel.present(here, 256 * MIB) <= 64 + 32 * MIB // kernel.PAGE + 2
        assert kernel.present(here, 64 * MIB) == 64
        assert bytes(buffer) == Task(one.pid).read(at, 256 * MIB)
    with iobmd.copy(one.pid, at, 4 * MIB, wired=True) as buffer:
        assert kernel.present(buffer.getBytesNoCopy(), 4 * MIB) == 4 * MIB // kernel.PAGE


def test_holes_of_memory_that_was_used_before_are_cleared(source: Callable[..., Source]) -> None:
    one = source(
        MEMFD + "; n = mmap.mmap(-1, 1 << 30, flags=PRIVATE | ANONYMOUS | NORESERVE); result = [at(m), at(n)]"
    )
    for at in one.addresses:
        room = bytearray(b"\xff" * (8 * MIB + 3))
        assert Task(one.pid).readinto(at + 1, room) == len(room)
        room[5 * MIB - 1 : 5 * MIB + 3] = bytes(4)
        assert not any(room)


@pytest.mark.needs("memory_cgroup")
@pytest.mark.parametrize("freeze", [False, True])
def test_a_source_with_a_limit_lives_on(
    memory_cgroup: Callable[[int], Path], source: Callable[..., Source], freeze: bool
) -> None:
    """Reading shared memory by page faults charges it to the cgroup of the source, which is then killed."""
    group = memory_cgroup(64 * MIB)
    one = source(
        MEMFD + "; os.pwrite(fd, b'more' * (1 << 20), 600 << 20); result = [at(m)]",
        before=f"open({str(group)!r}, 'w').write('0')\n",
    )
    (at,) = one.addresses
    usage = group.parent / ("memory.usage_in_bytes" if "memory/" in str(group) else "memory.current")
    before = int(usage.read_text())
    with iobmd.copy(one.pid, at, 1 << 30, wired=False, freeze=freeze) as buffer:
        assert buffer.readBytes(5 * MIB, 4) == b"here"
        assert buffer.readBytes(600 * MIB, 8) == b"moremore"
    assert Task(one.pid).read(at, 512 * MIB)[5 * MIB : 5 * MIB + 4] == b"here"
    assert one.process.poll() is None
    # The counters of cgroups lag by a batch of pages per processor.
    assert int(usage.read_text()) - before < 2 * MIB
    one.end()
    leave(group)


def free_pages() -> tuple[int, int]:
    return int((POOL / "free_hugepages").read_text()), int((POOL / "resv_hugepages").read_text())


HUGETLB = {
    "private": f"m = mmap.mmap(-1, {4 * HUGE}, flags=PRIVATE | ANONYMOUS | HUGETLB); m[{HUGE}] = 7",
    "shared": f"m = mmap.mmap(-1, {4 * HUGE}, flags=mmap.MAP_SHARED | ANONYMOUS | HUGETLB); m[{HUGE}] = 7",
    "memfd": f"fd = memfd({4 * HUGE}, 4); m = mmap.mmap(fd, {4 * HUGE}); m[{HUGE}] = 7",
}


@pytest.mark.needs("hugetlb")
@pytest.mark.parametrize("kind", HUGETLB)
def test_no_page_of_a_pool_is_taken(hugetlb_pool: int, source: Callable[..., Source], kind: str) -> None:
    assert hugetlb_pool >= 4
    one = source(HUGETLB[kind] + "; result = [at(m)]")
    (at,) = one.addresses
    expected = bytearray(4 * HUGE)
    expected[HUGE] = 7

    def whole_copy() -> bytes:
        with iobmd.copy(one.pid, at, 4 * HUGE, wired=False) as buffer:
            return bytes(buffer)

    # The source's own mapping has one page of the pool, and has reserved the others: taking one ends a reservation.
    # Another process may take a page without one in the meantime, but not during each of several attempts.
    rollup = Path(f"/proc/{one.pid}/smaps_rollup").read_text
    own = [line for line in rollup().splitlines() if "Hugetlb" in line]
    changes = []
    for way in (
        lambda: Task(one.pid).read(at, 4 * HUGE),
        whole_copy,
        lambda: Task(one.pid).read(at, 1) + Task(one.pid).read(at + 1, 4 * HUGE - 1),
    ):
        before = free_pages()
        assert way() == expected
        changes.append(before != free_pages())
        assert [line for line in rollup().splitlines() if "Hugetlb" in line] == own
    assert not all(changes)
    assert free_pages()[1] == before[1], "the reservations of the source"


@pytest.mark.needs("swap")
def test_swapped_pages_go_back_to_swap(swap: None, source: Callable[..., Source]) -> None:
    code = f"m = mmap.mmap(-1, {8 * MIB}, flags=PRIVATE | ANONYMOUS); m[:] = os.urandom({8 * MIB})\n"
    one = source(code + "m.madvise(21); result = [at(m)]")  # MADV_PAGEOUT
    (at,) = one.addresses
    before = kernel.status("VmSwap", one.pid)
    assert before > 6 * MIB, "the control"
    content = Task(one.pid).read(at, 8 * MIB)
    assert kernel.status("VmSwap", one.pid) >= before - 64 * kernel.PAGE
    with iobmd.copy(one.pid, at, 8 * MIB, wired=False) as buffer:
        assert bytes(buffer) == content
    assert kernel.status("VmSwap", one.pid) >= before - 64 * kernel.PAGE
    assert any(content)


@pytest.mark.needs("swap")
def test_swapped_pages_of_an_object_go_back_to_swap(swap: None, source: Callable[..., Source]) -> None:
    """Swapped pages next to resident ones are returned to swap, and no others: smaps counts the object's pages."""
    code = f"fd = memfd({8 * MIB}); m = mmap.mmap(fd, {8 * MIB}); m[:] = os.urandom({8 * MIB})\nm.madvise(21)\n"
    one = source(code + f"sum(m[at] for at in range(0, {8 * MIB}, 40960)); result = [at(m)]")
    (at,) = one.addresses
    before = kernel.smaps(at, one.pid)
    assert before["Swap"] > 6 * MIB, "the control"
    content = Task(one.pid).read(at, 8 * MIB)
    assert any(content)
    after = kernel.smaps(at, one.pid)
    assert abs(after["Swap"] - before["Swap"]) <= 64 * kernel.PAGE
    assert after["Rss"] == before["Rss"]
    with iobmd.copy(one.pid, at, 8 * MIB, wired=False) as buffer:
        assert bytes(buffer) == content
    assert abs(kernel.smaps(at, one.pid)["Swap"] - before["Swap"]) <= 64 * kernel.PAGE


def test_files_are_read_and_not_mapped(source: Callable[..., Source], tmp_path: Path) -> None:
    """The rest of the last page is zero, and the pages after it do not exist."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * MIB + 100))
    one = source(
        f"fd = os.open({str(path)!r}, os.O_RDONLY); m = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)\n"
        "lines = [line for line in open('/proc/self/maps') if line.rstrip().endswith('/file')]\n"
        "result = [int(line.split('-')[0], 16) for line in lines]"
    )
    (at,) = one.addresses
    before = one.held()
    inside = 3 * MIB + kernel.PAGE
    assert Task(one.pid).read(at, inside) == path.read_bytes() + bytes(kernel.PAGE - 100)
    assert one.held() == before


def test_past_the_end_of_an_object(source: Callable[..., Source]) -> None:
    one = source(
        "fd = memfd(8 << 20); os.pwrite(fd, b'x' * 100, 4 << 20); m = mmap.mmap(fd, 8 << 20); result = [at(m)]"
    )
    (at,) = one.addresses
    one.execute("os.ftruncate(fd, (4 << 20) + 100)")
    assert Task(one.pid).read(at, 4 * MIB + kernel.PAGE)[4 * MIB :] == b"x" * 100 + bytes(kernel.PAGE - 100)
    with pytest.raises(IOReturnError) as caught:
        Task(one.pid).read(at, 8 * MIB)
    assert (caught.value.code, caught.value.address) == (IOReturn.kIOReturnVMError, at + 4 * MIB + kernel.PAGE)
    with iobmd.copy(one.pid, at, 8 * MIB, wired=False, unreadable="zero") as buffer:
        assert buffer.holes == [(4 * MIB + kernel.PAGE, 4 * MIB - kernel.PAGE)]
        assert bytes(buffer)[4 * MIB :] == b"x" * 100 + bytes(4 * MIB - 100)


HOLES = """
libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p
start = libc.mmap(None, ctypes.c_size_t(32 << 20), 3, 0x22, -1, 0)
ctypes.memset(start, 0x61, 32 << 20)
def page(number): return ctypes.c_void_p(start + number * mmap.PAGESIZE)
libc.munmap(page(3), ctypes.c_size_t(mmap.PAGESIZE))
libc.mprotect(page(10), ctypes.c_size_t(2 * mmap.PAGESIZE), 0)
libc.munmap(ctypes.c_void_p(start + (16 << 20)), ctypes.c_size_t(8 << 20))
result = [start]
"""


@pytest.mark.parametrize("freeze", [False, True])
def test_holes_are_listed(source: Callable[..., Source], freeze: bool) -> None:
    one = source(HOLES)
    (at,) = one.addresses
    start, length = at + 100, (32 << 20) - 200
    with pytest.raises(IOReturnError) as caught:
        iobmd.copy(one.pid, start, length, wired=False, freeze=freeze)
    assert caught.value.address == at + 3 * PAGE_SIZE
    with iobmd.copy(one.pid, start, length, wired=False, freeze=freeze, unreadable="zero") as buffer:
        assert buffer.holes == [
            (3 * PAGE_SIZE - 100, PAGE_SIZE),
            (10 * PAGE_SIZE - 100, 2 * PAGE_SIZE),
            ((16 << 20) - 100, 8 << 20),
        ]
        expected = bytearray(b"a" * length)
        for offset, size in buffer.holes:
            expected[offset : offset + size] = bytes(size)
        assert bytes(buffer) == expected
    with iobmd.copy(one.pid, at, PAGE_SIZE, wired=False, unreadable="zero") as buffer:
        assert buffer.holes == []
    with pytest.raises(ValueError, match="'raise' or 'zero'"):
        iobmd.copy(one.pid, at, PAGE_SIZE, unreadable="skip")


def test_holes_through_the_memory_file(source: Callable[..., Source]) -> None:
    """The copy works if seccomp forbids process_vm_readv."""
    one = source(HOLES)
    (at,) = one.addresses

    def look() -> tuple[list[tuple[int, int]], bytes]:
        with iobmd.copy(one.pid, at, 64 << 10, wired=False, unreadable="zero") as buffer:
            return buffer.holes, bytes(buffer)

    holes, content = in_child(look, deny={"process_vm_readv": 1})
    assert holes == [(3 * PAGE_SIZE, PAGE_SIZE), (10 * PAGE_SIZE, 2 * PAGE_SIZE)]
    assert (
        content
        == b"a" * 3 * PAGE_SIZE
        + bytes(PAGE_SIZE)
        + b"a" * 6 * PAGE_SIZE
        + bytes(2 * PAGE_SIZE)
        + b"a" * 4 * PAGE_SIZE
    )


def test_a_copy_larger_than_memory(source: Callable[..., Source]) -> None:
    """The existing part of the range counts, not its length."""
    size = 1 << 40
    one = source(
        f"m = mmap.mmap(-1, {size}, flags=PRIVATE | ANONYMOUS | NORESERVE)\nm[1 << 35] = 7; result = [at(m)]"
    )
    (at,) = one.addresses
    assert size > os.sysconf("SC_PHYS_PAGES") * kernel.PAGE
    offset = (1 << 35) - (1 << 30)
    with iobmd.copy(one.pid, at + offset, 40 << 30, wired=False) as buffer:
        assert buffer.readBytes(1 << 30, 2) == b"\7\0"
        assert buffer.getPageCounts()[0] == 1


AS_NOBODY = f"""
os.setgroups([]); os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY}); ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
"""


@pytest.mark.needs("root", "memory_cgroup")
def test_refused_where_the_pages_cannot_be_found(
    memory_cgroup: Callable[[int], Path], source: Callable[..., Source]
) -> None:
    """Another user's shared anonymous memory, which is mapped nowhere else, has neither a name nor a descriptor."""
    group = memory_cgroup(64 * MIB)
    # Import the modules first, because the new user may be unable to read the interpreter's files.
    before = "import ctypes, mmap, os, sys\n"
    before += f"open({str(group)!r}, 'w').write(str(os.getpid()))\n"
    one = source(SHARED_ANONYMOUS + "; result = [at(m)]", before=before + AS_NOBODY)
    (at,) = one.addresses

    def read() -> bytes:
        return Task(one.pid).read(at, 512 * MIB)

    with pytest.raises(IOReturnError, match=group.parent.name) as caught:
        in_child(read, uid=NOBODY)
    assert caught.value.code == IOReturn.kIOReturnNoMemory
    assert one.process.poll() is None
    assert in_child(lambda: Task(one.pid).read(at + 5 * MIB, 4), uid=NOBODY) == b"here"
    one.end()
    leave(group)


def test_nothing_is_opened_for_good(source: Callable[..., Source]) -> None:
    one = source(MEMFD + "; result = [at(m)]")
    (at,) = one.addresses
    gc.collect()  # pipes of earlier tests
    before = len(list(Path("/proc/self/fd").iterdir()))
    theirs = len(list(Path(f"/proc/{one.pid}/fd").iterdir()))
    for size in (1, 100_000, 64 * MIB):
        Task(one.pid).read(at + 8 * MIB, size)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert len(list(Path(f"/proc/{one.pid}/fd").iterdir())) == theirs
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)

    def exhausted() -> IOReturn:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())), limit[1]))
        task = Task(one.pid)
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        with pytest.raises(IOReturnError, match="ulimit -n") as caught:
            task.read(at + 8 * MIB, 1)
        return caught.value.code

    assert in_child(exhausted) == IOReturn.kIOReturnNoResources


def test_reading_this_process() -> None:
    with iobmd.allocate(4 * MIB, wired=False) as buffer:
        buffer.writeBytes(MIB, b"here")
        address = buffer.getBytesNoCopy()
        assert kernel_task.read(address, 4 * MIB)[MIB : MIB + 5] == b"here\0"
        assert kernel.present(address, 4 * MIB) == 1


LOCKED = """
fd = os.open({path!r}, os.O_RDWR); m = mmap.mmap(fd, 16 << 20)
for number in range(0, 4096, 64): m[number * 4096] = 7
result = [at(m)]
"""


@pytest.mark.parametrize("folder", ["memory", "disk"])
def test_locks_on_a_file_of_the_source_are_kept(source: Callable[..., Source], tmp_path: Path, folder: str) -> None:
    """A process that closes any descriptor of a file loses its POSIX locks on it (fcntl(2))."""
    path = (Path("/dev/shm") if folder == "memory" else tmp_path) / f"iobmd-test-{os.getpid()}"
    path.write_bytes(bytes(16 * MIB))
    try:
        one = source(LOCKED.format(path=str(path)))
        (at,) = one.addresses
        expected = path.read_bytes()
        with path.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            assert is_locked(path), "the control"
            assert Task(one.pid).read(at, 16 * MIB) == expected
            with iobmd.copy(one.pid, at, 16 * MIB, wired=False) as buffer:
                assert bytes(buffer) == expected
            if not os.geteuid():  # through map_files
                # The file was written, and is in memory, although the task has touched only one page of 64.
                assert residency.absent(at, 16 * MIB, Task(one.pid)) == 0
            assert is_locked(path)
    finally:
        path.unlink()


LEASED = """
import fcntl
fd = os.open({path!r}, os.O_RDWR); m = mmap.mmap(fd, 16 << 20)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
result = [at(m)]
"""


@pytest.mark.parametrize("folder", ["memory", "disk"])
def test_a_lease_of_the_source_is_not_broken(source: Callable[..., Source], tmp_path: Path, folder: str) -> None:
    """Opening a file on which a process has a write lease makes the kernel send that process SIGIO, which ends it."""
    path = (Path("/dev/shm") if folder == "memory" else tmp_path) / f"iobmd-test-{os.getpid()}"
    expected = bytes(range(256)) * (16 * MIB // 256)
    path.write_bytes(expected)
    try:
        one = source(LEASED.format(path=str(path)))
        (at,) = one.addresses
        lease = f"WRITE {one.pid} "
        assert lease in Path("/proc/locks").read_text(), "the control"
        with iobmd.copy(one.pid, at, 16 * MIB, wired=False) as buffer:
            assert bytes(buffer) == expected
        assert Task(one.pid).read(at + 5, 100) == expected[5:105]
        assert one.process.poll() is None
        assert any("ACTIVE" in line and lease in line for line in Path("/proc/locks").read_text().splitlines())
    finally:
        path.unlink()


def is_locked(path: Path) -> bool:
    """Return whether another process finds the file locked."""

    def attempt() -> bool:
        with path.open("r+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
            return False

    return bool(in_child(attempt))


def test_absent_pages_first_where_the_calls_are_refused(source: Callable[..., Source]) -> None:
    """A seccomp filter that refuses process_vm_readv is detected only at the first present page."""
    one = source(ANONYMOUS + "; result = [at(m)]")
    (at,) = one.addresses
    read = in_child(lambda: Task(one.pid).read(at, 16 * MIB), deny={"process_vm_readv": 1})
    assert read == bytes(5 * MIB) + b"here" + bytes(11 * MIB - 4)


@pytest.mark.needs("root")
@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
def test_where_no_process_can_be_made(source: Callable[..., Source], kind: str) -> None:
    """At RLIMIT_NPROC no child can open the object, and page faults supply its bytes."""
    one = source(KINDS[kind] + "; result = [at(m)]", before="import ctypes, mmap, os, sys\n" + AS_NOBODY)
    (at,) = one.addresses

    def read() -> bytes:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        with pytest.raises(BlockingIOError):
            os.fork()
        return Task(one.pid).read(at + 4 * MIB, 2 * MIB) + Task(one.pid).read(at, PAGE_SIZE)

    assert in_child(read, uid=NOBODY) == bytes(MIB) + b"here" + bytes(MIB - 4) + bytes(PAGE_SIZE)


def test_holes_in_memory_that_was_used_before_are_cleared(source: Callable[..., Source]) -> None:
    """Inaccessible pages and unmapped addresses, as in the second attempt of a frozen copy."""
    one = source(HOLES)
    (at,) = one.addresses
    room = bytearray(b"\xff" * 16 * kernel.PAGE)
    with HeldBuffer(room, True) as held:
        outcome = Task(one.pid).copy_in(at, held.address, held.size, skip=True)
    page = kernel.PAGE
    assert outcome.unread == [(at + 3 * page, at + 4 * page), (at + 10 * page, at + 12 * page)]
    assert room == b"a" * 3 * page + bytes(page) + b"a" * 6 * page + bytes(2 * page) + b"a" * 4 * page


def test_many_gaps_take_no_child_each(source: Callable[..., Source]) -> None:
    """Every other page of a file is present: there are thousands of gaps, and each child reads many of them."""
    one = source(
        "fd = memfd(16 << 20); m = mmap.mmap(fd, 16 << 20)\n"
        "pages = (16 << 20) // mmap.PAGESIZE\n"
        "for number in range(pages): os.pwrite(fd, bytes([number % 251]), number * mmap.PAGESIZE)\n"
        "for number in range(0, pages, 2): m[number * mmap.PAGESIZE]\n"
        "result = [at(m)]"
    )
    (at,) = one.addresses
    expected = b"".join(bytes([number % 251]) + bytes(PAGE_SIZE - 1) for number in range(16 * MIB // PAGE_SIZE))
    before = forks()
    assert Task(one.pid).read(at, 16 * MIB) == expected
    # Other processes fork too, but not two thousand times.
    assert forks() - before < 1000


def forks() -> int:
    """Return how many processes and threads the host has created."""
    return int(Path("/proc/stat").read_text().partition("processes ")[2].split(maxsplit=1)[0])


SERVED = (
    FILE_SYSTEM.replace("{", "{{").replace("}", "}}")
    + """
import threading
device = mount({folder!r})
if {apart}:
    server = os.fork()
    if not server:
        LIBC.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG
        serve(device)
    os.close(device)
else:
    threading.Thread(target=serve, args=[device], daemon=True).start()
fd = os.open({folder!r} + "/file", os.O_RDONLY)
LIBC.mmap.restype = ctypes.c_void_p
result = [LIBC.mmap(None, ctypes.c_size_t(SIZE), 1, 1, fd, 0)]
os.close(fd)  # mmap.mmap would keep one open, and its close at exit would wait for a stopped or exiting server
"""
)


@pytest.mark.needs("root")
def test_a_server_of_a_file_that_does_not_answer(source: Callable[..., Source], tmp_path: Path) -> None:
    """The time limit also applies to an open(2) of that file, and no child remains."""
    one = source(SERVED.format(folder=str(tmp_path), apart=True))
    (at,) = one.addresses
    assert Task(one.pid).read(at + 4095, 10) == bytes([7]) * 10
    one.execute("os.kill(server, 19)")
    begin = time.monotonic()
    with pytest.raises(IOReturnError, match=r"was not supplied within 0\.3 s") as caught:
        Task(one.pid).read(at + 65536, MIB // 2, timeout=0.3)
    assert caught.value.code == IOReturn.kIOReturnTimeout
    assert time.monotonic() - begin < PATIENCE
    with contextlib.suppress(ChildProcessError):
        assert os.waitpid(-1, os.WNOHANG | 0x40000000) == (0, 0)  # __WALL
    one.execute("os.kill(server, 18)")
    assert Task(one.pid).read(at, MIB) == bytes([7]) * MIB


@pytest.mark.needs("root")
def test_a_frozen_task_is_not_asked_for_its_file(source: Callable[..., Source], tmp_path: Path) -> None:
    """A task that serves a file which it maps cannot supply its pages while it is stopped."""
    one = source(SERVED.format(folder=str(tmp_path), apart=False))
    (at,) = one.addresses
    with pytest.raises(IOReturnError, match="another program") as caught:
        iobmd.copy(one.pid, at, MIB, wired=False, freeze=True)
    assert caught.value.code == IOReturn.kIOReturnUnsupported
    assert Task(one.pid).read(at, MIB) == bytes([7]) * MIB


@pytest.mark.needs("root")
def test_memory_is_counted_without_a_server_that_does_not_answer(
    source: Callable[..., Source], tmp_path: Path
) -> None:
    """Opening the file, or determining its type, would wait for the server without a limit, and without Ctrl-C."""
    one = source(SERVED.format(folder=str(tmp_path), apart=True))
    (at,) = one.addresses
    assert Task(one.pid).read(at, 1) == b"\7", "the control"
    assert residency.absent(at, MIB, Task(one.pid), written=False) == MIB
    one.execute("os.kill(server, 19)")
    found: list[int] = []
    counting = threading.Thread(
        target=lambda: found.append(residency.absent(at, MIB, Task(one.pid), written=False)), daemon=True
    )
    counting.start()
    counting.join(PATIENCE)
    ended = not counting.is_alive()
    one.execute("os.kill(server, 18)")
    counting.join()
    assert ended
    assert found == [MIB]
