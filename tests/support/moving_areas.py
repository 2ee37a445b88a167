"""A target that moves areas upwards on request: those that were read, above those that were not.

A reader then never reaches the end of the areas. The script runs with the system's modules only.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Self

_PROGRAM = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
libc.mremap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
PAGE, AREAS = mmap.PAGESIZE, int(sys.argv[1])
lowest = top = 1 << 40  # below libraries and stacks, and above the heap
for _ in range(AREAS):  # with a gap after each, because the kernel would merge them
    assert libc.mmap(top, PAGE, 3, 0x100022, -1, 0) == top  # private, anonymous, at this place
    ctypes.memset(top, 1, PAGE)
    top += 2 * PAGE
print(AREAS, flush=True)
for line in sys.stdin:
    for _ in range(int(line)):
        assert libc.mremap(lowest, PAGE, PAGE, 3, top) == top  # may move, to this place
        lowest, top = lowest + 2 * PAGE, top + 2 * PAGE
    print(flush=True)
"""


class MovingAreas:
    """The target, with 400 areas that it moves upwards. It ends with the `with` block."""

    def __init__(self, areas: int = 400) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-Ic", _PROGRAM, str(areas)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self._answer()

    def move(self, areas: int = 4) -> None:
        """Move the lowest areas above the highest."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{areas}\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline(), "the target has exited"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.communicate()
