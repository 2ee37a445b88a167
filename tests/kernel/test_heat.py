"""Heat: samples show exactly the memory that another program used, and leave nothing behind."""

import ctypes
import json
import math
import mmap
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from iobmd.tools.pagemap.heatmap import rows_of
from PIL import Image
from support import kernel
from support.targets import Target, need_ptrace
from support.terminal import lines_on_terminal

from iobmd import IOReturn, IOReturnError, pagemap
from iobmd.cli import main
from iobmd.pagemap.sampler import tracks_accesses
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
AT, SIZE, HUGE, IDLE = 0x200000000000, 8 << 20, 0x200040000000, 0x200080000000
WRITTEN, READ = (1 * MIB, 2 * MIB), (5 * MIB, 6 * MIB)
SVG = "{http://www.w3.org/2000/svg}"
TOPS = re.compile(r"M[\d.]+ ([\d.]+)h")
"""The upper edges of the boxes of a path."""
ADDRESS = re.compile("[0-9a-f]{9,}")

PROGRAM = """
import ctypes, select, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
PATTERN = bytes(range(256)) * 16
for address, advice in ((0x200000000000, 15), (0x200040000000, 14), (0x200080000000, 15)):
    assert libc.mmap(address, 8 << 20, 3, 0x100022, -1, 0) == address
    libc.madvise(address, 8 << 20, advice)
    for page in range(2048):
        ctypes.memmove(address + page * 4096, PATTERN, 4096)
base = 0x200000000000
bytes_at = {page: ctypes.c_ubyte.from_address(base + page * 4096) for page in range(2048)}
huge = ctypes.c_ubyte.from_address(0x200040000000)
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0.01)[0]:
    if sys.argv[1] == "busy":
        for page in range(256, 512):
            bytes_at[page].value = 0
        for page in range(1280, 1536):
            bytes_at[page].value
        huge.value = 0
print(ctypes.string_at(base, 8 << 20) == PATTERN * 2048, flush=True)
"""
"""Writes zero to the first byte of some pages, which is zero, and reads others, until a line is written to it."""


def has_its_contents(target: Target) -> bool:
    """End the program; return whether its memory has the contents that it wrote."""
    target.tell()
    return target.line() == "True"


def area_flags(target: Target) -> set[str]:
    """Return the flags of the small area; those of userfaultfd(2) are u and another letter."""
    text = Path(f"/proc/{target.pid}/smaps").read_text()
    found = re.search(rf"^{AT:x}-.*?^VmFlags: (.*?)$", text, re.M | re.S)
    assert found
    return set(found[1].split())


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with Target([sys.executable, "-c", PROGRAM, getattr(request, "param", "busy")]) as made:
        yield made


def sampled(capsys: pytest.CaptureFixture[str], target: Target, *options: str) -> dict[str, Any]:
    assert main(["pagemap", str(target.pid), "--heat", "1", "--count", "5", "--json", *options]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def sampled_until(
    condition: Callable[[dict[str, Any]], bool], capsys: pytest.CaptureFixture[str], target: Target, *options: str
) -> dict[str, Any]:
    """Sample until a condition is met: on a busy machine, the program does not run in each interval."""
    for _ in range(20):
        document = sampled(capsys, target, *options)
        if condition(document):
            return document
    raise AssertionError(f"in the last of 20 samples: {document['areas']}")


def areas_of(document: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the areas by their addresses."""
    return {area["start"]: area for area in document["areas"]}


def pages_of(document: dict[str, Any]) -> set[int]:
    """Return the pages of the small area, as offsets, that were used in any interval."""
    ranges = document["used_ranges"]
    return {
        page - AT for one in ranges for page in range(max(one["start"], AT), min(one["end"], AT + SIZE), PAGE_SIZE)
    }


def test_written_pages(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """Precision and recall are 1: the same pages repeatedly, and no page that is only read or idle."""
    need_ptrace()

    def was_written_twice(document: dict[str, Any]) -> bool:
        return sum(used == MIB for used in areas_of(document)[AT]["used_bytes_per_interval"]) >= 2

    found = sampled_until(was_written_twice, capsys, target, "--method", "written")
    assert pages_of(found) == set(range(*WRITTEN, PAGE_SIZE))
    assert (found["method"], found["resolution_bytes"], found["used_is_lower_bound"]) == ("written", PAGE_SIZE, False)
    areas = areas_of(found)
    assert (areas[IDLE]["resident_bytes"], areas[IDLE]["used_bytes"]) == (SIZE, 0)
    assert not area_flags(target) & {"uw", "um", "ui"}
    chosen = sampled(capsys, target, "--method", "written", "--name", "[heap]")
    assert {area["name"] for area in chosen["areas"]} <= {"[heap]"}
    assert not pages_of(chosen)
    assert has_its_contents(target)


@pytest.mark.parametrize("target", ["idle"], indirect=True)
def test_a_program_that_uses_nothing(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """The control: the same memory, which the program does not use, is not reported."""
    need_ptrace()
    assert not pages_of(sampled(capsys, target, "--method", "written"))
    areas = sampled(capsys, target, "--method", "referenced")["areas"]
    assert {area["used_bytes"] for area in areas if area["start"] in (AT, IDLE)} == {0}


def test_accessed_pages(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """From Linux 7.3 on reads are seen too; older kernels say what they lack."""
    need_ptrace()
    if tracks_accesses():
        found = sampled_until(lambda document: len(pages_of(document)) >= 512, capsys, target)
        assert found["method"] == "accessed"
        assert pages_of(found) == {*range(*WRITTEN, PAGE_SIZE), *range(*READ, PAGE_SIZE)}
    else:
        assert main(["pagemap", str(target.pid), "--heat", "1", "--method", "accessed"]) == 1
        assert "Linux 7.3" in capsys.readouterr().err
    assert has_its_contents(target)


def test_referenced_areas(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """Which area is used, and how much of it; no page fault is caused, and no tracer stops the program."""

    def was_used(document: dict[str, Any]) -> bool:
        return int(areas_of(document)[AT]["used_bytes"]) >= MIB

    found = sampled_until(was_used, capsys, target, "--method", "referenced")
    used = areas_of(found)
    assert used[AT]["used_bytes"] <= 2 * MIB  # not more than it uses; less, if the processor has cached translations
    assert used[IDLE]["used_bytes"] == 0
    assert (found["resolution_bytes"], found["used_is_lower_bound"], found["used_ranges"]) == (None, True, None)


def test_frequencies_of_areas_are_unknown(target: Target) -> None:
    """The method shows how many pages of an area were used, not which."""
    heat = pagemap.heat(target.pid, 0.1, method="referenced", intervals=2)
    assert not heat.is_exact
    with pytest.raises(IOReturnError, match="referenced") as caught:
        heat.by_frequency()
    assert caught.value.code == IOReturn.kIOReturnUnsupported


@pytest.mark.needs("root")
def test_damon(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel's estimate is about right; the session of another program is refused, and continues."""
    folder = Path("/sys/kernel/mm/damon/admin/kdamonds")

    def session() -> list[str]:
        files = [folder / "nr_kdamonds", folder / "0/state", folder / "0/pid"]
        return [file.read_text() for file in files if file.exists()] if folder.exists() else []

    before = session()
    if main(["pagemap", str(target.pid), "--heat", "3", "--count", "15", "--method", "damon", "--json"]):
        assert re.search("kIOReturn(Busy|Unsupported|NotPrivileged)", capsys.readouterr().err)
    else:
        found = json.loads(capsys.readouterr().out)
        used = pages_of(found)
        assert len(used & {*range(*WRITTEN, PAGE_SIZE), *range(*READ, PAGE_SIZE)}) > 400
        areas = {area["start"]: area for area in found["areas"]}
        assert sum(areas[IDLE]["used_bytes_per_interval"]) < sum(areas[AT]["used_bytes_per_interval"]) / 4
    assert session() == before


def test_huge_pages_stay_huge(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """A write to a write-protected huge page would split its mapping."""
    need_ptrace()
    before = kernel.smaps(HUGE, target.pid)["AnonHugePages"]
    if before < SIZE:
        pytest.skip("the kernel gave the program no huge pages")
    found = sampled(capsys, target, "--method", "written")
    assert kernel.smaps(HUGE, target.pid)["AnonHugePages"] == before
    (unseen,) = (one["bytes"] for one in found["not_seen"] if one["what"].startswith("huge pages"))
    assert unseen >= SIZE


def test_nothing_remains_if_it_is_killed(target: Target) -> None:
    need_ptrace()
    command = [sys.executable, "-m", "iobmd", "pagemap", str(target.pid), "--heat", "60", "--method", "written"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as sampling:
        until(lambda: "uw" in area_flags(target))
        sampling.kill()
    until(lambda: "uw" not in area_flags(target))
    assert has_its_contents(target)


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is met."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("columns", [40, 80, 300])
def test_the_picture_fits_the_terminal(target: Target, columns: int) -> None:
    lines = lines_on_terminal(columns, "pagemap", str(target.pid), "--heat", "0.4", "--method", "referenced")
    assert all(len(line.rpartition("\r")[2]) <= columns for line in lines), lines
    assert any(line.startswith("memory ") and line.rstrip().endswith("s") for line in lines)
    assert any("≤" in line for line in lines)


def blocks_of(path: Path) -> dict[int, bool]:
    """Return the addresses of the rows of an image, and whether they show use."""
    svg = ElementTree.parse(path).getroot()
    used = {
        float(y)
        for shape in svg.iter(f"{SVG}path")
        if shape.get("class", "").startswith("heat")
        for y in TOPS.findall(shape.get("d", ""))
    }
    addresses = (label for label in svg.iter(f"{SVG}text") if ADDRESS.fullmatch(label.text or ""))
    return {int(label.text or "", 16): float(label.get("y", 0)) - 11 in used for label in addresses}


def test_an_image_shows_which_blocks_were_written(target: Target, tmp_path: Path) -> None:
    need_ptrace()
    command = ["pagemap", str(target.pid), "--heat", "1", "--count", "5", "--method", "written"]
    for _ in range(20):  # on a busy machine, the program does not run in each interval
        assert main([*command, "--svg", str(tmp_path / "image")]) == 0
        blocks = blocks_of(tmp_path / "image")
        if blocks[AT + MIB]:
            break
    for start, used in ((AT, WRITTEN), (IDLE, (0, 0))):
        within = {address - start: heat for address, heat in blocks.items() if start <= address < start + SIZE}
        assert len(within) >= SIZE // MIB
        assert within == {offset: used[0] <= offset < used[1] for offset in within}
    assert has_its_contents(target)


@pytest.mark.parametrize("option", ["--png", "--svg"])
def test_an_image_of_areas(target: Target, option: str, tmp_path: Path) -> None:
    """Referenced bits are those of whole areas: an area is a row."""
    command = ["pagemap", str(target.pid), "--heat", "0.4", "--method", "referenced", option, str(tmp_path / "image")]
    assert main(command) == 0
    if option == "--png":
        with Image.open(tmp_path / "image") as image:
            assert image.width == 1200
            assert len(image.getcolors() or ()) > 8
        return
    blocks = blocks_of(tmp_path / "image")
    assert {address for address in blocks if AT <= address < IDLE + SIZE} == {AT, HUGE, IDLE}


def test_the_first_row_of_an_area_names_it() -> None:
    """Its first block may have no memory, and the row of the next one is below another area."""
    with mmap.mmap(-1, 64 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_NOHUGEPAGE)
        area[32 * PAGE_SIZE :] = b"x" * 32 * PAGE_SIZE
        rows = list(rows_of(pagemap.heat(area, 0.2, method="written", intervals=2), 8))
    assert [row.begins for row in rows] == [True, *[False] * (len(rows) - 1)]
    assert [row.label.partition("+")[0] for row in rows[1:]] == ["  "] * (len(rows) - 1)
    assert rows[0].label.partition(" +")[0].strip()
    assert sum(row.resident for row in rows) == 32 * PAGE_SIZE


def test_memory_of_this_process() -> None:
    """The library samples a buffer here without injection; a page that is only in use between intervals counts."""
    with mmap.mmap(-1, 64 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_NOHUGEPAGE)
        area[:] = b"x" * len(area)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(area))

        def write(_elapsed: float) -> None:
            area[8 * PAGE_SIZE] = 1
            area[9 * PAGE_SIZE + 5] = 2

        found = pagemap.heat(area, 0.3, method="written", intervals=3, progress=write)
        # The writes after the first interval count in the two others.
        assert list(found.counted()) == [(begin + 8 * PAGE_SIZE, begin + 10 * PAGE_SIZE, 2)]
        assert (found.resident, found.by_frequency()) == (64 * PAGE_SIZE, {0: 62 * PAGE_SIZE, 2: 2 * PAGE_SIZE})
        assert [found.working_set(percent) for percent in (0, 33, 50, 100)] == [0, 0, 8192, 8192]


def test_what_is_refused(target: Target) -> None:
    for arguments, message in (
        ({"method": "written"}, "requires a userfaultfd"),
        ({"method": "guessed"}, "is not one of"),
        ({"intervals": 100}, "shorter than 50 ms"),
        ({"intervals": 0}, "cannot be divided"),
        ({"seconds": -1}, "cannot be divided"),
        ({"seconds": math.nan}, "cannot be divided"),
        ({"seconds": math.inf}, "cannot be divided"),
    ):
        with pytest.raises(IOReturnError, match=message) as caught:
            pagemap.heat(target.pid, **{"seconds": 1, **arguments})  # type: ignore[arg-type]
        assert caught.value.code == IOReturn.kIOReturnBadArgument


def test_the_page_has_no_picture_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pagemap", "self", "--heat", "1", "--html", "page.html"]) == 2
    assert "use --svg FILE or --png FILE" in capsys.readouterr().err
