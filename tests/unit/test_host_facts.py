"""The facts of `iobmd doctor`: complete, without side effects, and reported even if files are missing."""

import errno
import json
import mmap
import platform
import subprocess
from pathlib import Path

import pytest
from support import kernel
from support.child import in_child
from support.probing import become_nobody, by_name, private_mounts, status_field

from iobmd import host
from iobmd.host import Status, access, io_uring, lazyfree, pages, pressure, privilege, remote

PAGE = mmap.PAGESIZE
PROBES = {
    "kernel": pages.kernel,
    "page_size": pages.page_size,
    "mlock": privilege.mlock,
    "memlock": privilege.memlock,
    "capability": lambda: privilege.capability(host.Capability.CAP_SYS_ADMIN),
    "process_vm_readv": access.process_vm_readv,
    "proc_mem": access.proc_mem,
    "yama": access.yama,
    "frames": access.frames,
    "io_uring": io_uring.io_uring,
    "pagemap_scan": access.pagemap_scan,
    "huge_pages": pages.huge_pages,
    "hugetlb": pages.hugetlb,
    "swap": pages.swap,
    "madv_free": lazyfree.madv_free,
    "write_tracking": lazyfree.write_tracking,
    "pressure": pressure.pressure,
    "cgroup": pressure.cgroup,
    "system_calls": remote.system_calls,
    "pidfd_getfd": remote.pidfd_getfd,
    "huge_shared": remote.huge_shared,
}


def test_facts_are_complete_and_can_be_written_as_json():
    found = host.facts()
    assert len({fact.name for fact in found}) == len(found)
    for fact in found:
        assert json.loads(json.dumps(fact._asdict()))["status"] in ("yes", "limited", "no", "info")
        assert fact.summary
        assert fact.purpose
        assert bool(fact.remedy) == (fact.status in (Status.NO, Status.LIMITED)), fact
        assert fact.usable == (fact.status is not Status.NO)


@pytest.mark.parametrize("name", PROBES)
def test_probing_leaves_nothing_behind(name):
    def what_we_hold():
        size, locked = (status_field(field) for field in ("VmSize", "VmLck"))
        return len(list(Path("/proc/self/fd").iterdir())), int(size.split()[0]) << 10, locked

    def rounds():
        for _ in range(20):
            PROBES[name]()
        before = what_we_hold()
        # Removing a PSI trigger takes 10 ms.
        many = 40 if name in ("pressure", "cgroup") else 400
        for _ in range(many):
            PROBES[name]()
        return before, what_we_hold(), many

    (descriptors, size, locked), (descriptors_after, size_after, locked_after), many = in_child(rounds)
    assert (descriptors_after, locked_after) == (descriptors, locked)
    # The interpreter may grow by one of its arenas of 1 MiB.
    assert size_after - size < max(many * PAGE, 1 << 20 | 1)


def test_pins_are_given_back():
    def pinned_after_rounds():
        for _ in range(50):
            io_uring.io_uring()
        return kernel.pinned()  # a kernel worker releases a closed ring

    assert in_child(pinned_after_rounds) == 0


def test_page_size_and_kernel():
    assert pages.page_size().value == int(subprocess.check_output(["getconf", "PAGESIZE"]))
    release = Path("/proc/sys/kernel/osrelease").read_text().strip()
    assert pages.kernel().value == {"release": release, "machine": platform.machine()}


def test_what_memory_in_other_tasks_rests_on(monkeypatch):
    assert remote.system_calls().status is Status.YES
    with monkeypatch.context() as patch:
        patch.setattr(remote.tracer, "PROCESSOR", "")
        assert "x86-64" in remote.system_calls().remedy
    assert remote.pidfd_getfd().status is Status.YES
    denied = in_child(remote.pidfd_getfd, deny={"pidfd_getfd": errno.EPERM})
    assert denied.status is Status.NO
    assert "seccomp" in denied.remedy
    denied = in_child(remote.huge_shared, deny={"fsopen": errno.EPERM})
    assert (denied.status, denied.usable) == (Status.LIMITED, True)


@pytest.mark.parametrize("mode", [0o755, 0o700])
@pytest.mark.parametrize("hidden", [("/proc", "/sys"), ("/sys/kernel/mm",), ("/proc/sys", "/proc/pressure")])
@pytest.mark.needs("root")
def test_missing_files_are_findings(hidden, mode):
    def without_them():
        private_mounts(*hidden)
        for directory in hidden:
            Path(directory).chmod(mode)
        become_nobody()
        found = host.facts()
        return by_name(found), host.can_run_main_job(found)

    found, can_run = in_child(without_them)
    assert can_run == ("/proc" not in hidden)  # which shows other tasks
    gone = {
        "/proc": ("/proc", "/proc/PID/mem", "PFN", "PAGEMAP_SCAN", "hugetlb", "swap", "/proc/pressure/memory"),
        "/sys/kernel/mm": ("hugetlb",),
        "/proc/sys": ("/proc/pressure/memory",),
    }[hidden[0]]
    for name in gone:
        assert found[name].status is Status.NO, found[name]
        assert found[name].remedy
    assert not [fact for fact in found.values() if "None" in fact.summary]
