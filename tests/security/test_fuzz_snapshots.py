"""Files of `pagemap --save` that another user wrote or damaged: an IOReturnError, or plausible changes."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import mmap
import tracemalloc
from typing import TYPE_CHECKING

import pytest
from hypothesis import strategies as st
from support.fuzzing import anything, fuzzed, mutated

from iobmd import IOReturn, IOReturnError
from iobmd.cli import main
from iobmd.pagemap import Kind, Snapshot, changes
from iobmd.pagemap.snapshot import Header
from iobmd.task.task import ADDRESS_END

if TYPE_CHECKING:
    from pathlib import Path

PAGE = mmap.PAGESIZE
END = '{"end": true}'
HEADER = Header(1, 42, "program", 1.5, "6.18", PAGE, True, 0, 1 << 47)
WINDOW = 4 << 20

pages = st.integers(0, 40).map(lambda number: number * PAGE)
bounds = (
    pages | pages.map(lambda address: address * 512) | st.sampled_from([1 << 47, ADDRESS_END, ADDRESS_END - PAGE])
)
headers = st.tuples(bounds, bounds).map(lambda pair: HEADER._replace(start=min(pair), end=max(pair))) | st.just(
    HEADER
)
areas = st.tuples(bounds, bounds, st.just("rw-p"), pages, st.just(0), st.text(max_size=5), st.just("00:00"))
spans = st.lists(st.tuples(bounds, pages, bounds, st.integers(0, 127)), max_size=6)
lines = st.lists(
    areas.map(lambda area: json.dumps({"area": area}))
    | spans.map(lambda found: json.dumps({"spans": found}))
    | st.tuples(st.sampled_from(["area", "spans", "end"]), anything(PAGE)).map(lambda pair: json.dumps(dict([pair]))),
    max_size=8,
)


def text(header: Header, found: list[str]) -> bytes:
    return "\n".join([json.dumps({"iobmd pagemap": header._asdict()}), *found, END, ""]).encode()


@st.composite
def ordered(draw: st.DrawFn) -> bytes:
    """Return a snapshot that `save` may have written, or a similar one."""
    edges = sorted(draw(st.sets(bounds, min_size=2, max_size=12)))
    found = []
    for start, end in zip(edges[::2], edges[1::2], strict=False):
        found.append(json.dumps({"area": [start, end, "rw-p", 0, 0, "", "00:00"]}))
        length = draw(st.sampled_from([PAGE, end - start, 2 * WINDOW]))
        found.append(json.dumps({"spans": [[start, draw(pages), length, draw(st.integers(0, 127))]]}))
    return text(draw(headers), found)


files = ordered() | st.builds(text, headers, lines) | mutated(ordered())


def read(*paths: Path) -> bool:
    """Read all of one snapshot, or the changes between two; False: it was refused."""
    try:
        snapshots = [Snapshot(path) for path in paths]
        for snapshot in snapshots:
            ends = [(area.start, area.end) for area in snapshot.areas()]
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
            assert all(span.length > 0 and span.end <= ADDRESS_END for span in snapshot.spans())
        if len(snapshots) == 2:
            check_changes(snapshots[0], snapshots[1])
    except IOReturnError as error:
        assert error.code == IOReturn.kIOReturnBadArgument
        return False
    return True


def check_changes(before: Snapshot, after: Snapshot) -> None:
    behind: dict[bool, int] = {True: 0, False: 0}
    for change in changes(before, after):
        of_areas = change.kind in (Kind.MAPPED, Kind.UNMAPPED)
        assert behind[of_areas] <= change.virtual < change.virtual + change.length <= ADDRESS_END
        behind[of_areas] = change.virtual + change.length


@fuzzed(60, before=files, after=files)
def test_any_files(tmp_path: Path, before: bytes, after: bytes) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(before)
    second.write_bytes(after)
    for path in (first, second):
        read(path)
    read(first, second)


@fuzzed(
    40, data=st.binary(max_size=300) | anything().map(lambda value: json.dumps({"iobmd pagemap": value}).encode())
)
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data + b"\n" + END.encode() + b"\n")
    assert not read(tmp_path / "file")


@fuzzed(8, before=files)
def test_the_command(tmp_path: Path, before: bytes) -> None:
    """The command ends with a message, not with a traceback."""
    (tmp_path / "before").write_bytes(before)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["pagemap", "self", "--diff", str(tmp_path / "before")]) in (0, 1)


def test_an_area_around_an_empty_range(tmp_path: Path) -> None:
    path = tmp_path / "file"
    area = json.dumps({"area": [0, 4 * PAGE, "rw-p", 0, 0, "", "00:00"]})
    path.write_bytes(text(HEADER._replace(start=PAGE, end=PAGE), [area]))
    assert not read(path, path)


@pytest.mark.parametrize("start", [b"", b'{"iobmd pagemap": ', b'{"area": ', b'{"spans": [['], ids=str)
def test_a_file_without_newlines(tmp_path: Path, start: bytes) -> None:
    """A sparse line of 256 MiB is refused before all of it is in memory."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        if start and not start.startswith(b'{"iobmd'):
            file.write(json.dumps({"iobmd pagemap": HEADER._asdict()}).encode() + b"\n")
        file.write(start)
        file.truncate(256 << 20)
        file.seek(0, 2)
        file.write(b"\n" + END.encode() + b"\n")
    tracemalloc.start()
    try:
        assert not read(path)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
