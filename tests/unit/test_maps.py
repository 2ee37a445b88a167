"""Parsing of /proc/PID/maps, against another way to take its lines apart."""

import contextlib
import io
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iobmd import procfs
from iobmd._native import maps

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
    """Of names of any bytes, with or without a newline at the end."""
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
    """A line that ends early must not be taken for one that goes on behind its end."""
    for length in range(1, len(WHOLE) - 1):
        with pytest.raises(ValueError, match="not a line of maps"):
            maps.parse(WHOLE[:length] + b"\n" + WHOLE[length:])


COUNTERS = re.compile(rb"(\w+): +(\d+) kB")


def entries(text: bytes) -> list[tuple[tuple[object, ...], dict[str, int], frozenset[str]]]:
    """Take smaps apart line by line."""
    found: list[tuple[tuple[object, ...], dict[str, int], frozenset[str]]] = []
    for line in text.splitlines():
        if not re.match(rb"[A-Z]", line):
            found.append((reference(line), {}, frozenset()))
        elif counter := COUNTERS.fullmatch(line):
            found[-1][1][counter[1].decode()] = int(counter[2]) * 1024
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
def test_smaps_in_pieces(cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much each read returns; and a name that looks like the end of an area."""
    text = Path("/proc/self/smaps").read_bytes()
    text = text.replace(b"[heap]", b"/VmFlags: x\\012")

    class Pieces(io.BytesIO):
        def read(self, _size: int | None = -1) -> bytes:
            return super().read(cut)

    monkeypatch.setattr(procfs, "open", lambda *_path, **_how: Pieces(text), raising=False)
    found = list(procfs.details())
    assert [(one.counters, one.flags) for one in found] == [one[1:] for one in entries(text)]
    assert "/VmFlags: x\n" in [one.area.name for one in found]


@pytest.mark.parametrize("line", [b"Rss", b"Rss\n", b"Rss 12 kB\n", b"7f00-7f01\n"])
def test_what_is_no_line_of_smaps_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a line of"):
        maps.parse_details(WHOLE + b"\n" + line)


@given(st.binary())
def test_any_bytes_behind_an_area(text: bytes) -> None:
    with contextlib.suppress(ValueError):
        maps.parse_details(WHOLE + b"\nRss:   4 kB\n" + text)


def test_newlines_in_names(tmp_path: Path) -> None:
    import mmap

    file = tmp_path / "two\nlines"
    file.write_bytes(b"x" * 4096)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ):
        assert str(file) in [area.name for area in procfs.maps()]
        assert str(file) in [area.name for area, _counters in procfs.smaps()]
