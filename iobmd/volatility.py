"""What purgeable memory adds to a descriptor: `setPurgeable`, and a `with` in which the content is safe."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from iobmd.constants import IOPurgeable, IOReturn
from iobmd.errors import IOReturnError
from iobmd.purgeable import EMPTY, KEEP_CURRENT, NON_VOLATILE, OBSOLETE, VOLATILE, parse, purger

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator

    from iobmd.backing import Backing
    from iobmd.purgeable import Purgeable

_STATES = {int(state): state for state in (
    IOPurgeable.kIOMemoryPurgeableNonVolatile,
    IOPurgeable.kIOMemoryPurgeableVolatile,
    IOPurgeable.kIOMemoryPurgeableEmpty,
)}  # fmt: skip


class Volatility:
    """The part of `IOMemoryDescriptor` that deals with purgeable memory."""

    _backing: Backing | None
    _prepared: int
    _given = 0  # the modifiers it was last made volatile with
    _keepers = 0  # how many are inside of `nonvolatile`
    _volatile_again: int | None = None  # with which modifiers the last of them makes it volatile; None: not

    def _memory(self) -> Backing:
        raise NotImplementedError

    def _lock(self) -> threading.RLock:
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
            `kIOReturnUnsupported`: not made purgeable, or locked by others, so that the kernel cannot take it.
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
        with self._lock():
            purgeable = self._purgeable()
            if state == NON_VOLATILE:
                return _STATES[purgeable.keep()]
            if state == KEEP_CURRENT:
                old = purgeable.current()
            elif self._prepared:
                message = f"{self!r} is prepared {self._prepared} times: call complete() as often first"
                raise IOReturnError(IOReturn.kIOReturnBusy, message)
            elif state == EMPTY:
                old = purgeable.empty()
            else:
                old = purgeable.give(modifiers)
                self._given = modifiers
            if purgeable.shared and purgeable.order():
                purger.watch()
            return _STATES[old]

    @contextlib.contextmanager
    def nonvolatile(self) -> Iterator[bool]:
        """Keep purgeable memory non-volatile inside of a `with`; it is volatile again afterwards if it was before.

        Gives True when the content is intact, False when it was taken: then fill it again inside of the `with`. If
        that fails with an exception the memory is left Empty. Threads may be inside at the same time, and the last
        to leave makes it volatile; which of them fills it again is for a lock of their own.

        Raises
        ------
        IOReturnError
            As `setPurgeable`.
        """
        intact = self._enter()
        try:
            yield intact
        except BaseException:
            self._leave(spoilt=not intact)
            raise
        self._leave(spoilt=False)

    def _enter(self) -> bool:
        with self._lock():
            purgeable = self._purgeable()
            order = purgeable.order()
            old = purgeable.keep()
            if order:
                self._volatile_again = order.modifiers
            elif old == EMPTY:  # it was seen to be taken before
                self._volatile_again = self._given & ~OBSOLETE
            self._keepers += 1
            return old != EMPTY

    def _leave(self, *, spoilt: bool) -> None:
        with self._lock():
            self._keepers -= 1
            if self._keepers or self._backing is None:  # others are inside, or it was freed there
                return
            modifiers, self._volatile_again = self._volatile_again, None
            if spoilt:
                self.setPurgeable(EMPTY)
            elif modifiers is not None:
                self.setPurgeable(VOLATILE | modifiers)

    @property
    def lazily_freed(self) -> int:
        """Bytes of volatile private memory that the kernel may take at any moment (LazyFree in smaps).

        They still count as resident: RSS does not shrink when memory becomes volatile, but when the kernel takes it.
        """
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

    def _candidate(self) -> purger.Candidate | None:
        backing = self._backing
        if backing is None or backing.purgeable is None:
            return None
        order = backing.purgeable.order()
        return order and purger.Candidate(order, backing.purgeable.shared, backing.size)

    def _purge(self) -> int:
        with self._lock():
            backing = self._backing
            return backing.purgeable.purge() if backing and backing.purgeable else 0
