"""`iobmd bench allocator`: small buffers, secrets, memory that is kept for reuse, preparation for a device."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iobmd._native import mman, uring
from iobmd.api import allocate
from iobmd.descriptors.usage import trim
from iobmd.dma import IODMACommand
from iobmd.errors import NoResourcesError
from iobmd.units import PAGE_SIZE, format_size

from . import contiguous, floors
from .result import Result, at_most, medians, seconds

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = 256
SECRET = 32
PREPARED = 1 << 20
MANY = 200
ALIVE = 1_000_000
PAGEABLE_MOST = 4e-6
"""Seconds."""


def run(_size: int, rounds: int) -> list[Result]:
    """Measure; the sizes are those of the goals. Fewer than 7 `rounds`: with a tenth of the small buffers."""
    alive = ALIVE if rounds >= 7 else ALIVE // 10
    return [*_made_and_freed(rounds), _secret(rounds), *_prepared(rounds), *_alive(alive), *_contiguous(rounds)]


def _made_and_freed(rounds: int) -> list[Result]:
    small, wired, pageable = (
        partial(_repeated, size=SMALL),
        partial(_repeated, size=PAGE_SIZE),
        partial(_repeated, size=PAGE_SIZE, wired=False),
    )
    bare, *ours = medians(rounds * 10, _bare, small, wired, pageable)
    floor = f"mmap, mlock, munmap of a page in C: {bare * 1e6:.1f} µs"
    results = [
        at_most(f"{what} buffer, allocated and freed", f"{took * 1e6:.2f} µs", floor, took / bare, goal)
        for what, took, goal in ((f"wired {SMALL} B", ours[0], 0.3), ("wired 4 KiB", ours[1], 0.7))
    ]
    figure, met = f"{ours[2] * 1e6:.2f} µs", ours[2] <= PAGEABLE_MOST
    goal = f"≤ {PAGEABLE_MOST * 1e6:g} µs"
    return [*results, Result("pageable 4 KiB buffer, the same", figure, floor, ours[2] / bare, goal, met)]


def _bare() -> float:
    return sum(floors.map_and_lock(PAGE_SIZE) for _ in range(MANY)) / MANY


def _repeated(**keywords: Any) -> float:
    def repeat() -> None:
        for _ in range(MANY):
            allocate(**keywords).free()

    return seconds(repeat) / MANY


def _secret(rounds: int) -> Result:
    what = f"secret of {SECRET} B, allocated and freed"
    try:
        sodium = ctypes.CDLL("libsodium.so.23")
    except OSError:
        return Result(what, "libsodium is not installed", "apt-get install libsodium23", 0.0, "reported", True)
    sodium.sodium_init()
    sodium.sodium_malloc.restype = ctypes.c_void_p
    sodium.sodium_malloc.argtypes = (ctypes.c_size_t,)
    sodium.sodium_free.argtypes = (ctypes.c_void_p,)
    peer, ours = medians(rounds * 10, partial(_sodium, sodium), partial(_repeated, size=SECRET, secret=True))
    against = f"sodium_malloc and sodium_free by ctypes: {peer * 1e6:.1f} µs"
    return at_most(what, f"{ours * 1e6:.2f} µs", against, ours / peer, 0.5)


def _sodium(library: ctypes.CDLL) -> float:
    def repeat() -> None:
        for _ in range(MANY):
            library.sodium_free(library.sodium_malloc(SECRET))

    return seconds(repeat) / MANY


def _prepared(rounds: int) -> list[Result]:
    """Measure 1 MiB in 4 KiB pages: `prepare`, `segments`, `complete`, and a DMA command for the prepared memory."""
    table = uring.Table(2)  # with more than one slot, the ring remains open
    with allocate(PREPARED, wired=False) as buffer, IODMACommand.withSpecification() as command:
        address = buffer.getBytesNoCopy()
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            mman.advise(address, PREPARED, mman.MADV_NOHUGEPAGE)
        buffer.writeBytes(0, b"x" * PREPARED)
        room = bytearray(PREPARED // PAGE_SIZE * 8)
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)

        def bare() -> None:
            slot = table.pin(address, PREPARED)
            os.preadv(pagemap, [room], address // PAGE_SIZE * 8)
            assert slot
            slot.release()

        def prepared() -> None:
            buffer.prepare()
            buffer.segments()
            buffer.complete()

        def commanded() -> None:
            command.setMemoryDescriptor(buffer)
            command.genIOVMSegments()
            command.clearMemoryDescriptor()

        def with_command() -> float:
            buffer.prepare()
            try:
                return seconds(commanded)
            finally:
                buffer.complete()

        floor, ours, command_s = medians(rounds * 30, lambda: seconds(bare), lambda: seconds(prepared), with_command)
        buffer.prepare()
        count = len(buffer.segments())
        buffer.complete()
        os.close(pagemap)
    table.close()
    kernel = f"io_uring_register twice, pread of pagemap: {floor * 1e6:.1f} µs"
    what = f"1 MiB in {count} segments"
    return [
        at_most(f"prepare, segments, complete of {what}", f"{ours * 1e6:.1f} µs", kernel, ours / floor, 1.3),
        at_most(
            f"DMA command of {what}: set, segments, clear",
            f"{command_s * 1e6:.1f} µs",
            f"the row above: {ours * 1e6:.1f} µs",
            command_s / ours,
            2,
        ),
    ]


def _alive(count: int) -> list[Result]:
    """Measure what many small buffers occupy at a time, according to the kernel."""
    trim()
    locked, resident = _status("VmLck"), _status("VmRSS")
    buffers = [allocate(SMALL) for _ in range(count)]
    locked, resident = _status("VmLck") - locked, _status("VmRSS") - resident
    for buffer in buffers:
        buffer.free()
    trim()
    size = SMALL * count
    objects = (resident - locked) / count
    what, theirs = f"{count:,} wired buffers of {SMALL} B", f"their bytes: {size / 1e6:.1f} MB"
    of_each = f"{what}: Python objects of each"
    return [
        at_most(f"{what}: locked memory", f"{locked / 1e6:.1f} MB", theirs, locked / size, 1.3),
        at_most(of_each, f"{objects:.0f} B", f"its size: {SMALL} B", objects / SMALL, 200 / SMALL),
    ]


def _contiguous(rounds: int) -> list[Result]:
    """Measure contiguous memory that is freed and allocated again, compared with any pages, and with clearing it."""
    results = []
    for size, of_pages in ((2 << 20, 1.3), (64 << 20, 0.8)):
        what = f"contiguous {format_size(size)}, repeated"
        again = partial(_again, partial(allocate, size, contiguous=True))
        measured = partial(contiguous.populated, size), again, partial(_cleared, size)
        try:
            pages, ours, cleared = medians(rounds * 10, *measured)
        except NoResourcesError:
            results.append(Result(what, "not found", "a search, the first time", 0.0, "found", False))
            continue
        figure = f"{ours * 1e3:.3f} ms"
        floor = f"populate and pin as much THP: {pages * 1e3:.3f} ms"
        results.append(at_most(what, figure, floor, ours / pages, of_pages))
        floor = f"memset of as much, one thread: {cleared * 1e3:.3f} ms"
        results.append(Result(what, figure, floor, ours / cleared, "reported", True))
    return results


def _again(make: Callable[[], Any]) -> float:
    """Return the seconds for using kept memory once more: everything that the owner wrote is cleared."""
    with make() as buffer:
        buffer.writeBytes(0, b"\1")
    return seconds(lambda: make().free())


def _cleared(size: int) -> float:
    with allocate(size) as buffer:
        return floors.clear(buffer.getBytesNoCopy(), size)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0
