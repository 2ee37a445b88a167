"""page-types -p PID: the page flags of the memory of a process.

Before: `page-types -p PID`, a tool of the kernel's sources that is built in tools/mm.
"""

import sys
from collections import Counter

from iobmd import pagemap

sizes: Counter[tuple[str, ...]] = Counter()
for run, facts in pagemap.described(int(sys.argv[1])):
    sizes[facts.flags] += run.length
for flags, size in sizes.most_common():
    print(f"{size >> 10:8} KiB  {','.join(flags)}")
