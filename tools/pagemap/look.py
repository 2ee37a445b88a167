"""The inspected process and areas, as selected on the command line, and what is hidden."""

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from iobmd import host
from iobmd.errors import BusyError, IOReturnError, NotFoundError
from iobmd.pagemap.area import Area, areas, is_bearable
from iobmd.pagemap.frame import Frames
from iobmd.pagemap.range import Where, name_of, resolve
from iobmd.pagemap.reader import Reader, require_frames
from iobmd.printable import printable
from iobmd.procfs import VMA
from iobmd.task.task import Task
from iobmd.units import PAGE_SIZE, format_size

from .arguments import needs_smaps
from .columns import column
from .groups import Groups
from .order import ordered
from .process import stack_pointers
from .steady import Restless, Steady
from .total import total_of

_T = TypeVar("_T")


class Hidden(NamedTuple):
    """Data that is not shown, the reason, and the remedy."""

    what: str
    why: str
    remedy: str
    """Empty if the reason names it."""
    columns: tuple[str, ...] = ()
    """The columns of the table that lack it; empty if it is missing elsewhere."""

    def __str__(self) -> str:
        remedy = f"; remedy: {self.remedy.splitlines()[0]}" if self.remedy else ""
        return f"not shown: {self.what} ({self.why}){remedy}"


SWAPPED_SHARED = Hidden(
    "shared memory in swap, which appears to be absent or released",
    "pagemap does not show it",
    "the table, or --json",
)


class Look:
    """A process, its areas selected on the command line, and what is hidden about them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.task = Task(arguments.pid)
        start, end = arguments.range or (None, None)
        self.name = ""
        self._gone: IOReturnError | None = None
        self.where: Where = resolve(self.task, start, None if end is None else end - start)
        if arguments.runs or arguments.flags or arguments.segments:
            require_frames()
        if arguments.flags:
            Frames().close()  # raises the error for flags that are hidden
        self._steady = Steady(self.task)
        self.has_ended = False
        """Whether it exited while it was watched."""
        self.matched = False
        """Whether an area was selected."""
        self.time = time.time()
        self.kernel = os.uname().release
        self.ask_anew()

    @property
    def title(self) -> str:
        """The process's printable name and its pid."""
        return f"{printable(self.name)} ({self.task.pid})"

    def ask_anew(self) -> None:
        """Determine the name of the process, and what can be shown; both change if it executes another program."""
        with contextlib.suppress(OSError):  # it has exited: reading its memory reports that
            self.name = name_of(self.task)
        self.names = self.make_groups()
        with Reader(self.task) as reader:
            self.frames, self.scans = reader.visible, reader.scans
            needed = needs_smaps(self.arguments) and self.arguments.smaps is None
            wanted = True if needed else self.arguments.smaps
            self.details: bool = is_bearable(self.where, reader) if wanted is None else wanted
        self.flags = self.frames and os.access("/proc/kpageflags", os.R_OK)
        self.hidden = self._hidden()

    def _hidden(self) -> list[Hidden]:
        found = []
        if not self.frames:
            found.append(
                Hidden(
                    "frame numbers, runs, folio sizes, and which swap entries are markers",
                    "the kernel shows them only to holders of CAP_SYS_ADMIN",
                    host.capability_remedy(),
                    ("runs", "largest", "mthp"),
                )
            )
        elif not self.flags:
            found.append(Hidden("folio sizes", "/proc/kpageflags requires root", "run as root", ("mthp",)))
        if self.arguments.of_areas:
            found += self._hidden_of_smaps()
        if self.arguments.way in _WITHOUT_SMAPS and host.has_swap():
            found.append(SWAPPED_SHARED)
        if not self.scans:
            found.append(Hidden("PAGEMAP_SCAN", "this kernel lacks it: smaps shows huge pages", "Linux 6.7 or later"))
        return found

    def _hidden_of_smaps(self) -> list[Hidden]:
        if not self.details:
            asked = self.arguments.smaps is False
            why = "--no-smaps was given" if asked else "reading smaps would block the process"
            what = "PSS of shared memory, locked and lazily freed memory, and shared memory in swap"
            return [Hidden(what, why, "--smaps", ("pss", "locked", "lazyfree", "eligible", "swap"))]
        if self.where.cuts_an_area:
            what = "PSS, lazily freed memory, and shared memory in swap, of areas that the range cuts"
            columns = ("pss", "lazyfree", "swap")
            return [Hidden(what, "smaps counts whole areas", "use a --range of whole areas", columns)]
        return []

    def restless(self) -> Restless | None:
        """Return how the process has changed since the start; None if it is unchanged."""
        if self._gone:  # its areas at least: it has executed another program
            return Restless(not self.task.alive, True, 0)
        return self._steady.restless()

    def areas(self) -> Iterator[Area]:
        """Iterate over the selected areas, ascending."""
        return filter(self.chooses, self.all_areas())

    def all_areas(self) -> Iterator[Area]:
        """Iterate over all areas, selected or not, ascending."""
        return areas(self.where, details=self.details, folios=self.flags)

    def rows(self, write: Callable[[Area], str]) -> Iterator[str]:
        """Iterate over the selected areas as text, in the requested order."""
        key = self.arguments.sort
        areas = self.until_gone(self.areas())
        if key == "address":
            return map(write, areas)
        if key == "name":
            return ordered(((area.name, write(area)) for area in areas), backwards=False)
        value = column(key).value
        return ordered(((value(total_of(area)) or 0, write(area)) for area in areas), backwards=True)

    def until_gone(self, found: Iterable[_T]) -> Iterator[_T]:
        """Iterate until the task exits, or keeps moving its memory, so that the output can be completed.

        `require_task` then raises the error.
        """
        try:
            yield from found
        except (NotFoundError, BusyError) as error:
            self._gone = error

    def require_task(self) -> None:
        """Raise the error that ended `until_gone`."""
        if self._gone:
            raise self._gone

    def chooses(self, area: Area) -> bool:
        """Return whether an area is selected."""
        only = self.arguments.only
        chosen = self.may_choose(area.vma, area.size) and (only is None or _STATES[only](area) > 0)
        self.matched = self.matched or chosen
        return chosen

    def may_choose(self, vma: VMA, size: int) -> bool:
        """Return whether an area may be selected, whatever its contents; `size` is that of the requested part."""
        chosen = self.arguments
        named = chosen.name is None or chosen.name in vma.name or chosen.name in self.names.name_of(vma)
        return named and (chosen.min_size is None or size >= chosen.min_size)

    def make_groups(self) -> Groups:
        """Return groups, still empty, that recognize the present stacks of the process."""
        return Groups(stack_pointers(self.task.pid))

    def parts(self) -> Iterator[tuple[VMA, int, int]]:
        """Iterate over the same areas, ascending, with the start and end of the requested part of each.

        Their contents are read only if the selection depends on them.
        """
        if self.arguments.only is not None:
            yield from ((area.vma, area.start, area.end) for area in self.areas())
            return
        for vma in self.where.areas():
            start, end = max(vma.start, self.where.start), min(vma.end, self.where.end)
            if self.may_choose(vma, end - start):
                self.matched = True
                yield vma, start, end

    @property
    def criteria(self) -> list[str]:
        """The options that select areas, as on the command line."""
        low, high = self.arguments.range or (0, 0)
        given = {
            "--name": self.arguments.name,
            "--min-size": self.arguments.min_size and format_size(self.arguments.min_size),
            "--range": f"{low:#x}-{high:#x}" if high else None,
            "--only": self.arguments.only,
        }
        return [f"{option} {printable(value)}" for option, value in given.items() if value is not None]

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Iterate over the starts and ends of `parts`."""
        return ((start, end) for _vma, start, end in self.parts())


_WITHOUT_SMAPS = ("map", "picture", "watch")
"""Outputs that show only pages, or their changes."""

_STATES: dict[str, Callable[[Area], int]] = {
    "resident": lambda area: area.resident,
    "anonymous": lambda area: area.anonymous,
    "file": lambda area: area.file_or_shared,
    "huge": lambda area: area.huge or 0,
    "swapped": lambda area: area.swapped or 0,
    "locked": lambda area: area.locked or 0,
    "lazy": lambda area: area.lazy_free or 0,
    "zero": lambda area: area.tally.zero,
    "guard": lambda area: area.tally.guard,
    "device": lambda area: area.device,
}


def page_line(look: Look) -> str:
    """Return a line with the process and the host of the output."""
    return f"{look.title}, Linux {look.kernel}, pages of {PAGE_SIZE >> 10} KiB"
