"""Buffers at addresses that the caller chooses, and over address space that the caller has reserved."""

import contextlib
import ctypes
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import kernel

import iobmd
from iobmd._native.mapping import Mapping
from iobmd.host import pfns_visible
from iobmd.units import PAGE_SIZE

SIZE = 256 << 10
KINDS = {
    "wired": {},
    "pageable": {"wired": False},
    "purgeable": {"wired": False, "purgeable": True},
    "shared": {"shared": True},
    "shared pageable": {"shared": True, "wired": False},
    "contiguous": {"contiguous": True},
    "contiguous shared": {"contiguous": True, "shared": True},
}
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def areas(start: int, end: int) -> list[tuple[int, int, str]]:
    """Return the areas of /proc/self/maps between two addresses, limited to these: start, end, permissions."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        first, last = (int(number, 16) for number in span.split("-"))
        if first < end and last > start:
            found.append((max(first, start), min(last, end), permissions))
    return found


@pytest.fixture
def reserved() -> Iterator[int]:
    """Reserve four times the size of the buffers; return an address in the reservation, with room on both sides."""
    start = libc.mmap(None, 4 * SIZE, 0, 0x4022, -1, 0)
    assert start not in (None, ctypes.c_void_p(-1).value)
    yield start + SIZE
    assert areas(start, start + 4 * SIZE) == [(start, start + 4 * SIZE, "---p")]  # reserved again
    libc.munmap(start, 4 * SIZE)


@pytest.fixture(params=KINDS)
def keywords(request: pytest.FixtureRequest) -> dict[str, bool]:
    if "contiguous" in request.param and not pfns_visible():
        pytest.skip("frame numbers are hidden")
    return KINDS[request.param]


def test_over_a_reservation(reserved: int, keywords: dict[str, bool]) -> None:
    with iobmd.allocate(SIZE, address=reserved, overwrite=True, **keywords) as buffer:
        assert buffer.getBytesNoCopy() == reserved
        assert [area[2][:2] for area in areas(reserved, reserved + SIZE)] == ["rw"] * len(
            areas(reserved, reserved + SIZE)
        )
        assert areas(reserved - SIZE, reserved) == [(reserved - SIZE, reserved, "---p")]
        assert not any(buffer.readBytes(0, SIZE))
        ctypes.memmove(reserved + 5000, b"stored there", 12)
        assert buffer.readBytes(5000, 12) == b"stored there"
        if keywords.get("wired", True):
            assert kernel.present(reserved, SIZE) == SIZE // PAGE_SIZE
            assert kernel.smaps(reserved)["Locked"] > 0
            if pfns_visible() and buffer.wiring is iobmd.Wiring.PINNED:
                buffer.verify()
        if keywords.get("contiguous"):
            frames = kernel.frames(reserved, SIZE)
            assert frames == list(range(frames[0], frames[0] + len(frames)))
            assert buffer.getPhysicalAddress() == frames[0] * PAGE_SIZE


def test_again_and_again(reserved: int) -> None:
    """When a buffer is freed, its range is reserved as before, so that nothing else is mapped into it."""
    for _ in range(3):
        buffer = iobmd.allocate(SIZE, address=reserved, overwrite=True)
        view = memoryview(buffer)
        buffer.__exit__(None, None, None)
        assert areas(reserved, reserved + SIZE)[0][2].startswith("rw")
        view.release()
        assert areas(reserved, reserved + SIZE) == [(reserved, reserved + SIZE, "---p")]


def test_where_nothing_is_mapped(keywords: dict[str, bool]) -> None:
    start = libc.mmap(None, SIZE, 0, 0x4022, -1, 0)
    libc.munmap(start, SIZE)
    with iobmd.allocate(SIZE, address=start, **keywords) as buffer:
        assert buffer.getBytesNoCopy() == start
        with pytest.raises(iobmd.NoResourcesError, match="memory is mapped there"):
            iobmd.allocate(SIZE, address=start, **keywords)
        buffer.writeBytes(100, b"unharmed")
        with pytest.raises(iobmd.BadArgumentError, match="not reserved"):
            iobmd.allocate(SIZE, address=start, overwrite=True, **keywords)
        assert buffer.readBytes(100, 8) == b"unharmed"
    assert not areas(start, start + SIZE)


def test_memory_in_use_is_never_replaced(reserved: int) -> None:
    """Only one page of the range does not belong to the caller's reservation."""
    foreign = libc.mmap(reserved + SIZE // 2, PAGE_SIZE, 3, 0x32, -1, 0)
    ctypes.memset(foreign, 7, PAGE_SIZE)
    locked = kernel.status("VmLck")
    with pytest.raises(iobmd.BadArgumentError, match=f"not reserved at {foreign:#x}"):
        iobmd.allocate(SIZE, address=reserved, overwrite=True)
    assert ctypes.string_at(foreign, PAGE_SIZE) == b"\7" * PAGE_SIZE
    assert kernel.status("VmLck") == locked
    libc.mmap(foreign, PAGE_SIZE, 0, 0x4032, -1, 0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"address": 4097}, "not a multiple of 4096"),
        ({"address": -PAGE_SIZE}, "can begin at"),
        ({"address": 1 << 63}, "can begin at"),
        ({"address": 1 << 21, "alignment": 1 << 22, "wired": True}, "not a multiple"),
        ({"overwrite": True}, "pass address="),
        ({"address": 1 << 30, "task": None, "wired": False}, "no task"),
        ({"protection": "rx"}, "another task"),
        ({"protection": "x"}, "one of r, rw, rx, rwx"),
    ],
    ids=str,
)
def test_refused(keywords: dict[str, object], message: str) -> None:
    with pytest.raises(iobmd.BadArgumentError, match=message):
        iobmd.allocate(SIZE, **keywords)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="address must be an integer"):
        iobmd.allocate(SIZE, address="", wired=False)  # type: ignore[arg-type]


LARGE = 64 << 20  # Python's own allocations are small in comparison
LOW = 1 << 36  # the kernel maps nothing here on its own, so that a gap remains a gap
FAILURES = {
    "mask": (SIZE, {"physical_mask": 0x3000}),  # the first frames, which belong to the firmware
    "limit": (LARGE, {"wired": False}),
    "limit of shared memory": (LARGE, {"wired": False, "shared": True}),
}


@contextlib.contextmanager
def limited(room: int) -> Iterator[None]:
    """Limit the address space to its present size plus `room` bytes (RLIMIT_AS)."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (kernel.status("VmSize") + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("overwrite", [True, False])
def test_failure_leaves_the_addresses_to_the_caller(failure: str, overwrite: bool) -> None:
    """They are as before when the exception is raised, and memory that is mapped there in `except` remains."""
    size, keywords = FAILURES[failure]
    if failure == "mask" and not pfns_visible():
        pytest.skip("frame numbers are hidden")
    start = libc.mmap(LOW, size, 0, 0x4022, -1, 0)
    if not overwrite:
        libc.munmap(start, size)
    before = areas(start, start + size)
    with pytest.raises(iobmd.IOReturnError) as caught:
        try:
            with limited(size // 2 + (0 if overwrite else size)) if size == LARGE else contextlib.nullcontext():
                iobmd.allocate(size, address=start, overwrite=overwrite, **keywords)  # type: ignore[arg-type]
        except iobmd.IOReturnError:
            assert areas(start, start + size) == before
            with iobmd.allocate(size, address=start, overwrite=overwrite, wired=False) as again:
                assert again.getBytesNoCopy() == start
            assert areas(start, start + size) == before
            libc.mmap(start, size, 3, 0x32, -1, 0)
            ctypes.memset(start, 7, SIZE)
            raise
    del caught
    gc.collect()
    assert areas(start, start + size) == [(start, start + size, "rw-p")]
    assert ctypes.string_at(start, SIZE) == b"\7" * SIZE
    libc.munmap(start, size)


@pytest.mark.parametrize("overwrite", [True, False])
def test_failure_midway(overwrite: bool) -> None:
    """If the second part of the memory cannot be moved, the first part does not remain at the address."""
    start = libc.mmap(LOW, 4 * SIZE, 0, 0x4022, -1, 0)
    mapping = Mapping.anonymous(2 * SIZE, PAGE_SIZE)
    if not overwrite:
        libc.munmap(start + SIZE, 2 * SIZE)
    before = areas(start, start + 4 * SIZE)
    space = Mapping.space(start + SIZE, 2 * SIZE, overwrite)
    libc.munmap(mapping.address + SIZE, SIZE)  # mremap(2) fails there: EFAULT
    with pytest.raises(OSError, match="mremap"):
        mapping.move(space)
    assert areas(start, start + 4 * SIZE) == before
    space.close()
    mapping.close()
    assert areas(start, start + 4 * SIZE) == before
    libc.munmap(start, 4 * SIZE)
