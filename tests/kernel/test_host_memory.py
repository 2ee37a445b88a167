"""The physical memory of the host by kind, compared with frames of known kinds and with /proc/meminfo."""

import ctypes
import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import pytest
from support.child import NOBODY, in_child
from support.kernel import frames
from support.targets import until

from iobmd import BadArgumentError, NotPrivilegedError, pagemap
from iobmd._native.pagemap import WINDOW_STATES
from iobmd.pagemap.census import kinds_between
from iobmd.pagemap.frame import Frames
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
SIZE = 4 * MIB
MADV_COLLAPSE = 25


@contextmanager
def mapped(fd: int = -1, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, size: int = SIZE) -> Iterator[int]:
    """Map memory, and yield its address, a multiple of its size."""
    with mmap.mmap(fd, size, flags=flags) as memory:
        first = ctypes.c_char.from_buffer(memory)
        yield ctypes.addressof(first)
        del first


def kinds_of(address: int, size: int) -> dict[str, int]:
    """Return the memory of a range by kind, in runs of its frames."""
    total: dict[str, int] = {}
    numbers = sorted(frames(address, size))
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        for kind, held in kinds_between(run[0] * PAGE_SIZE, len(run) * PAGE_SIZE).items():
            total[kind] = total.get(kind, 0) + held
    return {kind: held for kind, held in total.items() if held}


def touch(address: int, size: int) -> None:
    for at in range(address, address + size, PAGE_SIZE):
        ctypes.c_char.from_address(at).value = b"x"


def mostly(address: int, kind: str) -> bool:
    """Return whether all frames are of one kind, although compaction for others may move them at any time."""
    return until(lambda: kinds_of(address, SIZE) == {kind: SIZE})


@pytest.mark.needs("root", "frames")
def test_anonymous_memory() -> None:
    with mapped() as address:
        touch(address, SIZE)
        assert mostly(address, "anonymous")


@pytest.mark.needs("root", "frames")
def test_shared_memory() -> None:
    fd = os.memfd_create("iobmd-test")
    os.truncate(fd, SIZE)
    with mapped(fd, mmap.MAP_SHARED) as address:
        touch(address, SIZE)
        assert mostly(address, "shared")
    os.close(fd)


@pytest.mark.needs("root", "frames")
def test_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(SIZE))
    with file.open("r+b") as opened, mapped(opened.fileno(), mmap.MAP_SHARED) as address:
        total = sum(ctypes.c_ubyte.from_address(at).value for at in range(address, address + SIZE, PAGE_SIZE))
        assert total
        system = subprocess.check_output(["stat", "-f", "-c", "%T", tmp_path], text=True).strip()
        assert mostly(address, "shared" if system == "tmpfs" else "file")


@pytest.mark.needs("root", "frames", "collapse")
def test_a_huge_page() -> None:
    """Its window counts as huge, and its frames as anonymous, also those that are no longer mapped by a huge page."""
    with mapped(size=2 * SIZE) as start:
        address = -(-start // (2 * MIB)) * (2 * MIB)
        touch(address, 2 * MIB)
        libc = ctypes.CDLL(None, use_errno=True)
        assert until(lambda: libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(2 * MIB), MADV_COLLAPSE) == 0)
        assert window_of(address) == "huge"
        # The folio remains whole until memory is short.
        assert libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(MIB), mmap.MADV_DONTNEED) == 0
        assert kinds_of(address + MIB, MIB) == {"anonymous": MIB}


def window_of(address: int) -> str:
    """Return the state of the window of a huge page that contains an address."""
    first = frames(address, PAGE_SIZE)[0] // 512 * 512
    with Frames() as opened:
        census = opened.census(512, 0, 1)
        census.begin(first, 0)
        census.read(first + 512)
        census.finish()
        (states,) = census.collect()[2][:1]
    return WINDOW_STATES[states.index(1)]


@pytest.mark.needs("root")
def test_sums_agree_with_meminfo() -> None:
    """Within the changes during the census, and the pages that are between two lists."""

    def agree() -> bool:
        before = meminfo()
        memory = pagemap.host_memory()
        after = meminfo()
        kinds = memory.kinds
        kinds["free"] += kinds["uninitialized"]  # MemFree includes memory that the kernel initializes later
        tolerance = max(before["MemTotal"] // 50, 32 * MIB)
        return all(
            min(before[name], after[name]) - tolerance <= kinds[kind] <= max(before[name], after[name]) + tolerance
            for kind, name in {
                "free": "MemFree",
                "anonymous": "AnonPages",
                "file": "file",
                "shared": "Shmem",
                "slab": "Slab",
                "page_tables": "PageTables",
                "hugetlb": "Hugetlb",
            }.items()
        )

    assert until(agree, 30)


def meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = {line.partition(":")[0]: int(line.split()[1]) << 10 for line in lines}
    found["file"] = found["Cached"] + found["Buffers"] - found["Shmem"]
    return found


@pytest.mark.needs("root")
def test_zones_runs_and_windows_add_up() -> None:
    progress: list[tuple[int, int]] = []
    memory = pagemap.host_memory(rows=10, cells=40, progress=lambda *step: progress.append(step))
    kinds = memory.kinds
    assert sum(held for _number, held in memory.free_runs.values()) == kinds["free"]
    assert sum(held for row in memory.rows for cell in row.cells for held in cell.values()) == sum(
        sum(zone.kinds.values()) for zone in memory.zones
    )
    assert progress[-1][0] == progress[-1][1] >= sum(sum(zone.kinds.values()) for zone in memory.zones)
    assert 0 < memory.longest_free.length <= memory.longest_movable.length
    assert memory.longest_free.length >= max(memory.free_runs)
    largest = [size for size, states in memory.windows.items() if states["free"]]
    assert memory.longest_free.length >= max(largest, default=0)
    for size, states in memory.windows.items():
        assert sum(states.values()) * size <= sum(kinds.values())
    present = zone_pages("present") * PAGE_SIZE
    assert abs(sum(kinds.values()) - present) < max(present // 100, 16 * MIB)


def zone_pages(name: str) -> int:
    return sum(
        int(line.split()[1]) for line in Path("/proc/zoneinfo").read_text().splitlines() if line.split()[:1] == [name]
    )


def test_impossible_maps() -> None:
    for wrong in ({"rows": -1}, {"rows": 1, "cells": 0}):
        with pytest.raises(BadArgumentError, match="is not possible"):
            pagemap.host_memory(**wrong)
    with pytest.raises(TypeError, match="rows must be an integer"):
        pagemap.host_memory(rows=1.5)  # type: ignore[arg-type]


@pytest.mark.needs("root")
def test_other_users_are_refused() -> None:
    def refused() -> str:
        with pytest.raises(NotPrivilegedError) as raised:
            pagemap.host_memory()
        return str(raised.value)

    assert "/proc/kpageflags: Permission denied; run as root" in in_child(refused, uid=NOBODY)
