"""Finding cgroups and the unused part of their limits, in invented trees of /proc and /sys/fs/cgroup."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.child import in_child

from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.host import cgroup, headroom
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1 << 20
UNLIMITED = 9223372036854771712
PID = 4242


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write files of /proc; each mount is its root, its path below `tmp_path`, and the text after the dash."""
    real = cgroup.read_text
    files: dict[str, str] = {}
    monkeypatch.setattr(cgroup, "read_text", lambda path: files[path] if path in files else real(path))
    monkeypatch.setattr(cgroup.procfs, "memory_file", lambda pid, name: f"/proc/{pid}/{name}")
    monkeypatch.setattr(cgroup, "_found", {})

    def make(*mounts: tuple[str, str, str], member: str, pid: int = PID) -> None:
        lines = [
            f"{40 + number} 31 0:{number} {root} {tmp_path}/{place} rw,nosuid shared:7 - {system}"
            for number, (root, place, system) in enumerate(mounts)
        ]
        files["/proc/self/mountinfo"] = "\n".join(["23 1 0:1 / / rw - ext4 /dev/vda rw", *lines])
        files[f"/proc/{pid}/cgroup"] = member

    return make


def group(directory: Path, **files: str | int) -> Path:
    """Create a cgroup's directory with these files; a double underscore in a name stands for a dot."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(f"{content}\n")
    return directory


def names(controller: str = "memory") -> list[str]:
    return [found.name for found in cgroup.around(controller, PID)]


V1 = "cgroup cgroup rw,memory"
V2 = "cgroup2 cgroup2 rw,nsdelegate"


def test_every_level_of_version_1(tmp_path: Path, proc: Callable[..., None]) -> None:
    group(tmp_path / "m/a/b")
    proc(("/", "m", V1), ("/", "c", "cgroup cgroup rw,cpu"), member="4:memory:/a/b\n3:cpu:/\n1:name=systemd:/z")
    assert names() == ["/a/b", "/a", "/"]
    assert cgroup.around("memory", PID)[0].directory == f"{tmp_path}/m/a/b"


def test_controllers_that_share_a_hierarchy(tmp_path: Path, proc: Callable[..., None]) -> None:
    group(tmp_path / "m/a")
    proc(("/", "m", "cgroup cgroup rw,hugetlb,memory"), member="4:hugetlb,memory:/a")
    assert names("memory") == names("hugetlb") == ["/a", "/"]
    assert names("cpu") == []


def test_version_2_beside_version_1(tmp_path: Path, proc: Callable[..., None]) -> None:
    group(tmp_path / "m/a")
    group(tmp_path / "u/b")
    proc(("/", "m", V1), ("/", "u", V2), member="4:memory:/a\n0::/b")
    assert [(found.name, found.unified) for found in cgroup.around("memory", PID)] == [
        ("/a", False), ("/", False), ("/b", True), ("/", True),
    ]  # fmt: skip


def test_a_mount_of_the_own_subtree_only(tmp_path: Path, proc: Callable[..., None]) -> None:
    """As in a container without a cgroup namespace: the path is the host's, and the mount begins at the group."""
    group(tmp_path / "m/inner")
    proc(("/docker/17", "m", V1), member="4:memory:/docker/17/inner")
    assert names() == ["/inner", "/"]
    proc(("/docker/17", "m", V1), member="4:memory:/docker/18")
    assert names() == []
    proc(("/docker/17", "m", V1), member="4:memory:/docker/177")
    assert names() == []


def test_a_namespace_with_a_mount_of_its_own(tmp_path: Path, proc: Callable[..., None]) -> None:
    group(tmp_path / "u")
    proc(("/", "u", V2), member="0::/")
    assert [found.directory for found in cgroup.around("memory", PID)] == [f"{tmp_path}/u"]


def test_a_mount_from_outside_of_the_namespace(tmp_path: Path, proc: Callable[..., None]) -> None:
    """As after `unshare --cgroup`: the names in between are not shown, and are found by the process in the group."""
    group(tmp_path / "u/x/other", cgroup__procs="1\n424")
    group(tmp_path / "u/y/mine/deep", cgroup__procs=f"7\n{PID}\n8")
    proc(("/../..", "u", V2), member="0::/deep")
    assert names() == ["/y/mine/deep", "/y/mine", "/y", "/"]
    proc(("/../..", "u", V2), member="0::/gone/deeper (deleted)")
    assert names() == []
    group(tmp_path / "u/y/sibling", cgroup__procs=PID)
    proc(("/../..", "u", V2), member="0::/../sibling")
    assert names() == ["/y/sibling", "/y", "/"]
    proc(("/../..", "u", V2), member="0::/../../y/mine")
    assert names() == ["/y/mine", "/y", "/"]


def test_a_group_outside_of_the_mount_is_no_other_directory(tmp_path: Path, proc: Callable[..., None]) -> None:
    """A target in a group outside of the namespace would otherwise choose the directory whose limits are read."""
    group(tmp_path / "u")
    group(tmp_path / "tmp/planted", memory__max=0)
    for member in ("0::/../tmp/planted", "0::/../u"):
        proc(("/", "u", V2), member=member)
        assert names() == []


def test_what_was_found_is_looked_at_again(tmp_path: Path, proc: Callable[..., None]) -> None:
    first = group(tmp_path / "u/a", cgroup__procs=PID)
    group(tmp_path / "u/b", cgroup__procs="")
    proc(("/..", "u", V2), member="0::/")
    assert names() == ["/a", "/"]
    group(first, cgroup__procs="")
    group(tmp_path / "u/b", cgroup__procs=PID)
    assert names() == ["/b", "/"]


def test_the_mount_that_shows_most_is_taken(tmp_path: Path, proc: Callable[..., None]) -> None:
    group(tmp_path / "part/b")
    group(tmp_path / "all/a/b")
    proc(("/a", "part", V1), ("/", "hidden", V1), ("/", "all", V1), member="4:memory:/a/b")
    assert cgroup.around("memory", PID)[0].directory == f"{tmp_path}/all/a/b"


def test_escapes_of_mountinfo(tmp_path: Path, proc: Callable[..., None]) -> None:
    group(tmp_path / "my cgroups\\x/in ner")
    proc(("/out\\040er\\134", "my\\040cgroups\\134x", V1), member="4:memory:/out er\\/in ner")
    assert names() == ["/in ner", "/"]


def test_a_group_that_was_removed(tmp_path: Path, proc: Callable[..., None]) -> None:
    group(tmp_path / "m/a")
    proc(("/", "m", V1), member="4:memory:/a/gone (deleted)")
    assert names() == ["/a", "/"]


def refused(size: int, *, swappable: bool = False, absent: int | None = None) -> str | None:
    """Request memory charged to the process; return the message, None if it fits."""
    try:
        headroom.require(size, swappable=swappable, pid=PID, absent=None if absent is None else lambda: absent)
    except IOReturnError as error:
        assert error.code == IOReturn.kIOReturnNoMemory
        return str(error)
    return None


STAT = "anon 1\nactive_anon {a}\ninactive_anon 0\nactive_file {f}\ninactive_file 0\nslab_reclaimable 0"


@pytest.fixture
def host_swap(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    real = headroom.procfs.meminfo

    def set_free(size: int) -> None:
        monkeypatch.setattr(headroom.procfs, "meminfo", lambda: {**real(), "SwapFree": size})

    set_free(0)
    return set_free


def test_limits_of_version_2(tmp_path: Path, proc: Callable[..., None], host_swap: Callable[[int], None]) -> None:
    inner = group(tmp_path / "u/a/b", memory__max="max", memory__current=50 * MIB)
    outer = group(
        tmp_path / "u/a",
        memory__max=256 * MIB,
        memory__current=200 * MIB,
        memory__stat=STAT.format(a=150 * MIB, f=20 * MIB),
    )
    proc(("/", "u", V2), member="0::/a/b")
    assert refused(50 * MIB) is None
    assert refused(70 * MIB) is None  # 20 MiB of files can be dropped
    message = refused(90 * MIB)
    assert message
    for part in ("90 MiB", "memory cgroup /a of task 4242", "76 MiB free", "256 MiB", f"{outer}/memory.max"):
        assert part in message
    assert refused(90 * MIB, absent=0) is None
    assert refused(90 * MIB, absent=60 * MIB) is None
    assert "80 MiB" in (refused(90 * MIB, absent=80 * MIB) or "")
    host_swap(1 << 30)
    assert refused(200 * MIB, swappable=True) is None
    assert refused(200 * MIB) is None  # 150 MiB of others can be swapped out
    assert refused(240 * MIB)
    group(inner, memory__swap__max=30 * MIB, memory__swap__current=10 * MIB)
    assert refused(100 * MIB, swappable=True)
    assert refused(90 * MIB, swappable=True) is None


def test_limits_of_version_1(tmp_path: Path, proc: Callable[..., None], host_swap: Callable[[int], None]) -> None:
    found = group(tmp_path / "m/a", memory__limit_in_bytes=UNLIMITED, memory__usage_in_bytes=10)
    proc(("/", "m", V1), member="4:memory:/a")
    assert refused(300 * MIB) is None
    group(
        found,
        memory__limit_in_bytes=256 * MIB,
        memory__usage_in_bytes=156 * MIB,
        memory__stat=f"active_file 0\ntotal_active_file {20 * MIB}\ntotal_inactive_anon {130 * MIB}",
    )
    assert refused(110 * MIB) is None
    assert "memory.limit_in_bytes" in (refused(130 * MIB) or "")
    host_swap(1 << 30)
    assert refused(200 * MIB) is None
    group(found, memory__memsw__limit_in_bytes=300 * MIB, memory__memsw__usage_in_bytes=200 * MIB)
    assert "memory.memsw.limit_in_bytes" in (refused(200 * MIB, swappable=True) or "")
    assert refused(110 * MIB) is None


def test_hugetlb_pools(tmp_path: Path, proc: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = headroom.pages.HugePool(2 * MIB, total=10, free=8, reserved=3, surplus=0, overcommit=0)
    monkeypatch.setattr(headroom.pages, "hugetlb_pools", lambda: [pool])
    proc(("/", "u", V2), member="0::/a")
    group(tmp_path / "u/a", hugetlb__2MB__max="max", hugetlb__2MB__current=0)
    headroom.require_pages(10 * MIB, 2 * MIB, pid=PID)
    with pytest.raises(
        IOReturnError, match=r"6 hugetlb pages of 2 MiB .* 8 are free, and others have reserved 3 .*echo 11 > "
    ) as raised:
        headroom.require_pages(11 * MIB, 2 * MIB, pid=PID)
    assert raised.value.code == IOReturn.kIOReturnNoResources
    found = group(tmp_path / "u/a", hugetlb__2MB__max=8 * MIB, hugetlb__2MB__current=2 * MIB)
    headroom.require_pages(6 * MIB, 2 * MIB, pid=PID)
    with pytest.raises(IOReturnError, match=f"hugetlb cgroup /a of task 4242.*{found}/hugetlb.2MB.max"):
        headroom.require_pages(8 * MIB, 2 * MIB, pid=PID)


def test_small_requests_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    real = headroom._Look

    def look(pid: int | None, size: int, *, swappable: bool) -> headroom._Look:
        looks.append(size)
        return real(pid, size, swappable=swappable)

    monkeypatch.setattr(headroom, "_Look", look)
    monkeypatch.setattr(headroom, "_recent", headroom._Recent())
    monkeypatch.setattr(headroom, "_VALID", -1)
    for _ in range(1024):
        headroom.require(PAGE_SIZE, swappable=True)
    assert len(looks) == 8, "512 KiB of pages, and as much overhead, in each MiB"


def test_a_fork_during_a_check_leaves_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """`functools.cached_property` computes inside a lock before Python 3.12, which a forked child inherits."""
    parent, inside, leave = os.getpid(), threading.Event(), threading.Event()
    around = cgroup.around

    def slow(*arguments: Any) -> Any:
        if os.getpid() == parent:
            inside.set()
            assert leave.wait(20)
        return around(*arguments)

    def check() -> bool:
        signal.alarm(10)
        headroom.require(64 * MIB, swappable=False, pid=os.getpid())
        return True

    monkeypatch.setattr(headroom.cgroup, "around", slow)
    thread = threading.Thread(target=headroom.tightest)
    thread.start()
    try:
        assert inside.wait(10)
        assert in_child(check)
    finally:
        leave.set()
        thread.join()
