"""The data of pictures: the selected areas, and a grid of their contents."""

from __future__ import annotations

import struct
import sys
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from iobmd.cli.printable import printable
from iobmd.pagemap.reader import Reader
from iobmd.pagemap.span import state_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .grid import Grid
    from .look import Look


class Part(NamedTuple):
    """An area, or the requested part of one."""

    start: int
    end: int
    name: str


def survey(look: Look, grid: Grid) -> list[Part]:
    """Add the selected areas to a grid until the task exits, and return them in ascending order."""
    return list(look.until_gone(_read(look, grid)))


def _read(look: Look, grid: Grid) -> Iterator[Part]:
    with Reader(look.task, whole=look.where.cuts_no_huge_page) as reader:
        for vma, start, end in look.parts():
            yield Part(start, end, sys.intern(vma.name))  # many have the same name
            for step in reader.steps(start, end):
                for virtual, physical, length, flags in struct.iter_unpack("=4Q", step.raw()):
                    state = state_of(flags)
                    # The zero page uses no memory, wherever it is mapped.
                    grid.add(virtual, None if state == "zero" else physical or None, length, state)
        reader.require_task()


def between(parts: Sequence[Part], start: int, end: int) -> Iterator[Part]:
    """Iterate over the parts of ascending areas that are between two addresses."""
    for index in range(bisect_right(parts, start, key=lambda part: part.end), len(parts)):
        part = parts[index]
        if part.start >= end:
            break
        yield Part(max(part.start, start), min(part.end, end), part.name)


def names(parts: Iterable[Part]) -> list[str]:
    """Return the distinct short names of areas."""
    return list(dict.fromkeys(short(part.name) for part in parts))


def short(name: str) -> str:
    """Return the printable name of an area without its directory, or the whole path of a device."""
    name = printable(name)
    return name if name.startswith("/dev/") else name.rpartition("/")[2] or "[anon]"
