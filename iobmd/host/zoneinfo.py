"""The zones of the host's memory (/proc/zoneinfo, /proc/buddyinfo), and the ranges of RAM (/proc/iomem, sysfs)."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd.host.fact import lines, read_text
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Container

_ZONE = re.compile(r"^Node (\d+), zone +(\w+)\n", re.MULTILINE)
_COUNTER = re.compile(r"^ +(?:pages )?(\w+):? +(\d+)$", re.MULTILINE)
_LISTED = re.compile(r"^ +count: +(\d+)$", re.MULTILINE)
_RAM = re.compile(r"^ *([0-9a-f]+)-([0-9a-f]+) : System RAM", re.MULTILINE)
_BLOCKS = "/sys/devices/system/memory"

SECTION = 128 << 20
"""Bytes of a section of page descriptors (x86-64), the least that the kernel initializes at once."""


class Zone(NamedTuple):
    """A zone of a NUMA node, in bytes. It may have holes."""

    node: int
    """The node."""
    name: str
    """The name, such as ``Normal``."""
    start: int
    """The first physical address."""
    end: int
    """The end of the spanned addresses."""
    present: int
    """Memory in it, without holes."""
    managed: int
    """The part of it that the allocator received: without memory reserved at boot, or not initialized yet."""
    free: int
    """Free memory."""
    high: int
    """The high watermark: free memory that ordinary allocations leave."""
    listed: int
    """Free memory in the lists of single processors, which `free` does not include."""
    counters: dict[str, int]
    """All counters, in pages; the first zone of a node also has those of the node (``nr_anon_pages``)."""


def zones() -> list[Zone]:
    """Return the zones that have memory.

    Raises
    ------
    OSError
        /proc/zoneinfo is hidden, as in some containers.
    """
    with open("/proc/zoneinfo") as file:
        parts = _ZONE.split(file.read())
    found = (_zone(int(node), name, text) for node, name, text in zip(*(parts[i::3] for i in (1, 2, 3)), strict=True))
    return [zone for zone in found if zone.end > zone.start]


def _zone(node: int, name: str, text: str) -> Zone:
    counters: dict[str, int] = {}
    for counter, value in _COUNTER.findall(text):
        counters.setdefault(counter, int(value))  # the per-CPU page sets have counters named high, too
    start = counters.get("start_pfn", 0)
    present, managed, high = (counters.get(counter, 0) * PAGE_SIZE for counter in ("present", "managed", "high"))
    free = counters.get("free", 0) * PAGE_SIZE
    listed = sum(map(int, _LISTED.findall(text))) * PAGE_SIZE
    end = start + counters.get("spanned", 0)
    return Zone(node, name, start * PAGE_SIZE, end * PAGE_SIZE, present, managed, free, high, listed, counters)


def uninitialized(found: list[Zone]) -> int:
    """Return the free memory, in bytes, that the kernel has not initialized since boot, and counts in no zone.

    Kernels that initialize memory when they need it (deferred_init=lazy) count it in MemFree nevertheless.
    """
    missing = procfs.meminfo().get("MemFree", 0) - sum(zone.free for zone in found)
    return missing if missing >= SECTION else 0  # a smaller difference may be memory that was freed since


def free_blocks() -> dict[tuple[int, str], list[int]]:
    """Return the numbers of free blocks by node and zone, for each order (/proc/buddyinfo); empty if it is hidden."""
    found = {}
    for line in lines(read_text("/proc/buddyinfo")):
        if match := re.fullmatch(r"Node (\d+), zone +(\w+) +([\d ]+)", line):
            found[int(match[1]), match[2]] = [int(count) for count in match[3].split()]
    return found


def free_in_blocks(size: int, node: int | None = None, zones: Container[tuple[int, str]] | None = None) -> int:
    """Return the free memory in blocks of at least `size` bytes, of a node or of `zones`; 0 if it is hidden."""
    found = free_blocks()
    listed = [sum(count << order for order, count in enumerate(counts)) for counts in found.values()]
    # A kernel that initializes memory lazily has not put all of it into lists yet; none of that is fragmented.
    fresh = max(0, os.sysconf("SC_AVPHYS_PAGES") - sum(listed)) if found else 0
    smallest = (size // PAGE_SIZE).bit_length() - 1
    there = (
        counts[smallest:]
        for zone, counts in found.items()
        if node in (None, zone[0]) and (zones is None or zone in zones)
    )
    blocks = sum(count << order for counts in there for order, count in enumerate(counts, smallest))
    return (blocks + fresh) * PAGE_SIZE


def ram() -> list[tuple[int, int]]:
    """Return the physical ranges of this host's memory: start and exclusive end.

    From /proc/iomem, which shows addresses to holders of CAP_SYS_ADMIN, or else from the spans of the zones, which
    may have holes. Empty if both are hidden.
    """
    found = [(int(first, 16), int(last, 16) + 1) for first, last in _RAM.findall(read_text("/proc/iomem") or "")]
    if any(start for start, _end in found):
        return found
    try:
        return [(zone.start, zone.end) for zone in zones()]
    except OSError:
        return []


def offline_blocks() -> list[tuple[int, int]]:
    """Return the physical ranges of memory blocks that are offline; empty if the kernel has no memory hotplug."""
    size = int(read_text(f"{_BLOCKS}/block_size_bytes") or "0", 16)
    try:
        names = [name for name in os.listdir(_BLOCKS) if re.fullmatch(r"memory\d+", name)] if size else []
    except OSError:
        return []
    numbers = sorted(
        int(name.removeprefix("memory")) for name in names if read_text(f"{_BLOCKS}/{name}/state") == "offline"
    )
    return [(number * size, (number + 1) * size) for number in numbers]
