"""The areas of a process, grouped by what they map: one row for each file, the heap, the stacks, anonymous memory.

This is the model of the table, of `groups` in JSON, and of the live view: data without any form.

>>> groups = Groups(stack_pointers(pid))
>>> for area in pagemap.areas(pid):
...     groups.counted(area)
>>> for group in groups.ranked("pss"):
...     print(group.label, group.total.pss)
>>> groups.total.pss
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from .total import Total

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from iobmd.pagemap.area import Area
    from iobmd.procfs import VMA

ANON = "[anon]"
STACKS = "[thread stacks]"
OTHERS = "[other mappings]"
MOST = 8192
"""Maximum number of groups. Names found later share one more, because a process may map thousands of files."""

_DELETED = " (deleted)"


class Group(NamedTuple):
    """The areas that map the same thing."""

    name: str
    """The path of the file, or a name in brackets: unique."""
    label: str
    """The name, or as much of the end of its path as distinguishes it from other groups; unique as well."""
    total: Total
    """Their sums."""


class Groups:
    """Areas, added one by one, by their groups.

    Parameters
    ----------
    stack_pointers : sequence of int
        Addresses in the stacks of threads, ascending, by which these stacks are recognized.
    """

    def __init__(self, stack_pointers: Sequence[int] = ()) -> None:
        self._stack_pointers = stack_pointers
        self._totals: dict[str, Total] = {}

    def counted(self, area: Area) -> Area:
        """Add an area to its group, and return it."""
        name = self.name_of(area.vma)
        total = self._totals.get(name)
        if total is None:
            if len(self._totals) >= MOST:
                name = OTHERS
            total = self._totals.setdefault(name, Total())
        return total.counted(area)

    def name_of(self, vma: VMA) -> str:
        """Return the name of the group of an area."""
        if vma.name and vma.name != "/dev/zero" + _DELETED:
            return vma.name
        if vma.name:
            return "[anon, shared]"
        index = bisect_left(self._stack_pointers, vma.start)
        if index < len(self._stack_pointers) and self._stack_pointers[index] < vma.end:
            return STACKS
        return _BY_PERMISSIONS.get(vma.perms[:3], "[anon, code]" if vma.perms[2] == "x" else ANON)

    @property
    def total(self) -> Total:
        """The sums of all groups."""
        total = Total()
        for one in self._totals.values():
            total.add(one)
        return total

    def ranked(self, key: str | Callable[[Total], float | None] = "resident") -> list[Group]:
        """Return the groups, largest first; unknown values come last.

        Parameters
        ----------
        key : str or callable
            An attribute of `Total`, a function of one, or "name", which sorts in alphabetical order.
        """
        labels = labels_of(self._totals)
        groups = [Group(name, labels[name], total) for name, total in self._totals.items()]
        if key == "name":
            return sorted(groups, key=lambda group: (group.label, group.name))

        # Equal values are in the order of the sizes in memory, then of the addresses of the first areas.
        def rank(group: Group) -> tuple[float, int, int]:
            total = group.total
            value: float | None = getattr(total, key) if isinstance(key, str) else key(total)
            return (-1 if value is None else value, total.resident, total.size)

        return sorted(groups, key=rank, reverse=True)


_BY_PERMISSIONS = {"---": "[anon, reserved]", "r--": "[anon, read-only]"}
"""Kinds of anonymous memory: addresses without access are reserved, and usually have no memory."""


def labels_of(names: Iterable[str]) -> dict[str, str]:
    """Return the shortest label of each name that no other name has."""
    left = list(names)
    found = {}
    depth = 1
    while left:
        by_label = defaultdict(list)
        for name in left:
            by_label[_label(name, depth)].append(name)
        left = []
        for label, same in by_label.items():
            if len(same) == 1:
                found[same[0]] = label
            else:
                left += same
        depth += 1
    return found


def _label(name: str, depth: int) -> str:
    """Return the last `depth` parts of a path; a name that is no path, or a device, as it is."""
    if depth > name.count("/") or name.startswith("/dev/"):
        return name
    if name.startswith("/memfd:"):
        return name.removeprefix("/").removesuffix(_DELETED)
    return "/".join(name.split("/")[-depth:])
