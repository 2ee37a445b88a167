"""Many small contiguous buffers in little memory, where the kernel reserves a part for CMA.

The huge pages of guests with 16 KiB pages are 32 MiB, and Debian's kernels for arm64 reserve 64 MiB for CMA. A pin
moves pages out of CMA.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from support import kernel

import iobmd
from iobmd.units import PAGE_SIZE

COUNT, SIZE = 200, 64 << 10


def allocate_all() -> None:
    """Allocate all of them, and compare their frames with pagemap."""
    buffers = [iobmd.allocate(SIZE, contiguous=True) for _ in range(COUNT)]
    starts = set()
    for buffer in buffers:
        frames = kernel.frames(buffer.getBytesNoCopy(), SIZE)
        assert list(frames) == list(range(frames[0], frames[0] + SIZE // PAGE_SIZE))
        assert buffer.getPhysicalAddress() == frames[0] * PAGE_SIZE
        starts.add(frames[0])
    assert len(starts) == COUNT
    for buffer in buffers:
        buffer.free()


@pytest.mark.needs("guest", "root", "frames")
@pytest.mark.parametrize("process", [1, 2, 3])
def test_each_of_many_buffers_is_contiguous(process: int, record_property) -> None:
    """In processes one after another: each begins with the memory that the previous one has freed."""
    program = f"from vm import {Path(__file__).stem} as test; test.allocate_all()"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=250)
    if process == 3:
        record_property("200 contiguous buffers of 64 KiB", "works")
