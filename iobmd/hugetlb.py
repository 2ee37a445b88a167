"""Blocks out of the hugetlb pools (Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd import host, pinning
from iobmd._native import memory
from iobmd._native.mapping import Mapping
from iobmd.blocks import Places, blocks_of
from iobmd.errors import IOReturnError
from iobmd.populate import populate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd.host import HugePool

MFD_HUGE_SHIFT = 26


class PoolBlocks:
    """Huge pages of one pool, in a memfd that is mapped page by page in the wanted order.

    With `reserve` the pool is raised for what it lacks, and put back as soon as the pages are in use: they are
    then surplus, which the kernel frees by itself when they are unmapped, also if this process is killed.
    """

    def __init__(self, pool: HugePool, *, reserve: bool) -> None:
        self.block = pool.size
        self.hidden = False
        self._pool = pool
        self._reserve = reserve
        self._held: list[tuple[int, Mapping]] = []

    def more(self, count: int, alignment: int) -> Places:  # noqa: ARG002 (the protocol's)
        """Take up to `count` pages of the pool; empty when it has none."""
        with self._raised(count) as available:
            count = min(count, available)
            if not count:
                return {}
            size = count * self.block
            kind = os.MFD_HUGETLB | self.block.bit_length() - 1 << MFD_HUGE_SHIFT
            fd = os.memfd_create(f"iobmd-{self.block >> 20}M", os.MFD_CLOEXEC | kind)
            try:
                os.ftruncate(fd, size)
                mapping = Mapping.file(fd, size)
            except OSError:
                os.close(fd)
                return {}
            self._held.append((fd, mapping))
            try:
                populate(mapping.address, size, self.block)
            except IOReturnError:  # somebody else was faster
                return {}
        table = pinning.own_runs(mapping.address, size)
        self.hidden = table.hidden > 0
        return blocks_of(table, self.block)

    def assemble(self, chosen: list[int], alignment: int) -> Mapping:
        """Map the pages behind each other; what is not chosen goes back to the pool."""
        target = Mapping.reserve(len(chosen) * self.block, max(self.block, alignment))
        try:
            for number, place in enumerate(chosen):
                fd, mapping = self._holder(place)
                memory.map_file(target.address + number * self.block, self.block, fd, place - mapping.address)
            populate(target.address, target.size, self.block)  # they are there: this only maps them
            for fd, mapping in self._held:
                self._punch(fd, mapping, set(chosen))
        except BaseException:
            target.close()
            raise
        return target

    def _holder(self, place: int) -> tuple[int, Mapping]:
        return next(
            (fd, mapping) for fd, mapping in self._held if mapping.address <= place < mapping.address + mapping.size
        )

    def _punch(self, fd: int, mapping: Mapping, kept: set[int]) -> None:
        for place in range(mapping.address, mapping.address + mapping.size, self.block):
            if place not in kept:
                memory.punch(fd, place - mapping.address, self.block)

    @contextlib.contextmanager
    def _raised(self, count: int) -> Iterator[int]:
        """Make `count` pages available if that is allowed; yields how many are."""
        if not self._reserve:
            yield self._available()
            return
        setting = Path(self._pool.directory) / "nr_hugepages"
        with setting.open() as one_at_a_time:  # of all threads and processes, or one restores what another raised
            fcntl.flock(one_at_a_time, fcntl.LOCK_EX)
            before = _persistent(self._pool.directory)
            missing = max(0, count - self._available())
            try:
                if missing:
                    with contextlib.suppress(OSError):  # not root: as many as there are
                        setting.write_text(str(before + missing))
                yield self._available()
            finally:
                if missing:
                    with contextlib.suppress(OSError):
                        setting.write_text(str(before))

    def _available(self) -> int:
        return next((pool.available for pool in host.hugetlb_pools() if pool.size == self.block), 0)

    def close(self) -> None:
        """Give back what is held."""
        for fd, mapping in self._held:
            mapping.close()
            os.close(fd)
        self._held.clear()


def _persistent(directory: Path) -> int:
    """Return the size that a pool is set to: surplus pages are in use and not part of it."""
    total, surplus = (int((directory / name).read_text()) for name in ("nr_hugepages", "surplus_hugepages"))
    return total - surplus
