"""Areas that cannot be accessed or pinned; run as a program, a process with one of them."""

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

from support import rawmemory
from support.rawmemory import ANONYMOUS, HUGETLB, NORESERVE, PAGE, PRIVATE, READ, SHARED, WRITE

DISK = "/var/tmp"
"""A directory on a disk, even if /tmp is a tmpfs."""


class Area(NamedTuple):
    """An area of four pages (or a huge one), and its first bad byte."""

    address: int
    size: int
    bad: int
    """Offset of the first bad byte."""


def _file(size: int, *, memory: bool = False) -> int:
    if memory:
        fd = os.memfd_create("area")
    else:
        with tempfile.TemporaryFile(dir=DISK) as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


def _past_the_end(flags: int, *, memory: bool) -> Area:
    fd = _file(PAGE + 10, memory=memory)
    return Area(rawmemory.map_memory(4 * PAGE, READ | WRITE, flags, fd), 4 * PAGE, 2 * PAGE)


def _guard() -> Area:
    address = rawmemory.map_memory(4 * PAGE)
    ctypes.memset(address, 1, 4 * PAGE)
    rawmemory.install_guard(address + 2 * PAGE, PAGE)
    return Area(address, 4 * PAGE, 2 * PAGE)


def _read_only() -> Area:
    address = rawmemory.map_memory(4 * PAGE)
    rawmemory.protect(address + PAGE, PAGE, READ)
    return Area(address, 4 * PAGE, PAGE)


def _shared_file() -> Area:
    return Area(rawmemory.map_memory(4 * PAGE, READ | WRITE, SHARED, _file(4 * PAGE)), 4 * PAGE, 0)


def _secret() -> Area:
    address = rawmemory.map_memory(4 * PAGE, READ | WRITE, SHARED, rawmemory.secret_memory(4 * PAGE))
    ctypes.memset(address, 1, 4 * PAGE)
    return Area(address, 4 * PAGE, 0)


def _device() -> Area:
    return Area(*rawmemory.vvar(), 0)


def _hugetlb() -> Area:
    flags = PRIVATE | ANONYMOUS | HUGETLB | NORESERVE
    return Area(rawmemory.map_memory(2 << 20, READ | WRITE, flags), 2 << 20, 0)


KINDS: dict[str, Callable[[], Area]] = {
    "past the end of a private file": lambda: _past_the_end(PRIVATE, memory=False),
    "past the end of a shared file": lambda: _past_the_end(SHARED, memory=False),
    "past the end of a memfd": lambda: _past_the_end(SHARED, memory=True),
    "guard": _guard,
    "read-only": _read_only,
    "shared file": _shared_file,
    "secret": _secret,
    "device": _device,
    "hugetlb": _hugetlb,
}

if __name__ == "__main__":
    print(*KINDS[sys.argv[1]](), flush=True)
    sys.stdin.read()
