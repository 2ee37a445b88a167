"""Huge pages, pools, swap, lazy freeing and write tracking, compared with smaps and meminfo."""

import ctypes
import errno
import mmap
import re
import subprocess
from pathlib import Path

import pytest
from support.child import in_child
from support.probing import check, libc, run_remedy, setting

from iobmd import host
from iobmd.host import Status, lazyfree, pages
from iobmd.physical import hugetlb
from iobmd.units import HUGE_PAGE_SIZE

PAGE = mmap.PAGESIZE
THP_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def anonymous_huge_bytes():
    """Fault in memory of the size of two huge pages with MADV_HUGEPAGE; return the huge bytes according to smaps."""
    size = HUGE_PAGE_SIZE
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
    own = THP_ENABLED.parent / f"hugepages-{HUGE_PAGE_SIZE >> 10}kB" / "enabled"
    if not own.exists():
        pytest.skip("this kernel has no setting per huge page size (Linux 6.8)")
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
    expected = [meminfo(f"HugePages_{field}") for field in ("Total", "Free", "Rsvd", "Surp")]
    assert [pool.total, pool.free, pool.reserved, pool.surplus] == expected


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


def test_lazy_freeing_here():
    assert lazyfree.madv_free().status is Status.YES


def test_lazy_freeing_after_mlockall():
    """mlockall does not lock memory that iobmd maps."""

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


def test_a_surplus_page_freed_while_a_pool_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pool without configured pages, whose only page another process frees between two reads."""
    (tmp_path / "nr_hugepages").write_text("1")
    (tmp_path / "surplus_hugepages").write_text("1")
    read = Path.read_text

    def read_slowly(path: Path) -> str:
        text = read(path)
        (tmp_path / "nr_hugepages").write_text("0")
        (tmp_path / "surplus_hugepages").write_text("0")
        return text

    monkeypatch.setattr(Path, "read_text", read_slowly)
    assert hugetlb._persistent(tmp_path) == 0
