"""Setting memory of this process to zero."""

import functools

from iobmd._internal import chunked
from iobmd._native import crosstask, mman
from iobmd.units import PAGE_SIZE, round_down, round_up


def clear(ours: int, size: int) -> None:
    """Set memory of this process to zero; large ranges on several threads, and interruptible by Ctrl-C."""
    if size <= chunked.PIECE:
        crosstask.zero(ours, size)
    else:
        chunked.run(functools.partial(_zero, ours), size)


def _zero(ours: int, offset: int, size: int) -> tuple[int, int]:
    crosstask.zero(ours + offset, size)
    return size, 0


def discard(ours: int, end: int) -> int:
    """Free the whole pages of a range of private memory, and clear what precedes them; return where they end."""
    first, last = round_up(ours, PAGE_SIZE), round_down(end, PAGE_SIZE)
    if first >= last:
        return ours
    try:
        mman.advise(first, last - first, mman.MADV_DONTNEED)
    except OSError:  # locked (mlockall)
        return ours
    clear(ours, first - ours)
    return last
