"""Whether a process stood still while it was read."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

from iobmd import procfs


class Restless(NamedTuple):
    """What a process did while it was read: what is shown of it may be of before or of after."""

    areas: bool
    """Whether areas came, went or changed."""
    page_faults: int

    def __str__(self) -> str:
        areas = "areas came, went or changed" if self.areas else ""
        faults = f"{self.page_faults:,} page faults" if self.page_faults else ""
        return "it changed while it was read: " + ", ".join(filter(None, (areas, faults)))


class Steady:
    """A process at one moment. What the kernel moves or swaps out behind its back is not noticed."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._areas, self._faults = self._now()

    def restless(self) -> Restless | None:
        """Return what it did since; None: nothing."""
        areas, faults = self._now()
        found = Restless(areas != self._areas, faults - self._faults)
        return found if any(found) else None

    def _now(self) -> tuple[int, int]:
        try:
            areas = Path(f"/proc/{self._pid}/maps").read_bytes()
            return zlib.crc32(areas), procfs.page_faults(self._pid)
        except OSError:  # it has exited, or may not be looked at: who reads it says so
            return 0, 0
