"""Freed memory that is kept for reuse: what the kernel may do with it, who gets it, and what they find in it."""

import ctypes
import mmap
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from support import kernel
from support.child import in_child
from support.errors import error_of
from support.purging import take
from support.rawmemory import map_memory, protect, unmap
from support.source_process import SourceProcess

import iobmd
from iobmd import BadArgumentError, IOReturn
from iobmd._native import mman
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
KINDS: dict[str, dict[str, object]] = {
    "contiguous 64 KiB": {"size": 64 << 10, "contiguous": True},
    "contiguous 2 MiB": {"size": 2 * MIB, "contiguous": True},
    "aligned 64 KiB": {"size": 64 << 10, "alignment": 64 << 10},
    "below 1 TiB": {"size": 64 << 10, "physical_mask": (1 << 40) - 1},
    "wired 1 MiB": {"size": MIB},
    "wired 5 MiB": {"size": 5 * MIB},
}
NEEDS_FRAMES = pytest.mark.needs("frames")
Buffer = iobmd.IOBufferMemoryDescriptor


def allocate(kind: str, **keywords: object) -> Buffer:
    return iobmd.allocate(**(KINDS[kind] | keywords))  # type: ignore[arg-type]


def fill(buffer: Buffer, byte: int = 0xA5) -> int:
    """Fill a buffer through its address; return that."""
    address = buffer.getBytesNoCopy()
    ctypes.memset(address, byte, len(buffer))
    return address


def is_zero(buffer: Buffer) -> bool:
    """Return whether whole pages of a buffer are zero, read through the kernel."""
    size = -(-len(buffer) // kernel.PAGE) * kernel.PAGE
    return not any(iobmd.kernel_task.read(buffer.getBytesNoCopy(), size))


def is_mapped(address: int, size: int) -> bool:
    """Return whether a page of a range is mapped (mincore(2))."""
    for page in range(address, address + size, kernel.PAGE):
        try:
            mman.incore(page, 1, kernel.PAGE)
        except OSError:
            continue
        return True
    return False


@NEEDS_FRAMES
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_owner_gets_it_cleared(kind: str) -> None:
    with allocate(kind) as buffer:
        address, frames = fill(buffer), kernel.frames_of(buffer)
        set_by_owner = [mman.MADV_NOHUGEPAGE, 16, 18]  # 16: MADV_DONTDUMP, 18: MADV_WIPEONFORK
        for advice in set_by_owner[1:] if buffer.getCapacity() >= 2 * MIB else set_by_owner:
            mman.advise(address, len(buffer), advice)
    assert iobmd.statistics().kept == len(frames) * kernel.PAGE
    with allocate(kind) as again:
        assert again.getBytesNoCopy() == address
        assert kernel.frames_of(again) == frames
        assert is_zero(again)
        again.verify()
        assert again.wiring is iobmd.Wiring.PINNED
        flags = kernel.smaps(address)
        assert flags["Locked"] >= len(again)
        again.writeBytes(0, b"inherited")
        assert in_child(lambda: ctypes.string_at(address, 9)) == b"inherited"  # neither wiped nor absent


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=NEEDS_FRAMES) if "physical_mask" in KINDS[kind] else kind for kind in KINDS]
)
def test_it_is_lazily_freed_and_not_wired(kind: str) -> None:
    locked, pinned = kernel.status("VmLck"), kernel.status("VmPin")
    with allocate(kind) as buffer:
        address, size = fill(buffer), len(buffer)
    assert kernel.status("VmLck") == locked
    assert kernel.pinned(pinned) == pinned
    counters = kernel.smaps(address)
    if counters["Rss"] >= MIB:  # pages of a per-CPU batch are skipped
        assert counters["LazyFree"] >= size // 2
    assert iobmd.statistics().kept == size


@NEEDS_FRAMES
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_may_take_it(kind: str) -> None:
    for part in (1, 2):  # all of it, and half
        with allocate(kind) as buffer:
            address, size = fill(buffer), len(buffer)
        take(address, size // part)
        with allocate(kind) as again:
            assert is_zero(again)
            again.verify()
            assert [tuple(segment) for segment in again.segments()] == merged(kernel.frames_of(again))
            if again.getBytesNoCopy() != address:
                assert KINDS[kind].keys() & {"contiguous", "alignment"}, "found again by a search only"


def merged(frames: list[int]) -> list[tuple[int, int]]:
    """Return the runs of consecutive frames, as addresses and lengths."""
    runs: list[tuple[int, int]] = []
    for frame in frames:
        start, length = runs[-1] if runs else (0, 0)
        if runs and start + length == frame * kernel.PAGE:
            runs[-1] = (start, length + kernel.PAGE)
        else:
            runs.append((frame * kernel.PAGE, kernel.PAGE))
    return runs


def test_trim_returns_it() -> None:
    with iobmd.allocate(4 * MIB) as buffer, iobmd.allocate(MIB, contiguous=True) as other:
        addresses = [(fill(one), len(one)) for one in (buffer, other)]
    assert iobmd.statistics().kept == 5 * MIB
    assert all(is_mapped(*where) for where in addresses)
    assert iobmd.trim() == 5 * MIB
    assert not any(is_mapped(*where) for where in addresses)
    assert iobmd.statistics().kept == 0


def test_a_forked_child_does_not_inherit_it() -> None:
    with iobmd.allocate(4 * MIB) as buffer:
        address = fill(buffer)

    def child() -> tuple[bool, int, bool]:
        absent, kept = not is_mapped(address, 4 * MIB), iobmd.statistics().kept
        other = map_memory(4 * MIB, at=address)  # its own memory, which must not be unmapped
        ctypes.memset(other, 7, 4 * MIB)
        with iobmd.allocate(4 * MIB) as own:
            zero = is_zero(own)
        iobmd.trim()
        return absent, kept, zero and ctypes.string_at(other, 2) == b"\7\7"

    assert in_child(child) == (True, 0, True)
    with iobmd.allocate(4 * MIB) as again:
        assert again.getBytesNoCopy() == address
        assert is_zero(again)


def test_the_limit() -> None:
    with iobmd.policy(keep=0):
        buffer = iobmd.allocate(4 * MIB)
    address = fill(buffer)
    buffer.free()
    assert not is_mapped(address, 4 * MIB)
    assert iobmd.statistics().kept == 0
    with iobmd.policy(keep=3 * MIB):
        for size in (MIB, 2 * MIB, 4 * MIB):
            iobmd.allocate(size).free()
        assert iobmd.statistics().kept == 3 * MIB  # the first two; the third exceeds the limit
        iobmd.allocate(MIB + PAGE_SIZE).free()
        assert iobmd.statistics().kept == MIB + PAGE_SIZE  # the oldest make room
        iobmd.allocate(64 << 10, contiguous=True).free()
        iobmd.allocate(3 * MIB).free()
        assert iobmd.statistics().kept == MIB + PAGE_SIZE + (64 << 10), "memory that was searched for is kept longest"


class Unsigned(int):
    """An integer of 32 bits whose differences wrap around, like NumPy's."""

    def __rsub__(self, other: int) -> int:
        return other - int(self) & 0xFFFFFFFF


def test_a_limit_of_another_integer_type() -> None:
    with iobmd.policy(keep=Unsigned(2 * MIB)):
        iobmd.allocate(MIB).free()
    assert iobmd.statistics().kept == MIB


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"keep": -1}, "keep must be 0 or more, not -1"),
        ({"memory_budget": -1}, "memory_budget must be 0 or more"),
        ({"time_budget": -0.5}, "time_budget must be 0 or more"),
        ({"time_budget": float("nan")}, "time_budget must be 0 or more, not nan"),  # a search without an end
        ({"keep": 1.5}, "keep must be an integer"),
        ({"memory_budget": ""}, "memory_budget must be an integer"),
        ({"time_budget": ""}, "time_budget must be a number"),
        ({"reserve": "no"}, "reserve must be True or False"),  # it would permit changes of the host
    ],
    ids=str,
)
def test_wrong_policies_are_refused(wrong: dict[str, object], expected: str) -> None:
    with pytest.raises((TypeError, BadArgumentError), match=expected):
        iobmd.policy(**wrong).__enter__()  # type: ignore[arg-type]


def test_a_view_delays_it() -> None:
    with iobmd.allocate(4 * MIB) as buffer:
        address, view = fill(buffer), memoryview(buffer)
    assert iobmd.statistics().kept == 0
    with iobmd.allocate(4 * MIB) as other:
        assert other.getBytesNoCopy() != address
        assert view[0] == 0xA5
    view.release()


def test_memory_that_is_not_private_is_not_kept() -> None:
    iobmd.trim()
    iobmd.allocate(4 * MIB, shared=True).free()
    iobmd.allocate(4 * MIB, wired=False, purgeable=True).free()
    Buffer.inTaskWithGuardPages(iobmd.kernel_task, 0, 4 * MIB).free()
    Buffer.inTaskWithOptions(iobmd.kernel_task, 0, 4 * MIB, 1, 7).free()  # its name would remain
    assert iobmd.statistics().kept == 0


def unmap_a_page(address: int) -> None:
    unmap(address + MIB, kernel.PAGE)


def protect_a_page(address: int) -> None:
    protect(address + MIB, kernel.PAGE, mmap.PROT_READ)


def replace_a_page(address: int) -> None:
    unmap_a_page(address)
    map_memory(kernel.PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, at=address + MIB)
    ctypes.memset(address + MIB, 0x5A, kernel.PAGE)


@pytest.mark.parametrize("kept", [False, True], ids=["before it is freed", "while it is kept"])
@pytest.mark.parametrize("change", [unmap_a_page, protect_a_page, replace_a_page])
def test_memory_that_the_program_changed_is_not_reused(change: Callable[[int], None], kept: bool) -> None:
    def work() -> tuple[bool, bytes]:
        buffer = iobmd.allocate(4 * MIB)
        address = fill(buffer)
        if not kept:
            change(address)
        buffer.free()
        if kept:
            change(address)
        with iobmd.allocate(4 * MIB) as again:
            zero = is_zero(again)
            fill(again)
            left = ctypes.string_at(address + MIB, 4) if change is replace_a_page else b""
        return zero, left

    assert in_child(work) == (True, b"ZZZZ" if change is replace_a_page else b"")


def test_it_is_freed_before_an_allocation_is_refused() -> None:
    """The address space is limited to a little more than the process has, and all of that is kept."""

    sizes = [4 * MIB - kernel.PAGE * count for count in range(32)]  # of different kinds: none is used again

    def work() -> tuple[int, int, int]:
        for size in sizes:
            with iobmd.allocate(size) as buffer:
                fill(buffer)
        kept = iobmd.statistics().kept
        limit = kernel.status("VmSize") + 32 * MIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with iobmd.allocate(100 * MIB, wired=False) as buffer:
            fill(buffer)
            left = iobmd.statistics().kept
        refused = error_of(lambda: iobmd.allocate(1 << 30, wired=False)).code
        return kept, left, refused

    kept, left, refused = in_child(work)
    assert kept == sum(sizes)
    assert left == 0
    assert refused == IOReturn.kIOReturnNoMemory


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("wired", [False, True])
@pytest.mark.parametrize("kind", ["anonymous", "thp", "memfd", "untouched"])
def test_a_copy_into_kept_memory_is_exact(start_source: Callable[..., SourceProcess], kind: str, wired: bool) -> None:
    source = start_source(4 * MIB)
    address, size = source[kind]
    for cut in (0, 1, kernel.PAGE + 3):  # the end of the last page is cleared too
        expected = iobmd.Task(source.pid).read(address, size - cut)
        with iobmd.allocate(size - cut) as buffer:
            before = fill(buffer)
        with iobmd.copy(source.pid, address, size - cut, wired=wired) as copied:
            reused = copied.getBytesNoCopy() == before
            assert bytes(copied) == expected
            pages = -(-len(copied) // kernel.PAGE) * kernel.PAGE
            assert not any(iobmd.kernel_task.read(copied.getBytesNoCopy() + len(copied), pages - len(copied)))
        assert reused or (kind == "untouched" and not wired)
        iobmd.trim()


def test_a_sparse_copy_is_as_sparse_as_its_source() -> None:
    size = 8 * MIB
    with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as source:
        source.madvise(mmap.MADV_NOHUGEPAGE)
        for present in (range(0, size, kernel.PAGE), range(0, size, kernel.PAGE * 16)):
            for offset in present:
                source[offset] = 1 + offset // kernel.PAGE % 200
            hole = (MIB + 3 * kernel.PAGE, 64 * kernel.PAGE)
            source.madvise(mmap.MADV_DONTNEED, *hole)
            with iobmd.allocate(size) as buffer:
                before = fill(buffer)
            at = ctypes.addressof(ctypes.c_char.from_buffer(source))
            with iobmd.copy(os.getpid(), at, size, wired=False) as copied:
                resident = kernel.present(copied.getBytesNoCopy(), size)
                assert copied.getBytesNoCopy() == before or present.step > kernel.PAGE
                assert bytes(copied) == source[:]
            assert resident == len([offset for offset in present if not hole[0] <= offset < sum(hole)])
            source.madvise(mmap.MADV_DONTNEED)
            iobmd.trim()


def test_unreadable_bytes_of_a_copy_are_zero() -> None:
    at = map_memory(4 * MIB)
    ctypes.memset(at, 3, 4 * MIB)
    unmap(at + MIB, kernel.PAGE)
    for wired in (False, True):
        with iobmd.allocate(4 * MIB) as buffer:
            fill(buffer)
        with iobmd.copy(os.getpid(), at, 4 * MIB, wired=wired, unreadable="zero") as copied:
            assert copied.holes == [(MIB, kernel.PAGE)]
            assert bytes(copied) == b"\3" * MIB + bytes(kernel.PAGE) + b"\3" * (3 * MIB - kernel.PAGE)
        iobmd.trim()
    unmap(at, MIB)
    unmap(at + MIB + kernel.PAGE, 3 * MIB - kernel.PAGE)


def test_a_failed_copy_leaves_nothing() -> None:
    at = map_memory(4 * MIB)
    ctypes.memset(at, 3, 4 * MIB)
    protect(at + 2 * MIB, kernel.PAGE, 0)
    with iobmd.allocate(4 * MIB) as buffer:
        address = fill(buffer)
    error = error_of(lambda: iobmd.copy(os.getpid(), at, 4 * MIB))
    assert (error.code, error.address) == (IOReturn.kIOReturnVMError, at + 2 * MIB)
    assert not is_mapped(address, 4 * MIB)
    unmap(at, 4 * MIB)


@pytest.mark.parametrize("size", [100, PAGE_SIZE, 256 << 10, 4 * MIB])
def test_use_after_free_faults_without_reuse(size: int) -> None:
    program = f"""
import ctypes, iobmd
buffer = iobmd.allocate({size})
address = buffer.getBytesNoCopy()
ctypes.memset(address, 1, {size})
buffer.free()
for _ in range(20):
    with iobmd.allocate({size}) as other:
        assert not other.getBytesNoCopy() <= address < other.getBytesNoCopy() + {size}
assert iobmd.statistics().kept == 0
print("faults now", flush=True)
ctypes.memset(address, 1, 1)
"""
    environment = os.environ | {"IOBMD_NO_REUSE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == "faults now\n", done.stderr
    assert done.returncode == -signal.SIGSEGV
