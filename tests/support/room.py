"""Memory in one piece, whatever the state of free memory: requests that the kernel is asked to make room for first.

A host that has run for hours may have no 64 MiB free in one piece. Then a refusal is right, and only then: the kernel
shows it by its pool of 1 GiB pages, for which it moves away what can be moved. Where that pool grows, and the page is
returned at once, there is room, and a refusal is a fault.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from iobmd import IOReturn, IOReturnError

_POOL = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")
T = TypeVar("T")


def is_made(setting: Callable[[str, object], None]) -> bool:
    """Have the kernel free a GiB in one piece, and say whether it could. As root, by the fixture `setting`."""
    Path("/proc/sys/vm/compact_memory").write_text("1")
    if not _POOL.exists():
        return True  # a processor without such pages: a refusal is not excused
    before = int(_POOL.read_text())
    try:
        setting(str(_POOL), before + 1)  # which waits for the lock under which the library raises pools
        return int(_POOL.read_text()) > before
    finally:
        setting(str(_POOL), before)


def allocated(allocate: Callable[[], T], setting: Callable[[str, object], None]) -> T | None:
    """Return what `allocate` returns; None if it is refused, with the promised error, and there is no room for it.

    Another process may use up the room that was made: it is made again, a few times.
    """
    for _ in range(4):
        try:
            return allocate()
        except IOReturnError as error:
            assert error.code == IOReturn.kIOReturnNoResources
            assert "longest run was" in str(error)
        if not is_made(setting):
            return None
    pytest.fail("refused, though the kernel has just freed a GiB in one piece, four times")
