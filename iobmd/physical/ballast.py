"""Free memory that is held while other memory is allocated, so that the kernel reaches the memory behind it.

fallocate(2) in a tmpfs allocates pages without clearing them: they are cleared when they are first touched, which
these never are. Holding 12 GiB takes 50 ms in huge pages, and freeing it 25 ms; populating as much takes 2 s where
memory is fast, and 40 s on a virtual machine whose host backs it on first touch (measured, Linux 6.18). With
MADV_HUGEPAGE the kernel would also compact memory; here it only allocates free memory.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd._native import mman
from iobmd.host import zoneinfo
from iobmd.memory import shmem
from iobmd.units import HUGE_PAGE_SIZE, round_down

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet
    from typing import Self

_STEP = 256 << 20
"""Bytes a call: 0.7 ms in huge pages; the kernel undoes an interrupted call."""
_TRIES = 3
_MOST_RESERVED = 512 << 20
"""Bytes that the kernel may reserve for itself, at most; if more is left, other processes have just freed it."""


def is_available() -> bool:
    """Return whether the kernel offers such memory to this process (fsopen(2): CAP_SYS_ADMIN)."""
    with Ballast() as nothing:
        return nothing.is_available


class Ballast:
    """Free memory in huge pages of a tmpfs, initially none.

    It is freed when this process ends, even if it is killed. A child that another thread forks inherits the
    descriptor, but not the memory: `close` truncates the file.
    """

    def __init__(self) -> None:
        self._end = 0  # of the file, which has holes where memory was freed
        self._held: set[int] = set()  # offsets of huge pages
        self._reserved = 0
        self._fd = shmem.create_huge(0)

    @property
    def size(self) -> int:
        """Bytes held."""
        return len(self._held) * HUGE_PAGE_SIZE

    @property
    def is_available(self) -> bool:
        """Whether it can hold memory."""
        return self._fd >= 0

    def hold(self, size: int) -> int:
        """Hold up to `size` more bytes, as far as huge pages are free; return how many.

        When none are left, the kernel allocates smaller pages, and when these run out, it reclaims memory of others.
        It reserves some huge pages for its own use: the end is reached when no more are allocated.
        """
        begin, failures = self.size, 0
        while (step := self._step(begin + size - self.size)) > 0:
            before = _in_huge_pages()
            try:
                os.ftruncate(self._fd, self._end + step)
                mman.allocate_pages(self._fd, self._end, step)
            except InterruptedError:  # the handlers of signals have run, and raised nothing
                continue
            except OSError:  # a limit of the memory cgroup
                break
            if _in_huge_pages() - before < step // 2:
                mman.punch(self._fd, self._end, step)
                failures += 1
                if failures == _TRIES:
                    self._reserved = min(self._spare(), _MOST_RESERVED)
                    break
                continue  # another process may have freed huge pages of a tmpfs
            self._held.update(range(self._end, self._end + step, HUGE_PAGE_SIZE))
            self._end += step
            failures = 0
        return self.size - begin

    def _step(self, size: int) -> int:
        """Return how many bytes to allocate next, decreasing towards the end."""
        spare = self._spare() - self._reserved if self.is_available else 0
        return round_down(min(_STEP, size, max(spare // 2, min(spare, _STEP // 16))), HUGE_PAGE_SIZE)

    def _spare(self) -> int:
        return zoneinfo.free_in_blocks(HUGE_PAGE_SIZE)

    def parts(self, size: int, *, without: AbstractSet[int] = frozenset()) -> Iterator[tuple[int, int]]:
        """Iterate over contiguous parts, as offsets and sizes of at most `size` bytes, in descending order.

        Huge pages at the offsets `without` are omitted.
        """
        held = sorted(self._held - without)
        while held:
            start = len(held) - 1
            while start and held[start - 1] == held[start] - HUGE_PAGE_SIZE and held[-1] - held[start - 1] < size:
                start -= 1
            yield held[start], held[-1] + HUGE_PAGE_SIZE - held[start]
            del held[start:]

    def free(self, offset: int, size: int) -> None:
        """Free a part of it: whole huge pages."""
        mman.punch(self._fd, offset, size)
        self._held.difference_update(range(offset, offset + size, HUGE_PAGE_SIZE))

    @property
    def fd(self) -> int:
        """The descriptor of the file."""
        return self._fd

    def close(self) -> None:
        """Free all of it. Idempotent."""
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
            os.close(self._fd)
            self._fd = -1
        self._held.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def _in_huge_pages() -> int:
    """Return the bytes in huge pages of tmpfs on this host, which hardly any other program uses."""
    return procfs.meminfo().get("ShmemHugePages", 0)
