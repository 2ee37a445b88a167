"""Snapshots, and the changes between two, for operations of the kernel on memory of this process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import kernel
from support.moving import again_if_pages_move

import iobmd
from iobmd import IOReturn, IOReturnError, kernel_task, pagemap
from iobmd._native import mman
from iobmd.pagemap import Change, Kind, Run
from iobmd.units import PAGE_SIZE

MIB = 1 << 20


class Memory:
    """A buffer in small pages, and its snapshots."""

    def __init__(self, path: Path, size: int = 4 * MIB) -> None:
        self.buffer = iobmd.allocate(size, wired=False)
        self.address, self.size = self.buffer.getBytesNoCopy(), size
        mman.advise(self.address, size, mman.MADV_NOHUGEPAGE)
        self.buffer.writeBytes(0, b"x" * size)
        self._path = path

    def save(self, name: str) -> pagemap.Snapshot:
        pagemap.save(kernel_task, self._path / name, self.address, self.size)
        return pagemap.Snapshot(self._path / name)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    made = Memory(tmp_path)
    yield made
    made.buffer.free()


def by_kind(found: list[Change]) -> dict[Kind, int]:
    sums: dict[Kind, int] = {}
    for change in found:
        sums[change.kind] = sums.get(change.kind, 0) + change.length
    return sums


@again_if_pages_move
def test_a_snapshot_holds_what_was_there(memory: Memory) -> None:
    saved = memory.save("one")
    assert list(saved.spans()) == list(pagemap.spans(memory.buffer))
    assert saved.header.page_bytes == PAGE_SIZE
    assert any(area.start <= memory.address < area.end for area in saved.areas())
    assert not list(pagemap.changes(saved, memory.save("two")))


@again_if_pages_move
def test_released_and_newly_resident(memory: Memory) -> None:
    memory.buffer.writeBytes(0, b"x" * memory.size)  # also if it is repeated
    before = memory.save("before")
    mman.advise(memory.address + MIB, MIB, mman.MADV_DONTNEED)
    between = memory.save("between")
    assert by_kind(list(pagemap.changes(before, between))) == {Kind.RELEASED: MIB}
    memory.buffer.writeBytes(MIB, b"y" * (MIB // 2))
    changes = list(pagemap.changes(between, memory.save("after")))
    assert by_kind(changes) == {Kind.NEWLY_RESIDENT: MIB // 2}
    assert [(change.virtual, change.length) for change in changes] == [(memory.address + MIB, MIB // 2)]


@pytest.mark.needs("swap")
@pytest.mark.usefixtures("swap")
def test_out_to_swap_and_back(memory: Memory) -> None:
    before = memory.save("before")
    mman.advise(memory.address, memory.size, mman.MADV_PAGEOUT)
    out = memory.save("out")
    swapped = kernel.swapped(memory.address, memory.size) * PAGE_SIZE
    assert by_kind(list(pagemap.changes(before, out)))[Kind.SWAPPED_OUT] == swapped > MIB
    memory.buffer.readBytes(0, memory.size)
    assert by_kind(list(pagemap.changes(out, memory.save("in"))))[Kind.SWAPPED_IN] == swapped


@again_if_pages_move
@pytest.mark.needs("frames")
def test_collapsed_and_split(memory: Memory) -> None:
    start = -(-memory.address // (2 * MIB)) * 2 * MIB
    before = memory.save("small")
    mman.advise(start, 2 * MIB, mman.MADV_HUGEPAGE)
    mman.advise(start, 2 * MIB, mman.MADV_COLLAPSE)
    huge = memory.save("huge")
    assert by_kind(list(pagemap.changes(before, huge))) == {Kind.COLLAPSED: 2 * MIB}
    mman.advise(start, PAGE_SIZE, mman.MADV_DONTNEED)  # the rest remains in its frames, mapped page by page
    split = memory.save("split")
    changes = list(pagemap.changes(huge, split))
    assert by_kind(changes) == {Kind.SPLIT: 2 * MIB - PAGE_SIZE, Kind.RELEASED: PAGE_SIZE}
    assert all(change.before == change.after for change in changes if change.kind == Kind.SPLIT)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "no JSON", '{"iobmd pagemap": {"version": 2}}', "\n"])
def test_what_is_no_snapshot_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(IOReturnError, match="not a snapshot") as caught:
        pagemap.Snapshot(tmp_path / "file")
    assert caught.value.code == IOReturn.kIOReturnBadArgument


def test_a_snapshot_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(IOReturnError):
        pagemap.save(2, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_segments_keep_to_the_limits_and_cover_all() -> None:
    runs = [Run(0, 0x1800, 0x3000), Run(0x9000, 0x10000, 0x800)]
    assert [tuple(one) for one in pagemap.segments(runs)] == [(0x1800, 0x3000), (0x10000, 0x800)]
    cut = list(pagemap.segments(runs, max_segment=0xC00, boundary=0x1000))
    assert sum(one.length for one in cut) == 0x3800
    assert all(
        one.length <= 0xC00 and one.physical // 0x1000 == (one.physical + one.length - 1) // 0x1000 for one in cut
    )
    for wrong in ({"max_segment": 0}, {"boundary": 3}):
        with pytest.raises(ValueError, match=r"not positive|power of two"):
            pagemap.segments(runs, **wrong)
