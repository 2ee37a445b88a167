"""Private anonymous memory of this process."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from iobmd import headroom
from iobmd._native import memory
from iobmd._native.mapping import Mapping
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.task import Task, kernel_task
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size, round_up
from iobmd.wiring import Wiring, make_resident

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from iobmd.pieces import Progress


class AnonymousBacking:
    """Zeroed memory that only this process maps.

    Parameters
    ----------
    size : int
        Bytes; rounded up to whole pages.
    wired : bool
        Keep it resident (mlock).
    source : tuple of (Task, int), optional
        Fill it with the `size` bytes at this address of this task.
    progress : callable, optional
        Told how many of those bytes are copied.
    """

    def __init__(
        self,
        size: int,
        *,
        wired: bool,
        source: tuple[Task, int] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.task = kernel_task
        self.wiring = Wiring.RESIDENT if wired else Wiring.PAGEABLE
        populated = wired or source is not None
        if populated:
            headroom.require(size, swappable=not wired)
        huge = size >= HUGE_PAGE_SIZE
        self.mapping = _map(round_up(size, PAGE_SIZE), HUGE_PAGE_SIZE if huge else PAGE_SIZE)
        try:
            if huge and populated:
                self._prefer_huge_pages()
            if wired:
                # A large copy faults its pages in by itself, on several threads: reserve the limit, do not populate.
                make_resident(self.address, self.size, populate=not (huge and source))
            if source:
                task, address = source
                huge_size = HUGE_PAGE_SIZE if huge else 0
                task.copy_in(address, self.address, size, huge=huge_size, progress=progress)
        except BaseException:
            self.mapping.close()
            raise

    @property
    def address(self) -> int:
        """Address in this process."""
        return self.mapping.address

    @property
    def size(self) -> int:
        """Bytes mapped, whole pages."""
        return self.mapping.size

    def _prefer_huge_pages(self) -> None:
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages: slower, nothing else
            memory.advise(self.address, self.size, memory.MADV_HUGEPAGE)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on."""
        return self.mapping.read(offset, length)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` from `offset` on."""
        self.mapping.read_into(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`."""
        self.mapping.write(offset, data)

    def close(self) -> None:
        """Unmap the memory, which also unlocks it. Raises BufferError while it is in use; idempotent."""
        self.mapping.close()


def _map(size: int, alignment: int) -> Mapping:
    try:
        return Mapping.anonymous(size, alignment)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", errno.ENOMEM)
        message = (
            f"cannot map {format_size(size)}: the address space, the overcommit limit (vm.overcommit_memory, "
            "`ulimit -v`) or the number of mappings (vm.max_map_count) is exhausted"
        )
        raise IOReturnError(IOReturn.kIOReturnNoMemory, message, number) from None
