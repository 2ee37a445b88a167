"""Freed private memory of this process that is kept for later allocations of the same kind.

It is not wired, lazily freed (MADV_FREE, Linux 4.5) and not inherited by forked children (MADV_DONTFORK): the kernel
reclaims its pages before it swaps memory out or kills a process, and MemAvailable includes them. The remaining pages
save a later allocation page faults, and for contiguous or masked memory the search. The memory contains the bytes of
its former owner, and is cleared or overwritten before it has another.

The list is changed by single calls of C functions, between two bytecodes, and needs no lock: threads, signal handlers
and forks find each piece in it once or not at all.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, NamedTuple

from iobmd._native import mman
from iobmd.host import headroom

if TYPE_CHECKING:
    from collections.abc import Hashable

    from iobmd._native.mapping import Mapping

LEAST = 128 << 10
"""Bytes from which memory without constraints is kept: the smaller the memory, the less there is to save."""

_MOST = 256
"""The maximum number of pieces: each is a separate area (vm.max_map_count)."""


class Kind(NamedTuple):
    """The memory that an allocation can use. Kept memory serves allocations of exactly its kind."""

    size: int
    """In bytes, in whole pages."""
    alignment: int
    """Alignment of its address in bytes."""
    node: int | None
    """The requested NUMA node."""
    constraints: Hashable = None
    """Constraints on its physical addresses, which are verified again before it is used; None: none."""


class _Piece:
    """Kept memory. Pieces are compared by identity, because `list.remove` must not call Python code."""

    __slots__ = ("kind", "mapping")

    def __init__(self, kind: Kind, mapping: Mapping) -> None:
        self.kind = kind
        self.mapping = mapping


_kept: list[_Piece] = []
"""In the order in which they were freed."""


def offer(mapping: Mapping, kind: Kind, limit: int) -> bool:
    """Keep memory that its owner frees, and close `mapping`; return False if it is not kept.

    The caller has unpinned the memory, and verified that the whole mapping is still its own.

    Parameters
    ----------
    mapping : Mapping
        The memory: sealed, so that no view of it exists.
    kind : Kind
        The allocations that may use it.
    limit : int
        How many bytes may be kept. Older memory is freed to stay within this limit, memory without constraints first.
    """
    if kind.size > limit or mapping.denied or not _make_room(kind, limit):
        return False
    address, size = mapping.address, mapping.size
    try:
        mman.unlock(address, size)
        mman.advise(address, size, mman.MADV_DONTFORK)
        mman.advise(address, size, mman.MADV_FREE)
    except OSError:  # such as too many areas; the caller unmaps it
        return False
    kept = mapping.renew()
    kept.withhold(True)
    _kept.append(_Piece(kind, kept))
    return True


def acquire(kind: Kind) -> Mapping | None:
    """Return memory of a kind, or None if none is kept.

    Each of its pages contains old bytes, or zeros if the kernel has reclaimed it. Forked children do not inherit it:
    the caller undoes this (MADV_DOFORK, `Mapping.withhold`).
    """
    for piece in reversed(_kept):
        if piece.kind == kind and _remove(piece):
            if _is_intact(piece.mapping):
                return piece.mapping
            _unmap(piece.mapping)
    return None


def _is_intact(mapping: Mapping) -> bool:
    """Undo advice of the former owner; return False if the program has unmapped or replaced a part by mistake."""
    if mapping.lost() is not None:
        return False
    try:
        for advice in (mman.MADV_KEEPONFORK, mman.MADV_DODUMP):
            mman.advise(mapping.address, mapping.size, advice)
    except OSError:
        return False
    return True


def size() -> int:
    """Return how many bytes are kept, whether or not the kernel has reclaimed them."""
    return sum(piece.kind.size for piece in list(_kept))


def trim(target: int | None = None) -> int:
    """Unmap kept memory, at least `target` bytes of it if there is as much, by default all; return the bytes."""
    freed = 0
    for piece in _least_valuable_first():
        if target is not None and freed >= target:
            break
        if _remove(piece):
            freed += piece.kind.size
            _unmap(piece.mapping)
    return freed


def _least_valuable_first() -> list[_Piece]:
    """Return all pieces: the oldest first, but memory that was found by a search last."""
    return sorted(_kept, key=lambda piece: piece.kind.constraints is not None)


def _make_room(kind: Kind, limit: int) -> bool:
    """Free older memory until a piece of this kind fits; return False if none but more valuable memory is left."""
    kept = _least_valuable_first()
    missing, freed = size() + kind.size - limit, 0
    spare = [piece for piece in kept if kind.constraints is not None or piece.kind.constraints is None]
    if sum(piece.kind.size for piece in spare) < missing:
        return False
    for count, piece in enumerate(spare):
        if freed >= missing and len(kept) - count < _MOST:
            break
        if _remove(piece):
            freed += piece.kind.size
            _unmap(piece.mapping)
    return len(_kept) < _MOST


def _remove(piece: _Piece) -> bool:
    """Remove a piece from the list; return False if another thread was faster."""
    try:
        _kept.remove(piece)
    except ValueError:
        return False
    return True


def _unmap(mapping: Mapping) -> None:
    with contextlib.suppress(OSError):  # a part stays mapped if there are too many areas
        mapping.close()


headroom.on_shortage(trim)
os.register_at_fork(after_in_child=_kept.clear)
