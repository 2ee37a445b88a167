"""Swap: pageable memory is swapped out and in unchanged; wired and prepared memory never leaves its frames."""

import contextlib
import tempfile
from pathlib import Path

import pytest
from support import kernel
from support.kernel import frames
from support.purging import page_out

import iobmd
from iobmd.units import PAGE_SIZE

pytestmark = pytest.mark.needs("guest", "swap", "frames")
MIB = 1 << 20
CONTENT = bytes(range(256)) * (MIB // 256)


@pytest.mark.usefixtures("swap")
@pytest.mark.parametrize("shared", [False, True])
def test_pageable_memory_goes_and_comes_back(shared: bool) -> None:
    with iobmd.allocate(MIB, wired=False, shared=shared) as buffer:
        buffer.writeBytes(0, CONTENT)
        page_out(buffer)
        assert kernel.present(buffer.getBytesNoCopy(), MIB) == 0
        assert swap_in_use() >= MIB // 2
        assert buffer.readBytes(0, MIB) == CONTENT
        assert kernel.present(buffer.getBytesNoCopy(), MIB) == MIB // PAGE_SIZE


def swap_in_use() -> int:
    """Return how many bytes of the swap space are in use, and how many are in the swap cache."""
    return int(Path("/proc/swaps").read_text().splitlines()[1].split()[3]) << 10


@pytest.mark.usefixtures("swap")
def test_wired_and_prepared_memory_stays() -> None:
    """Private and shared memory, with MADV_PAGEOUT, and while the guest runs out of memory and swaps."""
    with contextlib.ExitStack() as stack:

        def filled(**keywords: bool) -> iobmd.IOBufferMemoryDescriptor:
            buffer = stack.enter_context(iobmd.allocate(MIB, **keywords))
            buffer.writeBytes(0, CONTENT)
            return buffer

        control = filled(wired=False)
        held = [filled(wired=wired, shared=shared) for wired in (False, True) for shared in (False, True)]
        for buffer in held:
            buffer.prepare()
            stack.callback(buffer.complete)
        before = [frames(buffer.getBytesNoCopy(), MIB) for buffer in held]
        page_out(control)
        for buffer in held:
            with contextlib.suppress(OSError):  # locked
                page_out(buffer)
        assert kernel.present(control.getBytesNoCopy(), MIB) == 0
        run_short()
        for buffer in held:
            buffer.verify()
        assert [frames(buffer.getBytesNoCopy(), MIB) for buffer in held] == before
        assert all(each.readBytes(0, MIB) == CONTENT for each in (control, *held))


def pages_swapped_out() -> int:
    """Return how many pages have been swapped out since the guest started."""
    return int(Path("/proc/vmstat").read_text().split("pswpout ")[1].split()[0])


def run_short() -> None:
    """Fill a tmpfs until 16 MiB have been swapped out because of that, and free it again."""
    enough = pages_swapped_out() + 16 * MIB // PAGE_SIZE
    with tempfile.TemporaryFile(dir="/tmp", buffering=0) as file:
        for _ in range(kernel.available() // MIB * 3 // 2):
            if pages_swapped_out() >= enough:
                return
            file.write(bytes(MIB))
    raise AssertionError("half as much again as all available memory was filled, and less than 16 MiB swapped out")
