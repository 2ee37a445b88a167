"""Index of the addresses at which memory of iobmd is mapped."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from iobmd._internal.weak_registry import WeakRegistry
from iobmd.descriptors import memory_map, slabs
from iobmd.descriptors.ownership import MemoryOwner, Part
from iobmd.errors import NotOpenError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd.task.task import Task

_known: WeakRegistry[MemoryOwner] = WeakRegistry()


def add(owner: MemoryOwner) -> None:
    """Register memory that was allocated."""
    _known.add(owner)


def owners() -> list[MemoryOwner]:
    """Return the memory that exists."""
    return _known.all()


def find(task: Task, address: int, length: int) -> Part | None:
    """Return the part of an owner's memory at these addresses of a task; None unless it fills them."""
    small = slabs.find(address) if task.is_current else None
    for owner in (small, *owners()) if small else owners():
        with contextlib.suppress(NotOpenError):  # just released, or of the parent process after a fork
            for start, offset, size in _places(owner, task):
                place = offset + address - start
                end = min(offset + size, owner.length)
                if start <= address and place >= 0 and place + length <= end:
                    return Part(owner, place, length)
    return None


def _places(owner: MemoryOwner, task: Task) -> Iterator[tuple[int, int, int]]:
    """Yield each address in a task at which the memory is mapped, the offset of its first byte, and its size."""
    backing = owner.require_backing()
    if _same(backing.task, task):
        yield backing.address, 0, backing.size
    for mapping in memory_map.further_mappings(owner):
        if mapping.own and _same(mapping.task, task):  # another owner's memory may now be mapped there
            yield mapping.address, mapping.first, mapping.own.size


def _same(one: Task | None, other: Task) -> bool:
    return one is other or (one is not None and one.pid == other.pid and one == other)
