"""A target that maps a sparse file of 8 TiB, which costs it nothing, costs its inspector no memory either."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from support.child import started
from support.targets import need_ptrace

import iobmd
from iobmd import pagemap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIB, MIB = 1 << 40, 1 << 20
SIZE = 8 * TIB
PROGRAM = f"""
import ctypes, os, sys, tempfile
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
os.ftruncate(fd, {SIZE})
for flags in 0x4002, 0x4001:  # MAP_NORESERVE with MAP_PRIVATE, MAP_SHARED
    at = libc.mmap(None, ctypes.c_size_t({SIZE}), 3, flags, fd, 0)
    assert at != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
    ctypes.memset(at, 7, 1)
Path("/proc/self/coredump_filter").write_text("0x7f")  # all memory
print(at, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def target() -> Iterator[tuple[int, int]]:
    """Start the target; yield its pid, and the address of its shared mapping."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with started([sys.executable, "-c", PROGRAM], **options) as program:
        assert program.stdout
        yield program.pid, int(program.stdout.readline())


class _EnoughError(Exception):
    pass


def core_of(pid: int, _at: int) -> None:
    """Write the first bytes of a core file: 16 TiB would take hours."""

    def enough(_done: int, total: int) -> None:
        assert total > 2 * SIZE, "the control"
        raise _EnoughError

    need_ptrace()
    with iobmd.snapshot(pid) as snapshot, open("/dev/null", "wb") as sink, pytest.raises(_EnoughError):  # noqa: PTH123
        snapshot.core(sink, progress=enough)


INSPECTIONS: dict[str, Callable[[int, int], object]] = {
    "core file": core_of,
    "areas": lambda pid, _at: list(pagemap.areas(pid, details=True)),
    "spans": lambda pid, _at: list(pagemap.spans(pid)),
    "pages": lambda pid, at: [page for page in pagemap.pages(pid, at, 64 * MIB) if page.present],
}


@pytest.mark.needs("root")
@pytest.mark.parametrize("inspect", INSPECTIONS.values(), ids=INSPECTIONS)
def test_memory_of_the_inspector(target: tuple[int, int], inspect: Callable[[int, int], object]) -> None:
    """A core file once began with a list of all its parts, a GiB of Python objects for each 20 TiB."""
    tracemalloc.start()
    try:
        inspect(*target)
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()
