"""Capabilities and the limit on locked memory, compared with the kernel's own calls."""

import ctypes
import errno
import mmap
import re
import resource
import sys
from pathlib import Path

import pytest
from support.child import deny_calls, drop_capabilities, in_child
from support.probing import become_nobody, by_name, check, effective_capabilities, libc, status_field

from iobmd import host
from iobmd.host import Status, access, privilege

PAGE = mmap.PAGESIZE


def test_capabilities_are_those_that_capget_tells():
    effective = effective_capabilities()
    # linux/capability.h
    for name, bit in {"CAP_IPC_LOCK": 14, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}.items():
        assert host.has_capability(name) == bool(effective >> bit & 1)
        assert host.Capability[name] == bit
    with pytest.raises(KeyError):
        host.has_capability("CAP_NO_SUCH")


def test_a_dropped_capability_is_missing():
    def drop_one():
        drop_capabilities(1 << host.Capability.CAP_SYS_PTRACE)
        return privilege.capability(host.Capability.CAP_SYS_PTRACE)

    fact = in_child(drop_one)
    assert (fact.status, fact.value) == (Status.NO, {"effective": False, "host": False})
    assert "setcap cap_ipc_lock,cap_sys_ptrace,cap_sys_admin+ep /" in fact.remedy
    # In a virtual environment, the interpreter finds its packages only from the directory of this one.
    copy = next(re.finditer(r"\+ep (\S+)", fact.remedy))[1]
    assert Path(copy).parent.samefile(Path(sys.executable).parent)
    assert "--cap-add SYS_PTRACE" in fact.remedy


def test_capabilities_in_a_user_namespace_do_not_count_for_the_host():
    def enter_namespace():
        become_nobody()
        if libc.unshare(0x10000000) == -1:
            return None
        return effective_capabilities(), privilege.capability(host.Capability.CAP_SYS_ADMIN), access.frames()

    answer = in_child(enter_namespace)
    if answer is None:
        pytest.skip("this host permits user namespaces only for root")
    effective, fact, frames = answer
    assert effective >> host.Capability.CAP_SYS_ADMIN & 1
    assert (fact.status, fact.value) == (Status.LIMITED, {"effective": True, "host": False})
    assert frames.value is False
    assert "user namespace" in frames.remedy


def test_memlock_reports_the_limits_and_what_is_locked():
    def lock_three_pages():
        area = mmap.mmap(-1, 3 * PAGE)
        check(libc.mlock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(area))), 3 * PAGE))
        return privilege.memlock().value, status_field("VmLck")

    value, locked = in_child(lock_three_pages)
    limits = [
        None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_MEMLOCK)
    ]
    assert [value["soft"], value["hard"]] == limits
    assert value["locked"] == 3 * PAGE == int(locked.split()[0]) << 10


def test_memlock_limit_counts_without_cap_ipc_lock_only():
    def with_limit():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (4 * PAGE, 8 * PAGE))
        before = host.memlock_limit()
        become_nobody()
        return before, host.memlock_limit(), privilege.memlock()

    before, after, fact = in_child(with_limit)
    assert before == (None if effective_capabilities() >> 14 & 1 else 4 * PAGE)
    assert after == 4 * PAGE
    assert (fact.status, fact.value["effective"]) == (Status.LIMITED, 4 * PAGE)
    for way in (f"ulimit -l {8 * PAGE >> 10} ", "prlimit --memlock=", "LimitMEMLOCK=", "--ulimit memlock=-1"):
        assert way in fact.remedy


def test_without_any_lockable_memory_the_main_job_cannot_run():
    def with_limit_zero():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        become_nobody()
        area = mmap.mmap(-1, PAGE)
        refused = libc.mlock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(area))), PAGE)
        found = host.facts()
        return refused, by_name(found), host.can_run_main_job(found), host.obstacles(found)

    refused, found, can_run, obstacles = in_child(with_limit_zero)
    assert refused == -1
    assert found["mlock"].status is found["RLIMIT_MEMLOCK"].status is Status.NO
    assert "RLIMIT_MEMLOCK (0 B)" in found["mlock"].summary
    assert "ulimit -l" in found["mlock"].remedy
    assert not can_run
    assert obstacles == [found["mlock"]]


def test_a_limit_that_is_used_up_is_told_as_such():
    def lock_all_of_it():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (PAGE, PAGE))
        become_nobody()
        area = mmap.mmap(-1, PAGE)
        check(libc.mlock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(area))), PAGE))
        return privilege.mlock(), privilege.memlock()

    mlock, memlock = in_child(lock_all_of_it)
    assert mlock.status is Status.NO
    assert "leaves no room" in mlock.summary
    assert (memlock.status, memlock.value["locked"]) == (Status.LIMITED, PAGE)


def test_mlock_denied_by_seccomp():
    def denied():
        deny_calls({"mlock": errno.EPERM})
        return privilege.mlock()

    fact = in_child(denied)
    assert fact.status is Status.NO
    assert "seccomp" in fact.summary
    assert "seccomp" in fact.remedy
