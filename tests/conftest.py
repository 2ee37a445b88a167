"""Requirements, the report header, and the fixtures that change the host and restore it."""

import contextlib
import errno
import fcntl
import gc
import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import iobmd.tools  # adds its commands to those of iobmd.cli
import pytest
from support import guard, inherited, requirements, source_process, targets
from support.kernel import Footprint

import iobmd

REQUIRE_ALL = os.environ.get("IOBMD_REQUIRE") == "all"
Undoing = Callable[..., AbstractContextManager[None]]
_MAP_HUGETLB = 0x40000  # and the size of a page in the bits from 26 on
GUARD = pytest.StashKey[guard.Guard]()


def pytest_configure(config: pytest.Config) -> None:
    inherited.set_to_expected()
    config.stash[GUARD] = guard.Guard()
    if "IOBMD_GUEST" not in os.environ:  # under emulation the import takes seconds, and no test in guests needs it
        import hypothesis

        # Its database would be where an unprivileged user may not write, its deadlines depend on an idle machine, and
        # a change must not fail by examples that are new by chance: those are for `make fuzz` and nightly runs.
        again = "IOBMD_NIGHTLY" not in os.environ
        hypothesis.settings.register_profile("iobmd", database=None, deadline=None, derandomize=again)
        hypothesis.settings.load_profile("iobmd")
    config.addinivalue_line("markers", "needs(*requirements): requirements of the test (support.requirements)")


def pytest_collection_finish() -> None:
    """Exclude objects that exist before the first test from garbage collection: `Footprint` collects twice per test.

    With 2,700 tests collected this takes 4 ms instead of 120.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[GUARD].close()


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    """Start the guard's timer, together with pytest-timeout's, which may be unable to end the test."""
    item.config.stash[GUARD].limit(item.nodeid, settings.timeout + guard.MARGIN)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    try:
        return (yield)
    finally:
        item.config.stash[GUARD].limit(item.nodeid, None)


def pytest_enter_pdb(config: pytest.Config) -> None:
    config.stash[GUARD].limit("a debugger", None)


def pytest_report_header() -> list[str]:
    offers = {name: requirements.missing(name) for name in requirements.PROBES}
    have = [name for name, reason in offers.items() if not reason]
    lack = [f"{name} ({reason})" for name, reason in offers.items() if reason]
    return [
        f"iobmd: uid {os.geteuid()}, Linux {os.uname().release}, IOBMD_REQUIRE={'all' if REQUIRE_ALL else 'no'}",
        f"host offers: {', '.join(have) or 'nothing'}; lacks: {', '.join(lack) or 'nothing'}",
    ]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            reason = requirements.missing(name)
            if not reason:
                continue
            if REQUIRE_ALL and name not in requirements.MAY_BE_MISSING:
                pytest.fail(f"IOBMD_REQUIRE=all, and the host lacks {name}: {reason}", pytrace=False)
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    """Extend the time budget of searches, which take longer on a busy machine or while a host backs a virtual one."""
    with contextlib.ExitStack() as held:
        if "IOBMD_GUEST" not in os.environ:  # a guest has little memory, and a longer search would use all of it
            held.enter_context(iobmd.policy(time_budget=60))
        yield


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    """Free memory that earlier tests have left for reuse, so that a test gets new memory, or its own."""
    iobmd.trim()


@pytest.fixture(scope="session", autouse=True)
def what_the_library_keeps() -> None:
    """Create the process's ring, open pagemap, userfaultfd and tmpfs, so that they do not count as leaks."""
    iobmd.allocate(1).free()
    iobmd.allocate(1, wired=False, purgeable=True).free()
    iobmd.allocate(2 << 20, wired=False, shared=True).free()


@pytest.fixture(scope="session")
def source_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_process.build(tmp_path_factory.mktemp("source"))


@pytest.fixture
def start_source(source_program: Path) -> Iterator[Callable[..., source_process.SourceProcess]]:
    """Start C processes with memory of every kind; they end with the test."""
    started: list[source_process.SourceProcess] = []

    def start(size: int = 4 << 20, *options: str) -> source_process.SourceProcess:
        started.append(source_process.SourceProcess(source_program, size, *options))
        return started[-1]

    yield start
    for one in started:
        one.__exit__()


@pytest.fixture
def may_trace() -> None:
    """Skip the test unless this process may trace its children."""
    targets.need_ptrace()


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail the test if it leaves mappings, descriptors or locked memory behind.

    Requested by `usefixtures`, so that it is set up before the test's other fixtures, and checks after their end.
    """
    before = Footprint.settled()
    yield
    after = Footprint.settled()
    assert after.descriptors == before.descriptors
    assert after.locked == before.locked
    if not requirements.missing("own_footprint"):
        # glibc retains some freed memory, and the stacks and arenas of threads: less than any leaked buffer
        assert after.resident - before.resident < 8 << 20, (before, after)


@pytest.fixture(scope="session")
def undoing(pytestconfig: pytest.Config) -> Undoing:
    """Return `Guard.undoing`, for settings that must be restored even if the tests are killed."""
    return pytestconfig.stash[GUARD].undoing


@pytest.fixture
def hugetlb_pool(setting: Callable[[str, object], None]) -> int:
    """Provide eight free 2 MiB pages in the pool, which is restored afterwards."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    setting(str(pool), int(pool.read_text()) + 8)
    return 8


@pytest.fixture
def empty_pools() -> Iterator[None]:
    """Reserve all free hugetlb pages, because memory that cannot be pinned would otherwise be allocated in them."""
    with contextlib.ExitStack() as reserved:
        for pool in iobmd.host.hugetlb_pools():
            if pool.available:
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_HUGETLB | (pool.size.bit_length() - 1) << 26
                reserved.enter_context(mmap.mmap(-1, pool.available * pool.size, flags))
        yield


@pytest.fixture
def compacted() -> None:
    """Compact memory, as root, because earlier tests may have left no contiguous 64 MiB."""
    if os.geteuid() == 0:
        Path("/proc/sys/vm/compact_memory").write_text("1")


@pytest.fixture
def setting(
    undoing: Undoing,
) -> Iterator[Callable[[str, object], None]]:
    """Write settings of the host (files of /proc/sys and /sys), and restore each afterwards."""
    before: dict[Path, str] = {}
    with contextlib.ExitStack() as guarded:

        def write(path: str, value: object) -> None:
            file = Path(path)
            if file not in before:
                with file.open() as opened:
                    # The library raises hugetlb pools under this lock: without it, a temporary value would be
                    # recorded as the previous state.
                    fcntl.flock(opened, fcntl.LOCK_EX)
                    text = opened.read()
                # "always [madvise] never": the current one is in brackets
                before[file] = text.partition("[")[2].partition("]")[0] or text
                guarded.enter_context(undoing(("write", str(file), before[file])))
            file.write_text(str(value))

        yield write
        for file, value in before.items():
            file.write_text(value)


def _swap_off(device: str) -> None:
    """Remove swap space, repeatedly: this fails while a process that was killed in a full cgroup has pages there."""
    end = time.monotonic() + 30
    while subprocess.run(["swapoff", device], check=False).returncode:
        assert time.monotonic() < end, f"{device} is still in use"
        time.sleep(0.1)


def _when_unused(action: Callable[[], object]) -> None:
    """Do something that fails with EBUSY while its object is used: by udev, or by a process that is exiting."""
    end = time.monotonic() + 30
    while True:
        try:
            action()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


@pytest.fixture
def swap(undoing: Undoing) -> Iterator[None]:
    """64 MiB of swap on zram, removed afterwards."""
    device = Path("/sys/block/zram0")
    assert Path("/proc/swaps").read_text().count("\n") == 1, "the host already has swap space"
    with undoing(("run", "swapoff", "/dev/zram0"), ("write", str(device / "reset"), "1")):
        (device / "disksize").write_text(str(64 << 20))
        try:
            subprocess.run(["mkswap", "/dev/zram0"], check=True, capture_output=True)
            subprocess.run(["swapon", "/dev/zram0"], check=True)
            try:
                yield
            finally:
                _swap_off("/dev/zram0")
        finally:
            _when_unused(lambda: (device / "reset").write_text("1"))


@pytest.fixture
def memory_cgroup(
    undoing: Undoing,
) -> Iterator[Callable[[int], Path]]:
    """Create memory cgroups with a limit in bytes; return the path of cgroup.procs, to which a pid is written."""
    made: list[Path] = []
    v1 = Path("/sys/fs/cgroup/memory/cgroup.procs").exists()
    root = Path("/sys/fs/cgroup/memory" if v1 else "/sys/fs/cgroup")
    with contextlib.ExitStack() as guarded:

        def make(limit: int) -> Path:
            group = root / f"iobmd-test-{os.getpid()}-{len(made)}"
            guarded.enter_context(undoing(("rmdir", str(group))))
            group.mkdir()
            made.append(group)
            (group / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit))
            return group / "cgroup.procs"

        yield make
        for group in made:
            _when_unused(group.rmdir)
