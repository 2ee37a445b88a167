"""Files with snapshots of the layout of a task's memory: one JSON document per line, because they may be long."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from iobmd._internal.atomic_file import replacing
from iobmd.errors import BadArgumentError, IOReturnError
from iobmd.pagemap.range import name_of, resolve
from iobmd.pagemap.reader import Reader
from iobmd.pagemap.span import Span
from iobmd.procfs import VMA
from iobmd.task.task import ADDRESS_END

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from iobmd._native.pagemap import Walk
    from iobmd.pagemap.range import Target

VERSION = 1
_HEADER = "iobmd pagemap"
_KINDS = (f'{{"{_HEADER}": ', '{"area": ', '{"spans": ')
_END = '{"end": true}\n'
"""The last line, which a truncated file lacks."""
_DIGITS = len(str(ADDRESS_END))
_AREA = [int, int, str, int, int, str, str]
"""The types of the fields of a VMA."""
_FLAGS = 1 << 7
"""Exceeds all flags of spans."""
_LONGEST = 1 << 20
"""Maximum number of characters of a line; `save` writes at most a tenth of that."""
_WINDOW = 4 << 20
"""Size of the address window whose spans form a line: two snapshots have equal lines for windows without changes."""


class Header(NamedTuple):
    """The subject and the time of a snapshot."""

    version: int
    """The version of the file's format."""
    pid: int
    """The process."""
    name: str
    """The name of the program."""
    time: float
    """Seconds since the epoch."""
    kernel: str
    """The version of the kernel."""
    page_bytes: int
    """The page size."""
    frames_visible: bool
    """Whether frame numbers are recorded; if not, moved pages cannot be recognized."""
    start: int
    """The start of the requested range."""
    end: int
    """The end of the requested range."""

    @property
    def valid(self) -> bool:
        """Whether it may have been written by `save`."""
        numbers = (self.version, self.pid, self.page_bytes, self.start, self.end)
        return (
            all(type(number) is int and 0 <= number <= ADDRESS_END for number in numbers)
            and self.version == VERSION
            and self.start <= self.end
            and all(isinstance(text, str) for text in (self.name, self.kernel))
            and type(self.time) in (int, float)
            and 0 <= self.time < 1 << 36
            and isinstance(self.frames_visible, bool)
        )


def save(target: Target, path: str | Path, address: int | None = None, size: int | None = None) -> Header:
    """Write a snapshot of a target (as for `spans`) to a file; return its header.

    The file replaces an existing one when it is complete. Only its owner may read it, because it contains physical
    addresses, which the kernel hides from other users.

    Raises
    ------
    IOReturnError
        As `spans`.
    OSError
        The file cannot be written.
    """
    where = resolve(target, address, size)
    with Reader(where.task, whole=where.cuts_no_huge_page) as reader:
        header = Header(
            VERSION,
            where.task.pid,
            name_of(where.task),
            round(time.time(), 3),
            os.uname().release,
            reader.page,
            reader.visible,
            where.start,
            where.end,
        )
        with replacing(path, 0o600) as opened, TextIOWrapper(opened) as file:
            file.write(json.dumps({_HEADER: header._asdict()}) + "\n")
            for area in where.areas():
                file.write(json.dumps({"area": area}) + "\n")
                for spans in _windows(reader.steps(max(area.start, where.start), min(area.end, where.end))):
                    file.write(json.dumps({"spans": spans}) + "\n")
            reader.require_task()
            file.write(_END)
    return header


def _windows(steps: Iterable[Walk]) -> Iterator[list[tuple[int, int, int, int]]]:
    """Group spans by the window in which they begin, because the bounds of steps are arbitrary."""
    spans: list[tuple[int, int, int, int]] = []
    window = -1
    for step in steps:
        for index in range(len(step)):
            span = step[index]
            if span[0] // _WINDOW != window:
                if spans:
                    yield spans
                spans, window = [], span[0] // _WINDOW
            spans.append(span)
    if spans:
        yield spans


class Snapshot:
    """A saved snapshot. Each method reads the file again, incrementally.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: the file is not a snapshot, or of another version.
    OSError
        The file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        first = next(self._documents(_HEADER), None)
        header = Header(**first) if isinstance(first, dict) and set(first) == set(Header._fields) else None
        if not header or not header.valid:
            message = f"{self._path} is not a snapshot of `iobmd pagemap --save`, version {VERSION}"
            raise BadArgumentError(message)
        self.header = header
        with self._path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - len(_END)))
            if file.read() != _END.encode():
                raise self._damaged("its end is missing")

    def _lines(self, kind: str) -> Iterator[str]:
        """Iterate over the lines with one kind of document; the header is the first line, and occurs once."""
        start = f'{{"{kind}": '
        with self._path.open(errors="surrogateescape") as file:
            for number, line in enumerate(iter(partial(file.readline, _LONGEST), "")):
                if len(line) == _LONGEST:
                    raise self._damaged(f"line {number + 1} has {_LONGEST} characters or more")
                if line.startswith(start):
                    yield line
                elif line == _END and not file.read(1):
                    return
                elif not line.startswith(_KINDS[:1] if not number else _KINDS[1:]):
                    raise self._damaged(f"line {number + 1} is not expected there")
                if kind == _HEADER:
                    return

    def _documents(self, kind: str) -> Iterator[Any]:
        return (self._parse(line, kind) for line in self._lines(kind))

    def _parse(self, line: str, kind: str) -> Any:
        start, end = f'{{"{kind}": ', "}\n"
        if not line.endswith(end):
            raise self._damaged("a line has no end")
        try:
            return json.loads(line[len(start) : -len(end)])  # the end must match, because a member may occur twice
        except (ValueError, RecursionError) as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, why: str) -> BadArgumentError:
        return BadArgumentError(f"{self._path} is not a snapshot, or is damaged: {why}")

    def areas(self) -> Iterator[VMA]:
        """Iterate over the areas, ascending."""
        behind = 0
        for fields in self._documents("area"):
            if not isinstance(fields, list) or [type(field) for field in fields] != _AREA:
                raise self._damaged(f"an area is {fields!r:.100}")
            area = VMA(*fields)
            if not behind <= area.start < area.end <= ADDRESS_END:
                raise self._damaged(f"the area {area} is in the wrong place")
            if max(area.start, self.header.start) >= min(area.end, self.header.end):
                raise self._damaged(f"the area {area} is outside its range")
            behind = area.end
            yield area

    def spans(self) -> Iterator[Span]:
        """Iterate over the spans, ascending."""
        return (span for batch in self.batches() for span in batch.spans())

    def batches(self) -> Iterator[Batch]:
        """Iterate over the batches of spans in the file, ascending; unchanged batches have equal texts."""
        before: Batch | None = None
        for line in self._lines("spans"):
            batch = Batch(line, self._read)
            if before and batch.start < before.end:
                raise self._damaged(f"spans at {batch.start:#x} come after others that reach to {before.end:#x}")
            before = batch
            yield batch

    def _read(self, line: str) -> list[Span]:
        found: list[Span] = []
        behind = 0
        try:
            for virtual, physical, length, flags in self._parse(line, "spans"):
                if not (
                    type(virtual) is type(physical) is type(length) is type(flags) is int
                    and behind <= virtual < virtual + length <= ADDRESS_END
                    and 0 <= physical <= ADDRESS_END
                    and 0 <= flags < _FLAGS
                ):
                    raise self._damaged(f"a span is {virtual!r:.30}, {physical!r:.30}, {length!r:.30}, {flags!r:.30}")
                behind = virtual + length
                found.append(Span(virtual, length, physical or None, flags))
        except (TypeError, ValueError) as error:
            raise error if isinstance(error, IOReturnError) else self._damaged(str(error)) from None
        if not found:
            raise self._damaged("a line of spans contains no span")
        return found


class Batch:
    """Consecutive spans, as a line of a snapshot.

    Attributes
    ----------
    start : int
        The start address of the first span.
    end : int
        The end address of the last span if the spans were parsed, otherwise `start` + 1.

    Raises
    ------
    IOReturnError
        The text is damaged.
    """

    def __init__(self, text: str, read: Callable[[str], list[Span]]) -> None:
        self.text = text
        self._read = read
        first = text[len('{"spans": [[') :].partition(",")[0]
        self.start = int(first) if first.isdecimal() and len(first) <= _DIGITS else read(text)[0].virtual
        self.end = self.start + 1

    def spans(self) -> list[Span]:
        """Return the spans; raise IOReturnError if the text is damaged."""
        found = self._read(self.text)
        self.end = found[-1].end
        return found
