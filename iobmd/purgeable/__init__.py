"""Purgeable memory: its states, and what each kind of memory does to change them.

A kind of memory is one module; `Purgeable` is what they have in common. The descriptor calls it under its own lock.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

from iobmd.constants import IOPurgeable
from iobmd.errors import BadArgumentError, NotReadyError

KEEP_CURRENT, NON_VOLATILE, VOLATILE, EMPTY = 1, 2, 3, 4
"""The states of `IOPurgeable` as plain numbers: an operation on its members takes longer than a system call."""

_STATE_BITS = 0xF
OBSOLETE = int(IOPurgeable.kIOMemoryPurgeableVolatileOrderingObsolete)
_LIFO = int(IOPurgeable.kIOMemoryPurgeableVolatileBehaviorLifo)
_GROUP = int(IOPurgeable.kIOMemoryPurgeableVolatileGroup7)
MODIFIERS = OBSOLETE | _LIFO | _GROUP


def parse(new_state: int) -> tuple[int, int]:
    """Return the state and the modifiers of a word as `setPurgeable` takes it. Raises `kIOReturnBadArgument`."""
    word = int(new_state)
    state, modifiers = word & _STATE_BITS, word & ~_STATE_BITS
    if not KEEP_CURRENT <= state <= EMPTY or modifiers & ~MODIFIERS:
        raise BadArgumentError(
            f"{word:#x} is not a purgeable state: kIOMemoryPurgeableKeepCurrent, …NonVolatile, …Volatile with its "
            "modifiers, or …Empty"
        )
    return state, modifiers


def now() -> int:
    """Return the time in microseconds, by a clock that all processes share (CLOCK_MONOTONIC)."""
    return time.monotonic_ns() // 1000


class Order(NamedTuple):
    """When volatile memory is taken, compared with other volatile memory."""

    modifiers: int
    """Those of the `IOPurgeable` word: obsolete or normal, group, FIFO or LIFO."""
    since: int
    """When it became volatile, by `now`."""

    @property
    def obsolete(self) -> bool:
        """Whether it is taken before everything that is not obsolete."""
        return bool(self.modifiers & OBSOLETE)

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Sort key: obsolete memory, the oldest first; then by group, FIFO oldest and then LIFO youngest first."""
        if self.obsolete:
            return 0, 0, 0, self.since
        lifo = bool(self.modifiers & _LIFO)
        return 1, self.modifiers & _GROUP, lifo, -self.since if lifo else self.since


class Purgeable(Protocol):
    """Memory that can be taken back while it is volatile.

    Each method returns the state before it, `NON_VOLATILE`, `VOLATILE` or `EMPTY`. `EMPTY` also means that whatever
    was left is dropped: every byte reads zero until it is written to. On an error the state is as it was.
    """

    shared: bool
    """Other processes may map it; then the kernel takes nothing by itself, and our purger has to."""

    def current(self) -> int:
        """Find out the state."""

    def keep(self) -> int:
        """Make it non-volatile; `VOLATILE` returned: every byte is intact, and stays so."""

    def give(self, modifiers: int) -> int:
        """Make it volatile."""

    def empty(self) -> int:
        """Drop the content."""

    def order(self) -> Order | None:
        """Return when it is to be taken, None when it is not volatile; may be late by a moment."""

    def purge(self) -> int:
        """Drop the content if it is volatile and nobody else is at it; returns the bytes of memory that came free."""

    def before_write(self, offset: int, length: int) -> None:
        """Have bytes that are about to be written to survive like the rest, though it is volatile."""

    def hold(self) -> None:
        """Refuse to be volatile until `let_go`. Raises `kIOReturnNotReady` when it is."""

    def let_go(self) -> None:
        """Undo `hold`."""

    def lazily_freed(self) -> int:
        """Return how many bytes the kernel may take at any moment, which still count as resident."""


def wanted_non_volatile() -> NotReadyError:
    """Return the error for an I/O that volatile memory was prepared for."""
    return NotReadyError(
        "the memory is volatile, and may be taken: setPurgeable(kIOMemoryPurgeableNonVolatile) before prepare()"
    )
