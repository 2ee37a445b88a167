"""Fragmented free memory, for tests and benchmarks: `python -m iobmd.tools.fragmentation` until its input ends."""

from __future__ import annotations

import argparse
import array
import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from iobmd import procfs
from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.cli.child import python
from iobmd.host import zoneinfo
from iobmd.memory import pinning
from iobmd.physical.ballast import Ballast
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator

_AREA = 256 << 20
_FILE, _FILES = 16 << 10, 1000
_FRAME = (1 << 55) - 1  # the bits of an entry of pagemap


class PinnedPages:
    """Free memory with one pinned page in each block, which neither compaction nor a hugetlb pool can move.

    Parameters
    ----------
    size : int
        Bytes that are allocated in small pages, and freed except for the pinned ones.
    block : int
        Bytes of physical memory with one pinned page each: no free run is twice as long.
    interleaved : int
        Bytes in which every other page remains allocated.
    """

    def __init__(self, size: int, block: int = HUGE_PAGE_SIZE, interleaved: int = 0) -> None:
        self._areas: list[Mapping] = []
        self._pins: list[pinning.Pin] = []
        pinned: dict[int, int] = {}
        try:
            for _ in range(size // _AREA):
                self._allocate(pinned, block)
            self._pins += [pinning.Pin(address, PAGE_SIZE) for address in pinned.values()]
        except BaseException:
            self.close()
            raise
        for number, area in enumerate(self._areas):
            start, end = area.address, area.address + _AREA
            kept = {address for address in pinned.values() if start <= address < end}
            if number < interleaved // _AREA:
                kept |= set(range(start, end, 2 * PAGE_SIZE))
            for address in [*sorted(kept), end]:
                if address > start:
                    mman.advise(start, address - start, mman.MADV_DONTNEED)
                start = address + PAGE_SIZE

    def _allocate(self, pinned: dict[int, int], block: int) -> None:
        area = Mapping.anonymous(_AREA, HUGE_PAGE_SIZE)
        self._areas.append(area)
        mman.advise(area.address, _AREA, mman.MADV_NOHUGEPAGE)
        mman.populate(area.address, _AREA, HUGE_PAGE_SIZE, PAGE_SIZE)
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(area.address // PAGE_SIZE * 8)
            entries = array.array("Q", pagemap.read(_AREA // PAGE_SIZE * 8))
        for index, entry in enumerate(entries):
            pinned.setdefault((entry & _FRAME) * PAGE_SIZE // block, area.address + index * PAGE_SIZE)

    @property
    def pins(self) -> int:
        """The number of pinned pages."""
        return len(self._pins)

    def close(self) -> None:
        """Free them."""
        for pin in self._pins:
            pin.release()
        for area in self._areas:
            area.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def write_files(folder: Path, size: int) -> None:
    """Write `size` bytes of files of 16 KiB: page cache, and the slabs of as many inodes and names."""
    content = bytes(_FILE)
    for number in range(size // _FILE):
        place = folder / f"{number // _FILES:x}"
        if number % _FILES == 0:
            place.mkdir()
        (place / f"{number:x}").write_bytes(content)


@contextlib.contextmanager
def fragmented(size: int, *options: str) -> Iterator[None]:
    """Fragment `size` bytes in another process, until the end of the `with` block; `options` are the program's."""
    command = python("-m", "iobmd.tools.fragmentation", str(size), *options)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        try:
            if not process.stdout.readline():
                raise RuntimeError("memory could not be fragmented")
            yield
        finally:
            process.stdin.close()


def main() -> None:
    """Run as the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "size", type=parse_size, nargs="?", help="bytes to fragment (default: 80 %% of the available memory)"
    )
    parser.add_argument("--block", type=parse_size, default=HUGE_PAGE_SIZE, help="memory with one pinned page")
    parser.add_argument("--interleaved", type=parse_size, default=0, help="memory that retains every other page")
    parser.add_argument("--leave", type=parse_size, help="memory that remains free; the rest is held in huge pages")
    parser.add_argument("--files", type=parse_size, default=0, help="page cache of small files, written before")
    arguments = parser.parse_args()
    size = procfs.meminfo()["MemAvailable"] * 8 // 10 if arguments.size is None else arguments.size
    with contextlib.ExitStack() as held:
        write_files(Path(held.enter_context(tempfile.TemporaryDirectory())), arguments.files)
        pages = held.enter_context(PinnedPages(size, arguments.block, arguments.interleaved))
        ballast = held.enter_context(Ballast())
        if arguments.leave is not None:
            ballast.hold(max(0, zoneinfo.free_in_blocks(HUGE_PAGE_SIZE) - arguments.leave))
        print(f"{size >> 20} MiB with {pages.pins} pinned pages, {ballast.size >> 20} MiB held", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
