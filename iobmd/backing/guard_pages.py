"""Inaccessible pages, for guards around other memory in a concatenation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd._native import pagemap
from iobmd.backing.pageless import PagelessBacking
from iobmd.errors import VMError
from iobmd.memory.shmem import FileExtent
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from iobmd._native.pagemap import RunTable


class GuardBacking(PagelessBacking):
    """`size` bytes, in whole pages, that cannot be accessed. Where they are mapped, they occupy only addresses."""

    error = VMError
    refusal = "guard pages cannot be read or written: no memory is accessible there"

    def has_guard_pages(self, _offset: int, length: int) -> bool:
        """Return whether the range has any byte."""
        return length > 0

    @property
    def runs(self) -> RunTable:
        """No runs: there are no page frames."""
        return pagemap.listed([])

    def file_extents(self, offset: int, length: int) -> list[FileExtent]:
        """Return inaccessible pages."""
        in_page = self.in_page(offset)
        return [FileExtent(None, offset - in_page, self.span(offset, length), PAGE_SIZE, PAGE_SIZE)]
