"""Changes between two invented snapshots, compared with a comparison page by page."""

import json
import mmap
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from iobmd import pagemap
from iobmd.pagemap import Kind

PAGE = mmap.PAGESIZE
PRESENT, SWAPPED, FILE, HUGE = 1, 2, 4, 64
STEP = 16
"""Pages after which a line ends, as between the steps of a walk; spans may extend beyond."""
Page = tuple[int, int]
"""Flags, and the frame number (0: none)."""
HEADER = {
    "version": 1, "pid": 1, "name": "x", "time": 0.0, "kernel": "6", "page_bytes": PAGE, "frames_visible": True,
    "start": 0, "end": 1 << 64,
}  # fmt: skip


@st.composite
def memories(draw: st.DrawFn) -> tuple[dict[int, Page], dict[int, Page]]:
    """The states of 64 pages before and after, with ranges that change and ranges that do not."""
    found: tuple[dict[int, Page], dict[int, Page]] = ({}, {})
    first = 0
    while first < 64:
        last = min(64, first + draw(st.integers(1, 24)))
        kinds = draw(st.tuples(st.sampled_from("-pmshf"), st.sampled_from("-pmshf=====")))
        for memory, kind in zip(found, (kinds[0], kinds[0] if kinds[1] == "=" else kinds[1]), strict=True):
            for page in range(first, last):
                if kind != "-":
                    frame = {"p": 100 + page, "m": 1000 + page * 2, "s": 0, "h": 100 + page, "f": 5000 + page}[kind]
                    memory[page] = {"s": SWAPPED, "h": PRESENT | HUGE, "f": PRESENT | FILE}.get(kind, PRESENT), frame
        first = last
    return found


def save(memory: dict[int, Page], path: Path) -> pagemap.Snapshot:
    spans: list[list[int]] = []
    for page, (flags, frame) in sorted(memory.items()):
        if spans:
            virtual, physical, length, state = spans[-1]
            follows = physical + length == frame * PAGE if physical else not frame
            if virtual + length == page * PAGE and state == flags and follows:
                spans[-1][2] += PAGE
                continue
        spans.append([page * PAGE, frame * PAGE, PAGE, flags])
    lines: dict[int, list[list[int]]] = {}
    for span in spans:
        lines.setdefault(span[0] // PAGE // STEP, []).append(span)
    documents = [{"iobmd pagemap": HEADER}, {"area": [0, 64 * PAGE, "rw-p", 0, 0, "", ""]}]
    documents += [{"spans": line} for line in lines.values()]
    documents.append({"end": True})
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return pagemap.Snapshot(path)


def expected(before: Page | None, after: Page | None) -> Kind | None:
    if before == after:
        return None
    if before is None or after is None:
        if after is None:
            return Kind.RELEASED
        return Kind.NEWLY_RESIDENT if after[0] & PRESENT else Kind.SWAPPED_OUT
    if before[0] & SWAPPED or after[0] & SWAPPED:
        return Kind.SWAPPED_IN if before[0] & SWAPPED else Kind.SWAPPED_OUT
    if (before[0] ^ after[0]) & HUGE:
        return Kind.COLLAPSED if after[0] & HUGE else Kind.SPLIT
    return Kind.COPIED if (before[0] ^ after[0]) & FILE else Kind.MIGRATED


def test_new_areas_are_not_joined(tmp_path: Path) -> None:
    """A change belongs to one area, so that its address shows which, also if its pages were read in one span."""
    areas = [[0, 4 * PAGE, "rw-p", 0, 0, "", ""], [4 * PAGE, 8 * PAGE, "r--p", 0, 0, "", ""]]
    spans = [[PAGE, 0, 6 * PAGE, PRESENT]]
    snapshots = []
    for name, added in ("before", []), ("after", [*({"area": area} for area in areas), {"spans": spans}]):
        path = tmp_path / name
        path.write_text("".join(json.dumps(one) + "\n" for one in ({"iobmd pagemap": HEADER}, *added, {"end": True})))
        snapshots.append(pagemap.Snapshot(path))
    found = [(change.kind, change.virtual, change.length) for change in pagemap.changes(*snapshots)]
    assert found[:2] == [(Kind.MAPPED, 0, 4 * PAGE), (Kind.MAPPED, 4 * PAGE, 4 * PAGE)]
    assert found[2:] == [(Kind.NEWLY_RESIDENT, PAGE, 3 * PAGE), (Kind.NEWLY_RESIDENT, 4 * PAGE, 3 * PAGE)]


@given(memories())
def test_page_by_page(memory: tuple[dict[int, Page], dict[int, Page]]) -> None:
    before, after = memory
    with tempfile.TemporaryDirectory() as folder:
        snapshots = save(before, Path(folder, "before")), save(after, Path(folder, "after"))
        found = {
            address // PAGE: (change.kind, change.before, change.after, address - change.virtual)
            for change in pagemap.changes(*snapshots, joined=False)
            for address in range(change.virtual, change.virtual + change.length, PAGE)
        }
        joined = list(pagemap.changes(*snapshots))
    wanted = {page: kind for page in range(64) if (kind := expected(before.get(page), after.get(page)))}
    assert {page: kind for page, (kind, *_rest) in found.items()} == wanted
    for page, (_kind, physical, now, offset) in found.items():
        assert (0 if physical is None else physical + offset) == before.get(page, (0, 0))[1] * PAGE
        assert (0 if now is None else now + offset) == after.get(page, (0, 0))[1] * PAGE
    check_joined(joined, found)


def check_joined(joined: list[pagemap.Change], found: dict[int, tuple[Kind, int | None, int | None, int]]) -> None:
    """Each range is as long as possible, and has an address only if that holds for all of its pages."""
    covered = {}
    for change in joined:
        pages = range(change.virtual // PAGE, (change.virtual + change.length) // PAGE)
        assert {found[page][0] for page in pages} == {change.kind}
        assert found.get(pages.stop, (None,))[0] != change.kind, "the next page belongs to it"
        for page in pages:
            covered[page] = change
        for address, index in (change.before, 1), (change.after, 2):
            of_pages = [None if (first := found[page][index]) is None else first + found[page][3] for page in pages]
            contiguous = of_pages[0] is not None and of_pages == [
                of_pages[0] + offset * PAGE for offset in range(len(pages))
            ]
            assert address == (of_pages[0] if contiguous else None)
    assert covered.keys() == found.keys()
