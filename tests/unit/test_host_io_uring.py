"""The probe of io_uring: compared with raw calls, and disabled, denied or over a limit."""

import ctypes
import errno
import os
import resource
from pathlib import Path

import pytest
from support.child import SYSCALLS, deny_calls, in_child
from support.probing import become_nobody, libc, run_remedy, setting

from iobmd.host import Status, io_uring

IO_URING_SETUP = SYSCALLS["io_uring_setup"]
IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")


def ring_error():
    """Return the error number of io_uring_setup(2), 0 if it creates a ring."""
    ring = libc.syscall(IO_URING_SETUP, 1, (ctypes.c_uint32 * 30)())
    if ring < 0:
        return ctypes.get_errno()
    os.close(ring)
    return 0


def test_io_uring_agrees_with_a_raw_call():
    fact = io_uring.io_uring()
    assert fact.value == {"pins": ring_error() == 0, "errno": ring_error()}
    assert (fact.status is Status.YES) == fact.value["pins"]


@pytest.mark.parametrize("call", ["io_uring_setup", "io_uring_register"])
@pytest.mark.parametrize(("number", "verb"), [(errno.EPERM, "forbids"), (errno.ENOSYS, "hides")])
def test_io_uring_denied_by_seccomp(call, number, verb):
    if not io_uring.io_uring().usable:
        pytest.skip("io_uring is already disabled here, so that a filter has nothing to deny")

    def denied():
        deny_calls({call: number})
        return io_uring.io_uring()

    fact = in_child(denied)
    assert (fact.status, fact.value) == (Status.NO, {"pins": False, "errno": number})
    assert f"seccomp filter {verb}" in fact.summary
    assert "seccomp" in fact.remedy


@pytest.mark.needs("root")
def test_io_uring_off_for_everybody():
    with setting(IO_URING_DISABLED, "2"):
        assert ring_error() == errno.EPERM
        fact = io_uring.io_uring()
        assert fact.status is Status.NO
        assert "kernel.io_uring_disabled is 2" in fact.summary
        run_remedy(fact)
        assert io_uring.io_uring().status is Status.YES


@pytest.mark.needs("root")
def test_io_uring_off_for_the_unprivileged():
    def as_nobody():
        become_nobody()
        return ring_error(), io_uring.io_uring()

    with setting(IO_URING_DISABLED, "1"):
        assert io_uring.io_uring().status is Status.YES
        number, fact = in_child(as_nobody)
    assert number == errno.EPERM
    assert "kernel.io_uring_disabled is 1" in fact.summary
    assert "io_uring_group" in fact.remedy


def test_io_uring_over_the_limit_on_locked_memory():
    def with_limit_zero():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        become_nobody()
        return ring_error(), io_uring.io_uring()

    number, fact = in_child(with_limit_zero)
    if number == errno.EPERM:
        pytest.skip("io_uring is disabled here, and its limit is not reached")
    assert fact.value == {"pins": False, "errno": errno.ENOMEM}
    assert "RLIMIT_MEMLOCK" in fact.summary
    assert "ulimit -l" in fact.remedy


def test_io_uring_waits_for_rings_just_closed():
    def at_a_tight_limit():
        # Room for a few rings: without a wait, the worker that uncharges closed ones loses this race.
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))
        become_nobody()
        return ring_error(), {io_uring.io_uring().summary for _ in range(100)}

    number, summaries = in_child(at_a_tight_limit)
    if number:
        pytest.skip(f"io_uring cannot be used here: {os.strerror(number)}")
    assert summaries == {"a page was pinned"}
