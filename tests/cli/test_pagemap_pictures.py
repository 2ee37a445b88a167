"""The pictures of `iobmd pagemap`, compared with the kernel's data on the memory that they show."""

import base64
import ctypes
import hashlib
import html
import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from iobmd.tools.pagemap.palette import INKS, Ink
from PIL import Image
from support import kernel, page_states
from support.child import CAP_SYS_ADMIN, in_child
from support.commands import shown
from support.moving import again_if_pages_move
from support.targets import PATIENCE, Target, need_program
from support.terminal import lines_on_terminal

from iobmd._native import mman
from iobmd.cli import color, main
from iobmd.units import format_size

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
def memory() -> Memory:
    return Memory()


def pictured(capsys: pytest.CaptureFixture[str], memory: Memory, *arguments: str) -> str:
    """Return the output of the command for memory that the kernel did not move during the read.

    Any process may have the kernel compact memory; the pages that it moves are drawn as markers.
    """
    for _attempt in range(50):
        before = kernel.entries(memory.address, 8 * MIB)
        text = shown(capsys, "self", *arguments, "--range", memory.range)
        if before == kernel.entries(memory.address, 8 * MIB):
            break
    return text


def cells_of(text: str) -> str:
    """Return the cells of a map, without the addresses and names around them."""
    return "".join(re.findall(r"^ *[0-9a-f]{9,} ([A-Z]+)", text, re.M))


def test_a_letter_for_each_block(
    memory: Memory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setenv("LINES", "40")
    text = pictured(capsys, memory, "--map")
    cell = re.search(r"^a cell: (\d+) KiB, ", text, re.M)
    assert cell
    per_state = 2 * MIB // (int(cell[1]) << 10)
    huge = "H" if memory.has_huge else "A"
    assert cells_of(text) == "A" * per_state + huge * per_state + "Z" * per_state
    assert max(len(line) for line in text.splitlines() if not line.startswith("not shown: ")) < 90
    assert "not drawn: 2 MiB of addresses without pages" in text


@pytest.mark.parametrize("kind", INKS.values(), ids=INKS)
def test_a_kind_on_a_terminal(kind: Ink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(color, "has_color", lambda: True)
    assert re.fullmatch("\x1b\\[(3[0-7]|9[0-7])mx\x1b\\[0m", color.painter()("x", kind.terminal))


def test_every_kind_has_a_color_and_a_letter_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, whose sixteen colors are used; then the user wants none."""
    for attribute in ("terminal", "letter", "color", "meaning"):
        assert len({getattr(ink, attribute) for ink in INKS.values()}) == len(INKS)
    monkeypatch.setenv("TERM", "xterm")
    text = "\n".join(lines_on_terminal(70, "pagemap", str(os.getpid()), "--map", raw=True))
    found = re.search("\x1b\\[(\\d+)m█\x1b\\[0m anonymous", text)
    assert found, "the legend"
    assert f"\x1b[{found[1]}m█" in text.rpartition("anonymous")[0]
    monkeypatch.setenv("NO_COLOR", "1")
    text = "\n".join(lines_on_terminal(70, "pagemap", str(os.getpid()), "--map", raw=True))
    assert "\x1b" not in text
    assert "AAA" in text


NAMED = """
import mmap, os, sys
held = []
for number in range(60):
    file = os.memfd_create(f"a-very-long-name-of-memory-{number:02}-" + "x" * 100)
    os.ftruncate(file, 3 << 20 if number % 5 == 0 else 1 << 18)
    held.append(mmap.mmap(file, 0))
    held[-1][:] = b"x" * len(held[-1])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def named() -> Iterator[int]:
    """A process with twelve mappings of 3 MiB and 48 small ones, with long names."""
    with Target([sys.executable, "-I", "-S", "-c", NAMED]) as target:
        yield target.pid


@pytest.mark.parametrize(("columns", "rows"), [(40, 24), (80, 50), (300, 24)])
def test_a_map_fits_the_terminal(named: int, columns: int, rows: int) -> None:
    lines = lines_on_terminal(columns, "pagemap", str(named), "--map", rows=rows)
    assert rows // 2 < len(lines) < rows, "the prompt follows"
    assert max(map(len, lines)) < columns
    assert any("…" in line for line in lines), "\n".join(lines)


TERABYTE = f"""
import mmap, sys
area = mmap.mmap(-1, 1 << 40, flags={PRIVATE})
print("ready", flush=True)
sys.stdin.read()
"""


def test_unused_addresses_are_not_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Target([sys.executable, "-I", "-S", "-c", TERABYTE]) as target:
        text = shown(capsys, str(target.pid), "--map")
        shown(capsys, str(target.pid), "--html", str(tmp_path / "file.html"))
    assert re.search(r"^not drawn: 1(\.\d)? TiB of addresses without pages$", text, re.M)
    assert text.count("\n") < 44
    assert data_of(tmp_path / "file.html")["length"] < 100 * MIB


def data_of(page: Path) -> dict[str, Any]:
    """Return the data of a page."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    found: dict[str, Any] = json.loads(text)
    return found


def rollup(pid: int) -> dict[str, int]:
    """Return the sums of smaps of all areas, in bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.findall(r"^(Rss|Anonymous|AnonHugePages|Swap): +(\d+) kB", text, re.M)
    return {name: int(value) << 10 for name, value in found}


def test_the_legend_adds_up_to_the_sums_of_the_kernel(
    named: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _attempt in range(20):  # the kernel may move or swap out pages during the read
        before = rollup(named)
        shown(capsys, str(named), "--html", str(tmp_path / "file.html"))
        shown(capsys, str(named), "--svg", str(tmp_path / "file.svg"))
        found = data_of(tmp_path / "file.html")
        totals = {state["key"]: state["total"] for state in found["states"]}
        if rollup(named) == before and not totals["marker"]:
            break
    assert totals["huge"] + totals["present"] + totals["file"] + totals["shmem"] == before["Rss"]
    assert totals["present"] == before["Anonymous"] - before["AnonHugePages"]
    memfds = [area for area in page_states.areas(named) if "/memfd:" in area.name]
    assert totals["shmem"] == sum(area.resident - area.huge for area in memfds) > 0
    assert totals["swapped"] == before["Swap"]
    assert sum(sum(sums.values()) for _name, _is_group, sums in found["groups"]) == sum(totals.values())
    assert f"anonymous {format_size(totals['present'])}, " in (tmp_path / "file.svg").read_text()
    column = [key for key, _heading in found["fields"]].index("resident_bytes")
    assert sum(row[column] for row in found["rows"]) == before["Rss"], "the table"


@pytest.mark.needs("frames")
@again_if_pages_move
def test_a_cell_for_every_place_where_memory_lies(
    memory: Memory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictured(capsys, memory, "--html", str(tmp_path / "file.html"))
    found = data_of(tmp_path / "file.html")
    drawn = list(zip(found["cells"][::4], found["cells"][1::4], strict=True))
    wanted = {
        (index * kernel.PAGE // found["block"], (entry & kernel.FRAME) * kernel.PAGE // found["physical_block"])
        for index, entry in enumerate(kernel.entries(memory.address, 4 * MIB))
    }
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == wanted
    assert [int(column[0], 16) for column in found["columns"]] == list(
        range(memory.address, memory.address + 6 * MIB, found["block"])
    )


def test_frames_that_are_hidden_leave_the_strip(memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "file.svg"
    assert (
        in_child(lambda: main(["pagemap", "self", "--svg", str(path), "--range", memory.range]), drop=CAP_SYS_ADMIN)
        == 0
    )
    text = path.read_text()
    assert "Physical address" not in text
    assert "frame numbers" in text
    assert "zero page" in text
    assert len(list(ElementTree.parse(path).iter(f"{SVG}rect"))) > 10


def test_names_stay_within_their_boxes(named: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each name has a border; no two labels overlap, however long the names are."""
    shown(capsys, str(named), "--svg", str(tmp_path / "file.svg"))
    tree = ElementTree.parse(tmp_path / "file.svg")
    borders = [shape for shape in tree.iter(f"{SVG}rect") if shape.get("class") == "border"]
    edges = [(float(box.get("x", 0)), float(box.get("x", 0)) + float(box.get("width", 0))) for box in borders]
    assert len(edges) > 10
    assert all(end <= start for (_start, end), (start, _end) in pairwise(edges))
    top = float(borders[0].get("y", 0))
    names = [
        (float(text.get("x", 0)), text.text or "")
        for text in tree.iter(f"{SVG}text")
        if text.get("class") == "name" and float(text.get("y", 0)) == top + 14
    ]
    assert {edge for edge in edges if edge[1] - edge[0] >= 36} <= {
        edge for edge in edges for x, _words in names if edge[0] < x < edge[1]
    }, "each that is not small has a name"
    assert sum(words.endswith("…") for _x, words in names) > 5
    for x, words in names:
        end = next(edge[1] for edge in edges if edge[0] <= x < edge[1])
        assert x + len(words) * 6.62 < end, "in the monospaced font of 11 pixels"


def test_a_page_loads_nothing_and_runs_only_its_script(
    memory: Memory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(capsys, "self", "--html", str(tmp_path / "file.html"), "--range", memory.range)
    text = (tmp_path / "file.html").read_text()
    assert not re.search(r"(src|href)=|url\(|@import|https?://", text)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)
    for element, kind in (("script", "script"), ("style", "style")):
        (content,) = re.findall(f"<{element}>(.*?)</{element}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")


HOSTILE = """
import mmap, os, sys
held = []
for name in ("</script><script>document.title=1</script>", "<img src=x onerror=document.title=2>", "<!--<script>"):
    file = os.memfd_create(name)
    os.ftruncate(file, 4 << 20)
    held.append(mmap.mmap(file, 0))
    held[-1][:] = b"x" * len(held[-1])
print("ready", flush=True)
sys.stdin.read()
"""
USED = """
const result = {resources: performance.getEntriesByType("resource").length};
const rows = () => [...document.querySelectorAll("#rows tr")].map(row => row.querySelector(".name").textContent);
const field = document.getElementById("search");
const type = text => { field.value = text; field.dispatchEvent(new Event("input")); };
const ground = () => getComputedStyle(document.body).backgroundColor;
const boxes = () => [...document.querySelectorAll("#boxes button")].map(box => box.getBoundingClientRect());
result.all = rows();
result.gaps = boxes().map((box, index, all) => index ? box.left - all[index - 1].right : 0);
result.boxes = boxes().length;
type("onerror");
result.searched = rows();
result.dimmed = document.querySelectorAll("#boxes button.other").length;
result.found = document.getElementById("found").textContent;
type("");
document.querySelector("[data-state=shmem]").click();
result.filtered = rows();
document.querySelector("[data-state=shmem]").click();
[...document.querySelectorAll("#boxes button")].find(box => box.textContent.includes("onerror")).click();
result.zoomed = [rows(), boxes().length, location.hash];
dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
result.again = rows().length;
document.querySelectorAll("th button")[0].click();
result.sorted = [...document.querySelectorAll("#rows tr")].map(row => row.firstChild.textContent.split("-")[0]);
result.light = ground();
document.getElementById("theme").click();
result.dark = ground();
result.title = document.title;
document.body.replaceChildren(Object.assign(document.createElement("pre"), {textContent: JSON.stringify(result)}));
"""


def reported(page: Path, script: str, width: int) -> dict[str, Any]:
    """Return what a script reports of a page in a browser, as JSON in an element `pre`."""
    # The policy would also stop a name that was not escaped, and this script.
    text = re.sub(r"<meta http-equiv=.*", "", page.read_text())
    page.write_text(text.replace("</body>", f"<script>{{{script}}}</script></body>"))
    done = subprocess.run(
        [need_program("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},900", page.as_uri()],
        capture_output=True, text=True, check=False, timeout=PATIENCE * 3,
        env=os.environ | {"HOME": str(page.parent)},
    )  # fmt: skip
    (dumped,) = re.findall("<pre>(.*?)</pre>", done.stdout, re.S) or [""]
    assert dumped, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(html.unescape(dumped))
    return found


@pytest.mark.parametrize("width", [520, 1200])
def test_a_page_fits_the_window(width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the table may be wider, and then has a scroll bar; the title is not split."""
    shown(capsys, "self", "--html", str(tmp_path / "file.html"))
    script = """
    const found = document.createElement("pre"), title = document.querySelector("h1");
    found.textContent = JSON.stringify({
      over: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      lines: Math.round(title.getBoundingClientRect().height / parseFloat(getComputedStyle(title).lineHeight)),
    });
    document.body.append(found);
    """
    assert reported(tmp_path / "file.html", script, width) == {"over": 0, "lines": 1}


def test_a_page_in_a_browser(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Searches, filters, zooms, sorts and switches the theme; names that look like HTML remain text."""
    page = tmp_path / "file.html"
    with Target([sys.executable, "-I", "-S", "-c", HOSTILE]) as target:
        shown(capsys, str(target.pid), "--html", str(page))
    assert page.read_text().count("</script>") == 2
    result = reported(page, USED, 1200)
    assert result["resources"] == 0
    assert sum("onerror" in name for name in result["all"]) == 1
    assert sum("</script><script>" in name for name in result["all"]) == 1
    assert result["title"].startswith("Memory of python")
    assert result["boxes"] >= 3
    assert max(map(abs, result["gaps"])) < 1, "boxes neither overlap nor leave gaps"
    assert [("onerror" in name) for name in result["searched"]] == [True]
    assert result["dimmed"] == result["boxes"] - 1
    assert result["found"] == f"1 of {len(result['all'])} areas selected, 4 MiB resident"
    assert not any("onerror" in name for name in result["filtered"])
    assert result["filtered"]
    assert [("onerror" in name) for name in result["zoomed"][0]] == [True]
    assert result["zoomed"][1] == 1
    assert "from=" in result["zoomed"][2]
    assert result["again"] == len(result["all"])
    starts = [int(start, 16) for start in result["sorted"]]
    assert starts == sorted(starts)
    assert result["light"] == "rgb(255, 255, 255)"
    assert result["dark"] == "rgb(21, 24, 28)"


def test_pixels_have_the_colors_of_the_states(
    memory: Memory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictured(capsys, memory, "--png", str(tmp_path / "file.png"))
    with Image.open(tmp_path / "file.png") as image:
        plot = image.convert("RGB").crop((84, 0, 1170, image.height))
    wanted = [bytes.fromhex(INKS[state].color[1:]) for state in ("present", "huge", "zero")]
    anonymous, huge, zero = (tuple(color) for color in wanted)
    # The strip: every pixel of a row has the color of a state.
    rows = [y for y in range(plot.height) if plot.getpixel((0, y)) == anonymous and plot.getpixel((1085, y)) == zero]
    strip = [plot.getpixel((x, rows[0])) for x in range(plot.width)]
    if memory.has_huge:
        assert [color for color, _same in groupby(strip)] == [anonymous, huge, zero]
        assert strip.count(anonymous) == strip.count(huge) == strip.count(zero) == 362
    else:
        assert [color for color, _same in groupby(strip)] == [anonymous, zero]
        assert strip.count(anonymous) == 2 * strip.count(zero)


def test_without_pillow(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["pagemap", "self", "--png", str(tmp_path / "file")]) == 1
    assert "iobmd[plot]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pagemap", "self", "--svg", str(tmp_path / "no" / "file")]) == 1
    assert "No such file" in capsys.readouterr().err
