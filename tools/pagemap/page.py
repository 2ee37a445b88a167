"""The page of `--html`: one file with the picture, the table, and the program that searches, filters and zooms."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iobmd.printable import printable
from iobmd.units import format_count

from .document import FIELDS
from .drawing import STRENGTHS, strength
from .palette import INKS, main_state

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

    from iobmd.pagemap.area import Area

    from .look import Look
    from .survey import Survey

_BARS = 12
_COLUMNS = {
    "start": "addresses",
    "end": "",
    "perms": "perms",
    "name": "name",
    "size_bytes": "size",
    "resident_bytes": "resident",
    "pss_bytes": "PSS",
    "uss_bytes": "USS",
    "anonymous_bytes": "anon",
    "file_bytes": "file",
    "shmem_bytes": "shmem",
    "swapped_bytes": "swapped",
    "huge_bytes": "huge",
    "locked_bytes": "locked",
    "run_count": "runs",
    "largest_run_bytes": "largest run",
}
"""Headings of the table by field of --json."""


def write(look: Look, survey: Survey, file: BinaryIO, light: dict[str, str], dark: dict[str, str]) -> str:
    """Write the page, and return a description of it."""
    here = Path(__file__).with_name("page_files")
    script = (here / "page.js").read_text()
    style = _colors(light, dark) + (here / "page.css").read_text()
    known = {
        # Only this script and this style take effect, and nothing is loaded, whatever the names of files contain.
        "policy": f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}",
        "title": html.escape(f"Memory of {look.title}"),
        "style": style,
        "script": script,
    }
    for index, text in enumerate(re.split(r"\$(\w+)", (here / "page.html").read_text())):
        if index % 2 == 0:
            file.write(text.encode())
        elif text == "data":
            for piece in _data(look, survey):
                # Inside a script element, "<" could begin its end tag or a comment.
                file.write(piece.replace("<", "\\u003c").encode())
        else:
            file.write(known[text].encode())
    return f"{format_count(survey.areas, 'area')}, self-contained page"


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _colors(light: dict[str, str], dark: dict[str, str]) -> str:
    states = {state: ink.color for state, ink in INKS.items()}
    day = _variables(light | {"faint": "#59616b"} | states)
    night = _variables(dark | {"faint": "#a3acb6"})
    return (
        f":root {{ color-scheme: light; {day} }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{ color-scheme: dark; {night} }} }}\n"
        f":root[data-theme=dark] {{ color-scheme: dark; {night} }}\n"
    )


def _variables(colors: dict[str, str]) -> str:
    return "; ".join(f"--{name}: {color}" for name, color in colors.items())


def _data(look: Look, survey: Survey) -> Iterator[str]:
    """Yield the data as JSON, in pieces: a process may have tens of thousands of areas."""
    numbers = {state: index for index, state in enumerate(INKS)}
    grid = survey.grid
    fields = list(_COLUMNS)
    words = dict(survey.legend())
    largest, count, rest = survey.largest(_BARS)
    groups = [(name, True, sums) for name, sums in largest]
    if count:
        groups.append((f"{count} others", False, rest))
    when = time.strftime("%F %T", time.localtime(look.time))
    names = survey.names
    head: dict[str, Any] = {
        "extent": f"{survey.extent()}; Linux {look.kernel}, {when}",
        "length": grid.length,
        "memory": survey.memory,
        "block": grid.block,
        "physical_block": grid.physical_block,
        "physical_blocks": grid.physical_blocks,
        "degrees": STRENGTHS,
        "states": [
            {
                "key": state,
                "word": ink.word,
                "words": words.get(state, ""),
                "memory": ink.is_memory,
                "total": survey.totals[state],
            }
            for state, ink in INKS.items()
        ],
        "groups": groups,
        "names": names,
        "fields": [(key, _COLUMNS[key]) for key in fields],
    }
    yield json.dumps(head)[:-1]
    named = {name: index for index, name in enumerate(names)}
    yield from _listed(
        "parts",
        (
            [named[part.name], f"{part.start:x}", f"{part.end:x}", part.position, part.length, part.states]
            for part in survey.parts()
        ),
    )
    columns = (
        [f"{block.start:x}", f"{block.end:x}", *chain(*((numbers[state], block.sums[state]) for state in block.sums))]
        for block in grid.blocks()
    )
    yield from _listed("columns", columns)
    cells = ((column, row, numbers[main_state(sums)], strength(grid, sums)) for column, row, sums in grid.cells())
    yield from _listed("cells", chain.from_iterable(cells))
    yield from _listed("rows", look.rows(lambda area: json.dumps(_row(area, fields))), are_json=True)
    restless = look.restless()
    notes = [*survey.notes(), *map(str, look.hidden), *([str(restless)] if restless else [])]
    yield f', "notes": {json.dumps(notes)}}}'


def _listed(name: str, items: Iterable[Any], *, are_json: bool = False) -> Iterator[str]:
    yield f',\n"{name}": ['
    for index, item in enumerate(items):
        yield ("," if index else "") + (item if are_json else json.dumps(item, separators=(",", ":")))
    yield "]"


def _row(area: Area, fields: list[str]) -> list[Any]:
    """Return the cells of a row of the table."""
    row: list[Any] = [FIELDS[key](area) for key in fields]
    for index, key in enumerate(fields):
        if key in ("start", "end"):
            row[index] = f"{row[index]:x}"
        elif key == "name":
            row[index] = printable(row[index])
    return row
