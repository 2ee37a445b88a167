"""Windows of physical memory that a search chooses in advance, and memory that it holds without clearing it."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import kernel
from support.kernel import frames
from support.targets import until

import iobmd
from iobmd import IOReturn, IOReturnError
from iobmd.host import zoneinfo
from iobmd.pagemap.census import BlockTable
from iobmd.physical import search, windows
from iobmd.physical.ballast import Ballast
from iobmd.physical.policy import Budget
from iobmd.physical.thp import TransparentBlocks
from iobmd.physical.zones import ALL_ADDRESSES
from iobmd.units import PAGE_SIZE

MIB, GIB = 1 << 20, 1 << 30
HUGE = 2 * MIB
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")

pytestmark = pytest.mark.needs("root", "frames", "big_memory")


@pytest.fixture
def kpageflags() -> Iterator[Callable[[int], int]]:
    with Path("/proc/kpageflags").open("rb", buffering=0) as file:
        yield lambda physical: int.from_bytes(os.pread(file.fileno(), 8, physical // PAGE_SIZE * 8), "little")


@pytest.mark.usefixtures("nothing_left")
def test_a_search_without_descriptors_for_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        tried.append(True)
        raise IOReturnError(IOReturn.kIOReturnNoResources, "no descriptor is free", errno.EMFILE)

    tried: list[bool] = []
    monkeypatch.setattr(search, "_BRIEF_UP_TO", 0)
    monkeypatch.setattr(windows, "Claim", refuse)
    with iobmd.allocate(4 * MIB, contiguous=True) as buffer:
        assert len(buffer.segments()) == 1
    assert tried


@pytest.mark.usefixtures("nothing_left")
def test_a_chosen_window_is_obtained() -> None:
    """Page faults allocate exactly the blocks of the window, unless another process takes one of them first."""
    for _ in range(8):
        with windows.Claim(windows.free_windows(16 * MIB, HUGE, ALL_ADDRESSES), Budget()) as claim:
            if not (window := claim.hold_one()):
                continue
            source = TransparentBlocks()
            try:
                places = source.more(2 * claim.blocks, 1, claim.free_next)
                seen = {frames(virtual, PAGE_SIZE)[0] * PAGE_SIZE for virtual in places.values()}
                if seen == set(window.heads):
                    assert not any(source._batches[0].read(0, 16 * MIB)), "it is cleared"
                    return
            finally:
                source.close()
    pytest.fail("another process took a block of a free window eight times")


@pytest.mark.usefixtures("nothing_left", "compacted")
def test_a_window_is_obtained_while_memory_that_is_preferred_becomes_free() -> None:
    """Page faults are served from the highest zone: pages freed there must not replace those of the window."""
    for _ in range(8):
        higher, source = TransparentBlocks(), TransparentBlocks()
        try:
            places = higher.more(16, 1)
            with windows.Claim(windows.free_windows(8 * MIB, HUGE, 0xFFFFFFFF), Budget()) as claim:
                if not (window := claim.hold_one()) or min(places) <= 0xFFFFFFFF:
                    continue  # other processes have used the memory
                higher.close()
                places = source.more(4 * claim.blocks, 1, claim.free_next)
                freed = window.heads[claim.blocks :]
            assert len(set(freed) - set(places)) <= 1, "no block is free for longer than it takes to allocate it"
            assert {frames(virtual, PAGE_SIZE)[0] * PAGE_SIZE for virtual in places.values()} == set(places)
            if set(places) >= set(window.heads):
                return
        finally:
            higher.close()
            source.close()
    pytest.fail("no free window below 4 GiB was obtained in eight attempts")


@pytest.mark.usefixtures("nothing_left")
def test_ballast_is_neither_cleared_nor_mapped(kpageflags: Callable[[int], int]) -> None:
    resident = kernel.status("VmRSS")
    before = set(_untouched(kpageflags))
    with Ballast() as ballast:
        begin = time.perf_counter()
        held = ballast.hold(256 * MIB)
        took = time.perf_counter() - begin
        assert held > 128 * MIB, took
        assert kernel.status("VmRSS") - resident < 64 * MIB
        assert len(set(_untouched(kpageflags)) - before) >= held // HUGE // 2
        assert ballast.hold(0) == 0
        ballast.free(0, HUGE)
    assert until(lambda: len(set(_untouched(kpageflags)) - before) < 8)


def _untouched(kpageflags: Callable[[int], int]) -> Iterator[int]:
    """Iterate over the huge pages of tmpfs that are not up to date (bit 3), which have no contents."""
    for start, end in zoneinfo.ram():
        for physical in range(-(-start // HUGE) * HUGE, end - HUGE + 1, HUGE):
            if kpageflags(physical) & (1 << 14 | 1 << 15 | 1 << 3 | 1 << 12) == 1 << 14 | 1 << 15:
                yield physical


def test_a_killed_search_leaves_nothing() -> None:
    """Memory that is held belongs to a file without a name, which ends with its process."""
    program = (
        "from iobmd.physical.ballast import Ballast; import time\n"
        "ballast = Ballast(); print(ballast.hold(1 << 29), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert int(process.stdout.readline()) > 1 << 28
        shared = _meminfo("ShmemHugePages")
        process.send_signal(signal.SIGKILL)
    assert until(lambda: _meminfo("ShmemHugePages") < shared - (1 << 28))


def _meminfo(name: str) -> int:
    found = re.search(rf"^{name}: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) << 10


def test_obstacles_are_those_of_the_flags(kpageflags: Callable[[int], int]) -> None:
    """A block with a slab page (bit 7) is an obstacle, and its kind is named."""
    table = BlockTable()
    seen = 0
    for number in range(table.first, table.first + len(table)):
        kinds = table.kinds(number, 1) if table.has_memory(number, 1) else {}
        if set(kinds) == {"slab"} and kinds["slab"] <= 64 << 10:
            window = windows.Window(number * HUGE, HUGE, table.free(number, 1), kinds)
            assert re.fullmatch(r"the best window, at 0x\w+, lacks \d+ pages? of slab", str(window))
            slabs = sum(kpageflags(number * HUGE + offset) >> 7 & 1 for offset in range(0, HUGE, PAGE_SIZE))
            seen += slabs > 0  # tails before Linux 6.9 lack the flag, and slabs are freed at any time
            if seen > 8:
                break
    assert seen


def test_the_refusal_names_the_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no window can be free, neither time nor memory is recommended."""
    monkeypatch.setattr(windows, "free_windows", lambda *_: [])
    monkeypatch.setattr(windows.Survey, "windows", lambda _self: [])
    total = sum(zone.present for zone in zoneinfo.zones())
    budget = iobmd.policy(time_budget=4, memory_budget=512 * MIB)
    with budget, pytest.raises(IOReturnError) as caught:
        iobmd.allocate(256 * MIB, alignment=1 << total.bit_length() - 1)  # the host has one or two such places
    message = str(caught.value)
    assert "the best window, at 0x" in message
    if "lacks" in message and "the kernel did not move" not in message:
        assert "time_budget" not in message
        assert "memory_budget" not in message


@pytest.mark.usefixtures("nothing_left")
def test_low_memory_within_the_time_of_holding_the_rest() -> None:
    """Memory below 4 GiB, with neither a pool nor memory that is populated to reach it."""
    pools = POOL.read_text()
    resident = kernel.status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    with iobmd.allocate(PAGE_SIZE, physical_mask=0xFFFFFFFF) as buffer:
        assert frames(buffer.getBytesNoCopy(), PAGE_SIZE)[0] < 1 << 20
        assert POOL.read_text() == pools
    assert kernel.status("VmHWM") - resident < GIB


@pytest.mark.needs("hugetlb")
def test_a_killed_process_does_not_leave_its_pool_enlarged() -> None:
    """A helper restores the pool, while it holds the lock of the pool."""
    program = (
        "from iobmd import host; from iobmd.physical.hugetlb import PoolBlocks; import time\n"
        "pool = next(pool for pool in host.hugetlb_pools() if pool.size == 2 << 20)\n"
        "with PoolBlocks(pool, reserve=True)._raised(pool.available + 3) as available:\n"
        "    print(available, flush=True); time.sleep(60)"
    )
    before = int(POOL.read_text())
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline()
        assert int(POOL.read_text()) > before
        process.send_signal(signal.SIGKILL)
    assert until(lambda: int(POOL.read_text()) == before)
