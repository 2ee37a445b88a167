"""Fragmented free memory, as after days of use: `python -m support.fragmented` until its input ends.

Most of the available memory is allocated in pages of 4 KiB. Then one page in each block of physical memory is pinned,
so that neither compaction nor a hugetlb pool can move it, every other page of a part remains allocated, and the rest
is freed.
"""

import argparse
import array
import mmap
import sys
from pathlib import Path

from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.memory import pinning
from support import kernel

MIB, GIB = 1 << 20, 1 << 30
PAGE = mmap.PAGESIZE


class Fragmented:
    """Free memory with a pinned page in each block of `block` bytes, in `share` of the available memory.

    Parameters
    ----------
    share : float
        The fraction of MemAvailable that is allocated first.
    block : int
        Bytes of physical memory with one pinned page each: no free run is twice as long.
    interleaved : int
        Bytes in which every other page remains allocated.
    """

    def __init__(self, share: float = 0.8, block: int = 32 * MIB, interleaved: int = GIB) -> None:
        self._areas: list[Mapping] = []
        self._pins: list[pinning.Pin] = []
        size = int(kernel.available() * share) // GIB * GIB
        pinned: dict[int, int] = {}
        for _ in range(size // GIB):
            area = Mapping.anonymous(GIB, 2 * MIB)
            self._areas.append(area)
            mman.advise(area.address, GIB, mman.MADV_NOHUGEPAGE)
            mman.populate(area.address, GIB, 2 * MIB, PAGE)
            with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
                pagemap.seek(area.address // PAGE * 8)
                entries = array.array("Q", pagemap.read(GIB // PAGE * 8))
            for index, entry in enumerate(entries):
                pinned.setdefault((entry & kernel.FRAME) * PAGE // block, area.address + index * PAGE)
        self._pins = [pinning.Pin(address, PAGE) for address in pinned.values()]
        kept = sorted(pinned.values())
        for number, area in enumerate(self._areas):
            inside = [address for address in kept if area.address <= address < area.address + GIB]
            if number < interleaved // GIB:
                inside = sorted({*inside, *range(area.address, area.address + GIB, 2 * PAGE)})
            start = area.address
            for address in [*inside, area.address + GIB]:
                if address > start:
                    mman.advise(start, address - start, mman.MADV_DONTNEED)
                start = address + PAGE
        self.size, self.pins = size, len(self._pins)

    def close(self) -> None:
        """Free all of it."""
        for pin in self._pins:
            pin.release()
        for area in self._areas:
            area.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fragment free memory until the input ends.")
    parser.add_argument("--share", type=float, default=0.8, help="of the available memory")
    parser.add_argument("--block", type=int, default=32, help="MiB of physical memory with one pinned page")
    arguments = parser.parse_args()
    fragmented = Fragmented(arguments.share, arguments.block * MIB)
    print(f"{fragmented.size >> 20} MiB with a pinned page in each of {fragmented.pins} blocks", flush=True)
    sys.stdin.read()
    fragmented.close()


if __name__ == "__main__":
    main()
