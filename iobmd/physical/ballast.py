"""Free memory that is held while other memory is allocated, so that the kernel reaches the memory behind it.

fallocate(2) in a tmpfs allocates pages without clearing them: they are cleared when they are first touched, which
these never are. Holding 12 GiB takes 50 ms in huge pages, and freeing it 25 ms; populating as much takes 2 s where
memory is fast, and 40 s on a virtual machine whose host backs it on first touch (measured, Linux 6.18). With
MADV_HUGEPAGE the kernel would also compact memory; here it only allocates what is free.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from iobmd._native import mman
from iobmd.host import zoneinfo
from iobmd.memory import shmem
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, round_down

if TYPE_CHECKING:
    from typing import Self

_STEP = 256 << 20
"""Bytes a call: 0.7 ms in huge pages; the kernel undoes an interrupted call."""


class Ballast:
    """Memory in blocks of one size, at first none: huge pages of a tmpfs, or base pages of a memfd.

    It is freed with this process, whatever ends it. A child that another thread forks inherits the descriptor, but
    not the memory: `close` truncates the file.

    Parameters
    ----------
    block : int
        The size of a block in bytes.
    """

    def __init__(self, block: int = HUGE_PAGE_SIZE) -> None:
        self.block = block
        self.size = 0
        """Bytes held."""
        huge = block > PAGE_SIZE
        self._fd = shmem.create_huge(0) if huge else os.memfd_create(shmem.NAME, os.MFD_CLOEXEC)

    @property
    def is_available(self) -> bool:
        """Whether the kernel offers such memory (a tmpfs of this process: CAP_SYS_ADMIN)."""
        return self._fd >= 0

    def hold(self, size: int) -> int:
        """Hold up to `size` more bytes, as far as blocks are free; return how many.

        When no blocks are left, the kernel allocates smaller pages, and when these run out, it reclaims memory of
        others. Some blocks are reserved for its own use: the end is reached when their number no longer falls.
        """
        begin, spare = self.size, zoneinfo.free_in_blocks(self.block) if self.is_available else 0
        while step := round_down(min(_STEP, begin + size - self.size, spare), self.block):
            try:
                os.ftruncate(self._fd, self.size + step)
                mman.allocate_pages(self._fd, self.size, step)
            except InterruptedError:  # the handlers of signals have run, and raised nothing
                continue
            except OSError:  # a limit of the memory cgroup
                break
            self.size += step
            left = zoneinfo.free_in_blocks(self.block)
            if spare - left < step // 2:
                break
            spare = left
        return self.size - begin

    def free(self, offset: int, size: int) -> None:
        """Free a part of it: whole blocks."""
        mman.punch(self._fd, offset, size)

    def hold_again(self, offset: int, size: int) -> None:
        """Hold a part again that was freed, if no other process has allocated its memory."""
        mman.allocate_pages(self._fd, offset, size)

    def close(self) -> None:
        """Free all of it. Idempotent."""
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
