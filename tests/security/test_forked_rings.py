"""A child that is forked while memory is pinned keeps no ring, and so no pin, whether Python knows of it or not."""

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
    """Whether it is so within two seconds: a child closes rings as it begins, a worker of the kernel unpins pages."""
    deadline = time.monotonic() + 2
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
    """Its pages were pinned, and charged to it, until that child ended."""
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
