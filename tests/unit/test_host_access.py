"""Access to other tasks and to page frames, permitted and denied."""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from pathlib import Path

import pytest
from support import kernel
from support.child import deny_calls, drop_capabilities, in_child
from support.probing import become_nobody, by_name, private_mounts

from iobmd import host
from iobmd.host import Status, access

PAGE = mmap.PAGESIZE


def test_copying_works_here():
    assert access.process_vm_readv().status is access.proc_mem().status is Status.YES
    assert host.can_run_main_job(host.facts())


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_process_vm_readv_denied_leaves_proc_mem(number):
    def denied():
        deny_calls({"process_vm_readv": number})
        found = host.facts()
        return by_name(found), host.can_run_main_job(found)

    found, can_run = in_child(denied)
    assert found["process_vm_readv"].status is Status.NO
    assert found["process_vm_readv"].summary == os.strerror(number)
    assert "seccomp" in found["process_vm_readv"].remedy
    assert found["/proc/PID/mem"].status is Status.YES
    assert can_run


def test_proc_mem_that_opens_and_cannot_be_read():
    def denied():
        deny_calls({"pread64": errno.EIO})
        found = host.facts()
        return by_name(found), host.can_run_main_job(found)

    found, can_run = in_child(denied)
    assert (found["/proc/PID/mem"].status, found["/proc/PID/mem"].summary) == (Status.NO, os.strerror(errno.EIO))
    assert found["process_vm_readv"].status is Status.YES
    assert can_run


def test_neither_way_to_copy():
    def denied():
        become_nobody(dumpable=False)
        deny_calls({"process_vm_readv": errno.EPERM})
        found = host.facts()
        return host.obstacles(found), by_name(found)

    obstacles, found = in_child(denied)
    assert [fact.name for fact in obstacles] == ["process_vm_readv", "/proc/PID/mem"]
    for name in ("/proc/PID/mem", "PFN", "PAGEMAP_SCAN"):
        assert "PR_SET_DUMPABLE" in found[name].remedy


@pytest.mark.parametrize(
    ("scope", "status", "privileged"),
    [
        (0, Status.YES, Status.YES),
        (1, Status.LIMITED, Status.YES),
        (2, Status.NO, Status.YES),
        (3, Status.NO, Status.NO),
    ],
)
@pytest.mark.needs("root")
def test_yama(scope, status, privileged):
    def under_yama():
        private_mounts("/proc/sys/kernel")
        Path("/proc/sys/kernel/yama").mkdir()
        Path("/proc/sys/kernel/yama/ptrace_scope").write_text(f"{scope}\n")
        with_capability = access.yama()
        drop_capabilities(1 << host.Capability.CAP_SYS_PTRACE)
        found = host.facts()
        return with_capability, by_name(found)["yama.ptrace_scope"], host.can_run_main_job(found)

    with_capability, without, can_run = in_child(under_yama)
    assert (with_capability.status, without.status) == (privileged, status)
    assert with_capability.value == without.value == scope
    assert can_run == (status is not Status.NO)
    assert bool(without.remedy) == (scope > 0)


def test_no_yama_means_no_restriction():
    path = Path("/proc/sys/kernel/yama/ptrace_scope")
    assert host.yama_scope() == (int(path.read_text()) if path.exists() else 0)


def own_pagemap_entry():
    """Return the entry of a page that this process has just touched."""
    with mmap.mmap(-1, PAGE) as page:
        page[0] = 1
        anchor = ctypes.c_char.from_buffer(page)
        entry = kernel.entries(ctypes.addressof(anchor), 1)[0]
        del anchor
        return entry


def test_frames_are_visible_when_pagemap_shows_one():
    fact = access.frames()
    assert fact.value == bool(own_pagemap_entry() & kernel.FRAME) == host.pfns_visible()
    assert (fact.status is Status.YES) == fact.value


def test_frames_are_hidden_from_nobody():
    def look():
        become_nobody()
        return own_pagemap_entry(), access.frames()

    entry, fact = in_child(look)
    assert entry >> 63
    assert not entry & kernel.FRAME
    assert (fact.status, fact.value) == (Status.NO, False)
    assert "CAP_SYS_ADMIN" in fact.summary
    assert "cap_sys_admin" in fact.remedy


def test_pagemap_scan_agrees_with_a_raw_ioctl():
    # An empty range, which a kernel with the call accepts.
    argument = struct.pack("12Q", 96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    with Path("/proc/self/pagemap").open("rb") as entries:
        try:
            known = fcntl.ioctl(entries, 0xC0606610, argument) is not None
        except OSError:
            known = False
    assert access.pagemap_scan().value == known


def test_a_kernel_without_pagemap_scan():
    def denied():
        deny_calls({"ioctl": errno.ENOTTY})
        return access.pagemap_scan()

    fact = in_child(denied)
    assert (fact.status, fact.remedy) == (Status.NO, "Linux 6.7 or later")
