"""The data of pictures: the selected areas without their empty parts, and a grid of their pages."""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from iobmd.pagemap.area import SharedMemory, maps_a_device
from iobmd.pagemap.reader import Reader
from iobmd.pagemap.span import state_of
from iobmd.printable import printable
from iobmd.units import format_count, format_size

from .columns import percent, share
from .groups import MOST, OTHERS, labels_of
from .palette import INKS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .grid import Grid, Sums
    from .look import Look

LONGEST = 2 << 20
"""Bytes of guard pages, of the zero page, … in a row that are drawn: they use no memory, but may fill terabytes."""


class Part(NamedTuple):
    """Adjacent areas of one name, without addresses that have no pages."""

    start: int
    """The first address."""
    end: int
    """The end address."""
    position: int
    """The bytes of pages before it."""
    length: int
    """Its bytes of pages, as drawn."""
    name: str
    """The label of their group."""
    states: int
    """A bit for each state of its pages, in the order of `INKS`."""
    areas: int
    """The number of areas."""


class Survey:
    """The pages of the selected areas, in one pass.

    Attributes
    ----------
    grid : Grid
        The pages by position.
    totals : Counter
        Bytes in each state.
    groups : dict
        The same for the areas of each group, by its label.
    names : list of str
        The labels of the groups, by number.
    areas, size : int
        The number of selected areas, and their size in bytes.
    is_cut : bool
        Whether pages without memory were drawn in part (`LONGEST`).
    """

    def __init__(self, look: Look, grid: Grid) -> None:
        self.grid = grid
        self.totals: Counter[str] = Counter()
        self.groups: dict[str, Sums] = {}
        self.areas = self.size = 0
        self.is_cut = False
        # Areas that have pages: arrays, because a process may have 65,530 of them, or more.
        self._starts, self._ends = array("Q"), array("Q")
        self._positions, self._names, self._states = array("Q"), array("I"), array("H")
        self._numbers: dict[str, int] = {}  # of groups
        for name, sums in look.until_gone(self._read(look)):
            self.totals.update(sums)
            group = self.groups[name]
            for state, length in sums.items():
                group[state] = group.get(state, 0) + length
        labels = labels_of(self.groups)
        self.names = [printable(labels[name]) for name in self.groups]
        self.groups = dict(zip(self.names, self.groups.values(), strict=True))

    @property
    def memory(self) -> int:
        """Bytes that occupy memory or swap space."""
        return memory_of(self.totals)

    def legend(self) -> Iterator[tuple[str, str]]:
        """Iterate over the states that exist, and their totals as text."""
        for state, ink in INKS.items():
            if total := self.totals[state]:
                note = percentage(total, self.memory) if ink.is_memory else "no memory"
                yield state, f"{ink.meaning} {format_size(total)}, {note}"

    def extent(self) -> str:
        """Return a line about the amounts of memory and addresses."""
        swapped = self.totals["swapped"]
        in_swap = f", {format_size(swapped)} in swap" if swapped else ""
        mapped = f"{format_count(self.areas, 'area')} with {format_size(self.size)} of addresses"
        return f"{format_size(self.memory - swapped)} in memory{in_swap}; {mapped}"

    def notes(self) -> Iterator[str]:
        """Iterate over lines about what is not drawn."""
        if empty := self.size - self.totals.total():
            yield f"not drawn: {format_size(empty)} of addresses without pages"
        if self.is_cut:
            words = ", ".join(ink.word for state, ink in INKS.items() if not ink.is_memory and self.totals[state])
            yield f"drawn as at most {format_size(LONGEST)} each, because they use no memory: {words}"

    def parts(self) -> Iterator[Part]:
        """Iterate over the areas that have pages, ascending."""
        for index, position in enumerate(self._positions):
            end = self._positions[index + 1] if index + 1 < len(self._positions) else self.grid.length
            name = self.names[self._names[index]]
            yield Part(
                self._starts[index], self._ends[index], position, end - position, name, self._states[index], areas=1
            )

    def mappings(self) -> Iterator[Part]:
        """Iterate over the same areas; those of one name are joined unless another area is between them."""
        last: Part | None = None
        for part in self.parts():
            if last and last.name == part.name:
                length, states = last.length + part.length, last.states | part.states
                last = last._replace(end=part.end, length=length, states=states, areas=last.areas + 1)
                continue
            if last:
                yield last
            last = part
        if last:
            yield last

    def largest(self, most: int) -> tuple[list[tuple[str, Sums]], int, Sums]:
        """Return the groups that use most memory, the number of the others, and their sums."""
        by_size = sorted(self.groups.items(), key=lambda group: -memory_of(group[1]))
        with_memory = [group for group in by_size if memory_of(group[1])]
        most = len(with_memory) if len(with_memory) == most + 1 else most  # a row is needed in any case
        rest: Counter[str] = Counter()
        for _name, sums in with_memory[most:]:
            rest.update(sums)
        return with_memory[:most], len(with_memory[most:]), dict(rest)

    def names_between(self, start: int, end: int) -> list[str]:
        """Return the distinct names of areas between two positions."""
        found: dict[str, None] = {}
        for index in range(max(0, bisect_right(self._positions, start) - 1), len(self._positions)):
            if self._positions[index] >= end:
                break
            found[self.names[self._names[index]]] = None
        return list(found)

    def _read(self, look: Look) -> Iterator[tuple[str, Sums]]:
        """Yield the group of each area, and its sums."""
        groups = look.make_groups()
        shared_memory = SharedMemory(look.task)
        with Reader(look.task, whole=look.where.cuts_no_huge_page) as reader:
            for vma, start, end in look.parts():
                self.areas += 1
                self.size += end - start
                before = self.grid.length
                kind = "device" if maps_a_device(vma.name) else "shmem" if vma in shared_memory else "file"
                sums = self._add(reader, start, end, kind)
                if not sums:
                    continue
                name = groups.name_of(vma)
                if name not in self.groups and len(self.groups) >= MOST:
                    name = OTHERS
                self.groups.setdefault(name, {})
                self._starts.append(start)
                self._ends.append(end)
                self._positions.append(before)
                self._names.append(self._numbers.setdefault(name, len(self._numbers)))
                self._states.append(sum(1 << number for number, state in enumerate(INKS) if state in sums))
                yield name, sums
            reader.require_task()

    def _add(self, reader: Reader, start: int, end: int, kind: str) -> Sums:
        """Add an area. pagemap does not distinguish pages of the `kind`s file, shmem and device."""
        sums: Sums = {}
        stretch, behind = 0, -1  # the drawn bytes without memory that end there
        last = ""
        for step in reader.steps(start, end):
            for virtual, physical, length, flags in struct.iter_unpack("=4Q", step.raw()):
                state = state_of(flags)
                if state == "file" or kind == "device":
                    state = kind
                sums[state] = sums.get(state, 0) + length
                drawn = length
                if not INKS[state].is_memory:
                    if virtual != behind or state != last:
                        stretch = 0
                    drawn = min(length, LONGEST - stretch)
                    self.is_cut = self.is_cut or drawn < length
                    stretch += drawn
                    behind, last = virtual + length, state
                if drawn:
                    # The zero page uses no memory, wherever it is mapped.
                    self.grid.add(virtual, None if state == "zero" else physical or None, drawn, state)
        return sums


def memory_of(sums: Sums) -> int:
    """Return the bytes that occupy memory or swap space."""
    return sum(length for state, length in sums.items() if INKS[state].is_memory)


def percentage(part: int, whole: int) -> str:
    """Format a share of a whole."""
    return f"{percent(share(part, whole))} %"


def short(name: str) -> str:
    """Return the printable name of an area without its directory, or the whole path of a device."""
    name = printable(name)
    if name.startswith("/memfd:"):  # may contain anything, also slashes, and is never in a directory
        return name[1:].removesuffix(" (deleted)")
    return name if name.startswith("/dev/") else name.rpartition("/")[2] or "[anon]"
