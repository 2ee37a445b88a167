"""Whether a process stood still while it was read."""

import zlib
from typing import NamedTuple

from iobmd import procfs
from iobmd.errors import BusyError
from iobmd.task.task import Task


class Restless(NamedTuple):
    """What a process did while it was read: what is shown of it may be of before or of after."""

    ended: bool
    """It is gone, or was another in the end."""
    areas: bool
    """Whether areas came, went or changed."""
    page_faults: int

    def __str__(self) -> str:
        if self.ended:
            return "it ended while it was read"
        areas = "areas came, went or changed" if self.areas else ""
        faults = f"{self.page_faults:,} page faults" if self.page_faults else ""
        return "it changed while it was read: " + ", ".join(filter(None, (areas, faults)))


class Steady:
    """A process at one moment. What the kernel moves or swaps out behind its back is not noticed."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._then = self._now()

    def restless(self) -> Restless | None:
        """Return what it did since; None: nothing."""
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
        except OSError:  # it has exited, or may not be looked at: who reads it says so
            return None
        return (areas, faults) if self._task.alive else None

    def _areas(self, pid: int) -> object:
        """Return something that differs where the areas do."""
        checksum = 0
        try:
            for text in procfs.maps_text(pid):  # of many areas the whole is long
                checksum = zlib.crc32(text, checksum)
        except BusyError:
            return object()  # it keeps moving them
        return checksum
