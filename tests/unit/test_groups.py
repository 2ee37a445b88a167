"""Areas grouped by what they map, for areas that are made up; the sums are those of Tally and smaps."""

import mmap
from pathlib import Path
from typing import cast

import pytest
from iobmd.tools.pagemap import groups as module
from iobmd.tools.pagemap.groups import Groups

from iobmd import pagemap
from iobmd._native.pagemap import Tally
from iobmd.pagemap import Area
from iobmd.procfs import VMA, Details


class Contents:
    """The attributes of a Tally, which only native code fills."""

    def __init__(self, **amounts: int) -> None:
        self.__dict__ |= amounts

    def __getattr__(self, _name: str) -> int:
        return 0


def area(name: str, start: int, *, perms: str = "rw-p", kib: int = 4, pss: int | None = None) -> Area:
    """Return an area of 1 MiB with `kib` KiB in memory, shared with others if `pss` is given."""
    vma = VMA(start, start + (1 << 20), perms, 0, 1 if name.startswith("/") else 0, name, "fe:00")
    alone = 0 if pss is not None else kib << 10
    tally = Contents(present=kib << 10, file=kib << 10 if vma.inode else 0, exclusive=alone)
    details = None if pss is None else Details(vma, {"Pss": pss << 10}, frozenset())
    return Area(vma, vma.start, vma.end, cast("Tally", tally), details, None, True, True, True, False)


def grouped(*areas: Area, stack_pointers: tuple[int, ...] = ()) -> Groups:
    groups = Groups(stack_pointers)
    for one in areas:
        groups.counted(one)
    return groups


def test_areas_of_a_file_are_one_group_and_anonymous_memory_is_split_by_use() -> None:
    groups = grouped(
        area("/usr/lib/libc.so.6", 0x100000, perms="r-xp", kib=8),
        area("/usr/lib/libc.so.6", 0x200000, kib=4),
        area("", 0x300000, kib=64),
        area("", 0x400000, kib=16),
        area("", 0x500000, perms="rwxp", kib=12),
        area("", 0x600000, perms="---p", kib=0),
        area("[heap]", 0x700000, kib=32),
        area("/dev/zero (deleted)", 0x800000, perms="rw-s", kib=20),
        stack_pointers=(0x4FFFF8,),
    )
    rows = [(group.label, group.total.areas, group.total.resident >> 10) for group in groups.ranked()]
    assert rows == [
        ("[anon]", 1, 64), ("[heap]", 1, 32), ("[anon, shared]", 1, 20), ("[thread stacks]", 1, 16),
        ("libc.so.6", 2, 12), ("[anon, code]", 1, 12), ("[anon, reserved]", 1, 0),
    ]  # fmt: skip
    assert groups.total.areas == 8
    assert groups.total.resident == sum(kib for _label, _areas, kib in rows) << 10


def test_labels_are_as_short_as_they_are_distinct() -> None:
    names = [
        "/a/x/core.so", "/b/x/core.so", "/b/y/core.so", "/usr/lib/z.so", "/memfd:pool (deleted)", "/dev/fb0",
        "/core.so", "/old.so (deleted)", "[heap]", "/srv/[heap]",
    ]  # fmt: skip
    groups = grouped(*(area(name, number << 20) for number, name in enumerate(names)))
    labels = {group.name: group.label for group in groups.ranked("name")}
    assert [labels[name] for name in names] == [
        "a/x/core.so", "b/x/core.so", "y/core.so", "z.so", "memfd:pool", "/dev/fb0", "/core.so",
        "old.so (deleted)", "[heap]", "srv/[heap]",
    ]  # fmt: skip


def test_unknown_values_make_the_sum_unknown_and_come_last() -> None:
    known, unknown = area("/known", 0x100000, kib=8, pss=3), area("/unknown", 0x200000, kib=64, pss=0)
    unknown = unknown._replace(details=None)
    groups = grouped(known, unknown, area("", 0x300000, kib=2))
    assert [(group.label, group.total.pss) for group in groups.ranked("pss")] == [
        ("known", 3 << 10), ("[anon]", 2 << 10), ("unknown", None),
    ]  # fmt: skip
    assert groups.total.pss is None
    assert groups.total.uss == 2 << 10


def test_late_names_share_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    groups = grouped(*(area(f"/{number}", number << 20, kib=4 * number) for number in (1, 2, 3, 4, 1)))
    rows = [(group.label, group.total.areas, group.total.resident >> 10) for group in groups.ranked("name")]
    assert rows == [("1", 2, 8), ("2", 1, 8), ("[other mappings]", 2, 28)]


@pytest.mark.parametrize("flags", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_shared_anonymous_memory_is_shmem(flags: int) -> None:
    """As in Pss_Shmem of the kernel, and an area of this process alone has the same PSS as USS."""

    def shmem() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Shmem:"))

    before = shmem()
    with mmap.mmap(-1, 1 << 20, flags=flags | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = b"x" * (1 << 20)
        wanted = shmem() - before
        sums = [Groups() for _details in (True, False)]
        for details, groups in zip((True, False), sums, strict=True):
            for one in pagemap.areas(memory, details=details):
                groups.counted(one)
    assert wanted == (1 << 20 if flags == mmap.MAP_SHARED else 0)
    for groups in sums:
        assert groups.total.shmem == wanted
        assert groups.total.anonymous == (1 << 20) - wanted
        assert groups.total.pss == groups.total.uss == 1 << 20
