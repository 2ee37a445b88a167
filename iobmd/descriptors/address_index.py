"""Which addresses show memory of iobmd: so that it is known again where a caller has no more than its address."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

from iobmd._internal.weak_registry import WeakRegistry
from iobmd.backing.joined import Owner, Part
from iobmd.descriptors import memory_map
from iobmd.errors import NotOpenError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd.descriptors.mapping_cache import Descriptor
    from iobmd.task.task import Task

    class Live(Owner, Descriptor, Protocol):
        """A descriptor with memory of its own."""


_known: WeakRegistry[Live] = WeakRegistry()


def know(descriptor: Live) -> None:
    """Take note of memory that was made."""
    _known.add(descriptor)


def find(task: Task, address: int, length: int) -> Part | None:
    """Return the part of a descriptor's memory that is at these addresses of a task; None: there is none, or less."""
    for owner in _known.all():
        with contextlib.suppress(NotOpenError):  # it was freed just now, or is not this process's after a fork
            for start, offset, size in _places(owner, task):
                place = offset + address - start
                end = min(offset + size, owner.getLength())
                if start <= address and place >= 0 and place + length <= end:
                    return Part(owner, place, length)
    return None


def _places(owner: Live, task: Task) -> Iterator[tuple[int, int, int]]:
    """Yield the addresses in a task where its memory shows, the offset of the first byte there, and how many."""
    backing = owner._memory()
    if _same(backing.task, task):
        yield backing.address, 0, backing.size
    for window in memory_map.windows(owner):
        if window.own and _same(window.task, task):  # what is behind a window may be another's
            yield window.address, window.first, window.own.size


def _same(one: Task | None, other: Task) -> bool:
    return one is other or (one is not None and one.pid == other.pid and one == other)
