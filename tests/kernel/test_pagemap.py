"""`iobmd.pagemap` compared with an independent reader of a few lines, and its treatment of hidden frames."""

import ctypes
import errno
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support import kernel
from support.child import NOBODY, in_child
from support.moving import again_if_pages_move
from support.source_process import SourceProcess

import iobmd
from iobmd import IOReturn, IOReturnError, Task, kernel_task, pagemap
from iobmd._native import mman
from iobmd._native import pagemap as native
from iobmd._native.mapping import Mapping
from iobmd.pagemap.reader import Reader
from iobmd.pagemap.span import read_runs
from iobmd.units import PAGE_SIZE

Start = Callable[..., SourceProcess]

HUGE = 2 << 20
MADV_GUARD_INSTALL = 102
MREMAP_MAYMOVE_FIXED_DONTUNMAP = 7


def independent(address: int, size: int, pid: int | str = "self") -> list[tuple[bool, bool, int | None, bool, bool]]:
    """Decode entries according to the table of proc_pid_pagemap(5)."""
    return [
        (bool(e >> 63), bool(e >> 62 & 1), (e & kernel.FRAME or None) if e >> 63 else None, bool(e >> 61 & 1),
         bool(e >> 56 & 1))
        for e in kernel.entries(address, size, pid)
    ]  # fmt: skip


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("kind", ["anonymous", "thp", "memfd", "file", "readonly", "stack", "untouched"])
@again_if_pages_move
def test_every_page_as_an_independent_reader_sees_it(start_source: Start, kind: str) -> None:
    source = start_source(40 << 20)  # more pages than one read of pagemap returns
    region = source[kind]
    ours = list(pagemap.pages(source.pid, *region))
    assert [tuple(page[1:6]) for page in ours] == independent(*region, source.pid)
    assert [page.address for page in ours] == list(
        range(region.address // PAGE_SIZE * PAGE_SIZE, region.address + region.size, PAGE_SIZE)
    )
    counts = pagemap.counts(Task(source.pid), *region)
    assert counts.present == sum(page.present for page in ours)
    assert counts.exclusive == sum(page.present and page.exclusive for page in ours)
    assert counts.hidden == sum(page.pfn_hidden for page in ours)
    assert (counts.present > 0) == (kind != "untouched")
    assert {page.file_or_shared for page in ours if page.present} <= {kind in ("memfd", "file")}


@pytest.mark.needs("frames")
def test_frames_are_shown_to_root() -> None:
    with iobmd.allocate(64 << 10) as buffer:
        pages = list(pagemap.pages(kernel_task, buffer.getBytesNoCopy(), 64 << 10))
        assert all(page.pfn and page.physical_address == page.pfn * PAGE_SIZE for page in pages)
        assert len({page.pfn for page in pages}) == 16


def test_hidden_frames_are_never_zero() -> None:
    def look() -> list[tuple[int | None, bool, int | None]]:
        with iobmd.allocate(16 << 10) as buffer:
            found = list(pagemap.pages(os.getpid(), buffer.getBytesNoCopy(), 16 << 10))
            assert pagemap.counts(kernel_task, buffer.getBytesNoCopy(), 16 << 10).hidden == 4
        return [(page.pfn, page.pfn_hidden, page.physical_address) for page in found if page.present]

    assert in_child(look, uid=NOBODY) == [(None, True, None)] * 4


@pytest.mark.needs("swap")
@pytest.mark.usefixtures("swap")
def test_swapped_pages() -> None:
    with iobmd.allocate(1 << 20, wired=False) as buffer:
        address, size = buffer.getBytesNoCopy(), len(buffer)
        buffer.writeBytes(0, os.urandom(size))
        mman.advise(address, size, mman.MADV_PAGEOUT)
        counts = pagemap.counts(kernel_task, address, size)
        assert counts.swapped == kernel.swapped(address, size) > 200
        assert all(page.pfn is None for page in pagemap.pages(kernel_task, address, size) if page.swapped)
        # Half of it is swapped in: only resident pages count as resident and dirty.
        buffer.readBytes(0, size // 2)
        assert buffer.getPageCounts()[0] == kernel.present(address, size) < 256


def test_guard_pages_are_not_swapped() -> None:
    """MADV_GUARD_INSTALL (102, Linux 6.13) leaves a marker that looks like a swap entry."""
    with iobmd.allocate(4 * PAGE_SIZE, wired=False) as buffer:
        buffer.writeBytes(0, b"x" * len(buffer))
        try:
            mman.advise(buffer.getBytesNoCopy() + PAGE_SIZE, PAGE_SIZE, 102)
        except OSError as error:
            pytest.skip(f"no guard pages on this kernel: {error}")
        pages = list(pagemap.pages(kernel_task, buffer.getBytesNoCopy(), len(buffer)))
        assert [page.guard for page in pages] == [False, True, False, False]
        assert not any(page.swapped for page in pages)
        assert pagemap.counts(kernel_task, buffer.getBytesNoCopy(), len(buffer)).swapped == 0


@pytest.mark.needs("frames")
def test_what_lies_nowhere_is_not_in_the_first_frames() -> None:
    size = 8 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        try:
            area.madvise(MADV_GUARD_INSTALL)
        except OSError:
            pytest.skip("no MADV_GUARD_INSTALL (Linux 6.13)")
        assert os.getpid() not in {use.pid for use in pagemap.users(PAGE_SIZE, size - PAGE_SIZE)}


@pytest.mark.needs("frames", "big_memory")
def test_huge_pages_that_are_neighbours_in_memory_alone() -> None:
    """Two areas with contiguous frames: the second begins with the frame after the last one of the first."""
    mremap = ctypes.CDLL(None, use_errno=True).mremap
    mremap.restype, mremap.argtypes = ctypes.c_long, [ctypes.c_long] * 5
    # Enough pages that some have adjacent frames even if free memory is fragmented.
    with closing(Mapping.anonymous(1 << 30, HUGE)) as area, closing(Mapping.anonymous(16 << 20, HUGE)) as apart:
        mman.advise(area.address, area.size, mman.MADV_HUGEPAGE)
        mman.advise(area.address, area.size, mman.MADV_POPULATE_WRITE)
        places = {
            (kernel.entries(address, PAGE_SIZE)[0] & kernel.FRAME) * PAGE_SIZE: address
            for address in range(area.address, area.address + area.size, HUGE)
        }
        first = next(frame for frame in places if frame + HUGE in places)
        wanted = [(apart.address, first, HUGE), (apart.address + (8 << 20), first + HUGE, HUGE)]
        for address, frame, length in wanted:
            moved = mremap(places[frame], length, length, MREMAP_MAYMOVE_FIXED_DONTUNMAP, address)
            assert moved == address, ctypes.get_errno()
        with Reader(kernel_task) as reader:
            found = read_runs(reader, [(address, address + length) for address, _frame, length in wanted])
            assert list(found) == wanted


@pytest.mark.parametrize("before", [0, 1, 100, 4095, PAGE_SIZE, 5000])
@pytest.mark.parametrize("after", [0, 1, 5000])
def test_many_small_areas(before: int, after: int) -> None:
    """Small areas are read several at once, even if the range begins and ends inside a page."""
    pages = 600
    with iobmd.allocate(pages * PAGE_SIZE, wired=False) as buffer:
        address = buffer.getBytesNoCopy()
        mman.advise(address, pages * PAGE_SIZE, mman.MADV_NOHUGEPAGE)
        for number in range(0, pages, 3):
            buffer.writeBytes(number * PAGE_SIZE, b"x")
        for number in range(0, pages, 2):
            mman.advise(address + number * PAGE_SIZE, PAGE_SIZE, mmap.MADV_DONTFORK)
        low, high = address + before, address + pages * PAGE_SIZE - after
        found = list(pagemap.areas(kernel_task, low, high - low))
        frames = {
            address + number * PAGE_SIZE: entry & kernel.FRAME
            for number, entry in enumerate(kernel.entries(address, pages * PAGE_SIZE))
            if entry >> 63
        }
    assert len(found) == pages - before // PAGE_SIZE - after // PAGE_SIZE
    assert (found[0].start, found[-1].end) == (low, high)
    for area in found:
        (page,) = range(area.start // PAGE_SIZE * PAGE_SIZE, area.end, PAGE_SIZE)
        assert area.tally.present == (PAGE_SIZE if page in frames else 0)
        assert area.tally.largest == (PAGE_SIZE if frames.get(page) else 0)


def test_what_was_read_ahead_is_not_kept() -> None:
    with iobmd.allocate(64 << 10, wired=False) as buffer, Reader(kernel_task) as reader:
        address = buffer.getBytesNoCopy()
        mman.advise(address, 64 << 10, mman.MADV_NOHUGEPAGE)
        buffer.writeBytes(0, bytes(64 << 10))
        before, _rest = reader.totals([(address, address + PAGE_SIZE), (address + PAGE_SIZE, address + (64 << 10))])
        mman.advise(address, 64 << 10, mmap.MADV_DONTNEED)
        assert (before.present, reader.total(address, address + PAGE_SIZE).present) == (PAGE_SIZE, 0)


@pytest.mark.parametrize("address", [1 << 63, 0xFFFFFFFFFF600000, (1 << 64) - 8192])
def test_above_all_of_user_space(address: int) -> None:
    """The end of the address space is reported even if another step would exceed the last address."""

    def look() -> IOReturn:
        with pytest.raises(IOReturnError) as caught:
            list(pagemap.spans(kernel_task, address, PAGE_SIZE))
        return caught.value.code

    assert in_child(look) == IOReturn.kIOReturnBadArgument


TOP = 0x7FFFFFFFF000
"""The end of user space with four levels of page tables (x86-64, TASK_SIZE)."""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="user space has another end")
@pytest.mark.parametrize("look", [pagemap.spans, pytest.param(pagemap.runs, marks=pytest.mark.needs("frames"))])
def test_ranges_across_the_end_of_user_space(look: Callable[..., Iterator[object]]) -> None:
    for start, size in (
        (0, TOP + PAGE_SIZE),
        (TOP - PAGE_SIZE, 8192),
        (0, (1 << 64) - 1),
        ((1 << 64) - PAGE_SIZE, PAGE_SIZE),
    ):
        with pytest.raises(IOReturnError, match="past the end of the user address space") as caught:
            list(look(kernel_task, start, size))
        assert caught.value.code == IOReturn.kIOReturnBadArgument


def test_what_is_empty_holds_nothing() -> None:
    buffer = bytearray(b"x" * 8192)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    for look in (pagemap.spans, pagemap.areas):
        assert list(look(buffer))
        assert not list(look(kernel_task, address, 0))
        assert not list(look(kernel_task, address + 5, 0))
        assert not list(look(b""))


MAIN_THREAD_ENDS = """
import ctypes, os, threading
from iobmd import kernel_task, pagemap
main = threading.get_native_id()
def look():
    while "Z" not in open(f"/proc/self/task/{main}/stat").read():
        pass
    data = b"x" * (1 << 20)
    held = sum(area.resident for area in pagemap.areas(data))
    print(held >= 1 << 20, sum(span.length for span in pagemap.spans(kernel_task)) > held, flush=True)
    os._exit(0)
threading.Thread(target=look).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_looks_at_itself_after_its_main_thread() -> None:
    done = subprocess.run([sys.executable, "-c", MAIN_THREAD_ENDS], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


def without_main_thread(source: SourceProcess) -> int:
    """End the main thread, and return the id of another."""
    source.command("leader-exit")
    while kernel.status("VmRSS", source.pid):
        pass
    return next(int(one.name) for one in Path(f"/proc/{source.pid}/task").iterdir() if one.name != str(source.pid))


@pytest.mark.needs("compiler")
@again_if_pages_move
def test_memory_of_threads_whose_main_thread_has_exited(start_source: Start) -> None:
    source = start_source()
    thread = without_main_thread(source)
    for kind in ("anonymous", "thp", "memfd", "untouched"):
        pages = [tuple(page[1:6]) for page in pagemap.pages(source.pid, *source[kind])]
        assert pages == independent(*source[kind], thread)
        start = source[kind].address
        (area,) = (area for area in pagemap.areas(source.pid) if area.start <= start < area.end)
        assert area.resident == kernel.smaps(start, thread)["Rss"]
        assert (area.resident > 0) == (kind != "untouched")
        assert area.locked == area.swapped == 0, "smaps was read"


@pytest.mark.needs("compiler", "frames")
@again_if_pages_move
def test_frames_of_threads_whose_main_thread_has_exited(start_source: Start) -> None:
    source = start_source()
    start, size = source["anonymous"]
    node = next(pagemap.described(source.pid, start, size)).facts.node
    thread = without_main_thread(source)
    run, facts = next(pagemap.described(source.pid, start, size))
    assert run.physical // PAGE_SIZE == kernel.entries(start, PAGE_SIZE, thread)[0] & kernel.FRAME
    assert facts.node == node
    assert [(use.pid, use.virtual) for use in pagemap.users(run.physical, PAGE_SIZE)] == [(source.pid, start)]


@pytest.mark.usefixtures("nothing_left")
def test_what_it_refuses() -> None:
    child = subprocess.Popen(["sleep", "60"])
    task = Task(child.pid)
    child.kill()
    child.wait()

    def code(target: Task | int, address: int) -> IOReturn:
        with pytest.raises(IOReturnError) as caught:
            pagemap.counts(target, address, PAGE_SIZE)
        return caught.value.code

    assert code(task, 0x400000) == IOReturn.kIOReturnNotFound
    assert code(kernel_task, 1 << 63) == IOReturn.kIOReturnBadArgument
    assert code(kernel_task, -PAGE_SIZE) == IOReturn.kIOReturnBadArgument
    assert code(2, 0x400000) == IOReturn.kIOReturnUnsupported
    with pytest.raises(IOReturnError, match="outside the 64-bit address space"):
        pagemap.huge_bytes(-1, PAGE_SIZE)
    with pytest.raises(TypeError, match="before must be of type Snapshot"):
        next(pagemap.changes(bytearray(1), bytearray(1)))  # type: ignore[arg-type]


@pytest.mark.needs("numpy", "root")
def test_narrow_integers() -> None:
    """Their sums would wrap around."""
    import numpy

    pages = pagemap.pages(kernel_task, numpy.uint8(200), PAGE_SIZE)
    assert [page.address for page in pages] == [0, PAGE_SIZE]
    assert not list(pagemap.users(numpy.uint64((1 << 64) - 1), numpy.uint8(0)))


@pytest.mark.needs("root")
def test_another_users_pagemap() -> None:
    with pytest.raises(PermissionError, match="pagemap of task 1") as caught:
        in_child(lambda: pagemap.counts(1, 0x400000, PAGE_SIZE), uid=NOBODY)
    assert caught.value.code == IOReturn.kIOReturnNotPermitted


def no_scan(*_arguments: object) -> list[tuple[int, int]]:
    raise OSError(errno.ENOTTY, "ioctl: no PAGEMAP_SCAN before Linux 6.7")


@pytest.mark.parametrize("scans", [True, False], ids=["PAGEMAP_SCAN", "smaps"])
def test_huge_pages_are_counted_with_and_without_pagemap_scan(monkeypatch: pytest.MonkeyPatch, scans: bool) -> None:
    if not scans:
        monkeypatch.setattr(native, "scan", no_scan)
    with iobmd.allocate(8 << 20, wired=False) as buffer:
        address = buffer.getBytesNoCopy()
        mman.advise(address, 4 << 20, mman.MADV_HUGEPAGE)
        mman.advise(address + (4 << 20), 4 << 20, mman.MADV_NOHUGEPAGE)
        mman.advise(address, 8 << 20, mman.MADV_POPULATE_WRITE)
        if not kernel.smaps(address)["AnonHugePages"]:
            pytest.skip("the kernel has no huge page")
        assert pagemap.huge_bytes(address, 8 << 20) == 4 << 20
        assert pagemap.is_huge(address, 4 << 20)
        assert not pagemap.is_huge(address, 8 << 20)
        assert pagemap.huge_bytes(address + (4 << 20), 4 << 20) == 0


@pytest.mark.needs("root")
@pytest.mark.parametrize("scans", [True, False], ids=["PAGEMAP_SCAN", "smaps"])
def test_huge_pages_of_a_tmpfs_are_counted(monkeypatch: pytest.MonkeyPatch, scans: bool) -> None:
    if not scans:
        monkeypatch.setattr(native, "scan", no_scan)
    with iobmd.allocate(4 << 20, shared=True) as buffer:
        mapped = kernel.smaps(buffer.getBytesNoCopy())["ShmemPmdMapped"]
        if not mapped:
            pytest.skip("the kernel has no huge page")
        assert buffer.layout().huge == mapped


@pytest.mark.needs("hugetlb")
@pytest.mark.usefixtures("hugetlb_pool")
@pytest.mark.parametrize("scans", [True, False], ids=["PAGEMAP_SCAN", "smaps"])
def test_pages_of_a_pool_are_counted(monkeypatch: pytest.MonkeyPatch, scans: bool) -> None:
    if not scans:
        monkeypatch.setattr(native, "scan", no_scan)
    fd = os.memfd_create("pool", os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    os.ftruncate(fd, 4 << 20)
    once, twice = (Mapping.view([(fd, 0, 4 << 20)], 0, True, 0, 2 << 20) for _ in range(2))
    os.close(fd)
    mman.lock(once.address, 4 << 20)
    assert pagemap.huge_bytes(once.address, 4 << 20) == 4 << 20
    mman.lock(twice.address, 2 << 20)
    assert pagemap.huge_bytes(once.address, 4 << 20) == 4 << 20, "mapped by two, as Shared_Hugetlb"
    assert pagemap.huge_bytes(twice.address, 4 << 20) == 2 << 20
    once.close()
    twice.close()


@again_if_pages_move
def test_pages_of_a_buffer_a_map_and_a_task() -> None:
    """As elsewhere in `pagemap`, the target is a task, a range of one, a buffer or a map."""
    with iobmd.allocate(3 * PAGE_SIZE, shared=True) as buffer, buffer.map() as mapped:
        address = buffer.getBytesNoCopy()
        expected = list(pagemap.pages(kernel_task, address, 3 * PAGE_SIZE))
        assert [page.address for page in expected] == [address, address + PAGE_SIZE, address + 8192]
        assert list(pagemap.pages(buffer)) == list(pagemap.pages(memoryview(buffer))) == expected
        assert [page.pfn for page in pagemap.pages(mapped)] == [page.pfn for page in expected]
        assert list(pagemap.pages(memoryview(buffer)[5000:5001])) == expected[1:2]
        assert pagemap.counts(buffer) == pagemap.counts(kernel_task, address, 3 * PAGE_SIZE)
        whole = {page.address: page.pfn for page in pagemap.pages(kernel_task)}
        assert [whole[page.address] for page in expected] == [page.pfn for page in expected]
        assert pagemap.counts(kernel_task).present > 1000
        with pytest.raises(IOReturnError, match="both an address and a size"):
            next(pagemap.pages(kernel_task, address))
    with iobmd.allocate(PAGE_SIZE, task=None) as nowhere, pytest.raises(IOReturnError) as caught:
        next(pagemap.pages(nowhere))
    assert caught.value.code == IOReturn.kIOReturnUnsupported


def test_runs_of_hidden_frames() -> None:
    """Without an error, they would appear to be absent."""

    def code() -> IOReturn:
        with pytest.raises(IOReturnError) as caught:
            next(pagemap.runs(mmap.mmap(-1, PAGE_SIZE)))
        return caught.value.code

    assert in_child(code, drop=1 << 21) == IOReturn.kIOReturnNotPrivileged


def test_name_and_permissions_of_an_area() -> None:
    (stack,) = (area for area in pagemap.areas(os.getpid()) if area.name == "[stack]")
    assert f"{stack.start:x}-{stack.end:x} {stack.perms} " in Path("/proc/self/maps").read_text()
