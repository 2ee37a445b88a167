"""smem: how much memory each process would free by its exit (USS), and RSS.

Before: `smem --columns="pid name uss rss"`, which adds up the lines of /proc/PID/smaps.
"""

import sys

import psutil

from iobmd import IOReturnError, pagemap


def usage(pid: int) -> tuple[int, int]:
    """Return USS and RSS in bytes."""
    areas = list(pagemap.areas(pid, details=False))  # without smaps
    resident = sum(area.resident for area in areas)
    return resident - sum(area.shared for area in areas), resident


pids = [int(argument) for argument in sys.argv[1:]] or psutil.pids()
print(f"{'PID':>8} {'USS':>12} {'RSS':>12}  name")
for pid in pids:
    try:
        uss, rss = usage(pid)
        name = psutil.Process(pid).name()
        print(f"{pid:8} {uss >> 10:8} KiB {rss >> 10:8} KiB  {name}")
    except (IOReturnError, psutil.Error):  # it exited, or may not be traced
        continue
