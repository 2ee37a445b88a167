"""pmap -x PID: the areas of a process, with their size and RSS.

Before: `pmap -x PID`, which reads /proc/PID/smaps.
"""

import sys

from iobmd import pagemap

size = rss = 0
print(f"{'address':>16} {'KiB':>10} {'RSS':>10}  mode  mapping")
for area in pagemap.areas(int(sys.argv[1]), details=False):  # without smaps
    print(f"{area.start:016x} {area.size >> 10:10} {area.resident >> 10:10}  {area.perms}  {area.name or '[anon]'}")
    size += area.size
    rss += area.resident
print(f"{'total':>16} {size >> 10:10} {rss >> 10:10}")
