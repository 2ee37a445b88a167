"""numastat -p PID: the memory of a process by NUMA node.

Before: `numastat -p PID`, or adding up the N0=, N1= fields of /proc/PID/numa_maps.
"""

import sys
from collections import Counter

from iobmd import pagemap

sizes: Counter[int | None] = Counter()
for run, facts in pagemap.described(int(sys.argv[1])):
    sizes[facts.node] += run.length
for node, size in sorted(sizes.items(), key=str):
    print(f"node {node}: {size >> 10} KiB")
