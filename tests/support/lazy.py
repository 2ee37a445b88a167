"""Lazy copies for tests: a source in small pages, and what the kernel shows of a fetch."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import iobmd
from iobmd._native import mman
from support import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd import IOBufferMemoryDescriptor

MIB = 1 << 20
_PATTERN = bytes(range(251)) * 17  # of no page size


def why_not() -> str | None:
    """Return why this process cannot make a lazy copy, None if it can."""
    with Source(16 * MIB) as source:
        try:
            source.copied_while(is_incomplete).free()
        except AssertionError:
            return "no userfaultfd(2) for missing pages, no free process or thread, or no /proc"
    return None


class Source:
    """A pageable buffer in small pages, with contents."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.buffer = iobmd.allocate(size, wired=False)
        self.address = self.buffer.getBytesNoCopy()
        mman.advise(self.address, size, mman.MADV_NOHUGEPAGE)
        self.contents = (os.urandom(16) + _PATTERN) * (size // len(_PATTERN) + 1)
        self.contents = self.contents[:size]
        self.buffer.writeBytes(0, self.contents)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.buffer.free()

    def copied(self) -> iobmd.IOBufferMemoryDescriptor:
        """Return a lazy copy."""
        return iobmd.copy(os.getpid(), self.address, self.size, wired=False, lazy=True)

    def copied_while(self, is_seen: Callable[[IOBufferMemoryDescriptor], bool]) -> IOBufferMemoryDescriptor:
        """Return a lazy copy for which `is_seen` was true, of several: the fetch may end before this thread runs."""
        for _ in range(20):
            copy = self.copied()
            if is_seen(copy):
                return copy
            copy.free()
        raise AssertionError("each copy was fetched before it was inspected")


def is_incomplete(copy: iobmd.IOBufferMemoryDescriptor) -> bool:
    """Return whether a copy is still being fetched."""
    return copy.fetched < copy.getCapacity()


def fetcher_thread() -> int | None:
    """Return the id of a thread of this process that fetches a copy, or None."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if (task / "comm").read_bytes() == b"iobmd-fetch\n":
                return int(task.name)
    return None


def snapshots(parent: int) -> list[int]:
    """Return the children of a process that hold its snapshots."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and (process / "comm").read_bytes() == b"iobmd-snapshot\n":
                status = (process / "status").read_text(errors="replace")
                if f"PPid:\t{parent}\n" in status and "State:\tZ" not in status:
                    found.append(int(process.name))
    return found


def has_no_memory(pid: int) -> bool:
    """Return whether a process has exited."""
    try:
        return kernel.status("VmSize", pid) == 0
    except OSError:
        return True


def is_soon(condition: Callable[[], bool]) -> bool:
    """Return whether a condition becomes true within 20 s."""
    end = time.monotonic() + 20
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def absent(copy: iobmd.IOBufferMemoryDescriptor) -> int:
    """Return the number of absent pages of a copy."""
    size = copy.getCapacity()
    return size // kernel.PAGE - kernel.present(copy.getBytesNoCopy(), size)
