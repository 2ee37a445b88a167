"""Pages of a file, chosen by physical address, which can be mapped in any order and by several processes."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from iobmd import pagemap
from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.errors import IOReturnError
from iobmd.host import limits
from iobmd.memory import numa, shmem
from iobmd.memory.populate import populate
from iobmd.memory.shmem import Extent, SharedObject
from iobmd.pagemap.self import own_runs
from iobmd.physical.thp import LONGEST, blocks_of
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size

if TYPE_CHECKING:
    from iobmd.physical.thp import Each, Places


class FileBlocks:
    """Transparent huge pages of a memfd, which are requested by MADV_COLLAPSE; before Linux 6.1, of a tmpfs file.

    If `block` is the size of a base page, they are base pages of a memfd.
    With `sealed` it is a memfd in any case, because the size of a tmpfs file cannot be sealed.
    """

    immovable = False
    """Whether the pages never move, even without a pin."""

    def __init__(self, block: int = HUGE_PAGE_SIZE, name: str = shmem.NAME, *, sealed: bool = False) -> None:
        self.block = block
        self.name = name
        self._is_sealed = sealed
        self.hidden = False
        self._fd = -1
        self._size = 0
        self._batches: list[tuple[int, Mapping]] = []  # each with its offset in the file
        self._collapses = False
        self._sealable = True  # except for a tmpfs file

    def create(self) -> int:
        """Return a new empty file. Raises OSError."""
        small = self.block == PAGE_SIZE
        fd = -1 if self._is_sealed or small or shmem.can_collapse() else shmem.create_huge(0, self.name)
        self._sealable = fd < 0
        self._collapses = fd < 0 and not small
        return os.memfd_create(self.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if fd < 0 else fd

    def more(self, count: int, alignment: int, each: Each | None = None) -> Places:  # noqa: ARG002 (the protocol's)
        """Allocate up to `count` more blocks; empty if there are none."""
        if not count:
            return {}
        size = count * self.block
        try:
            if self._fd < 0:
                self._fd = self.create()
            os.ftruncate(self._fd, self._size + size)
            batch = Mapping.view([(self._fd, self._size, size)], 0, True, 0, self.block)
        except OSError as error:
            if error.errno == errno.EAGAIN or (error.errno == errno.ENOMEM and not self.immovable):
                raise limits.from_oserror(error, f"cannot map {format_size(size)}", size) from None
            return {}  # no such pages, or the pool is exhausted
        self._batches.append((self._size, batch))
        numa.place(batch.address, size)
        self._size += size
        step = self.block if each else size
        for offset in range(0, size, step):
            if each and not each(batch.address + offset - step if offset else 0):
                break
            try:
                huge = self.block if self.block > PAGE_SIZE else LONGEST
                populate(batch.address + offset, step, huge, collapse=self._collapses)
            except IOReturnError:
                if not self.immovable:
                    raise
                return {}  # another process allocated them first
        table = own_runs(batch.address, size)
        self.hidden = table.hidden > 0
        return blocks_of(table, self.block)

    def assemble(self, chosen: list[int], alignment: int) -> Mapping:
        """Map the chosen blocks contiguously, and free the others."""
        shared = self.share(chosen, alignment)
        try:
            mapping = shared.map()
            populate(mapping.address, mapping.size, self.block)  # they exist: this only maps them
        finally:
            shared.close()
        return mapping

    def share(self, chosen: list[int], alignment: int, size: int = 0) -> SharedObject:
        """Return the blocks as an object, in this order; unless `size` is 0, only their first `size` bytes."""
        offsets = [self._offset(place) for place in chosen]
        end = 0  # of the blocks before a gap: one call for each gap, not for each of thousands of base pages
        for offset in (*sorted(offsets), self._size):
            if offset > end:
                mman.punch(self._fd, end, offset - end)
            end = offset + self.block
        extents = self._joined(offsets)
        if size and self.block == HUGE_PAGE_SIZE and not self.immovable:
            last = extents[-1]
            excess = len(chosen) * self.block - size
            if excess:
                extents[-1] = Extent(last.offset, last.length - excess)
                mman.punch(self._fd, sum(extents[-1]), excess)
        if self._sealable:
            shmem.seal(self._fd)
        fd, self._fd = self._fd, -1
        page = self.block if self.immovable else PAGE_SIZE
        return SharedObject(fd, extents, alignment=max(self.block, alignment), page=page, immovable=self.immovable)

    def first(self) -> int | None:
        """Return the position of the first block if it is a huge page, although its frame is hidden."""
        if not self._batches:
            return None
        address = self._batches[0][1].address
        return address if pagemap.is_huge(address, self.block) else None

    def _joined(self, offsets: list[int]) -> list[Extent]:
        extents: list[Extent] = []
        for offset in offsets:
            if extents and sum(extents[-1]) == offset:
                extents[-1] = Extent(extents[-1].offset, extents[-1].length + self.block)
            else:
                extents.append(Extent(offset, self.block))
        return extents

    def _offset(self, place: int) -> int:
        return next(
            start + place - batch.address
            for start, batch in self._batches
            if batch.address <= place < batch.address + batch.size
        )

    def close(self) -> None:
        """Free all blocks that are held."""
        for _start, batch in self._batches:
            batch.close()
        self._batches.clear()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
