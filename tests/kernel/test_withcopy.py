"""`withCopy`: exact for every kind of memory, or an error that reports where it stopped and leaves nothing behind."""

import _thread
import ctypes
import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import kernel, requirements
from support.child import in_child
from support.source_process import SourceProcess
from support.targets import until
from support.threads import on_one_processor, run_all

import iobmd
from iobmd import IOBufferMemoryDescriptor, IOReturn, Task, kernel_task, kIOMemoryPageable
from iobmd._internal import chunked
from iobmd.units import PAGE_SIZE

Start = Callable[..., SourceProcess]
READABLE = ("anonymous", "thp", "memfd", "file", "readonly", "stack", "untouched")
BIG = 64 << 20

LARGE = 0 if requirements.may_lock(BIG) else int(kIOMemoryPageable)
"""Options of a large copy: wired, unless a limit forbids it."""

needs_compiler = pytest.mark.needs("compiler")


def copy(source: SourceProcess, address: int, size: int, options: int = LARGE) -> bytes:
    with IOBufferMemoryDescriptor.withCopy(kernel_task, options, source.pid, address, size) as buffer:
        return bytes(buffer)


@needs_compiler
@pytest.mark.parametrize("options", [0, kIOMemoryPageable], ids=["wired", "pageable"])
@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.usefixtures("nothing_left")
def test_exact_for_each_kind(start_source: Start, tmp_path: Path, kind: str, options: int) -> None:
    source = start_source()
    region = source[kind]
    expected = source.dump(kind, tmp_path / "dump")
    assert len(expected) == region.size
    assert (kind == "untouched") == (not any(expected))
    task = Task(source.pid)
    with IOBufferMemoryDescriptor.withCopy(kernel_task, options, task, region.address, region.size) as buffer:
        assert bytes(buffer) == expected
        wired = options == 0
        assert kernel.present(buffer.getBytesNoCopy(), region.size) == region.size // kernel.PAGE
        locked = kernel.smaps(buffer.getBytesNoCopy())["Locked"]
        assert (locked >= region.size) if wired else (locked == 0)


@needs_compiler
@pytest.mark.needs("hugetlb")
def test_exact_for_hugetlb(hugetlb_pool: int, start_source: Start, tmp_path: Path) -> None:
    source = start_source()
    region = source["hugetlb"]
    assert region.address
    assert copy(source, region.address, region.size) == source.dump("hugetlb", tmp_path / "dump")


@needs_compiler
def test_any_offset_and_size(start_source: Start, tmp_path: Path) -> None:
    source = start_source(BIG, "only-anonymous")
    address, size = source["anonymous"]
    expected = source.dump("anonymous", tmp_path / "dump")

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, size - 1), st.integers(1, 1 << 20) | st.integers(1, size), st.booleans())
    def check(offset: int, length: int, wired: bool) -> None:
        length = min(length, size - offset)
        with iobmd.copy(
            source.pid, address + offset, length, wired=wired and (not LARGE or length <= 1 << 20)
        ) as buffer:
            assert len(buffer) == length
            assert bytes(buffer) == expected[offset : offset + length]

    check()


@needs_compiler
@pytest.mark.parametrize("size", [1 << 20, BIG], ids=["one call", "threads"])
@pytest.mark.usefixtures("nothing_left")
def test_hole_in_the_middle(start_source: Start, size: int) -> None:
    source = start_source(size, "only-anonymous")
    address = source["anonymous"].address
    hole = size // 2 + kernel.PAGE
    source.command(f"unmap anonymous {hole} {kernel.PAGE}")
    # There is a second hole above: the error names the first, whichever thread is faster.
    source.command(f"unmap anonymous {hole + (size >> 2)} {kernel.PAGE}")
    for start in (0, 1, kernel.PAGE - 1, hole - 1):
        with pytest.raises(iobmd.IOReturnError, match="no memory is mapped") as caught:
            copy(source, address + start, size - start)
        assert caught.value.code == IOReturn.kIOReturnVMError
        assert caught.value.address == address + hole
    assert len(copy(source, address, hole)) == hole


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "why"), [("no-access", "without read permission"), ("past-end", "past the end of its file")]
)
@pytest.mark.usefixtures("nothing_left")
def test_unreadable_memory(start_source: Start, kind: str, why: str) -> None:
    source = start_source()
    region = source[kind]
    with pytest.raises(iobmd.IOReturnError, match=why) as caught:
        copy(source, region.address, region.size)
    assert caught.value.code == IOReturn.kIOReturnVMError
    expected = region.address if kind == "no-access" else region.address + region.size - kernel.PAGE
    assert caught.value.address == expected


@needs_compiler
@pytest.mark.usefixtures("nothing_left")
def test_source_that_unmaps_meanwhile(start_source: Start) -> None:
    size = 16 << 20
    source = start_source(size, "only-anonymous")
    address = source["anonymous"].address
    offset, length = size // 2, 1 << 20
    source.command(f"flap anonymous {offset} {length}")
    outcomes: set[str] = set()
    for turn in range(2000):
        if turn >= 60 and "refused" in outcomes:
            break
        try:
            with IOBufferMemoryDescriptor.withCopy(
                kernel_task, kIOMemoryPageable, source.pid, address, size
            ) as buffer:
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
def test_source_that_goes_away_midway(start_source: Start, end: str) -> None:
    source = start_source(BIG, "only-anonymous")
    task = Task(source.pid)
    called = []

    def go_away(copied: int) -> None:
        if called:
            return
        called.append(copied)
        if end == "kill":
            os.kill(source.pid, signal.SIGKILL)
            os.waitid(os.P_PID, source.pid, os.WEXITED | os.WNOWAIT)
        else:
            source.tell("exec")
            while b"sleep" not in Path(f"/proc/{source.pid}/cmdline").read_bytes():
                pass

    with on_one_processor(), pytest.raises(iobmd.IOReturnError) as caught:  # this thread copies each chunk
        IOBufferMemoryDescriptor.withCopy(
            kernel_task, LARGE, task, source["anonymous"].address, BIG, progress=go_away
        )
    assert called
    assert called[0] < BIG
    if end == "kill":
        assert caught.value.code == IOReturn.kIOReturnNotFound
        assert not task.alive
    else:
        # Detected by the final check, or earlier: the new program has nothing mapped at that address.
        assert caught.value.code in (IOReturn.kIOReturnNotFound, IOReturn.kIOReturnVMError)


@needs_compiler
@pytest.mark.usefixtures("nothing_left")
def test_killed_at_random_moments(start_source: Start, tmp_path: Path) -> None:
    for round_ in range(12):
        source = start_source(BIG // 2, "only-anonymous")
        address, size = source["anonymous"]
        expected = source.dump("anonymous", tmp_path / "dump")
        timer = threading.Timer(round_ * 0.001, source.process.kill)
        timer.start()
        try:
            assert copy(source, address, size) == expected
        except iobmd.IOReturnError as error:
            assert error.code == IOReturn.kIOReturnNotFound
        timer.join()


@needs_compiler
def test_zombie_and_reaped(start_source: Start) -> None:
    source = start_source()
    task = Task(source.pid)
    source.process.kill()
    os.waitid(os.P_PID, source.pid, os.WEXITED | os.WNOWAIT)
    for target in (task, source.pid, task):
        with pytest.raises(ProcessLookupError) as caught:
            IOBufferMemoryDescriptor.withCopy(kernel_task, 0, target, source["anonymous"].address, PAGE_SIZE)
        assert caught.value.code == IOReturn.kIOReturnNotFound
        source.process.wait()


@needs_compiler
def test_threads_remain_when_the_leader_exited(start_source: Start, tmp_path: Path) -> None:
    source = start_source()
    expected = source.dump("thp", tmp_path / "dump")
    task = Task(source.pid)
    source.command("leader-exit")
    while "zombie" not in Path(f"/proc/{source.pid}/status").read_text():
        pass
    assert task.alive
    assert copy(source, *source["thp"]) == expected


@needs_compiler
@pytest.mark.usefixtures("nothing_left")
def test_many_threads_at_once(start_source: Start, tmp_path: Path) -> None:
    source = start_source(24 << 20, "only-anonymous")
    address, size = source["anonymous"]
    expected = source.dump("anonymous", tmp_path / "dump")
    start = ctypes.cast(ctypes.c_char_p(expected), ctypes.c_void_p).value or 0
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(8):
            offset = (seed * 7919 + turn * 104729) % (size // 2)
            with iobmd.copy(source.pid, address + offset, size - offset, wired=not LARGE) as buffer:
                # Views are compared element by element, and copies would remain in the threads' arenas.
                if memcmp(buffer.getBytesNoCopy(), start + offset, size - offset):
                    wrong.append(offset)

    run_all(*(partial(work, seed) for seed in range(6)))
    assert not wrong


@pytest.mark.needs("compiler", "big_memory")
@pytest.mark.usefixtures("nothing_left")
def test_more_than_two_gigabytes(start_source: Start, tmp_path: Path) -> None:
    """More bytes than one process_vm_readv transfers (0x7ffff000), at an odd address."""
    size = (2 << 30) + (64 << 20)
    source = start_source(size, "only-anonymous")
    address = source["anonymous"].address
    with iobmd.copy(source.pid, address + 1, size - 1, wired=False) as buffer:
        for offset in (0, (2 << 30) - PAGE_SIZE, (2 << 30) + 12345, size - 4097):
            assert buffer.readBytes(offset, PAGE_SIZE) == Task(source.pid).read(address + 1 + offset, PAGE_SIZE)
        # The generator has no zero words, so that a page that was not copied would show.
        with memoryview(buffer) as view, view[: (size - 1) // 8 * 8].cast("Q") as words:
            assert 0 not in words[:: kernel.PAGE // 8].tolist()


@needs_compiler
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("size", [100, BIG])
def test_progress_ends_with_the_size(
    size: int, freeze: bool, start_source: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if other threads copy all chunks, as on a busy machine."""
    monkeypatch.setattr(chunked, "threads", lambda _size, _most: 2)
    monkeypatch.setattr(_thread, "start_new_thread", lambda work, arguments: work(*arguments))
    source = start_source(BIG, "only-anonymous")
    seen: list[int] = []
    address = source["anonymous"].address
    iobmd.copy(source.pid, address, size, freeze=freeze, wired=False, progress=seen.append).free()
    assert seen == [size]


@needs_compiler
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    "keywords",
    [{"wired": False}, {"wired": False, "freeze": True}, {"secret": True}, {"wired": False, "shared": True}],
    ids=str,
)
@pytest.mark.parametrize("kind", [ValueError, PermissionError])
def test_an_exception_of_progress_ends_a_copy(
    keywords: dict[str, bool], kind: type[Exception], start_source: Start
) -> None:
    """It is raised as it is, although an OSError may be one of the kernel's."""
    source = start_source(BIG, "only-anonymous")

    size = 100 if "secret" in keywords else BIG

    def stop(_copied: int) -> None:
        raise kind(1, "of the caller")

    with pytest.raises(kind, match="of the caller"):
        iobmd.copy(source.pid, source["anonymous"].address, size, progress=stop, **keywords)


@needs_compiler
@pytest.mark.usefixtures("nothing_left")
def test_interrupt_leaves_nothing(start_source: Start) -> None:
    source = start_source(BIG, "only-anonymous")
    before = len(list(Path("/proc/self/task").iterdir()))

    def interrupt(_copied: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        IOBufferMemoryDescriptor.withCopy(
            kernel_task, LARGE, source.pid, source["anonymous"].address, BIG, progress=interrupt
        )
    # A thread needs a moment to end after its last piece, also one of an earlier copy.
    assert until(lambda: len(list(Path("/proc/self/task").iterdir())) <= before)


@needs_compiler
def test_no_second_copy_of_the_data(start_source: Start) -> None:
    source = start_source(256 << 20, "only-anonymous")
    address, size = source["anonymous"]

    def peak() -> int:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = kernel.status("VmRSS")
        with iobmd.copy(source.pid, address, size, wired=not LARGE):
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
        ((1 << 64) - PAGE_SIZE, PAGE_SIZE, IOReturn.kIOReturnVMError),
        (1 << 63, PAGE_SIZE, IOReturn.kIOReturnVMError),
        (0, PAGE_SIZE, IOReturn.kIOReturnVMError),
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
        IOBufferMemoryDescriptor.withCopy(kernel_task, 0, 2, 0x10000, PAGE_SIZE)
    assert caught.value.code == IOReturn.kIOReturnUnsupported
