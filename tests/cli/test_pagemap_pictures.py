"""The pictures of `iobmd pagemap`, compared with the kernel's data on the memory that they show."""

import ctypes
import mmap
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from support import kernel
from support.child import CAP_SYS_ADMIN, in_child
from support.commands import shown
from support.targets import Target

from iobmd._native import mman
from iobmd.cli import main

MIB = 1 << 20
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE (Python 3.13)
SVG = "{http://www.w3.org/2000/svg}"


class Memory:
    """2 MiB in small pages, 2 MiB in a huge page, 2 MiB that were only read, and 2 MiB that are empty."""

    def __init__(self) -> None:
        self.mapping = mmap.mmap(-1, 16 * MIB, flags=PRIVATE)
        whole = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        self.address = -(-whole // (8 * MIB)) * 8 * MIB
        mman.advise(self.address, 8 * MIB, mman.MADV_NOHUGEPAGE)
        ctypes.memset(self.address, 1, 2 * MIB)
        mman.advise(self.address + 2 * MIB, 2 * MIB, mman.MADV_HUGEPAGE)
        ctypes.memset(self.address + 2 * MIB, 1, 2 * MIB)
        for offset in range(4 * MIB, 6 * MIB, kernel.PAGE):
            ctypes.string_at(self.address + offset, 1)
        self.has_huge = kernel.smaps(self.address + 2 * MIB)["AnonHugePages"] > 0

    @property
    def range(self) -> str:
        return f"{self.address:#x}-{self.address + 8 * MIB:#x}"


@pytest.fixture
def ours() -> Memory:
    return Memory()


def rows_of(text: str) -> dict[int, str]:
    """Return the rows of a map: the cells by the address of the first."""
    found = (re.match(r" *([0-9a-f]+)  (.*)", line) for line in text.splitlines())
    return {int(row[1], 16): row[2] for row in found if row}


def test_a_letter_for_each_block(
    ours: Memory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("LINES", "40")
    text = shown(capsys, "self", "--map", "--range", ours.range)
    cell = re.search(r"a cell: (\d+) KiB, ", text)
    assert cell
    per_state = 2 * MIB // (int(cell[1]) << 10)
    cells = "".join(row.partition("  ")[0] for row in rows_of(text).values())
    huge = "H" if ours.has_huge else "A"
    # The end is empty: the row is omitted, or shown as empty blocks of an area.
    assert cells.rstrip(".") == "A" * per_state + huge * per_state + "Z" * per_state
    assert max(map(len, text.splitlines()[3:])) <= 90


def test_colours_and_the_width_of_a_terminal(
    ours: Memory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("COLUMNS", "70")):
        monkeypatch.setenv(name, value)
    text = shown(capsys, "self", "--map", "--range", ours.range)
    assert "█" in text
    assert "\x1b[" in text
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(map(len, plain.splitlines()[3:])) <= 70


TERABYTE = f"""
import mmap, sys
area = mmap.mmap(-1, 1 << 40, flags={PRIVATE})
print("ready", flush=True)
sys.stdin.read()
"""


def test_far_apart_areas_are_not_joined_by_empty_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses a small process: how much of a TiB is in nonempty rows depends on its other mappings."""
    monkeypatch.setenv("LINES", "40")
    with Target([sys.executable, "-I", "-S", "-c", TERABYTE]) as target:
        assert main(["pagemap", str(target.pid), "--map"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 90
    assert re.search(r"⋮  1(\.\d)? TiB of empty areas", text)  # other areas may adjoin it


def boxes(path: Path) -> list[tuple[ElementTree.Element, str]]:
    """Return the boxes of a picture that have a description."""
    found = [(box, box.findtext(f"{SVG}title")) for box in ElementTree.parse(path).iter(f"{SVG}rect")]
    return [(box, tip) for box, tip in found if tip]


@pytest.mark.needs("frames")
def test_a_box_for_every_place_where_memory_lies(
    ours: Memory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(capsys, "self", "--svg", str(tmp_path / "file.svg"), "--range", ours.range)
    drawn: set[tuple[int, int]] = set()
    size = 0
    for box, tip in boxes(tmp_path / "file.svg"):
        place = re.search(r"^0x(\w+)-0x(\w+)\nphysical 0x(\w+)-0x(\w+)\n", tip)
        if not place:
            continue
        virtual, end, physical, stop = (int(number, 16) for number in place.groups())
        drawn.add((virtual, physical))
        columns, rows = end - virtual, stop - physical
        size += 1
        assert float(box.get("width", 0)) > 0
    assert size == len(drawn)
    wanted = set()
    for index, entry in enumerate(kernel.entries(ours.address, 4 * MIB)):
        virtual, physical = ours.address + index * kernel.PAGE, (entry & kernel.FRAME) * kernel.PAGE
        wanted.add((virtual // columns * columns, physical // rows * rows))
    assert drawn == wanted


def test_frames_that_are_hidden_leave_the_strip(ours: Memory, tmp_path: Path) -> None:
    path = tmp_path / "file.svg"
    assert (
        in_child(lambda: main(["pagemap", "self", "--svg", str(path), "--range", ours.range]), drop=CAP_SYS_ADMIN)
        == 0
    )
    tips = [tip for _box, tip in boxes(path)]
    assert tips
    assert not any("physical" in tip for tip in tips)
    assert "frame numbers" in path.read_text()
    assert sum(float(box.get("height", 0)) > 0 for box, tip in boxes(path) if "zero page" in tip) > 0


def test_a_page_needs_nothing_else(ours: Memory, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, "self", "--html", str(tmp_path / "file.html"), "--range", ours.range)
    text = (tmp_path / "file.html").read_text()
    assert not re.search(r"(src|href)=|url\(|@import", text)
    assert [link for link in re.findall(r"https?://[^\"]*", text) if "w3.org" not in link] == []
    assert f"{ours.address:#x}-" in text


def test_pixels_have_the_colours_of_the_states(
    ours: Memory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(capsys, "self", "--png", str(tmp_path / "file.png"), "--range", ours.range)
    with Image.open(tmp_path / "file.png") as image:
        strip = [image.getpixel((x, 96)) for x in range(80, 1040)]
    first = {color: strip.index(color) for color in dict.fromkeys(strip)}
    anonymous, huge, zero = (0x6C, 0xB9, 0xEE), (0x0B, 0x5F, 0xA5), (0xB9, 0xB9, 0xB9)
    if ours.has_huge:
        assert first[anonymous] < first[huge] < first[zero]
        assert strip.count(anonymous) == strip.count(huge) == strip.count(zero) > 100
    else:
        assert strip.count(anonymous) == 2 * strip.count(zero) > 100


def test_without_pillow(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["pagemap", "self", "--png", str(tmp_path / "file")]) == 1
    assert "iobmd[plot]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pagemap", "self", "--svg", str(tmp_path / "no" / "file")]) == 1
    assert "No such file" in capsys.readouterr().err
