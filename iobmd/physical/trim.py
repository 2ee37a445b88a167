"""Freeing the unused end of a huge page."""

import contextlib
from typing import TYPE_CHECKING

from iobmd._native import mman
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, round_down

if TYPE_CHECKING:
    from iobmd._native.mapping import Mapping


def trim(mapping: "Mapping", size: int) -> None:
    """Shorten a mapping of new zeroed huge pages to `size` bytes (whole pages), and free the rest of the last one.

    Unmapping a part of a huge page frees nothing while another part is in use. Advice on a part makes the kernel
    split the page first (MADV_COLD, Linux 5.4), and replace base pages that contain only zeros by the zero page
    (6.12). The pages to keep are therefore temporarily filled with other data.
    """
    last = round_down(size, HUGE_PAGE_SIZE)
    if size == mapping.size:
        return
    marks = range(last, size, PAGE_SIZE)
    for offset in marks:
        mapping.write(offset, b"\1")
    with contextlib.suppress(OSError):
        mman.advise(mapping.address + size, mapping.size - size, mman.MADV_COLD)
    for offset in marks:
        mapping.write(offset, b"\0")
    mapping.keep(0, size)
