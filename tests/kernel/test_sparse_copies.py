"""Copies of sparse memory: exact, equally sparse, in huge pages where it is dense; absent pages take no time."""

import errno
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import kernel
from support.child import in_child

import iobmd
from iobmd._native.crosstask import Ranges
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
SIZE = 64 * MIB
HUGE = 2 * MIB

PROGRAM = """
import ctypes, mmap, sys
size = int(sys.argv[1])
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
area.madvise(15)  # MADV_NOHUGEPAGE
for line in sys.stdin.readline().split():
    start, end = map(int, line.split("-"))
    for page in range(start, end, {page}):
        area[page:page + 8] = (page + 1).to_bytes(8, "little")
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
sys.stdin.read()
"""
Start = Callable[[int, list[tuple[int, int]]], tuple[int, int]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process that writes to ranges of pages; return its pid and the address."""
    processes = []

    def run(size: int, ranges: list[tuple[int, int]]) -> tuple[int, int]:
        command = [sys.executable, "-c", PROGRAM.format(page=kernel.PAGE), str(size)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(" ".join(f"{start}-{end}" for start, end in ranges) + "\n")
        process.stdin.flush()
        return process.pid, int(process.stdout.readline())

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def layout(seed: int) -> list[tuple[int, int]]:
    """Return ascending ranges of pages, from one page to many huge pages, with gaps of any length in between."""
    rng = random.Random(seed)
    lengths = (1, 2, 5, 511, 512, 513, 1024, 2047, 3000)
    ranges, at = [], rng.choice((0, 1, 700))
    while at < SIZE // kernel.PAGE - 2 * max(lengths):
        end = at + rng.choice(lengths)
        ranges.append((at, end))
        at = end + rng.choice(lengths)
    # More ranges than one system call finds, and than are processed at once.
    ranges += [(page, page + 1) for page in range(at, SIZE // kernel.PAGE, 2)]
    return [(start * kernel.PAGE, end * kernel.PAGE) for start, end in ranges]


def expected(ranges: list[tuple[int, int]]) -> bytearray:
    content = bytearray(SIZE)
    for start, end in ranges:
        for page in range(start, end, kernel.PAGE):
            content[page : page + 8] = (page + 1).to_bytes(8, "little")
    return content


@pytest.mark.parametrize("scan", [True, False], ids=["PAGEMAP_SCAN", "without"])
@pytest.mark.parametrize("seed", range(3))
def test_any_layout_is_copied_as_it_is(start: Start, seed: int, scan: bool) -> None:
    ranges = layout(seed)
    content = expected(ranges)
    pid, address = start(SIZE, ranges)
    before = kernel.status("VmRSS", pid), kernel.status("VmPTE", pid)

    def copy() -> tuple[int, bool, bool]:
        with iobmd.copy(pid, address, SIZE, wired=False) as buffer:
            pages = kernel.present(buffer.getBytesNoCopy(), SIZE)
            same = bytes(buffer) == content
        with iobmd.copy(pid, address + 4093, SIZE - 5000, wired=False) as buffer:  # no whole page in both processes
            odd = bytes(buffer) == content[4093 : SIZE - 907]
        return pages, same, odd

    written = sum(end - start for start, end in ranges) // kernel.PAGE
    assert in_child(copy, deny={} if scan else {"ioctl": errno.ENOTTY}) == (written, True, True)
    assert (kernel.status("VmRSS", pid), kernel.status("VmPTE", pid)) == before


@pytest.mark.needs("pagemap_scan")
def test_reserved_addresses_take_no_time(start: Start) -> None:
    """Reading all of the pagemap of 4 TiB (8 GiB) takes over 4 s of processor time, even on an idle machine."""
    size = 4 << 40
    pid, address = start(size, [(0, PAGE_SIZE), (size // 2, size // 2 + 8 * MIB), (size - kernel.PAGE, size)])
    begin = time.process_time()
    with iobmd.copy(pid, address, size, wired=False) as buffer:
        took = time.process_time() - begin
        assert kernel.status("VmRSS") < 1 << 30
        assert buffer.readBytes(size - kernel.PAGE, 8) == (size - kernel.PAGE + 1).to_bytes(8, "little")
        assert buffer.readBytes(size // 2 + PAGE_SIZE, 8) == (size // 2 + 4097).to_bytes(8, "little")
    assert took < 2


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
def test_huge_pages_are_allowed_where_it_is_dense(start: Start) -> None:
    """A range of several pieces begins and ends in the middle of a huge page."""
    pid, address = start(SIZE, [(3 * MIB, 43 * MIB), (44 * MIB, 44 * MIB + kernel.PAGE)])
    with iobmd.copy(pid, address, SIZE, wired=False) as buffer:
        here, allowed = buffer.getBytesNoCopy(), []
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                bounds = int(head[1], 16) - here, int(head[2], 16) - here
            elif line.startswith("VmFlags:") and "hg" in line.split() and 0 <= bounds[0] < SIZE:
                allowed.append(bounds)
    assert allowed == [(4 * MIB, 42 * MIB)]


def test_ranges() -> None:
    ranges = Ranges([(10, 20), (20, 30), (40, 50)])
    assert list(ranges) == [(10, 30), (40, 50)]
    assert ranges[-1] == (40, 50)
    assert ranges.size == 30
    assert list(ranges.between(25, 45)) == [(25, 30), (40, 45)]
    assert not ranges.between(30, 40)
    assert list(ranges.outside(0, 60)) == [(0, 10), (30, 40), (50, 60)]
    assert list(ranges.outside(15, 45)) == [(30, 40)]
    assert list(Ranges().outside(5, 9)) == [(5, 9)]
    assert list(Ranges.joined([Ranges([(40, 50)]), Ranges(), Ranges([(0, 10), (30, 40)])], 45)) == [(0, 10), (30, 45)]
    assert Ranges([(3, 17), (20, 24)]).whole(3, 1003, 8) == [(1008, 1016)]
    assert Ranges([(100, 110), (150, 175)]).cuts(100, 8, 4) == [0, 8, 56, 64, 72]
