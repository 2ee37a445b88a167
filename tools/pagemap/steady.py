"""Detection of changes in a process while it is read."""

import zlib
from typing import NamedTuple

from iobmd import procfs
from iobmd.errors import BusyError
from iobmd.task.task import Task
from iobmd.units import format_count


class Restless(NamedTuple):
    """Changes of a process while it was read: the output may show the state before or after them."""

    ended: bool
    """Whether it exited, or executed another program."""
    areas: bool
    """Whether areas were added, removed or changed."""
    page_faults: int

    def __str__(self) -> str:
        if self.ended:
            return "it exited while it was read"
        areas = "its areas" if self.areas else ""  # short: the line fits narrow terminals
        faults = format_count(self.page_faults, "page fault") if self.page_faults else ""
        return "it changed while it was read: " + " and ".join(filter(None, (areas, faults)))


class Steady:
    """A process at one moment. Pages that the kernel moves or swaps out are not detected."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._then = self._now()

    def restless(self) -> Restless | None:
        """Return the changes since then; None if it is unchanged."""
        now = self._now()
        if self._then is None or now is None:
            return Restless(True, False, 0) if now is None else None
        found = Restless(False, now[0] != self._then[0], now[1] - self._then[1])
        return found if any(found) else None

    def _now(self) -> tuple[object, int] | None:
        pid = self._task.pid
        try:
            areas = self._areas(pid)
            faults = procfs.page_faults(pid)
        except OSError:  # it has exited, or may not be inspected: reading it reports that
            return None
        return (areas, faults) if self._task.alive else None

    def _areas(self, pid: int) -> object:
        """Return a value that changes with the areas."""
        checksum = 0
        try:
            for text in procfs.maps_text(pid):  # the text of many areas is long
                checksum = zlib.crc32(text, checksum)
        except BusyError:
            return object()  # it keeps moving its areas
        return checksum
