"""Parsing of /proc/PID/maps, compared with another parser."""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iobmd import IOMemoryDescriptor, kernel_task, procfs
from iobmd._native import mapping, maps
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t

LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) (\S+) (\d+) *(.*)", re.S)


def reference(line: bytes) -> tuple[int, int, str, int, int, str, str]:
    found = LINE.fullmatch(line)
    assert found
    start, end, perms, offset, device, inode, name = found.groups()
    place = int(start, 16), int(end, 16), perms.decode(), int(offset, 16), int(inode)
    return *place, os.fsdecode(name), device.decode()


def test_maps_of_this_process() -> None:
    text = Path("/proc/self/maps").read_bytes()
    assert maps.parse(text) == [reference(line) for line in text.splitlines()]
    assert maps.parse(b"") == []


hexadecimal = st.integers(0, (1 << 64) - 1).map(lambda number: b"%x" % number)
names = st.binary(max_size=40).map(lambda name: name.replace(b"\n", b"").lstrip(b" "))
devices = st.tuples(st.integers(0, 1 << 12), st.integers(0, 1 << 20)).map(lambda pair: b"%02x:%02x" % pair)
lines = st.tuples(
    hexadecimal,
    hexadecimal,
    st.sampled_from([b"rwxp", b"---s"]),
    hexadecimal,
    devices,
    st.integers(0, 1 << 63),
    names,
).map(lambda parts: b"%b-%b %b %b %b %d   %b" % parts)


@given(st.lists(lines), st.booleans())
def test_any_lines(found: list[bytes], newline: bool) -> None:
    """Lines with arbitrary names, with or without a newline at the end."""
    text = b"\n".join(found) + (b"\n" if newline and found else b"")
    assert maps.parse(text) == [reference(line) for line in found]


@given(st.binary())
def test_anything_else_is_refused(text: bytes) -> None:
    if all(LINE.fullmatch(line) for line in text.splitlines()):
        return
    with pytest.raises(ValueError, match="not a line of maps"):
        maps.parse(text)


WHOLE = b"7f00-7f01 rw-p 00000000 00:01 12"


@pytest.mark.parametrize("length", range(1, len(WHOLE) - 1))
def test_a_part_of_a_line_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="not a line of maps"):
        maps.parse(b"7f00-7f01 rw-p 00000000 00:01 12\n" + WHOLE[:length])


@pytest.mark.parametrize(
    "line",
    [
        b"0-1 rwx 00000000 00:00 0",
        b"0-1 rwxps 00000000 00:00 0",
        b"0-1  rwxp 00000000 00:00 0",
        b"0-1 rwxp 00000000 00:00 12/name",
        b"0-1 rwxp 00000000  0",
        b"0 1 rwxp 00000000 00:00 0",
    ],
)
def test_what_is_almost_a_line_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a line of maps"):
        maps.parse(line)


def test_ends_are_not_passed_by() -> None:
    """A line that ends early must not be parsed beyond its end."""
    for length in range(1, len(WHOLE) - 1):
        with pytest.raises(ValueError, match="not a line of maps"):
            maps.parse(WHOLE[:length] + b"\n" + WHOLE[length:])


COUNTERS = re.compile(rb"(\w+): +(\d+)( kB)?")


def entries(text: bytes) -> list[tuple[tuple[object, ...], dict[str, int], frozenset[str]]]:
    """Parse smaps line by line."""
    found: list[tuple[tuple[object, ...], dict[str, int], frozenset[str]]] = []
    for line in text.splitlines():
        if not re.match(rb"[A-Z]", line):
            found.append((reference(line), {}, frozenset()))
        elif counter := COUNTERS.fullmatch(line):
            found[-1][1][counter[1].decode()] = int(counter[2]) * (1024 if counter[3] else 1)
        elif line.startswith(b"VmFlags:"):
            found[-1] = *found[-1][:2], frozenset(line.decode().split()[1:])
    return found


def test_smaps_of_this_process() -> None:
    text = Path("/proc/self/smaps").read_bytes()
    found = maps.parse_details(text)
    assert found == entries(text)
    assert all(counters["Size"] == area[1] - area[0] and "rd" in flags for area, counters, flags in found[:1])
    assert maps.parse_details(b"") == []


@pytest.mark.parametrize("cut", [1, 7, 100, 5000])
def test_smaps_in_pieces(cut: int) -> None:
    """The result does not depend on the size of each read, or on a name that looks like the end of an area."""
    text = Path("/proc/self/smaps").read_bytes()
    text = text.replace(b"[heap]", b"/VmFlags: x\\012")

    pieces = io.BytesIO(text)
    found = list(procfs.details(read=lambda _file, _size: pieces.read(cut)))
    assert [(one.counters, one.flags) for one in found] == [one[1:] for one in entries(text)]
    assert "/VmFlags: x\n" in [one.area.name for one in found]


@pytest.mark.parametrize("line", [b"Rss", b"Rss\n", b"Rss 12 kB\n", b"7f00-7f01\n"])
def test_what_is_no_line_of_smaps_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a line of"):
        maps.parse_details(WHOLE + b"\n" + line)


@given(st.binary())
def test_any_bytes_behind_an_area(text: bytes) -> None:
    try:
        (area, counters, _flags), *_more = maps.parse_details(WHOLE + b"\nRss:   4 kB\n" + text)
    except ValueError:
        return
    assert [area] == maps.parse(WHOLE)
    assert "Rss" in counters


def test_newlines_in_names(tmp_path: Path) -> None:
    file = tmp_path / "two\nlines"
    file.write_bytes(b"x" * PAGE_SIZE)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ):
        assert str(file) in [area.name for area in procfs.maps()]
        assert str(file) in [area.name for area, _counters in procfs.smaps()]


RANGES = st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))


@given(st.lists(lines), RANGES)
def test_lines_of_a_range(found: list[bytes], limits: tuple[int, int]) -> None:
    """Areas below the range are omitted, and so is everything from the first area that begins at its end or above."""
    low, high = limits
    expected = []
    for area in map(reference, found):
        if area[0] >= high:
            break
        if area[1] > low:
            expected.append(area)
    assert maps.parse(b"\n".join(found), low, high) == expected


@pytest.fixture
def separate_pages() -> Iterator[SeparatePages]:
    """Three hundred pages with alternating protection, each a separate area, with a hole among them; then a file."""
    with SeparatePages() as found:
        yield found


class SeparatePages:
    """Areas of one page each, in an address range of this process that is used for nothing else."""

    def __enter__(self) -> SeparatePages:
        self.memory = mapping.Mapping.reserve(302 * PAGE_SIZE, PAGE_SIZE)
        self.start = self.memory.address
        self.end = self.start + self.memory.size
        for page in range(0, 300, 2):
            libc.mprotect(self.start + page * PAGE_SIZE, PAGE_SIZE, 3 if page % 4 else 5)
        self.hole = self.start + 101 * PAGE_SIZE
        libc.munmap(self.hole, PAGE_SIZE)
        return self

    def __exit__(self, *_error: object) -> None:
        self.memory.close()


def overlapping(start: int, end: int) -> list[procfs.VMA]:
    return [area for area in procfs.maps() if area.end > start and area.start < end]


@pytest.fixture(params=[pytest.param("PROCMAP_QUERY", marks=pytest.mark.needs("procmap_query")), "search"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way in which areas are found: by the ioctl, or as on kernels without it."""
    if request.param == "search":
        monkeypatch.setattr(procfs, "_queried", lambda *_arguments: None)
    return str(request.param)


def test_areas_of_a_range(way: str, separate_pages: SeparatePages) -> None:
    """All areas that overlap the range, and no others, even if there are more than are queried at a time."""
    start, end, hole = separate_pages.start, separate_pages.end, separate_pages.hole
    for low, high in [
        (start, end),
        (start + 1, start + 2),
        (start + PAGE_SIZE, start + 2 * PAGE_SIZE),
        (start + PAGE_SIZE - 1, start + PAGE_SIZE + 1),
        (hole, hole + PAGE_SIZE),
        (hole - 1, hole + PAGE_SIZE + 1),
        (end - 1, end),
        (start, start),
    ]:
        assert list(procfs.areas("self", low, high)) == (overlapping(low, high) if low < high else [])
        assert list(procfs.areas(os.getpid(), low, high)) == list(procfs.areas("self", low, high))
    assert len(list(procfs.areas("self", start, end))) > 64 * 4
    assert procfs.find_vma("self", hole) is None
    assert procfs.find_vma("self", hole - 1) == overlapping(hole - 1, hole)[0]


def test_areas_of_all_kinds(way: str, tmp_path: Path) -> None:
    """Files with unusual names, deleted files, shared memory, and areas that the kernel maps itself."""
    file = tmp_path / "two\nlines \\ and \udcff"
    gone = tmp_path / "gone"
    for path in (file, gone):
        path.write_bytes(b"x" * PAGE_SIZE)
    with (
        file.open("rb") as opened,
        gone.open("r+b") as deleted,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ),
        mmap.mmap(deleted.fileno(), 0),
        mmap.mmap(-1, PAGE_SIZE),
    ):
        gone.unlink()
        expected = [area for area in procfs.maps() if area.name and area.name != "[heap]"]
        found = [next(procfs.areas("self", area.start, area.end)) for area in expected]
        assert found == expected
        assert {str(file), f"{gone} (deleted)", "[stack]"} <= {area.name for area in found}


def test_areas_of_a_process_without_memory(way: str) -> None:
    """An error is raised, instead of an empty result."""
    with subprocess.Popen(["sleep", "0"]) as program:
        os.waitid(os.P_PID, program.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(ProcessLookupError):
            next(procfs.areas(program.pid, 0, 1 << 40))


@pytest.mark.needs("procmap_query")
def test_one_area_of_many_is_found_without_the_others(separate_pages: SeparatePages) -> None:
    """Measured by the number of bytes that this process reads, according to the kernel (rchar of /proc/PID/io)."""
    page = separate_pages.start + 298 * PAGE_SIZE

    def read_bytes(work: Callable[[], object]) -> int:
        def counted() -> int:
            return int(re.search(r"rchar: (\d+)", Path("/proc/thread-self/io").read_text())[1])  # type: ignore[index]

        before, own = counted(), counted()
        work()
        return counted() - own - (own - before)

    whole = read_bytes(lambda: list(procfs.maps()))
    descriptor = IOMemoryDescriptor.withAddressRange(page, PAGE_SIZE, 3, kernel_task)

    def made_and_prepared() -> None:
        IOMemoryDescriptor.withAddressRange(page, PAGE_SIZE, 3, kernel_task)
        descriptor.prepare()
        descriptor.complete()

    made_and_prepared()  # opens descriptors that remain open
    assert whole > 300 * 40
    assert read_bytes(made_and_prepared) < 1024


def test_text_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file\udcff"
    for content in (b"", b"one line\n", b"\xff\0" * 5000, b"x" * (16 << 10)):
        file.write_bytes(content)
        assert os.fsencode(maps.read_text(str(file))) == content
    assert maps.read_text("/proc/self/mountinfo").encode() == Path("/proc/self/mountinfo").read_bytes()


def test_text_of_no_file(tmp_path: Path) -> None:
    for place, kind in ((tmp_path / "none", FileNotFoundError), (tmp_path, IsADirectoryError)):
        with pytest.raises(kind) as caught:
            maps.read_text(str(place))
        assert caught.value.filename == str(place)
    with pytest.raises(ValueError, match="null byte"):
        maps.read_text("/proc\0/self")
