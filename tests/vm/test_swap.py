"""Swap: pageable memory is swapped out and in unchanged; wired and prepared memory never leaves its frames."""

import contextlib
import subprocess
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
        swapped = pages_swapped_out()
        run_short()
        assert pages_swapped_out() > swapped, "nothing was swapped out"
        for buffer in held:
            buffer.verify()
        assert [frames(buffer.getBytesNoCopy(), MIB) for buffer in held] == before
        assert all(each.readBytes(0, MIB) == CONTENT for each in (control, *held))


def pages_swapped_out() -> int:
    """Return how many pages have been swapped out since the guest started."""
    return int(Path("/proc/vmstat").read_text().split("pswpout ")[1].split()[0])


def run_short() -> None:
    """Fill a tmpfs until 16 MiB more than all memory is required, and free it again."""
    megabytes = (kernel.available() >> 20) + 16
    subprocess.run(
        f"dd if=/dev/zero of=/tmp/fill bs=1M count={megabytes}; rm -f /tmp/fill",
        shell=True,
        stderr=subprocess.DEVNULL,
        check=False,
    )
