"""What the demonstration shows of purgeable memory: kept whole, and lost whole."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from iobmd._native import mman
from iobmd.api import allocate
from iobmd.purgeable import EMPTY, NON_VOLATILE, VOLATILE
from iobmd.units import PAGE_SIZE, format_size, pages

if TYPE_CHECKING:
    from iobmd.descriptors.buffer import IOBufferMemoryDescriptor


def demonstrate(size: int) -> dict[str, int | bool]:
    """Make memory volatile twice: once it is all there afterwards, once the kernel takes a page of it.

    Returns
    -------
    dict
        `size`, `lazily_freed` while volatile, and the pages `resident` then; whether it came back `intact`; how many
        pages were `taken` the second time; whether that was told (`lost`), and all of it reads `zero` then.
    """
    content = os.urandom(PAGE_SIZE) * pages(size)
    with allocate(len(content), wired=False, purgeable=True) as buffer:
        buffer.writeBytes(0, content)
        buffer.setPurgeable(VOLATILE)
        lazily_freed, (resident, _dirty) = buffer.lazily_freed, buffer.getPageCounts()
        intact = buffer.setPurgeable(NON_VOLATILE) == VOLATILE and _holds(buffer, content)
        buffer.setPurgeable(VOLATILE)
        # What the kernel does to a page that is lazily freed when memory is short (madvise(2), Linux 5.4).
        mman.advise(buffer.getBytesNoCopy(), PAGE_SIZE, mman.MADV_PAGEOUT)
        taken = pages(size) - buffer.getPageCounts()[0]
        lost = buffer.setPurgeable(NON_VOLATILE) == EMPTY
        found: dict[str, int | bool] = {"size": len(content), "lazily_freed": lazily_freed, "resident": resident}
        return found | {"intact": intact, "taken": taken, "lost": lost, "zero": _holds(buffer, bytes(len(content)))}


def truthful(found: dict[str, int | bool]) -> bool:
    """Say whether it went as promised."""
    told = found["lost"] and found["zero"] if found["taken"] else not found["lost"]
    return bool(found["intact"] and told)


def show(found: dict[str, int | bool]) -> None:
    """Print it for people."""
    resident = f"{format_size(found['resident'] * PAGE_SIZE)} still count as resident"
    after = "it is Empty, and every byte reads zero" if found["lost"] and found["zero"] else "NOT TOLD"
    print(
        f"\nPurgeable memory, {format_size(found['size'])}:\n"
        f"  volatile:              {format_size(found['lazily_freed'])} lazily freed; {resident}\n"
        f"  non-volatile again:    {'every byte is intact' if found['intact'] else 'NOT INTACT'}\n"
        f"  volatile once more:    the kernel takes {found['taken']} of {pages(found['size']):,} pages\n"
        f"  non-volatile again:    {after if found['taken'] else 'nothing was taken'}"
    )


def _holds(buffer: IOBufferMemoryDescriptor, content: bytes) -> bool:
    with memoryview(buffer) as view:
        return view == content
