"""Frames by an independent reading of pagemap."""

import time

from support import kernel

PFN = (1 << 55) - 1
_PRESENT, _SWAPPED, _GUARD = 1 << 63, 1 << 62, 1 << 58
_PATIENCE = 5.0


def frames(address: int, size: int, pid: int | str = "self") -> list[int]:
    """Return the frame of each page, 0 for a page without one.

    While the kernel tries to move a page its entry looks swapped (a migration entry), also if it then finds the page
    pinned and leaves it where it is. Compaction that any process causes does so at any time: such a page is looked at
    again.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        found = kernel.entries(address, size, pid)
        if not any(entry & (_PRESENT | _SWAPPED | _GUARD) == _SWAPPED for entry in found) or time.monotonic() > end:
            return [entry & PFN if entry & _PRESENT else 0 for entry in found]
        time.sleep(0.001)
