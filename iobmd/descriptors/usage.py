"""The memory of the buffers of this process: `iobmd.statistics`."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from iobmd._native.mapping import Slab, WholePages
from iobmd.descriptors import address_index, memory_map, slabs
from iobmd.errors import NotOpenError
from iobmd.memory import reuse
from iobmd.memory.mlock import Wiring


class Usage(NamedTuple):
    """A number of buffers, and their memory."""

    buffers: int = 0
    """Live buffers."""
    size: int = 0
    """Size of their memory in bytes, whether or not all of it is resident: whole pages, or parts of shared pages."""


class Statistics(NamedTuple):
    """The buffers of this process at one moment, from `iobmd.statistics`."""

    pageable: Usage
    """Memory that the kernel may page out."""
    resident: Usage
    """Memory that is locked, but may move to other frames."""
    pinned: Usage
    """Memory whose physical addresses cannot change, by its options or because it is prepared."""
    maps: int
    """Existing maps (`IOMemoryMap`) of these buffers or parts of them, in this process and others."""
    prepared: int
    """Buffers that are prepared."""
    kept: int = 0
    """Bytes of freed memory kept for reuse (`iobmd.policy`), including those that the kernel has reclaimed."""
    slabs: int = 0
    """Slabs, the pinned memory that small wired buffers share."""


def statistics() -> Statistics:
    """Count the live buffers of this process by their wiring, for monitoring and for finding leaks.

    A buffer is live until its memory is freed, even after `free` or the end of `with`, while views, arrays, parts or
    concatenations use its memory. Buffers in other tasks count in this process, which has their descriptors. In a
    forked child, wired buffers of the parent do not count. Descriptors of existing memory do not count.

    Returns
    -------
    Statistics
        Buffers and bytes for each wiring, maps, and prepared buffers.
    """
    found = {wiring: Usage() for wiring in Wiring}
    maps = prepared = 0
    buffers = set(address_index.owners())
    for owner in buffers:
        with contextlib.suppress(NotOpenError):  # just released, or of the parent process after a fork
            backing = owner.require_backing()
            usage = found[backing.wiring]
            found[backing.wiring] = Usage(usage.buffers + 1, usage.size + backing.size)
            prepared += owner.pins > 0
    small = slabs.all_slabs()
    for slab in small:
        wiring, pieces = slab.keeper.wiring, slab.used - slab.owned  # the others have been counted
        usage = found[wiring]
        found[wiring] = Usage(usage.buffers + pieces, usage.size + pieces * slab.piece_size)
    for owner, uses in memory_map.uses_by_owner():
        with contextlib.suppress(NotOpenError):
            if not buffers.isdisjoint(owner.origins()):  # also through parts and concatenations of buffers
                maps += uses
    free = [slab for slab in small if not slab.used and not _is_absent(slab)]
    kept = reuse.size() + sum(slab.count * slab.piece_size for slab in free)
    shared = sum(not isinstance(slab, WholePages) for slab in small)
    pageable, resident, pinned = (found[wiring] for wiring in (Wiring.PAGEABLE, Wiring.RESIDENT, Wiring.PINNED))
    return Statistics(pageable, resident, pinned, maps, prepared, kept, shared)


def _is_absent(slab: Slab) -> bool:
    """Return whether free pages of a slab are absent, because they are pageable."""
    return isinstance(slab, WholePages) and slab.is_pageable


def trim() -> int:
    """Return memory that is kept for reuse to the system: that of freed buffers, and slabs that no buffer uses.

    Returns
    -------
    int
        Bytes.
    """
    return reuse.trim() + slabs.trim()
