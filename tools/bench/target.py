"""A process with much memory of one kind, the target of `iobmd bench pagemap`.

`python -m iobmd.tools.bench.target KIND SIZE` prints the range of its memory. For each line that it then reads, it
maps memory for that number of seconds, and prints the duration of the longest mmap.
"""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from typing import Self

from iobmd._native import mman
from iobmd._native.crosstask import HeldBuffer
from iobmd.cli.child import python
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE

from . import floors

SMALL_AREA = 64 << 10
"""Size of each of many areas in bytes."""
_NORESERVE, _HUGETLB = 0x4000, 0x40000
_MADV_DONTFORK = 10


class Target:
    """The process, as a context manager.

    Parameters
    ----------
    kind : str
        small, THP, hugetlb; clustered, scattered: 1 % of it, at the beginning or everywhere; areas: many small ones.
    size : int
        Size of the address range in bytes.

    Raises
    ------
    OSError
        The host lacks this kind of memory.
    """

    def __init__(self, kind: str, size: int) -> None:
        command = python("-m", "iobmd.tools.bench.target", kind, str(size))
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        line = self._read()
        if not line:
            self._process.communicate()
            raise OSError(f"no memory of kind {kind}")
        self.start, self.end = json.loads(line)
        step = SMALL_AREA if kind == "areas" else self.end - self.start
        self.ranges = [(start, start + step) for start in range(self.start, self.end, step)]

    def begin_mapping(self, seconds: float) -> None:
        """Make it map and unmap memory for this many seconds."""
        assert self._process.stdin
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()

    def worst(self) -> float:
        """Return the duration of its longest mmap in seconds, after the time has elapsed."""
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.communicate()


def _make(kind: str, size: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_HUGETLB if kind == "hugetlb" else _NORESERVE)
    area = mmap.mmap(-1, size + HUGE_PAGE_SIZE, flags=flags)
    start, end = _range(area)
    if kind != "hugetlb":
        mman.advise(start, end - start, mman.MADV_HUGEPAGE if kind == "THP" else mman.MADV_NOHUGEPAGE)
    if kind == "scattered":
        for address in range(start, end, PAGE_SIZE * 100):
            mman.advise(address, PAGE_SIZE, mman.MADV_POPULATE_WRITE)
        return area
    touched = (end - start) // 100 // PAGE_SIZE * PAGE_SIZE if kind == "clustered" else end - start
    mman.advise(start, max(touched, PAGE_SIZE), mman.MADV_POPULATE_WRITE)
    if kind == "areas":
        for address in range(start, end, SMALL_AREA * 2):  # different flags make a separate area
            mman.advise(address, SMALL_AREA, _MADV_DONTFORK)
    return area


def _range(area: mmap.mmap) -> tuple[int, int]:
    with HeldBuffer(area, True) as held:
        start = -(-held.address // HUGE_PAGE_SIZE) * HUGE_PAGE_SIZE
        return start, start + held.size - HUGE_PAGE_SIZE


def main(kind: str, size: int) -> None:
    """Run as the process."""
    try:
        area = _make(kind, size)
    except OSError:
        sys.exit(1)
    print(json.dumps(_range(area)), flush=True)
    for line in sys.stdin:
        print(floors.map_stalls(float(line), PAGE_SIZE), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
