"""The examples of README.md and docs/: Python blocks, and the commands of console blocks, are run as shown.

`<!-- needs: frames -->` above a block names its requirements on the host, and `<!-- printed -->` above a text block
states that the Python block before it prints this text.
"""

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from enum import EnumType
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import iobmd.tools  # registers its commands
import pytest

import iobmd
import iobmd.host
import iobmd.iommu
import iobmd.pagemap
from iobmd import constants
from iobmd.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *(page for folder in ("docs", "docs/api", "docs/howto") for page in sorted((ROOT / folder).glob("*.md"))),
]
_BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[\w, ]+) -->\n)?^```(?P<kind>python|console)\n(?P<text>.*?)^```$"
    r"(?:\n\n<!-- printed -->\n```text\n(?P<printed>.*?)^```$)?",
    re.M | re.S,
)
_PYTHON = re.compile(r"^```py(?:thon)?\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\]\((?!https?:)([\w./-]+)(?:#[\w-]+)?\)")


class Block(NamedTuple):
    kind: str
    needs: frozenset[str]
    text: str
    printed: str


def blocks(page: Path, kind: str) -> list[Block]:
    found = (
        Block(one["kind"], frozenset((one["needs"] or "").split()), one["text"], one["printed"] or "")
        for one in _BLOCK.finditer(page.read_text())
    )
    return [block for block in found if block.kind == kind]


def texts(kind: str) -> list[object]:
    """The blocks to run of each page: those without requirements, and all of them if some have requirements."""
    runs = []
    for page in PAGES:
        all_of_it = blocks(page, kind)
        needs = frozenset().union(*(block.needs for block in all_of_it))
        for allowed in [frozenset(), needs] if needs else [needs]:
            chosen = [block for block in all_of_it if block.needs <= allowed]
            text, printed = "\n".join(block.text for block in chosen), [block.printed for block in chosen]
            marks = pytest.mark.needs(*allowed) if allowed else ()
            if text:
                runs.append(pytest.param(text, printed, id="-".join([page.name, *sorted(allowed)]), marks=marks))
    return runs


def test_every_block_is_found() -> None:
    for kind in ("python", "console"):
        found = sum(len(blocks(page, kind)) for page in PAGES)
        assert found == sum(page.read_text().count(f"```{kind}\n") for page in PAGES) > 2
    printed = sum(bool(block.printed) for page in PAGES for block in blocks(page, "python"))
    assert printed == sum(page.read_text().count("<!-- printed -->\n") for page in PAGES) > 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page: Path) -> None:
    """Those marked `py` as well, which do not run on every host: they need a device, or a memory limit."""
    for text in _PYTHON.findall(page.read_text()):
        ast.parse(text, page.name)


@pytest.mark.parametrize(("text", "printed"), texts("python"))
def test_python_blocks_run(text: str, printed: list[str], tmp_path: Path) -> None:
    """The blocks of a page run in one interpreter, in order, and print what the page shows. Some write files."""
    command = [sys.executable, "-W", "error", "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    position = 0
    for part in printed:
        assert part in done.stdout[position:]
        position = done.stdout.index(part, position) + len(part)


@pytest.mark.parametrize(("text", "_printed"), texts("console"))
def test_commands_run(
    text: str,
    _printed: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # some write files
    for line in filter(None, text.splitlines()):
        prompt, command, *arguments = shlex.split(line)
        assert (prompt, command) == ("$", "iobmd")
        assert main(arguments) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "module",
    [iobmd, iobmd.dmabuf, iobmd.host, iobmd.iommu, iobmd.pagemap, iobmd.rdma],
    ids=lambda module: module.__name__,
)
def test_every_public_name_is_in_the_reference(module: ModuleType) -> None:
    """The members of classes are checked when the reference is built (docs/conf.py)."""
    text = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    described = set(re.findall(r"^\.\. (?:auto\w+|py:\w+):: ([\w.]+)", text, re.M))
    kinds = [kind for kind in vars(constants).values() if isinstance(kind, EnumType)]
    members = {name for kind in kinds for name in kind.__members__}
    names = {f"{module.__name__}.{name}" for name in {*module.__all__} - members - {"__version__"}}
    assert not names - described
    assert all(getattr(module, name.rpartition(".")[2]).__doc__ for name in names)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_shown_with_its_output_and_options(name: str) -> None:
    """In its section of commands.md; the options are explained in the first column of a table."""
    parts = re.split(r"^## iobmd (\w+)$", (ROOT / "docs/commands.md").read_text(), flags=re.M)
    section = dict(zip(parts[1::2], parts[2::2], strict=True))[name]
    assert f"iobmd {name}" in section
    assert "\n```text\n" in section
    explained = set(re.findall(r"--[a-z][\w-]*", "\n".join(re.findall(r"^\| ([^|]*) \|", section, re.M))))
    parser = importlib.import_module(COMMANDS[name][0]).make_parser()
    options = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    assert explained == options - {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_links_of_the_readme_work_on_a_package_index() -> None:
    """They are absolute, below the URL of the documentation in the metadata, and that page exists."""
    text = (ROOT / "README.md").read_text()
    site = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Documentation"]
    assert not _LINK.findall(text)
    pages = re.findall(rf"\]\({re.escape(site)}([\w/-]+)\.html", text)
    assert len(pages) > 10
    assert not [page for page in pages if not (ROOT / "docs" / f"{page}.md").exists()]
