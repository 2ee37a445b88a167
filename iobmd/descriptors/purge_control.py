"""What purgeable memory adds to a descriptor: `setPurgeable`, and a `with` in which the content is safe."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

from iobmd.constants import IOPurgeable, IOReturn
from iobmd.errors import IOReturnError
from iobmd.purgeable import EMPTY, KEEP_CURRENT, NON_VOLATILE, OBSOLETE, VOLATILE, parse, purger

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd._internal import process_local
    from iobmd.backing import Backing
    from iobmd.purgeable import Purgeable

_T = TypeVar("_T")

_STATES = {int(state): state for state in (
    IOPurgeable.kIOMemoryPurgeableNonVolatile,
    IOPurgeable.kIOMemoryPurgeableVolatile,
    IOPurgeable.kIOMemoryPurgeableEmpty,
)}  # fmt: skip


class Volatility:
    """The part of `IOMemoryDescriptor` that deals with purgeable memory."""

    _backing: Backing | None
    _prepared: int
    _guard: process_local.Guard
    _given: int | None = None  # the modifiers it was last made volatile with; None: it never was
    _keepers = 0  # how many are inside of `nonvolatile`
    _volatile_again: int | None = None  # with which modifiers the last of them makes it volatile; None: not
    _unfilled = False  # it was found to be taken, and nobody has filled it since
    _spoilt = False  # somebody failed to

    def _memory(self) -> Backing:
        raise NotImplementedError

    def setPurgeable(self, newState: int) -> IOPurgeable:
        """Set the purgeable state of memory that was made with `kIOMemoryPageable | kIOMemoryPurgeable`.

        Parameters
        ----------
        newState : IOPurgeable
            `kIOMemoryPurgeableKeepCurrent`: only find out the state. `kIOMemoryPurgeableNonVolatile`: keep the
            content. `kIOMemoryPurgeableVolatile`: the system may take it, all or nothing, when memory is short;
            combined with `…VolatileGroup0` to `7`, `…VolatileBehaviorFifo` or `Lifo`, or `…VolatileOrderingObsolete`,
            which drops private memory at once. `kIOMemoryPurgeableEmpty`: drop the content.

        Returns
        -------
        IOPurgeable
            The state before: NonVolatile, Volatile or Empty. Volatile, returned by a move to NonVolatile: every byte
            is as it was, and stays so. Empty: it was taken, and every byte reads zero until it is written to; the
            state stays Empty until it is set again.

        Raises
        ------
        IOReturnError
            `kIOReturnUnsupported`: not made purgeable, or the kernel cannot take it.
            `kIOReturnBusy`: Volatile or Empty asked of memory that is prepared. `kIOReturnCannotWire`: not a page may
            be locked (RLIMIT_MEMLOCK), which a move back from Volatile takes. `kIOReturnBadArgument`. The state is as
            before then.

        Notes
        -----
        Private memory is lazily freed by the kernel (madvise(2), MADV_FREE, Linux 4.5), page by page, and counts as
        resident until then: `lazily_freed`. Memory of a shared object (`kIOMemoryKernelUserShared`) has its state in
        the object, so that all processes that map it agree, and a thread of ours takes it under pressure.

        Memory may be read while it is volatile, and is zero where it was taken. `writeBytes` and `appendBytes` may
        be used; a store by a memoryview or by address makes private memory count as taken, for nothing tells it from
        a store to a page that had been taken. In a forked child private memory that was volatile counts as taken
        when the parent has made it non-volatile since. Calls of several threads come one after another.
        """
        state, modifiers = parse(newState)
        with self._guard:
            return _STATES[self._change(self._purgeable(), state, modifiers)]

    def _change(self, purgeable: Purgeable, state: int, modifiers: int) -> int:
        if state == NON_VOLATILE:
            return purgeable.keep()
        if state == KEEP_CURRENT:
            return purgeable.current()
        if self._prepared:
            message = f"{self!r} is prepared {self._prepared} times: call complete() as often first"
            raise IOReturnError(IOReturn.kIOReturnBusy, message)
        if state == EMPTY:
            return purgeable.empty()
        old = purgeable.give(modifiers)
        self._given = modifiers
        if purgeable.shared:
            purger.watch()
        return old

    def nonvolatile(self) -> NonVolatile:
        """Keep purgeable memory non-volatile inside of a `with`; it is volatile again afterwards if it was before.

        Gives True when the content is intact, False when it was taken: then fill it again inside of the `with`. If
        that fails with an exception the memory is left Empty. Threads may be inside at the same time, and the last
        to leave makes it volatile. Until one that was given False has left without an exception, all are given
        False; which of them fills it again is for a lock of their own.

        Raises
        ------
        IOReturnError
            As `setPurgeable`.
        """
        return NonVolatile(self)

    def _enter(self, inside: NonVolatile) -> None:
        with self._guard:
            purgeable = self._purgeable()
            order = purgeable.order()
            old = purgeable.keep()
            if old == VOLATILE:
                self._volatile_again = order.modifiers if order else self._given or 0
            elif old == EMPTY:
                self._unfilled = True
                if order or self._given is not None:
                    self._volatile_again = order.modifiers if order else (self._given or 0) & ~OBSOLETE
            inside._intact = not self._unfilled
            self._keepers += 1

    def _leave(self, inside: NonVolatile, *, failed: bool) -> None:
        with self._guard:
            if inside._intact is False:
                self._unfilled = failed
                self._spoilt |= failed
            inside._intact = None
            self._keepers -= 1
            if self._keepers:
                return
            modifiers, self._volatile_again = self._volatile_again, None
            spoilt, self._spoilt, self._unfilled = self._spoilt, False, False
            if self._backing is None:  # freed inside
                return
            if spoilt:
                self._change(self._purgeable(), EMPTY, 0)
            elif modifiers is not None:
                self._change(self._purgeable(), VOLATILE, modifiers)

    @property
    def lazily_freed(self) -> int:
        """Bytes of volatile private memory that the kernel may take at any moment (LazyFree in smaps).

        They still count as resident: RSS does not shrink when memory becomes volatile, but when the kernel takes it.
        """
        with self._guard:
            purgeable = self._memory().purgeable
            return purgeable.lazily_freed() if purgeable else 0

    def _purgeable(self) -> Purgeable:
        if purgeable := self._memory().purgeable:
            return purgeable
        raise IOReturnError(
            IOReturn.kIOReturnUnsupported,
            f"{self!r} was not made purgeable: use kIOMemoryPageable | kIOMemoryPurgeable, or "
            "iobmd.allocate(…, wired=False, purgeable=True)",
        )

    def _is_shared(self) -> bool:
        backing = self._backing
        return backing is not None and backing.purgeable is not None and backing.purgeable.shared

    def _candidate(self, *, wait: bool) -> purger.Candidate | None:
        def look(backing: Backing, purgeable: Purgeable) -> purger.Candidate | None:
            order = purgeable.order()
            return order and purger.Candidate(order, backing.size)

        return self._if_free(look, wait=wait)

    def _purge(self, *, wait: bool) -> int:
        return self._if_free(lambda _backing, purgeable: purgeable.purge(), wait=wait) or 0

    def _if_free(self, action: Callable[[Backing, Purgeable], _T], *, wait: bool) -> _T | None:
        """Do something with purgeable memory, unless it is being changed: by us, or by others if we do not `wait`."""
        if self._guard.mine:
            return None
        try:
            if (wait and self._guard.enter()) or self._guard.enter_if_free():
                backing = self._backing
                if backing is not None and backing.purgeable:
                    return action(backing, backing.purgeable)
            return None
        finally:
            self._guard.leave()


class NonVolatile:
    """The `with` of `IOMemoryDescriptor.nonvolatile`."""

    _intact: bool | None = None
    """What it returned; None: not entered, or not even made when a signal handler raised."""

    def __init__(self, memory: Volatility) -> None:
        self._memory = memory

    def __enter__(self) -> bool:
        self._memory._enter(self)
        assert self._intact is not None
        return self._intact

    def __exit__(self, failed: object, *_error: object) -> None:
        self._memory._leave(self, failed=failed is not None)

    def __del__(self) -> None:
        # An interrupt came between it and the `with`, at its begin or its end.
        if self._intact is not None:
            with contextlib.suppress(IOReturnError):  # its memory may be garbage of the same cycle, and freed already
                self._memory._leave(self, failed=True)
