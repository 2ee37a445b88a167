"""Existing memory at ranges of a task's addresses, which may belong to iobmd, or at ranges of physical addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd._internal.arguments import integers
from iobmd.backing.device import DeviceBacking
from iobmd.backing.ranges import RangeBacking
from iobmd.descriptors import address_index
from iobmd.descriptors.composite_memory import CompositeBacking
from iobmd.descriptors.ownership import MemoryOwner, Part
from iobmd.device.physical import PhysicalRegion
from iobmd.task.task import check_range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from iobmd.backing import Backing
    from iobmd.task.task import Task


def describe(task: Task, ranges: Iterable[tuple[int, int]], kind: str, *, writable: bool) -> tuple[Backing, int]:
    """Return the concatenated memory at ranges of addresses, and its length in bytes.

    Parameters
    ----------
    task, ranges, writable
        As in `RangeBacking`; several ranges.
    kind : str
        The class of the descriptor, for messages.
    """
    found = list(_found(task, ranges, writable=writable))
    length = sum(one.length for one in found)
    if len(found) == 1 and isinstance(found[0], RangeBacking):
        return found[0], length
    parts = [one if isinstance(one, Part) else _whole(one, one.length, kind) for one in found]
    return CompositeBacking(parts), length


def describe_physical(ranges: Iterable[tuple[int, int]], kind: str) -> tuple[Backing, int]:
    """Return the concatenated memory at ranges of physical addresses, and its length in bytes.

    Parameters
    ----------
    ranges : iterable of (int, int)
        Addresses and lengths in bytes; ranges of length 0 are ignored.
    kind : str
        As `describe`.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: a range exceeds 64-bit addresses.
    """
    regions = []
    for address, length in ranges:
        address, length = integers(address=address, length=length)  # noqa: PLW2901
        if length:
            regions.append(PhysicalRegion(address, length))
    total = sum(region.size for region in regions)
    if len(regions) == 1:
        return DeviceBacking(regions[0]), total
    return CompositeBacking([_whole(DeviceBacking(region), region.size, kind) for region in regions]), total


def _whole(backing: Backing, length: int, kind: str) -> Part:
    return Part(MemoryOwner(backing, length, kind, has_handle=False), 0, length)


def _found(task: Task, ranges: Iterable[tuple[int, int]], *, writable: bool) -> Iterator[Part | RangeBacking]:
    """Yield the memory at the nonempty ranges: parts of iobmd descriptors, or ranges (adjacent ones joined)."""
    open_range = (0, 0)
    for address, length in ranges:
        address, length = check_range(address, length)  # noqa: PLW2901
        part = address_index.find(task, address, length) if length else None
        if open_range[1] and (part or (length and sum(open_range) != address)):
            yield RangeBacking(task, *open_range, writable=writable)
            open_range = (0, 0)
        if part:
            yield part
        elif length:
            open_range = (open_range[0] if open_range[1] else address), open_range[1] + length
    if open_range[1]:
        yield RangeBacking(task, *open_range, writable=writable)
