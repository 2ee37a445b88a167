"""The pages of a descriptor's memory in this process, which an IOMMU maps as one range of device addresses."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, NamedTuple

from iobmd.descriptors.composite_memory import CompositeBacking
from iobmd.errors import BadArgumentError
from iobmd.units import PAGE_SIZE, round_down, round_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd.backing import Backing
    from iobmd.descriptors.ownership import MemoryOwner


class Pages(NamedTuple):
    """Consecutive pages of this process."""

    address: int
    size: int


class _Extent(NamedTuple):
    """A range of memory that is not composite."""

    backing: Backing
    offset: int
    length: int

    @property
    def in_page(self) -> int:
        """The offset of its first byte in its page."""
        return self.backing.in_page(self.offset)

    @property
    def end_in_page(self) -> int:
        """The offset of its end in its page, 0 if it ends with the page."""
        return (self.in_page + self.length) % PAGE_SIZE


def border_inside_page(memory: MemoryOwner, length: int) -> int | None:
    """Return the first offset at which two parts meet inside a page, so that they are not in one range, or None."""
    offset = 0
    for before, after in itertools.pairwise(_extents(memory, 0, length)):
        offset += before.length
        if before.end_in_page or after.in_page:
            return offset
    return None


@contextlib.contextmanager
def of_memory(memory: MemoryOwner, length: int) -> Iterator[list[Pages]]:
    """Map the pages of memory in this process, populated, and yield those of each part, in order.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: it has no bytes, or parts that meet inside a page. As `Backing.here`, and
        `kIOReturnVMError`: guard pages.
    """
    if not length:
        raise BadArgumentError("this memory has no bytes to map for a device")
    if (offset := border_inside_page(memory, length)) is not None:
        message = (
            f"two parts meet at offset {offset}, inside a page, and an IOMMU maps whole pages: use an IODMACommand "
            "with mapper=, which copies them into one buffer"
        )
        raise BadArgumentError(message)
    with contextlib.ExitStack() as mapped:
        yield [_pages(extent, mapped) for extent in _extents(memory, 0, length)]


def _extents(memory: MemoryOwner, offset: int, length: int) -> list[_Extent]:
    """Return the memory of a range, in order, with consecutive parts of the same memory joined."""
    backing = memory.require_backing()
    if not isinstance(backing, CompositeBacking):
        return [_Extent(backing, offset, length)]
    found: list[_Extent] = []
    for owner, place, _start, size in backing.pieces(offset, length):
        for more in _extents(owner, place, size):
            last = found[-1] if found else None
            if last and last.backing is more.backing and last.offset + last.length == more.offset:
                found[-1] = last._replace(length=last.length + more.length)
            else:
                found.append(more)
    return found


def _pages(extent: _Extent, mapped: contextlib.ExitStack) -> Pages:
    """Return the pages of an extent: also of a small buffer, which is a part of one."""
    mapping = mapped.enter_context(extent.backing.here(populated=True))
    first = round_down(mapping.address, PAGE_SIZE) + extent.backing.in_page(0) + extent.offset
    start = round_down(first, PAGE_SIZE)
    return Pages(start, round_up(first + extent.length, PAGE_SIZE) - start)
