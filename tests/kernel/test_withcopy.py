"""`withCopy`: exact for every kind of memory, or an error that says where it stopped and leaves nothing behind."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import kernel, requirements
from support.child import in_child
from support.zoo import Zoo

import iobmd
from iobmd import IOBufferMemoryDescriptor, IOReturn, Task, kernel_task, kIOMemoryPageable

Start = Callable[..., Zoo]
READABLE = ("anonymous", "thp", "memfd", "file", "readonly", "stack", "untouched")
BIG = 64 << 20

LARGE = 0 if requirements.may_lock(BIG) else int(kIOMemoryPageable)
"""Options of a large copy: wired, unless a limit forbids it."""

needs_compiler = pytest.mark.needs("compiler")


def copy(zoo: Zoo, address: int, size: int, options: int = LARGE) -> bytes:
    with IOBufferMemoryDescriptor.withCopy(kernel_task, options, zoo.pid, address, size) as buffer:
        return bytes(buffer)


@needs_compiler
@pytest.mark.parametrize("options", [0, kIOMemoryPageable], ids=["wired", "pageable"])
@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.usefixtures("nothing_left")
def test_exact_for_each_kind(start_zoo: Start, tmp_path: Path, kind: str, options: int) -> None:
    zoo = start_zoo()
    animal = zoo[kind]
    expected = zoo.dump(kind, tmp_path / "dump")
    assert len(expected) == animal.size
    assert (kind == "untouched") == (not any(expected))
    task = Task(zoo.pid)
    with IOBufferMemoryDescriptor.withCopy(kernel_task, options, task, animal.address, animal.size) as buffer:
        assert bytes(buffer) == expected
        wired = options == 0
        assert kernel.present(buffer.getBytesNoCopy(), animal.size) == animal.size // kernel.PAGE
        locked = kernel.smaps(buffer.getBytesNoCopy())["Locked"]
        assert (locked >= animal.size) if wired else (locked == 0)


@needs_compiler
@pytest.mark.needs("hugetlb")
def test_exact_for_hugetlb(hugetlb_pool: int, start_zoo: Start, tmp_path: Path) -> None:
    zoo = start_zoo()
    animal = zoo["hugetlb"]
    assert animal.address
    assert copy(zoo, animal.address, animal.size) == zoo.dump("hugetlb", tmp_path / "dump")


@needs_compiler
def test_any_offset_and_size(start_zoo: Start, tmp_path: Path) -> None:
    zoo = start_zoo(BIG, "only-anonymous")
    address, size = zoo["anonymous"]
    expected = zoo.dump("anonymous", tmp_path / "dump")

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, size - 1), st.integers(1, 1 << 20) | st.integers(1, size), st.booleans())
    def check(offset: int, length: int, wired: bool) -> None:
        length = min(length, size - offset)
        with iobmd.copy(
            zoo.pid, address + offset, length, wired=wired and (not LARGE or length <= 1 << 20)
        ) as buffer:
            assert len(buffer) == length
            assert bytes(buffer) == expected[offset : offset + length]

    check()


@needs_compiler
@pytest.mark.parametrize("size", [1 << 20, BIG], ids=["one call", "threads"])
@pytest.mark.usefixtures("nothing_left")
def test_hole_in_the_middle(start_zoo: Start, size: int) -> None:
    zoo = start_zoo(size, "only-anonymous")
    address = zoo["anonymous"].address
    hole = size // 2 + kernel.PAGE
    zoo.obey(f"unmap anonymous {hole} {kernel.PAGE}")
    # A second hole above: the error names the first, whichever thread finds its own sooner.
    zoo.obey(f"unmap anonymous {hole + (size >> 2)} {kernel.PAGE}")
    for start in (0, 1, kernel.PAGE - 1, hole - 1):
        with pytest.raises(iobmd.IOReturnError, match="no memory is mapped") as caught:
            copy(zoo, address + start, size - start)
        assert caught.value.code == IOReturn.kIOReturnVMError
        assert caught.value.address == address + hole
    assert len(copy(zoo, address, hole)) == hole


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "why"), [("no-access", "without read permission"), ("past-end", "past the end of its file")]
)
@pytest.mark.usefixtures("nothing_left")
def test_unreadable_memory(start_zoo: Start, kind: str, why: str) -> None:
    zoo = start_zoo()
    animal = zoo[kind]
    with pytest.raises(iobmd.IOReturnError, match=why) as caught:
        copy(zoo, animal.address, animal.size)
    assert caught.value.code == IOReturn.kIOReturnVMError
    expected = animal.address if kind == "no-access" else animal.address + animal.size - kernel.PAGE
    assert caught.value.address == expected


@needs_compiler
@pytest.mark.usefixtures("nothing_left")
def test_source_that_unmaps_meanwhile(start_zoo: Start) -> None:
    size = 16 << 20
    zoo = start_zoo(size, "only-anonymous")
    address = zoo["anonymous"].address
    offset, length = size // 2, 1 << 20
    zoo.obey(f"flap anonymous {offset} {length}")
    outcomes: set[str] = set()
    for turn in range(2000):
        if turn >= 60 and "refused" in outcomes:
            break
        try:
            with IOBufferMemoryDescriptor.withCopy(kernel_task, kIOMemoryPageable, zoo.pid, address, size) as buffer:
                assert not set(buffer.readBytes(offset, length)) - {0, 0x55}
            outcomes.add("whole")
        except iobmd.IOReturnError as error:
            assert error.code == IOReturn.kIOReturnVMError
            assert error.address is not None
            assert 0 <= error.address - (address + offset) < length
            outcomes.add("refused")
    assert "refused" in outcomes


@needs_compiler
@pytest.mark.parametrize("end", ["kill", "exec"])
@pytest.mark.usefixtures("nothing_left")
def test_source_that_goes_away_midway(start_zoo: Start, end: str) -> None:
    zoo = start_zoo(BIG, "only-anonymous")
    task = Task(zoo.pid)
    called = []

    def go_away(copied: int) -> None:
        if called:
            return
        called.append(copied)
        if end == "kill":
            os.kill(zoo.pid, signal.SIGKILL)
            os.waitid(os.P_PID, zoo.pid, os.WEXITED | os.WNOWAIT)
        else:
            zoo.tell("exec")
            while b"sleep" not in Path(f"/proc/{zoo.pid}/cmdline").read_bytes():
                pass

    with pytest.raises(iobmd.IOReturnError) as caught:
        IOBufferMemoryDescriptor.withCopy(kernel_task, LARGE, task, zoo["anonymous"].address, BIG, progress=go_away)
    assert called
    assert called[0] < BIG
    if end == "kill":
        assert caught.value.code == IOReturn.kIOReturnNotFound
        assert not task.alive
    else:
        # Found gone by the check at the end, or sooner: the new program has nothing at that address.
        assert caught.value.code in (IOReturn.kIOReturnNotFound, IOReturn.kIOReturnVMError)


@needs_compiler
@pytest.mark.usefixtures("nothing_left")
def test_killed_at_random_moments(start_zoo: Start, tmp_path: Path) -> None:
    for round_ in range(12):
        zoo = start_zoo(BIG // 2, "only-anonymous")
        address, size = zoo["anonymous"]
        expected = zoo.dump("anonymous", tmp_path / "dump")
        timer = threading.Timer(round_ * 0.001, zoo.process.kill)
        timer.start()
        try:
            assert copy(zoo, address, size) == expected
        except iobmd.IOReturnError as error:
            assert error.code == IOReturn.kIOReturnNotFound
        timer.join()


@needs_compiler
def test_zombie_and_reaped(start_zoo: Start) -> None:
    zoo = start_zoo()
    task = Task(zoo.pid)
    zoo.process.kill()
    os.waitid(os.P_PID, zoo.pid, os.WEXITED | os.WNOWAIT)
    for target in (task, zoo.pid, task):
        with pytest.raises(ProcessLookupError) as caught:
            IOBufferMemoryDescriptor.withCopy(kernel_task, 0, target, zoo["anonymous"].address, 4096)
        assert caught.value.code == IOReturn.kIOReturnNotFound
        zoo.process.wait()


@needs_compiler
def test_threads_remain_when_the_leader_exited(start_zoo: Start, tmp_path: Path) -> None:
    zoo = start_zoo()
    expected = zoo.dump("thp", tmp_path / "dump")
    task = Task(zoo.pid)
    zoo.obey("leader-exit")
    while "zombie" not in Path(f"/proc/{zoo.pid}/status").read_text():
        pass
    assert task.alive
    assert copy(zoo, *zoo["thp"]) == expected


@needs_compiler
@pytest.mark.usefixtures("nothing_left")
def test_many_threads_at_once(start_zoo: Start, tmp_path: Path) -> None:
    zoo = start_zoo(24 << 20, "only-anonymous")
    address, size = zoo["anonymous"]
    expected = zoo.dump("anonymous", tmp_path / "dump")
    start = ctypes.cast(ctypes.c_char_p(expected), ctypes.c_void_p).value or 0
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(8):
            offset = (seed * 7919 + turn * 104729) % (size // 2)
            with iobmd.copy(zoo.pid, address + offset, size - offset, wired=not LARGE) as buffer:
                # Views compare element by element, and copies would stay in the threads' arenas.
                if memcmp(buffer.getBytesNoCopy(), start + offset, size - offset):
                    wrong.append(offset)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.needs("compiler", "big_memory")
@pytest.mark.usefixtures("nothing_left")
def test_more_than_two_gigabytes(start_zoo: Start, tmp_path: Path) -> None:
    """More than one process_vm_readv can move (0x7ffff000), at an odd address."""
    size = (2 << 30) + (64 << 20)
    zoo = start_zoo(size, "only-anonymous")
    address = zoo["anonymous"].address
    with iobmd.copy(zoo.pid, address + 1, size - 1, wired=False) as buffer:
        for offset in (0, (2 << 30) - 4096, (2 << 30) + 12345, size - 4097):
            assert buffer.readBytes(offset, 4096) == Task(zoo.pid).read(address + 1 + offset, 4096)
        # The generator has no zero words, so that a page that was not copied would show.
        with memoryview(buffer) as view, view[: (size - 1) // 8 * 8].cast("Q") as words:
            assert 0 not in words[:: kernel.PAGE // 8].tolist()


@needs_compiler
@pytest.mark.usefixtures("nothing_left")
def test_interrupt_leaves_nothing(start_zoo: Start) -> None:
    zoo = start_zoo(BIG, "only-anonymous")

    before = len(list(Path("/proc/self/task").iterdir()))

    def interrupt(_copied: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        IOBufferMemoryDescriptor.withCopy(
            kernel_task, LARGE, zoo.pid, zoo["anonymous"].address, BIG, progress=interrupt
        )
    deadline = time.monotonic() + 10
    while len(list(Path("/proc/self/task").iterdir())) > before and time.monotonic() < deadline:
        time.sleep(0.001)  # a thread that has done its last piece needs a moment to end
    assert len(list(Path("/proc/self/task").iterdir())) == before


@needs_compiler
def test_no_second_copy_of_the_data(start_zoo: Start) -> None:
    zoo = start_zoo(256 << 20, "only-anonymous")
    address, size = zoo["anonymous"]

    def peak() -> int:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = kernel.status("VmRSS")
        with iobmd.copy(zoo.pid, address, size, wired=not LARGE):
            return kernel.status("VmHWM") - before

    assert size <= in_child(peak) < size + (8 << 20)


@pytest.mark.usefixtures("nothing_left")
def test_own_memory() -> None:
    with IOBufferMemoryDescriptor.withBytes(os.urandom(100_000), iobmd.kIODirectionOut) as source:
        address = source.getBytesNoCopy()
        with IOBufferMemoryDescriptor.withCopy(kernel_task, 0, kernel_task, address + 1, 99_999) as copied:
            assert bytes(copied) == bytes(source)[1:]


@pytest.mark.parametrize(
    ("address", "size", "code"),
    [
        (0x10000, 0, IOReturn.kIOReturnBadArgument),
        (0x10000, -1, IOReturn.kIOReturnBadArgument),
        (-1, 10, IOReturn.kIOReturnBadArgument),
        ((1 << 64) - 5, 10, IOReturn.kIOReturnBadArgument),
        ((1 << 64) - 4096, 4096, IOReturn.kIOReturnVMError),
        (1 << 63, 4096, IOReturn.kIOReturnVMError),
        (0, 4096, IOReturn.kIOReturnVMError),
        (0x10000, 1 << 70, IOReturn.kIOReturnBadArgument),
    ],
)
@pytest.mark.usefixtures("nothing_left")
def test_bad_ranges(address: int, size: int, code: IOReturn) -> None:
    with pytest.raises(iobmd.IOReturnError) as caught:
        IOBufferMemoryDescriptor.withCopy(kernel_task, 0, kernel_task, address, size)
    assert caught.value.code == code


@pytest.mark.usefixtures("nothing_left")
def test_kernel_thread() -> None:
    with pytest.raises(iobmd.IOReturnError, match="kernel thread") as caught:
        IOBufferMemoryDescriptor.withCopy(kernel_task, 0, 2, 0x10000, 4096)
    assert caught.value.code == IOReturn.kIOReturnUnsupported
