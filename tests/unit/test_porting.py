"""The tables of docs/porting.md: all names exist, and every method of the four classes has a row."""

import re
from pathlib import Path

import pytest

import iobmd

PAGE = (Path(__file__).parents[2] / "docs" / "porting.md").read_text()
CLASSES = ("IOBufferMemoryDescriptor", "IOMemoryDescriptor", "IOMemoryMap", "IODMACommand")


def rows(section: str) -> list[tuple[str, str]]:
    """Return the first two cells of each row below a heading."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (.*?) \| (.*?) \|", text, re.MULTILINE)
    return [row for row in cells if row[0] not in ("IOKit", "DriverKit", "---")]


def method(cell: str) -> str | None:
    """Return the method that a cell names; None if it names none or contains no call."""
    found = re.match(r"`(?:(\w+)\.)?(\w+)\(", cell)
    return found[2] if found else None


@pytest.mark.parametrize("section", [*CLASSES, "DriverKit"])
def test_tables_name_methods_that_exist(section: str) -> None:
    family = ("IOSubMemoryDescriptor", "IOMultiMemoryDescriptor")
    known = {name for cls in (*CLASSES, *family) for name in dir(getattr(iobmd, cls))}
    for iokit, ours in rows(section):
        name = method(ours)
        assert name or ours == "none", iokit
        assert name is None or name in known, f"{iokit}: {ours}"


@pytest.mark.parametrize("section", CLASSES)
def test_tables_have_every_method(section: str) -> None:
    """Every method with an IOKit name (in camelCase) has a row."""
    cls = getattr(iobmd, section)
    inherited = (
        {name for base in cls.__mro__[1:] for name in vars(base)} if section != "IOMemoryDescriptor" else set()
    )
    named = {method(ours) for _, ours in rows(section)} | {method(iokit) for iokit, _ in rows(section)}
    wider = {"readBytesInto"}  # named in a remark
    for name in set(dir(cls)) - inherited - wider:
        if re.fullmatch(r"[a-z]+[A-Z]\w*", name) and callable(getattr(cls, name)):
            assert name in named, f"{section}.{name} is in no row"
