"""Purgeable memory: its states, and their implementation for each kind of memory.

Each kind of memory is one module; `Purgeable` is their common interface. The descriptor calls it under its lock.
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

from iobmd._internal.arguments import check_integers
from iobmd.constants import IOPurgeable
from iobmd.errors import BadArgumentError, NotReadyError

KEEP_CURRENT, NON_VOLATILE, VOLATILE, EMPTY = 1, 2, 3, 4
"""The states of `IOPurgeable` as plain integers: an operation on its members takes longer than a system call."""

_STATE_BITS = 0xF
OBSOLETE = int(IOPurgeable.kIOMemoryPurgeableVolatileOrderingObsolete)
_LIFO = int(IOPurgeable.kIOMemoryPurgeableVolatileBehaviorLifo)
_GROUP = int(IOPurgeable.kIOMemoryPurgeableVolatileGroup7)
FAULT_ON_ACCESS = int(IOPurgeable.kIOMemoryPurgeableFaultOnAccess)
MODIFIERS = OBSOLETE | _LIFO | _GROUP | FAULT_ON_ACCESS


def parse(new_state: int) -> tuple[int, int]:
    """Return the state and the modifiers of an argument of `setPurgeable`. Raises `kIOReturnBadArgument`."""
    check_integers(newState=new_state)
    word = int(new_state)
    state, modifiers = word & _STATE_BITS, word & ~_STATE_BITS
    if not KEEP_CURRENT <= state <= EMPTY or modifiers & ~MODIFIERS:
        raise BadArgumentError(
            f"{word:#x} is not a purgeable state: kIOMemoryPurgeableKeepCurrent, …NonVolatile, …Volatile with its "
            "modifiers, or …Empty"
        )
    return state, modifiers


def now() -> int:
    """Return the time in microseconds, from a clock that all processes share (CLOCK_MONOTONIC)."""
    return time.monotonic_ns() // 1000


class Order(NamedTuple):
    """The position of volatile memory in the order of purging."""

    modifiers: int
    """Those of the `IOPurgeable` word: obsolete or normal, group, FIFO or LIFO."""
    since: int
    """The time at which it became volatile, from `now`."""

    @property
    def obsolete(self) -> bool:
        """Whether it is purged before all memory that is not obsolete."""
        return bool(self.modifiers & OBSOLETE)

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Sort key: obsolete memory, oldest first; then by group: FIFO, oldest first, then LIFO, youngest first."""
        if self.obsolete:
            return 0, 0, 0, self.since
        lifo = bool(self.modifiers & _LIFO)
        return 1, self.modifiers & _GROUP, lifo, -self.since if lifo else self.since


class Purgeable(Protocol):
    """Memory that can be purged while it is volatile.

    Each method returns the previous state, `NON_VOLATILE`, `VOLATILE` or `EMPTY`. `EMPTY` also means that the rest of
    the contents was dropped: every byte reads zero until it is written to. After an error the state is unchanged.
    """

    shared: bool
    """Whether other processes may map it; the kernel then reclaims nothing, and the purger has to."""

    def current(self) -> int:
        """Determine the state."""

    def make_nonvolatile(self) -> int:
        """Make it non-volatile; if `VOLATILE` is returned, every byte is intact and remains so."""

    def make_volatile(self, modifiers: int) -> int:
        """Make it volatile."""

    def empty(self) -> int:
        """Drop the contents."""

    def order(self) -> Order | None:
        """Return its position in the order of purging, None if it is not volatile; may be slightly outdated."""

    def purge(self) -> int:
        """Drop the contents if it is volatile and not being changed; return the number of bytes freed."""

    def before_write(self, offset: int, length: int) -> None:
        """Ensure that volatile bytes which are about to be written are retained like the others."""

    def hold(self) -> None:
        """Prevent it from becoming volatile until `release`; raise `kIOReturnNotReady` if it is volatile."""

    def release(self) -> None:
        """Undo `hold`."""

    def lazily_freed(self) -> int:
        """Return how many bytes the kernel may reclaim at any time; they still count as resident."""


class Kept(NamedTuple):
    """The end of the `nonvolatile` blocks of memory: what the last of them does."""

    volatile_again: int | None = None
    """The modifiers with which it makes the memory volatile; None: it remains non-volatile."""
    unfilled: bool = False
    """Whether the memory was reclaimed, and has not been filled again."""
    spoilt: bool = False
    """Whether filling it again failed."""

    def entered(self, old: int, modifiers: int | None) -> Kept:
        """Return it after a block that found the state `old`, and the modifiers of the last volatile state."""
        if old == NON_VOLATILE:
            return self
        unfilled = old == EMPTY
        if modifiers is None:
            modifiers = self.volatile_again if unfilled else 0
        return self._replace(volatile_again=modifiers, unfilled=self.unfilled or unfilled)

    def left(self, *, intact: bool, failed: bool) -> Kept:
        """Return it after a block that received `intact`."""
        return self if intact else self._replace(unfilled=failed, spoilt=self.spoilt or failed)

    @property
    def then(self) -> tuple[int, int] | None:
        """The state and the modifiers after the last block; None: unchanged."""
        if self.spoilt or self.unfilled:  # unfilled: the process that filled it was killed
            return EMPTY, 0
        return None if self.volatile_again is None else (VOLATILE, self.volatile_again)


class Block(Protocol):
    """The use of memory by one `nonvolatile` block."""

    intact: bool | None
    """Whether the contents were intact; None: it is not inside."""


class Blocks(Protocol):
    """The `nonvolatile` blocks of memory."""

    def enter(self, block: Block, modifiers: int | None) -> None:
        """Make the memory non-volatile and set `block.intact`; `modifiers`: if not known otherwise, as in `Kept`."""

    def leave(self, block: Block, *, failed: bool) -> tuple[int, int] | None:
        """End a block; return the state and the modifiers to set now, None if the state is unchanged."""


class LocalBlocks:
    """The `nonvolatile` blocks of memory that only this process can change."""

    def __init__(self, memory: Purgeable) -> None:
        self._memory = memory
        self._entered = 0
        self._kept = Kept()

    def enter(self, block: Block, modifiers: int | None) -> None:
        """As `Blocks.enter`."""
        order = self._memory.order()
        old = self._memory.make_nonvolatile()
        self._kept = self._kept.entered(old, order.modifiers if order else modifiers)
        block.intact = not self._kept.unfilled
        self._entered += 1

    def leave(self, block: Block, *, failed: bool) -> tuple[int, int] | None:
        """As `Blocks.leave`."""
        intact, block.intact = block.intact, None
        self._entered -= 1
        self._kept = self._kept.left(intact=intact is not False, failed=failed)
        if self._entered:
            return None
        kept, self._kept = self._kept, Kept()
        return kept.then


def wanted_non_volatile() -> NotReadyError:
    """Return the error for preparing volatile memory."""
    return NotReadyError("the memory is volatile: call setPurgeable(kIOMemoryPurgeableNonVolatile) before prepare()")
