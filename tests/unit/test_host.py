"""The probes of `iobmd.host`, each compared with what the kernel says by another way, and under real denial."""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import platform
import re
import resource
import struct
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.child import NOBODY, SYSCALLS, deny_calls, in_child

from iobmd import host
from iobmd.host import Status, access, io_uring, lazyfree, pages, pressure, privilege, remote

PAGE = resource.getpagesize()
IO_URING_SETUP = SYSCALLS["io_uring_setup"]
IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")
THP_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
libc = ctypes.CDLL(None, use_errno=True)

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
    "python_ptrace": remote.python_ptrace,
    "pidfd_getfd": remote.pidfd_getfd,
    "huge_shared": remote.huge_shared,
}


def check(result):
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def become_nobody(*, dumpable=True):
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    # A change of user makes a process undumpable, and its files in /proc root's.
    check(libc.prctl(4, int(dumpable), 0, 0, 0))


def drop(capability):
    """Take one capability from the effective set by capset(2)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    check(libc.capget(header, data))
    data[capability // 32 * 3] &= ~(1 << capability % 32)
    check(libc.capset(header, data))


def effective_capabilities():
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(libc.capget(header, data))
    return data[0] | data[3] << 32


def private_mounts(*hidden):
    """Cover the directories `hidden` with an empty file system, for this process only."""
    check(libc.unshare(0x00020000))
    check(libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None))
    for directory in hidden:
        check(libc.mount(b"none", directory.encode(), b"tmpfs", 0, b"mode=0755"))


@contextmanager
def setting(path, value):
    text = path.read_text()
    before = text.partition("[")[2].partition("]")[0] or text.strip()
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(before)


def run_remedy(fact):
    """Do what the first line of a remedy says, as somebody who pastes it into a root shell."""
    subprocess.run(["sh", "-ec", fact.remedy.splitlines()[0]], check=True, capture_output=True)


def by_name(found):
    return {fact.name: fact for fact in found}


def status_field(name):
    return re.search(rf"^{name}:\s+(.*)$", Path("/proc/self/status").read_text(), re.MULTILINE)[1]


# What a fact is.


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
        # A trigger of PSI takes 10 ms to go.
        many = 40 if name in ("pressure", "cgroup") else 400
        for _ in range(many):
            PROBES[name]()
        return before, what_we_hold(), many

    (descriptors, size, locked), (descriptors_after, size_after, locked_after), many = in_child(rounds)
    assert (descriptors_after, locked_after) == (descriptors, locked)
    # The interpreter may grow by an arena of 1 MiB of its own.
    assert size_after - size < max(many * PAGE, 1 << 20 | 1)


def test_pins_are_given_back():
    def pinned_after_rounds():
        for _ in range(50):
            io_uring.io_uring()
        # A closed ring is taken apart by a worker of the kernel.
        for _ in range(100):
            if status_field("VmPin") == "0 kB":
                break
            libc.usleep(10_000)
        return status_field("VmPin")

    assert in_child(pinned_after_rounds) == "0 kB"


# Plain facts.


def test_page_size_and_kernel():
    assert pages.page_size().value == int(subprocess.check_output(["getconf", "PAGESIZE"]))
    release = Path("/proc/sys/kernel/osrelease").read_text().strip()
    assert pages.kernel().value == {"release": release, "machine": platform.machine()}


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
        drop(host.Capability.CAP_SYS_PTRACE)
        return privilege.capability(host.Capability.CAP_SYS_PTRACE)

    fact = in_child(drop_one)
    assert (fact.status, fact.value) == (Status.NO, {"effective": False, "host": False})
    assert "setcap cap_ipc_lock,cap_sys_ptrace,cap_sys_admin+ep /" in fact.remedy
    assert "--cap-add SYS_PTRACE" in fact.remedy


def test_capabilities_in_a_user_namespace_do_not_count_for_the_host():
    def enter_namespace():
        become_nobody()
        if libc.unshare(0x10000000) == -1:
            return None
        return effective_capabilities(), privilege.capability(host.Capability.CAP_SYS_ADMIN), access.frames()

    answer = in_child(enter_namespace)
    if answer is None:
        pytest.skip("this host gives user namespaces to root only")
    effective, fact, frames = answer
    assert effective >> host.Capability.CAP_SYS_ADMIN & 1
    assert (fact.status, fact.value) == (Status.LIMITED, {"effective": True, "host": False})
    assert frames.value is False
    assert "user namespace" in frames.remedy


# Locked memory.


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


# Copying from other processes.


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
        drop(host.Capability.CAP_SYS_PTRACE)
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


# Where pages are.


def own_pagemap_entry():
    area = mmap.mmap(-1, PAGE)
    area[0] = 1
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    with Path("/proc/self/pagemap").open("rb") as entries:
        entries.seek(address // PAGE * 8)
        return struct.unpack("Q", entries.read(8))[0]


def test_frames_are_visible_when_pagemap_shows_one():
    fact = access.frames()
    assert fact.value == bool(own_pagemap_entry() & ((1 << 55) - 1)) == host.pfns_visible()
    assert (fact.status is Status.YES) == fact.value


def test_frames_are_hidden_from_nobody():
    def look():
        become_nobody()
        return own_pagemap_entry(), access.frames()

    entry, fact = in_child(look)
    assert entry >> 63
    assert not entry & ((1 << 55) - 1)
    assert (fact.status, fact.value) == (Status.NO, False)
    assert "CAP_SYS_ADMIN" in fact.summary
    assert "cap_sys_admin" in fact.remedy


def test_pagemap_scan_agrees_with_a_raw_ioctl():
    # An empty range: a kernel that knows the call accepts it.
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


# io_uring.


def ring_error():
    """What io_uring_setup(2) says here: 0 for a ring."""
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
@pytest.mark.parametrize(("number", "told"), [(errno.EPERM, "forbids"), (errno.ENOSYS, "hides")])
def test_io_uring_denied_by_seccomp(call, number, told):
    if not io_uring.io_uring().usable:
        pytest.skip("io_uring is off here already: nothing for a filter to deny")

    def denied():
        deny_calls({call: number})
        return io_uring.io_uring()

    fact = in_child(denied)
    assert (fact.status, fact.value) == (Status.NO, {"pins": False, "errno": number})
    assert f"seccomp filter {told}" in fact.summary
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
        pytest.skip("io_uring is off here: its limit is never asked")
    assert fact.value == {"pins": False, "errno": errno.ENOMEM}
    assert "RLIMIT_MEMLOCK" in fact.summary
    assert "ulimit -l" in fact.remedy


def test_io_uring_waits_for_rings_just_closed():
    def at_a_tight_limit():
        # Room for a few rings: without patience the worker that uncharges closed ones loses this race.
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))
        become_nobody()
        return ring_error(), {io_uring.io_uring().summary for _ in range(100)}

    number, summaries = in_child(at_a_tight_limit)
    if number:
        pytest.skip(f"io_uring cannot be used here: {os.strerror(number)}")
    assert summaries == {"a page was pinned"}


# Huge pages.


def anonymous_huge_bytes():
    """Fault in two huge pages' room with MADV_HUGEPAGE and return what smaps counts as huge."""
    size = pages.huge_page_size()
    area = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_HUGEPAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    ctypes.memset(start + -start % size, 1, 1)
    for block in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+)", block)
        if bounds and int(bounds[1], 16) <= start + -start % size < int(bounds[2], 16):
            return int(re.search(r"AnonHugePages:\s+(\d+)", block)[1]) << 10
    return None


def test_transparent_huge_pages_agree_with_smaps():
    fact = pages.huge_pages()
    assert fact.value["obtained"] == bool(in_child(anonymous_huge_bytes))
    if THP_ENABLED.exists():
        assert f"[{fact.value['enabled']}]" in THP_ENABLED.read_text()
    assert (fact.status is Status.YES) == fact.value["obtained"]


@pytest.mark.needs("root")
def test_transparent_huge_pages_turned_off_and_on():
    with setting(THP_ENABLED, "never"):
        fact = pages.huge_pages()
        assert (fact.status, fact.value["obtained"]) == (Status.NO, False)
        assert not host.huge_pages_enabled()
        run_remedy(fact)
        assert pages.huge_pages().status is Status.YES
        assert host.huge_pages_enabled()


@pytest.mark.needs("root")
def test_transparent_huge_pages_off_for_one_size():
    own = THP_ENABLED.parent / f"hugepages-{pages.huge_page_size() >> 10}kB" / "enabled"
    if not own.exists():
        pytest.skip("this kernel has no setting a huge-page size (Linux 6.8)")
    with setting(own, "never"):
        fact = pages.huge_pages()
        assert (fact.status, fact.value["setting"], fact.value["obtained"]) == (Status.NO, "never", False)
        run_remedy(fact)
        assert pages.huge_pages().status is Status.YES


def test_transparent_huge_pages_off_in_this_process():
    def turn_off():
        check(libc.prctl(41, 1, 0, 0, 0))
        return pages.huge_pages(), host.huge_pages_enabled()

    fact, enabled = in_child(turn_off)
    assert (fact.status, enabled) == (Status.NO, False)
    assert "PR_SET_THP_DISABLE" in fact.remedy


def meminfo(field):
    return int(re.search(rf"^{field}:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)[1])


def default_pool():
    size = meminfo("Hugepagesize") << 10
    return next(pool for pool in host.hugetlb_pools() if pool.size == size)


def assert_pool_is_meminfos():
    pool = default_pool()
    told = [meminfo(f"HugePages_{field}") for field in ("Total", "Free", "Rsvd", "Surp")]
    assert [pool.total, pool.free, pool.reserved, pool.surplus] == told


def test_pools_are_those_of_the_kernel():
    listed = {path.name for path in Path("/sys/kernel/mm/hugepages").iterdir()}
    assert {Path(pool.directory).name for pool in host.hugetlb_pools()} == listed
    assert_pool_is_meminfos()


@pytest.mark.needs("root")
def test_pool_filled_by_its_remedy():
    pool = default_pool()
    counter = Path(pool.directory) / "nr_hugepages"
    with setting(counter, "0"):
        (fact,) = (fact for fact in pages.hugetlb() if fact.name == counter.parent.name)
        assert fact.status is Status.NO
        assert f"sysctl vm.nr_hugepages={(128 << 20) // pool.size}" in fact.remedy
        run_remedy(fact)
        assert counter.read_text().strip() == str((128 << 20) // pool.size)
        assert_pool_is_meminfos()
        (fact,) = (fact for fact in pages.hugetlb() if fact.name == counter.parent.name)
        assert (fact.status, fact.remedy) == (Status.YES, "")
        with mmap.mmap(-1, pool.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000):
            assert_pool_is_meminfos()
            assert (default_pool().reserved, default_pool().available) == (1, default_pool().free - 1)


# Swap and pressure.


@pytest.mark.needs("root")
def test_swap_comes_and_goes(tmp_path):
    file = tmp_path / "swap"
    file.write_bytes(bytes(16 << 20))
    file.chmod(0o600)
    subprocess.run(["mkswap", file], check=True, capture_output=True)
    if subprocess.run(["swapon", file], check=False, capture_output=True).returncode:
        pytest.skip("no swap file on the file system of temporary files")
    try:
        (area,) = (area for area in host.swap_areas() if area.name == str(file))
        fact = pages.swap()
    finally:
        subprocess.run(["swapoff", file], check=True)
    assert (area.type, area.size, area.used) == ("file", (16 << 20) - PAGE, 0)
    assert fact.status is Status.YES
    assert str(file) in fact.summary
    assert str(file) not in [area.name for area in host.swap_areas()]


# Purgeable memory.


def test_lazy_freeing_here():
    assert lazyfree.madv_free().status is Status.YES


def test_lazy_freeing_after_mlockall():
    """What iobmd maps is not locked by it."""

    def look():
        check(libc.mlockall(2))  # MCL_FUTURE
        return lazyfree.madv_free()

    assert in_child(look, memlock=8 << 20).status is Status.YES


def test_write_tracking():
    here = lazyfree.write_tracking()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    assert here.status in (Status.YES, Status.LIMITED)
    denied = in_child(lazyfree.write_tracking, deny={"userfaultfd": errno.EPERM})
    assert denied.status is Status.LIMITED
    assert "smaps" in denied.summary
    assert "seccomp" in denied.remedy
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_what_memory_in_other_tasks_rests_on(monkeypatch):
    assert remote.python_ptrace().status is Status.YES
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "iobmd[remote]" in remote.python_ptrace().remedy
    assert remote.pidfd_getfd().status is Status.YES
    denied = in_child(remote.pidfd_getfd, deny={"pidfd_getfd": errno.EPERM})
    assert denied.status is Status.NO
    assert "seccomp" in denied.remedy
    denied = in_child(remote.huge_shared, deny={"fsopen": errno.EPERM})
    assert (denied.status, denied.usable) == (Status.LIMITED, True)


def takes_trigger(path):
    try:
        with path.open("r+b", buffering=0) as file:
            file.write(b"some 150000 2000000\0")
    except OSError:
        return False
    return True


def test_pressure_of_the_host():
    path = Path("/proc/pressure/memory")
    file = host.system_pressure()
    assert (file is not None) == path.exists()
    if file:
        assert file == (str(path), takes_trigger(path))


def test_pressure_of_our_own_cgroup():
    file = host.cgroup_pressure()
    if file is None:
        assert "/sys/fs/cgroup" not in Path("/proc/self/mounts").read_text()
        pytest.skip("no cgroup is mounted here")
    path = Path(file.path)
    assert str(os.getpid()) in (path.parent / "cgroup.procs").read_text().split()
    if path.name == "memory.pressure":
        assert file.notifies == takes_trigger(path)


@pytest.mark.needs("root")
def test_pressure_that_can_only_be_read():
    if host.system_pressure() is None:
        pytest.skip("this kernel keeps no pressure information (PSI)")

    def read_only():
        private_mounts()
        check(libc.mount(b"/proc/pressure", b"/proc/pressure", None, 0x1000, None))
        check(libc.mount(None, b"/proc/pressure", None, 0x1000 | 0x20 | 1, None))
        return pressure.pressure()

    fact = in_child(read_only)
    assert (fact.status, fact.value["notifies"]) == (Status.LIMITED, False)


# Files that are not there, or not for us.


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
