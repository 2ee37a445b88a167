"""A child that is forked while memory is pinned retains no ring, and thus no pin, even if it is forked in C."""

import ctypes
import os
import signal
import time
from collections.abc import Callable

import pytest
from support import kernel
from support.child import forked
from support.source_process import SourceProcess
from support.targets import need_ptrace

import iobmd
from iobmd import IOMemoryDescriptor, Wiring

FORKS: dict[str, Callable[[], int]] = {"Python": os.fork, "C": ctypes.CDLL(None).fork}


def soon(condition: Callable[[], object]) -> bool:
    """Return whether a condition holds within 20 s: children close rings, and a kernel worker unpins pages."""
    deadline = time.monotonic() + 20
    while not (met := bool(condition())) and time.monotonic() < deadline:
        time.sleep(0.01)
    return met


@pytest.mark.parametrize("fork", FORKS.values(), ids=FORKS.keys())
def test_of_this_process(fork: Callable[[], int]) -> None:
    with iobmd.allocate(1 << 16) as buffer:
        if buffer.wiring is not Wiring.PINNED:
            pytest.skip("pages cannot be pinned here")
        before = kernel.rings(os.getpid())
        assert before
        with forked(signal.pause, fork) as pid:
            assert soon(lambda: not kernel.rings(pid))
        assert kernel.rings(os.getpid()) == before
        assert buffer.wiring is Wiring.PINNED


@pytest.mark.needs("compiler", "frames")
@pytest.mark.parametrize("fork", FORKS.values(), ids=FORKS.keys())
def test_of_another_task(fork: Callable[[], int], start_source: Callable[..., SourceProcess]) -> None:
    """Its pages were once pinned, and charged to it, until that child exited."""
    need_ptrace()
    source = start_source()
    address, size = source["anonymous"]
    with IOMemoryDescriptor.withAddressRange(address, size, 3, source.pid) as memory:
        memory.prepare()
        assert memory.wiring is Wiring.PINNED
        assert kernel.status("VmPin", source.pid)
        with forked(signal.pause, fork) as pid:
            assert soon(lambda: not kernel.rings(pid))
            memory.complete()
            assert soon(lambda: not kernel.status("VmPin", source.pid))
