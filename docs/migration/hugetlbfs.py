"""Huge pages from a hugetlb pool, for long contiguous memory.

Before, after `sysctl vm.nr_hugepages=2` at boot:

    memory = mmap.mmap(-1, 4 << 20, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB)
    memory[:] = bytes(4 << 20)  # SIGBUS if the pool is empty
    # the two pages are contiguous or not: read pagemap, and try again
"""

import iobmd

try:
    buffer = iobmd.allocate(4 << 20, contiguous=True, alignment=2 << 20)
except iobmd.IOReturnError as error:
    raise SystemExit(f"no contiguous memory: {error}") from None
with buffer:
    address, length = buffer.getPhysicalSegment(0)
    assert length == 4 << 20
    assert address % (2 << 20) == 0
    print(f"{length >> 20} MiB at {address:#x}, without a pool")
