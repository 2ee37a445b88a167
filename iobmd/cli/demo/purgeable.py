"""The part of `iobmd demo` on purgeable memory: contents that stay intact, and contents that are lost as a whole."""

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
    """Make memory volatile twice: the first time it stays intact, the second time the kernel reclaims a page.

    Returns
    -------
    dict
        `size`; the bytes `lazily_freed` and the pages `resident` while it was volatile; whether it was `intact`
        afterwards; how many pages were reclaimed (`taken`) the second time; whether that loss was reported (`lost`),
        and whether every byte then read as zero (`zero`).
    """
    content = os.urandom(PAGE_SIZE) * pages(size)
    with allocate(len(content), wired=False, purgeable=True) as buffer:
        buffer.writeBytes(0, content)
        buffer.setPurgeable(VOLATILE)
        lazily_freed, (resident, _dirty) = buffer.lazily_freed, buffer.getPageCounts()
        intact = buffer.setPurgeable(NON_VOLATILE) == VOLATILE and _holds(buffer, content)
        buffer.setPurgeable(VOLATILE)
        # Reclaims a lazily freed page, as the kernel does when memory is short (madvise(2), Linux 5.4).
        mman.advise(buffer.getBytesNoCopy(), PAGE_SIZE, mman.MADV_PAGEOUT)
        taken = pages(size) - buffer.getPageCounts()[0]
        lost = buffer.setPurgeable(NON_VOLATILE) == EMPTY
        found: dict[str, int | bool] = {"size": len(content), "lazily_freed": lazily_freed, "resident": resident}
        return found | {"intact": intact, "taken": taken, "lost": lost, "zero": _holds(buffer, bytes(len(content)))}


def is_as_documented(found: dict[str, int | bool]) -> bool:
    """Return whether the result is as documented."""
    reported = found["lost"] and found["zero"] if found["taken"] else not found["lost"]
    return bool(found["intact"] and reported)


def show(found: dict[str, int | bool]) -> None:
    """Print the result as text."""
    resident = f"{format_size(found['resident'] * PAGE_SIZE)} still counted as resident"
    after = "it is Empty, and every byte reads zero" if found["lost"] and found["zero"] else "LOSS NOT REPORTED"
    print(
        f"\nPurgeable memory, {format_size(found['size'])}:\n"
        f"  volatile:              {format_size(found['lazily_freed'])} lazily freed; {resident}\n"
        f"  non-volatile again:    {'every byte is intact' if found['intact'] else 'NOT INTACT'}\n"
        f"  volatile once more:    the kernel reclaims {found['taken']} of {pages(found['size']):,} pages\n"
        f"  non-volatile again:    {after if found['taken'] else 'nothing was reclaimed'}"
    )


def _holds(buffer: IOBufferMemoryDescriptor, content: bytes) -> bool:
    with memoryview(buffer) as view:
        return view == content
