"""`iobmd.pagemap` compared page by page with an independent reader, on memory in every state of the kernel."""

import random
import struct
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from support import page_states
from support.child import NOBODY, in_child
from support.page_states import PAGE, PageStateProcess, quiet, table

from iobmd import pagemap
from iobmd._native.pagemap import FILE, GUARD, MARKER, PRESENT, SWAPPED, ZERO, Walk
from iobmd.pagemap import Span, reader

pytestmark = pytest.mark.needs("compiler", "frames", "root")

STATES: dict[str, set[str]] = {
    "untouched": set(), "anonymous": {"present"}, "thp": {"huge"}, "split": {"present", "huge"}, "mthp": {"present"},
    "zero": {"present", "zero"}, "hugezero": {"huge", "zero"}, "hugetail": {"huge", "zero"},
    "guard": {"present", "guard"}, "hugetlb": {"huge"}, "hugetlb-shared": {"huge"}, "giga": {"huge"},
    "memfd": {"file"}, "memfd-huge": {"huge"}, "file": {"file"}, "file-private": {"file", "present"},
    "no-access": {"present"}, "swapped": {"present", "swapped"}, "swapped-shared": {"file"}, "lazy": {"present"},
    "locked": {"present"}, "watched": {"present", "marker"}, "sparse": {"present"}, "tiny": {"present"},
    "shared": {"file"}, "forked": {"present"}, "half-shared": {"huge"}, "own": {"present"}, "ring": {"file"},
}  # fmt: skip
"""Check that the target has pages of each kind, because otherwise the tests would prove nothing."""
ORDINARY = (
    "untouched", "anonymous", "thp", "split", "zero", "hugezero", "hugetail", "guard", "memfd", "file", "no-access",
    "lazy", "locked", "watched", "sparse", "tiny", "forked", "ring",
)  # fmt: skip
GROUPS = {
    "ordinary": ORDINARY, "folios": ("mthp", "memfd-huge"), "hugetlb": ("hugetlb",), "giga": ("giga",),
    "swap": ("swapped",),
}  # fmt: skip
THP = "/sys/kernel/mm/transparent_hugepage"
GIGA = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_states.build(tmp_path_factory.mktemp("page_states"))


@pytest.fixture
def giga_pool(setting: Callable[[str, object], None]) -> None:
    setting(GIGA, int(Path(GIGA).read_text()) + 1)
    free = Path(GIGA).with_name("free_hugepages")
    if not int(free.read_text()):
        pytest.skip("the kernel finds no contiguous GiB")


@pytest.fixture
def small_folios(setting: Callable[[str, object], None]) -> None:
    setting(f"{THP}/hugepages-64kB/enabled", "madvise")
    setting(f"{THP}/shmem_enabled", "advise")


SMALL = [
    pytest.param(("ordinary", None), id="ordinary"),
    pytest.param(("folios", "small_folios"), id="folios"),
    pytest.param(("hugetlb", "hugetlb_pool"), id="hugetlb", marks=pytest.mark.needs("hugetlb")),
    pytest.param(("swap", "swap"), id="swap", marks=pytest.mark.needs("swap")),
]
LARGE = pytest.param(("giga", "giga_pool"), id="giga", marks=pytest.mark.needs("hugetlb"))
small = pytest.mark.parametrize("target", SMALL, indirect=True)
all_sizes = pytest.mark.parametrize("target", [*SMALL, LARGE], indirect=True)  # a GiB takes seconds


@pytest.fixture
def target(request: pytest.FixtureRequest, program: Path) -> Iterator[PageStateProcess]:
    group, fixture = request.param
    if fixture:
        request.getfixturevalue(fixture)
    with PageStateProcess(program, *GROUPS[group]) as started:
        yield started


def kinds(target: PageStateProcess) -> list[str]:
    return [kind for kind in target.found if kind in STATES]


def expand(found: Iterable[Span]) -> dict[int, tuple[object, ...]]:
    """Return the state of each page according to spans, with the zero page as a separate state."""
    pages: dict[int, tuple[object, ...]] = {}
    for span in found:
        assert span.length > 0
        stride = 0 if span.zero and not span.huge else 1
        for index in range(span.length // PAGE):
            frame = None if span.physical is None else span.physical // PAGE + index * stride
            address = span.virtual + index * PAGE
            assert address not in pages
            assert not span.physical or not span.physical % PAGE
            pages[address] = (
                page_states.Page(span.present, span.swapped, span.guard, span.marker, span.file_or_shared, frame),
                span.zero,
            )
    return pages


def entries(target: PageStateProcess, kind: str) -> dict[int, int]:
    address, size = target[kind]
    return page_states.entries(target.pid, [(address, address + size)])


def both(target: PageStateProcess, kind: str) -> tuple[dict[int, int], list[Span]]:
    return quiet(lambda: entries(target, kind), lambda: list(pagemap.spans(target.pid, *target[kind])))


def everything(target: PageStateProcess) -> dict[int, int]:
    return page_states.entries(target.pid, [(area.start, area.end) for area in page_states.areas(target.pid)])


def huge_bytes(found: Iterable[Span], start: int, end: int) -> int:
    """Return how many bytes between two addresses are mapped by huge pages, without the huge zero page."""
    return sum(max(0, min(span.end, end) - max(span.virtual, start)) for span in found if span.huge and not span.zero)


def check_huge(pid: int, found: list[Span]) -> None:
    for area in page_states.areas(pid):
        assert huge_bytes(found, area.start, area.end) == area.huge, area


@all_sizes
def test_spans_say_of_every_page_what_the_kernel_says(target: PageStateProcess) -> None:
    for kind in kinds(target):
        theirs, ours = both(target, kind)
        assert not page_states.differing(page_states.expected(theirs), expand(ours)), kind
        assert {span.state for span in ours} == STATES[kind], kind
        assert all(before.end <= after.virtual for before, after in pairwise(ours)), kind
    if "giga" in target.found:  # a whole process, with the same GiB again, would prove nothing new
        return
    words, found = quiet(lambda: everything(target), lambda: list(pagemap.spans(target.pid)))
    assert not page_states.differing(page_states.expected(words), expand(found))
    check_huge(target.pid, found)


@small
def test_a_part_of_an_area_is_as_it_is_in_the_whole(target: PageStateProcess) -> None:
    """Ranges that begin and end inside huge pages, swapped pages and holes."""
    chance = random.Random(1)
    for kind in kinds(target):
        words = page_states.expected(entries(target, kind))
        address, size = target[kind]
        for _try in range(12):
            start = address + chance.randrange(size // PAGE) * PAGE
            end = min(address + size, start + chance.choice((1, 3, 100, 512, 700, 5000)) * PAGE)
            theirs = {page: words[page] for page in range(start, end, PAGE) if page in words}
            ours = expand(pagemap.spans(target.pid, start + 7, end - start - 9))
            assert not page_states.differing(theirs, ours), (kind, hex(start), end - start)


@small
def test_runs_are_broken_where_the_frames_are(target: PageStateProcess) -> None:
    for kind in kinds(target):
        theirs, ours = quiet(
            lambda kind=kind: page_states.runs(entries(target, kind)),
            lambda kind=kind: [tuple(run) for run in pagemap.runs(target.pid, *target[kind])],
        )
        assert not page_states.differing(dict(enumerate(theirs)), dict(enumerate(ours))), kind
    theirs, ours = quiet(
        lambda: page_states.runs(everything(target)), lambda: [tuple(run) for run in pagemap.runs(target.pid)]
    )
    assert not page_states.differing(dict(enumerate(theirs)), dict(enumerate(ours)))


def our_facts(area: pagemap.Area) -> dict[str, object]:
    names = ["present", "guard", "marker", "file", "zero", "hidden", "exclusive"]
    names += ["runs", "largest", "ascending", "descending"]
    return {
        **{name: getattr(area.tally, name) for name in names},
        **{
            name: getattr(area, name)
            for name in ("resident", "swapped", "anonymous", "lazy_free", "locked", "huge", "folios")
        },
        "tally.swapped": area.tally.swapped,
    }


@all_sizes
def test_areas_hold_what_smaps_and_the_frames_say(target: PageStateProcess) -> None:
    (areas, words), ours = quiet(
        lambda: (page_states.areas(target.pid), everything(target)),
        lambda: list(pagemap.areas(target.pid, details=True, folios=True)),
    )
    assert [(area.start, area.end) for area in ours] == [(area.start, area.end) for area in areas]
    sizes: dict[int, int] = {}
    wrong: dict[str, object] = {}
    at = iter([*words.items(), (1 << 64, 0)])
    address, word = next(at)
    with table() as flags:
        for area, ours_of_it in zip(areas, ours, strict=True):
            inside: dict[int, int] = {}
            while address < area.end:
                inside[address] = word
                address, word = next(at)
            theirs = page_states.area_facts(area, inside, flags)
            if difference := page_states.differing(theirs, our_facts(ours_of_it)):
                wrong[f"{area.start:#x}-{area.end:#x} {area.name}"] = difference
            for size, number in (ours_of_it.folios or {}).items():
                sizes[size] = sizes.get(size, 0) + number
    assert not wrong
    assert any(area.is_device for area in ours)  # [vvar]
    if "mthp" in target.found:
        assert sizes[64 << 10] >= 1 << 20, sizes
    if "split" in target.found:
        assert sizes[2 << 20] >= 5 << 20, sizes
    # If smaps was not read, properties that only smaps shows are unknown.
    for area, bare in zip(ours, pagemap.areas(target.pid, details=False), strict=True):
        assert (bare.resident, bare.huge, bare.tally.runs) == (area.resident, area.huge, area.tally.runs), area
        swaps = Path("/proc/swaps").read_text().count("\n") > 1
        on_tmpfs = area.vma.inode and area.vma.device.startswith("00:")  # only smaps shows their swapped pages
        assert bare.swapped == (None if swaps and on_tmpfs else area.tally.swapped)


@small
def test_counts_and_pages_agree(target: PageStateProcess) -> None:
    for kind in kinds(target):
        theirs, ours = quiet(partial(entries, target, kind), partial(pagemap.counts, target.pid, *target[kind]))
        pages = page_states.pages(theirs)
        exclusive = sum(word >> 63 and word >> 56 & 1 for word in theirs.values())
        present, swapped = (sum(page[index] for page in pages.values()) for index in (0, 1))
        assert ours == (present, swapped, 0, exclusive), kind


@small
def test_without_pagemap_scan_all_but_huge_is_right(
    target: PageStateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_has_scan", lambda _fd: False)
    for kind in kinds(target):
        theirs, ours = both(target, kind)
        assert not page_states.differing(page_states.expected(theirs), expand(ours)), kind
        assert not any(span.huge and not span.zero for span in ours), kind  # the huge zero page is known by its frame
    areas, ours_of_them = quiet(
        lambda: page_states.areas(target.pid), lambda: list(pagemap.areas(target.pid, details=True))
    )
    for area, found in zip(areas, ours_of_them, strict=True):
        assert (found.resident, found.swapped) == (area.resident, area.counters["Swap"]), area


@pytest.mark.parametrize(
    ("fixture", "group"),
    [
        (
            None,
            ORDINARY,
        ),
        pytest.param("hugetlb_pool", ("hugetlb",), marks=pytest.mark.needs("hugetlb")),
        pytest.param("swap", ("swapped",), marks=pytest.mark.needs("swap")),
    ],
    ids=["ordinary", "hugetlb", "swap"],
)
def test_with_hidden_frames_the_states_remain(
    request: pytest.FixtureRequest, program: Path, fixture: str | None, group: tuple[str, ...]
) -> None:
    if fixture:
        request.getfixturevalue(fixture)
    with PageStateProcess(program, *group, user=NOBODY) as target:
        hidden(target)


def hidden(target: PageStateProcess) -> None:
    def look() -> list[tuple[str, list[Span]]]:
        with pytest.raises(PermissionError):  # absent pages have no run either: these must not seem absent
            next(pagemap.runs(target.pid))
        return [(kind, list(pagemap.spans(target.pid, *target[kind]))) for kind in kinds(target)]

    for kind, found in in_child(look, uid=NOBODY):
        assert not page_states.differing(page_states.expected(entries(target, kind), hidden=True), expand(found)), (
            kind
        )
        assert {span.state for span in found} == STATES[kind], kind
    found = in_child(lambda: list(pagemap.spans(target.pid)), uid=NOBODY)
    check_huge(target.pid, found)
    facts = in_child(lambda: [(a.resident, a.swapped, a.huge) for a in pagemap.areas(target.pid)], uid=NOBODY)
    areas = page_states.areas(target.pid)
    assert facts == [(area.resident, area.counters["Swap"], area.huge) for area in areas]


@pytest.mark.parametrize("fixture", [None, pytest.param("swap", marks=pytest.mark.needs("swap"))])
def test_markers_are_no_swap_though_they_look_so(
    request: pytest.FixtureRequest, program: Path, fixture: str | None
) -> None:
    if fixture:
        request.getfixturevalue(fixture)
    with PageStateProcess(program, "watched", user=NOBODY) as target:
        facts = in_child(lambda: [(area.swapped, area.marker) for area in pagemap.areas(target.pid)], uid=NOBODY)
        spans = in_child(lambda: list(pagemap.spans(target.pid)), uid=NOBODY)
        markers = [area.marker for area in pagemap.areas(target.pid)]
    assert sum(filter(None, markers)) > 0
    assert facts == [(0, marker) for marker in markers]
    # Without swap space, the pages alone determine it.
    assert {(span.swapped, span.marker) for span in spans if span.swapped or span.marker} == {
        (True, False) if fixture else (False, True)
    }


def test_the_stack_grows(program: Path) -> None:
    with PageStateProcess(program) as target:
        sizes = []
        for _round in range(2):
            (area,) = (area for area in page_states.areas(target.pid) if area.name == "[stack]")
            theirs = page_states.entries(target.pid, [(area.start, area.end)])
            (ours,) = pagemap.areas(target.pid, area.start, area.end - area.start)
            found = pagemap.spans(target.pid, area.start, area.end - area.start)
            assert not page_states.differing(page_states.expected(theirs), expand(found))
            assert ours.resident == area.resident == len(theirs) * PAGE
            sizes.append(ours.resident)
            target.command("grow")
        assert sizes[1] >= sizes[0] + (1 << 20)


@pytest.mark.parametrize("details", [True, False])
def test_no_area_of_twenty_thousand_is_missed(program: Path, details: bool) -> None:
    with PageStateProcess(program, "many") as target:
        areas = page_states.areas(target.pid)
        assert len(areas) > 20_000
        ours = [(area.start, area.end, area.resident) for area in pagemap.areas(target.pid, details=details)]
    assert ours == [(area.start, area.end, area.resident) for area in areas]


VOLATILE = {
    "LOCKED", "REFERENCED", "UPTODATE", "DIRTY", "LRU", "ACTIVE", "WRITEBACK", "RECLAIM", "UNEVICTABLE", "MLOCKED",
    "IDLE", "SWAPCACHE", "PRIVATE", "PRIVATE_2", "OWNER_PRIVATE", "ARCH", "ARCH_2", "ARCH_3", "MAPPEDTODISK",
}  # fmt: skip
"""Flags that change without mapping or unmapping."""
STEADY = {
    "MMAP": 11, "ANON": 12, "SWAPBACKED": 14, "COMPOUND_HEAD": 15, "COMPOUND_TAIL": 16, "HUGE": 17, "NOPAGE": 20,
    "KSM": 21, "THP": 22, "OFFLINE": 23, "ZERO_PAGE": 24, "SLAB": 7, "BUDDY": 10, "HWPOISON": 19, "PGTABLE": 26,
    "RESERVED": 32, "SOFTDIRTY": 40, "UNCACHED": 39, "ERROR": 1,
}  # fmt: skip
"""The other flags, of linux/kernel-page-flags.h and fs/proc/page.c."""


@small
def test_runs_are_described_as_the_frame_tables_do(target: PageStateProcess) -> None:
    maps = Path(f"/proc/{target.pid}/numa_maps").read_text().splitlines()
    nodes = {int(line.split()[0], 16): {int(word[1]) for word in line.split() if word[0] == "N"} for line in maps}
    for kind in kinds(target):
        theirs, ours = quiet(
            partial(entries, target, kind), lambda kind=kind: list(pagemap.described(target.pid, *target[kind]))
        )
        assert [tuple(found.run) for found in ours] == page_states.runs(theirs), kind
        with table() as flags, table("kpagecount") as counts:
            for found in ours:
                frames = range(found.run.physical // PAGE, (found.run.physical + found.run.length) // PAGE)
                words = [flags[frame] for frame in frames]
                every = {name for name, bit in STEADY.items() if all(word >> bit & 1 for word in words)}
                some = {name for name, bit in STEADY.items() if any(word >> bit & 1 for word in words)} - every
                assert {*found.facts.flags} - VOLATILE == every, (kind, found)
                assert {*found.facts.some_flags} - VOLATILE == some, (kind, found)
                numbers = [counts[frame] for frame in frames]
                assert found.facts.mapped == (min(numbers), max(numbers)), (kind, found)
                assert (found.facts.node is None) == ("ZERO_PAGE" in every), (kind, found)
        where = nodes.get(target[kind][0], set())
        assert {found.facts.node for found in ours} - {None} <= where or len(where) != 1, kind


@pytest.mark.parametrize("page", [PAGE, 16384, 65536])
@pytest.mark.parametrize("visible", [True, False])
def test_a_pagemap_of_other_page_sizes(tmp_path: Path, page: int, visible: bool) -> None:
    """Invented entries, in an ordinary file."""
    chance = random.Random(page)
    zero, frame = 0x777, 0x1000
    words: list[int] = []
    while len(words) < 60_000:
        frame = chance.choice((frame, frame, chance.randrange(1, 1 << 40)))
        for _page in range(chance.choice((1, 1, 2, 17, 600))):
            words.append(1 << 63 | frame)
            frame += 1
        words += [0] * chance.choice((0, 0, 1, 5, PAGE))
        others = (
            1 << 63 | zero,
            1 << 63 | 1 << 61 | frame,
            1 << 63 | 1 << 56 | frame + 1,
            1 << 62 | 5 << 5,  # swap type 0
            1 << 62 | 26,  # a marker
            1 << 62 | 1 << 58 | 26,  # a guard page
            1 << 55,  # soft-dirty only
        )
        words += [chance.choice(others)] * chance.choice((0, 1, 3))
    if not visible:
        words = [word & ~((1 << 55) - 1) if word >> 63 else word for word in words]
    file = tmp_path / "pagemap"
    file.write_bytes(struct.pack(f"={len(words)}Q", *words))
    with file.open("rb") as opened:
        walk = Walk(opened.fileno(), page, 2 << 20, zero if visible else 0, 0, False, False)
        at = 0
        while at < len(words) * page:
            at = walk.step(at, len(words) * page)
        walk.finish()
        tally = walk.collect()
        found = [walk[index] for index in range(len(walk))]
        with pytest.raises(OSError, match="read of pagemap"):
            walk.total(0, (len(words) + 1) * page)
    theirs, ours = {}, {}
    for index, word in enumerate(words):
        number = word & (1 << 55) - 1
        flags = 0
        if word >> 63:
            flags = PRESENT | (FILE if word >> 61 & 1 else 0) | (ZERO if visible and number == zero else 0)
        elif word >> 62 & 1:
            flags = GUARD if word >> 58 & 1 else MARKER if number & 31 == 26 else SWAPPED
        if flags:
            theirs[index * page] = (number * page if flags & PRESENT else 0, flags)
    for virtual, physical, length, flags in found:
        for offset in range(0, length, page):
            assert virtual + offset not in ours
            ours[virtual + offset] = (physical and (physical if flags & ZERO else physical + offset), flags)
    assert not page_states.differing(theirs, ours)
    for name, flag in {"present": PRESENT, "file": FILE, "zero": ZERO, "swapped": SWAPPED, "guard": GUARD}.items():
        assert getattr(tally, name) == sum(bool(flags & flag) for _frame, flags in theirs.values()) * page, name
    assert tally.marker == sum(flags == MARKER for _frame, flags in theirs.values()) * page
    assert tally.exclusive == sum(word >> 63 and word >> 56 & 1 for word in words) * page
    assert tally.hidden == (0 if visible else tally.present)
    assert tally.huge == 0
