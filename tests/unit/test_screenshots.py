"""The screenshots of the documentation are those of `make screenshots`, of commands that exist."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from iobmd.tools.pagemap.arguments import parse
from iobmd.tools.pagemap.palette import INKS
from iobmd.tools.screenshots import HEAT_IMAGE, PAGES, SIZES, VIEWS

DOCS = Path(__file__).parents[2] / "docs"


def test_every_view_is_drawn_and_shown() -> None:
    drawn = {f"{name}-{columns}.svg" for name in VIEWS for columns in SIZES} | {f"{name}.png" for name in PAGES}
    drawn.add(f"{HEAT_IMAGE}.svg")
    assert {path.name for path in (DOCS / "screenshots").iterdir()} == drawn
    page = (DOCS / "questions.md").read_text()
    assert [name for name in drawn if f"(screenshots/{name})" not in page] == []


@pytest.mark.parametrize("name", VIEWS)
def test_the_command_of_a_view(name: str) -> None:
    command = VIEWS[name].command
    parse(command.replace("PID", "1").replace("FILE", "name").split())
    for columns in SIZES:
        path = DOCS / "screenshots" / f"{name}-{columns}.svg"
        words = "".join(ElementTree.parse(path).getroot().itertext()).replace("\xa0", " ")
        assert command.replace("PID", "").replace("FILE", "database.bin").strip() in words, "the title"
        assert "Traceback" not in words
        assert "://" not in path.read_text().replace("http://www.w3.org/2000/svg", ""), "it loads nothing"
        assert path.stat().st_size < 128 << 10, "as many cells as a terminal has, each of another color"


def test_the_map_has_the_legend_of_today() -> None:
    words = "".join(ElementTree.parse(DOCS / "screenshots" / "map-80.svg").getroot().itertext()).replace("\xa0", " ")
    for state in ("huge", "present", "file", "zero"):
        assert INKS[state].meaning in words
