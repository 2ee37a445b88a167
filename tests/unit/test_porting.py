"""The tables of docs/porting.md: all names exist, and no public method of the headers or of a class is missing."""

import re
from pathlib import Path

import pytest
from support.iokit_headers import DRIVERKIT_METHODS, IOKIT_METHODS

import iobmd

PAGE = (Path(__file__).parents[2] / "docs" / "porting.md").read_text()
CLASSES = [name for name in IOKIT_METHODS if hasattr(iobmd, name)]
"""The classes of the headers that iobmd has: each has a table."""
REASON = re.compile(r"\w+ \w+")


def rows(section: str) -> list[tuple[str, str, str]]:
    """Return the three cells of each row below a heading."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (.*?) \| (.*?) \| ?(.*?) ?\|$", text, re.MULTILINE)
    return [row for row in cells if row[0] not in ("IOKit", "DriverKit", "---")]


def method(cell: str) -> str | None:
    """Return the method or constructor that a cell names; None if it names none or contains no call."""
    found = re.match(r"`(?:(\w+)(?:\.|::))?(\w+)\(", cell)
    return found[2] if found else None


@pytest.mark.parametrize("section", [*CLASSES, "DriverKit"])
def test_tables_name_methods_that_exist(section: str) -> None:
    known = {name for cls in CLASSES for name in dir(getattr(iobmd, cls))} | {*CLASSES}
    for iokit, ours, remark in rows(section):
        name = method(ours)
        assert name or ours == "none", iokit
        assert name is None or name in known, f"{iokit}: {ours}"
        assert name or REASON.search(remark), f"{iokit} is refused without a reason"


@pytest.mark.parametrize("section", CLASSES)
def test_no_method_of_the_headers_is_missing(section: str) -> None:
    named = {method(iokit) for iokit, *_ in rows(section)}
    assert not {*IOKIT_METHODS[section]} - named


def test_no_method_of_driverkit_is_missing() -> None:
    named = {iokit.strip("`").partition("(")[0] for iokit, *_ in rows("DriverKit")}
    assert not {*DRIVERKIT_METHODS} - named


@pytest.mark.parametrize("section", CLASSES)
def test_tables_have_every_method(section: str) -> None:
    """Every method with an IOKit name (in camelCase) has a row."""
    cls = getattr(iobmd, section)
    inherited = (
        {name for base in cls.__mro__[1:] for name in vars(base)} if section != "IOMemoryDescriptor" else set()
    )
    named = {method(cell) for row in rows(section) for cell in row[:2]}
    wider = {"readBytesInto"}  # named in a remark
    for name in set(dir(cls)) - inherited - wider:
        if re.fullmatch(r"[a-z]+[A-Z]\w*", name) and callable(getattr(cls, name)):
            assert name in named, f"{section}.{name} is in no row"


def test_the_headers_are_complete() -> None:
    """Names that a port is likely to use are among them, and no name is listed twice."""
    for names in (*IOKIT_METHODS.values(), DRIVERKIT_METHODS):
        assert len(set(names)) == len(names)
    assert sum(map(len, IOKIT_METHODS.values())) > 120
