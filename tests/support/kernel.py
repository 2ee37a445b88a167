"""Data of the kernel, read without the use of `iobmd`."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import iobmd
from iobmd._native import mman

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from iobmd import IOBufferMemoryDescriptor

PAGE = os.sysconf("SC_PAGESIZE")
FRAME = (1 << 55) - 1
"""The bits of a pagemap entry that number the frame of a present page."""
_PRESENT, _SWAPPED, _GUARD = 1 << 63, 1 << 62, 1 << 58
_PATIENCE = 5.0


def status(name: str, pid: int | str = "self") -> int:
    """Return a field of /proc/PID/status in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def entries(address: int, size: int, pid: int | str = "self") -> list[int]:
    """Return the raw pagemap entries of a range."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        first, last = address // PAGE, (address + size - 1) // PAGE
        pagemap.seek(first * 8)
        raw = pagemap.read((last - first + 1) * 8)
    return list(struct.unpack(f"={len(raw) // 8}Q", raw))


def _settled_entries(address: int, size: int, pid: int | str, patience: float) -> list[int]:
    """Return the raw pagemap entries of a range while the kernel moves none of its pages.

    While the kernel tries to move a page, its entry appears as swapped (a migration entry), even if the kernel then
    finds the page pinned and does not move it. Compaction by any process can cause this at any time, so that such a
    page is read again; after `patience` seconds, it counts as swapped.
    """
    end = time.monotonic() + patience
    while True:
        found = entries(address, size, pid)
        if not any(entry & (_PRESENT | _SWAPPED | _GUARD) == _SWAPPED for entry in found) or time.monotonic() > end:
            return found
        time.sleep(0.001)


def frames(address: int, size: int, pid: int | str = "self") -> list[int]:
    """Return the frame of each page, 0 for a page without one."""
    found = _settled_entries(address, size, pid, _PATIENCE)
    return [entry & FRAME if entry & _PRESENT else 0 for entry in found]


def frames_of(buffer: IOBufferMemoryDescriptor) -> list[int]:
    """Return the frame of each page of a buffer of this process."""
    return frames(buffer.getBytesNoCopy(), buffer.getCapacity())


def physical_ranges(ranges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return the physical ranges of virtual ones (address and length), page by page, with adjacent ones joined."""
    found: list[list[int]] = []
    for start, length in ranges:
        page = start - start % PAGE
        for frame in frames(start, length):
            low, high = max(start, page), min(start + length, page + PAGE)
            physical = frame * PAGE + low % PAGE
            if found and sum(found[-1]) == physical:
                found[-1][1] += high - low
            else:
                found.append([physical, high - low])
            page += PAGE
    return found


def available() -> int:
    """Return MemAvailable in bytes."""
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) << 10


def held() -> dict[str, int]:
    """Return how many bytes of memory this process holds, mapped or not, by kind; other processes have no influence.

    Anonymous and shared resident pages, hugetlb pages, pinned pages, and those of its open shared objects; some count
    repeatedly. Mapped files are left out, because a forked child maps their pages again when it needs them.
    """
    objects = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor that lists the directory
            if "(deleted)" in str(path.readlink()):
                objects += path.stat().st_blocks * 512
    return {name: status(name) for name in ("RssAnon", "RssShmem", "HugetlbPages", "VmPin")} | {"objects": objects}


def check_given_back(before: dict[str, int], slack: int) -> None:
    """Check that this process holds at most `before` plus `slack`; waits, because pins end in a work queue."""
    end = time.monotonic() + 20
    while sum((now := held()).values()) - sum(before.values()) >= slack:
        assert time.monotonic() < end, f"memory was not freed: {before} before, {now} now"
        time.sleep(0.01)


def is_part_of_larger_page(frame: int) -> bool:
    """Return whether a frame belongs to a compound or huge page (/proc/kpageflags, requires root)."""
    with Path("/proc/kpageflags").open("rb", buffering=0) as flags:
        flags.seek(frame * 8)
        (bits,) = struct.unpack("Q", flags.read(8))
    return bool(bits & (1 << 15 | 1 << 16 | 1 << 22))  # KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL, KPF_THP


def present(address: int, size: int) -> int:
    """Count the pages with a frame."""
    return sum(entry >> 63 for entry in _settled_entries(address, size, "self", 1))


def swapped(address: int, size: int) -> int:
    """Count the pages that are in swap."""
    return sum(entry >> 62 & 1 for entry in entries(address, size))


def pinned(wanted: int = 0, pid: int | str = "self") -> int:
    """Return VmPin in bytes, as soon as it is `wanted`, or after a time limit.

    A pin whose ring was closed ends in a work queue of the kernel, on a busy machine some time later.
    """
    end = time.monotonic() + 20
    while (size := status("VmPin", pid)) != wanted and time.monotonic() < end:
        time.sleep(0.005)
    return size


def nothing_is_pinned() -> bool:
    """Return whether this process pins nothing, without the slabs that it keeps for small buffers."""
    iobmd.trim()
    return not pinned()


def smaps(address: int, pid: int | str = "self") -> dict[str, int]:
    """Return the counters of the mapping that contains `address`, in bytes; empty if nothing is mapped."""
    inside = False
    counters: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(head[1], 16) <= address < int(head[2], 16)
        elif inside and (field := re.match(r"(\w+):\s+(\d+) kB", line)):
            counters[field[1]] = int(field[2]) << 10
    return counters


def maps_of_iobmd() -> int:
    """Return how many mappings this process has of shared memory of iobmd.

    Unlike an address, which the next mapping of anything may use, they show whether memory was released.
    """
    return sum("memfd:iobmd" in line for line in Path("/proc/self/maps").read_text().splitlines())


def rings(pid: int | str = "self") -> int:
    """Count the open io_uring descriptors of a process."""
    count = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor that lists the directory
            count += "io_uring" in str(path.readlink())
    return count


def set_apart(buffer: IOBufferMemoryDescriptor) -> None:
    """Keep its area from being merged with adjacent ones (MADV_DONTDUMP), so that smaps counts its pages alone."""
    mman.advise(buffer.getBytesNoCopy(), len(buffer), 16)


class Footprint(NamedTuple):
    """The kernel resources that a process holds."""

    mappings: int
    resident: int
    descriptors: int
    locked: int

    @classmethod
    def settled(cls) -> Footprint:
        """Return the resources after garbage collection and the end of threads that release some.

        The purger ends if nothing is volatile; descriptors of foreign files are closed by a thread.
        """
        gc.collect()
        for thread in threading.enumerate():
            if thread.name in ("iobmd-purger", "iobmd-close"):
                thread.join(10)
        ctypes.CDLL(None).malloc_trim(0)  # glibc retains freed memory of large objects, in an arena for each thread
        return cls.now()

    @classmethod
    def now(cls) -> Footprint:
        iobmd.trim()
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        maps = Path("/proc/self/maps").read_text().splitlines()
        return cls(len(maps), status("VmRSS"), descriptors, status("VmLck"))


@contextlib.contextmanager
def no_growth(resident: int) -> Iterator[None]:
    """Assert that a block leaves no descriptor or locked page, and less than `resident` bytes of memory."""
    before = Footprint.settled()
    yield
    after = Footprint.settled()
    assert after.mappings <= before.mappings + 1  # Python's allocator may add an arena
    assert (after.descriptors, after.locked) == (before.descriptors, before.locked)
    assert after.resident - before.resident < resident
