"""Contiguous memory, whatever the state of free memory: requests that may be refused if there is none.

A host that has run for hours may have no contiguous 64 MiB free. Only in that case is a refusal correct. The memory
that the library should have found is searched here in another way: by inspecting huge pages without the library, or
by the kernel, which moves pages away when its pool of 1 GiB pages is enlarged.
"""

import ctypes
import mmap
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest

import iobmd
from iobmd import IOBufferMemoryDescriptor, IOReturn, IOReturnError
from iobmd.units import HUGE_PAGE_SIZE
from support.kernel import frames

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")
T = TypeVar("T")


def is_found(size: int, within: int) -> bool:
    """Compact memory, allocate huge pages for half of `within` bytes; return whether twice `size` is contiguous.

    The kernel does not allocate the same pages each time; with this reserve, a search for `size` in `within` bytes
    succeeds too.
    """
    size, within = 2 * size, within // 2
    Path("/proc/sys/vm/compact_memory").write_text("1")
    with mmap.mmap(-1, within + HUGE_PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_HUGEPAGE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(area))
        first = -base % HUGE_PAGE_SIZE
        for offset in range(first, first + within, HUGE_PAGE_SIZE):
            area[offset] = 1
        in_pages = frames(base + first, within)
    huge = HUGE_PAGE_SIZE // mmap.PAGESIZE
    blocks = sorted(
        in_pages[at]
        for at in range(0, len(in_pages), huge)
        if in_pages[at] % huge == 0 and in_pages[at + huge - 1] == in_pages[at] + huge - 1
    )
    in_a_row = longest = 1
    for one, following in pairwise(blocks):
        in_a_row = in_a_row + 1 if following == one + huge else 1
        longest = max(longest, in_a_row)
    return longest * HUGE_PAGE_SIZE >= size


def is_made(setting: Callable[[str, object], None]) -> bool:
    """Make the kernel free a contiguous GiB, and return whether it could. As root, by the fixture `setting`."""
    Path("/proc/sys/vm/compact_memory").write_text("1")
    if not _POOL.exists():
        return True  # a processor without such pages: a refusal would be a fault
    before = int(_POOL.read_text())
    try:
        setting(str(_POOL), before + 1)  # which waits for the lock under which the library enlarges pools
        return int(_POOL.read_text()) > before
    finally:
        setting(str(_POOL), before)


def allocated(allocate: Callable[[], T], is_there: Callable[[], bool]) -> T | None:
    """Return the result of `allocate`; None if it is refused with the documented error, and there is no room for it.

    Another process may allocate the memory that `is_there` found, so that the check is repeated a few times.
    """
    for _ in range(4):
        try:
            return allocate()
        except IOReturnError as error:
            assert error.code == IOReturn.kIOReturnNoResources
            assert "longest run was" in str(error)
        if not is_there():
            return None
    pytest.fail("refused four times, although there was room for it just before")


def allocated_beside_others(size: int, **keywords: object) -> IOBufferMemoryDescriptor:
    """Allocate by a search while another process repeatedly fills most of memory and frees it.

    A search ends before that process would run out of memory, and is repeated until enough is free.
    """
    end = time.monotonic() + 200
    while True:
        try:
            with iobmd.policy(memory_budget=1 << 40, time_budget=100):
                return iobmd.allocate(size, **keywords)  # type: ignore[arg-type]
        except IOReturnError as error:
            if error.code != IOReturn.kIOReturnNoResources or time.monotonic() > end:
                raise
