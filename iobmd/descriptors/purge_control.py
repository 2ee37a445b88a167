"""`PurgeControl`: the additional state of purgeable memory."""

from __future__ import annotations

import contextlib
import weakref
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from iobmd._internal import with_block
from iobmd._internal.uncopyable import Uncopyable
from iobmd._native.mapping import ClosedError
from iobmd.descriptors import mapping_cache
from iobmd.errors import BusyError, IOReturnError, NotOpenError, UnsupportedError
from iobmd.host import limits
from iobmd.purgeable import (
    EMPTY,
    FAULT_ON_ACCESS,
    KEEP_CURRENT,
    NON_VOLATILE,
    OBSOLETE,
    VOLATILE,
    Block,
    Blocks,
    LocalBlocks,
    purger,
)
from iobmd.purgeable.shared import KeptError, SharedState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iobmd._native.mapping import Mapping
    from iobmd.descriptors.ownership import MemoryOwner
    from iobmd.purgeable import Purgeable

_T = TypeVar("_T")


class PurgeControl:
    """The purgeable state of an owner's memory, and the blocks that keep it non-volatile.

    Created with purgeable memory; for composite memory when its state is first used.

    Parameters
    ----------
    owner : MemoryOwner
        The owner of the memory. `change`, `enter` and `leave` are called with its guard held.
    memory : Purgeable
        The object that has the state.
    size : int
        Size of the memory in bytes.
    """

    __slots__ = (
        "__weakref__",
        "_blocks",
        "_denied",
        "_modifiers",
        "_owner",
        "_size",
        "memory",
    )

    def __init__(self, owner: MemoryOwner, memory: Purgeable, size: int) -> None:
        self.memory = memory
        self._owner = weakref.ref(owner)  # weak, because the owner refers to this object
        self._size = size
        self._modifiers: int | None = None  # the modifiers of the last volatile state; None: it was never volatile
        self._denied: Mapping | None = None  # the mapping, while every access to it faults
        self._blocks: Blocks = memory if isinstance(memory, SharedState) else LocalBlocks(memory)

    def change(self, state: int, modifiers: int) -> int:
        """Set the state; return the previous one. Raises as `Purgeable`."""
        if state == KEEP_CURRENT:
            old = self.memory.current()
            if old == NON_VOLATILE:  # set by another process
                self._permit()
            return old
        faults = state in (VOLATILE, EMPTY) and modifiers & FAULT_ON_ACCESS
        deniable = self._deniable() if faults else None
        with self._permitted():
            old = self._set(state, modifiers)
        if deniable:
            try:
                self._deny(deniable)
            except IOReturnError:  # such as too many areas
                if old == NON_VOLATILE:
                    self.memory.make_nonvolatile()
                raise
        return old

    def _set(self, state: int, modifiers: int) -> int:
        if state == NON_VOLATILE:
            return self.memory.make_nonvolatile()
        if state == EMPTY:
            return self.memory.empty()
        old = self.memory.make_volatile(modifiers)
        self._modifiers = modifiers
        if self.memory.shared:
            purger.watch()
        return old

    # --- faults on access (kIOMemoryPurgeableFaultOnAccess)

    @property
    def denied(self) -> bool:
        """Whether every access faults."""
        return self._denied is not None

    def _deniable(self) -> Mapping | None:
        """Return the mapping to deny; None for composite memory, whose parts have separate controls.

        Raises
        ------
        IOReturnError
            `kIOReturnUnsupported`: it is mapped in another task, or in none. `kIOReturnBusy`: it is also mapped at
            other addresses, where accesses would not fault.
        """
        owner = self._owner()
        backing = owner.require_backing() if owner else None
        if owner is None or backing is None or backing.composite:
            return None
        if backing.task is None or not backing.task.is_current:
            raise UnsupportedError("kIOMemoryPurgeableFaultOnAccess requires memory that is mapped in this process")
        others = [one for one in mapping_cache.all_mappings() if one.own and not one.is_copy and one.users]
        if any(owner in one.owner.origins() for one in others):
            raise BusyError(
                f"{owner!r} is mapped at other addresses, where kIOMemoryPurgeableFaultOnAccess has no effect: call "
                "unmap() first"
            )
        return backing.exported()[0]

    def _deny(self, mapping: Mapping) -> None:
        _set_access(mapping, denied=True)
        self._denied = mapping

    def _permit(self) -> None:
        if self._denied:
            _set_access(self._denied, denied=False)
            self._denied = None

    @contextlib.contextmanager
    def _permitted(self) -> Iterator[None]:
        """Permit accesses, because a change of the state accesses the pages; after an error, they fault as before."""
        mapping = self._denied
        self._permit()
        try:
            yield
        except BaseException:
            if mapping:
                self._deny(mapping)
            raise

    def enter(self, block: Block) -> None:
        """Make it non-volatile for a `with` block, and set whether the contents are intact."""
        with self._permitted():
            self._blocks.enter(block, None if self._modifiers is None else self._modifiers & ~OBSOLETE)

    def leave(self, block: Block, *, failed: bool) -> tuple[int, int] | None:
        """End a `with` block; return the state and the modifiers to set now, None if the state is unchanged."""
        then = self._blocks.leave(block, failed=failed)
        if then is None:
            return None
        state, modifiers = then
        if not (self._modifiers or 0) & FAULT_ON_ACCESS:  # another process has set it, for its own mapping
            modifiers &= ~FAULT_ON_ACCESS
        return state, modifiers

    # --- for the purger

    def is_shared(self) -> bool:
        """Whether the memory exists, and other processes may map it."""
        owner = self._owner()
        return self.memory.shared and owner is not None and not owner.released

    def candidate(self, *, wait: bool) -> purger.Candidate | None:
        """Return it if it is volatile; None if not, or if this thread (without `wait`: any thread) is changing it."""

        def look() -> purger.Candidate | None:
            order = self.memory.order()
            return order and purger.Candidate(order, self._size)

        return self._if_free(look, wait=wait)

    def purge(self, *, wait: bool) -> int:
        """Purge it if it is still volatile; return the number of bytes released, 0 as above."""
        return self._if_free(self.memory.purge, wait=wait) or 0

    def _if_free(self, action: Callable[[], _T], *, wait: bool) -> _T | None:
        owner = self._owner()  # a strong reference keeps the memory
        if owner is None or owner.guard.mine:
            return None
        try:
            if (wait and owner.guard.enter()) or owner.guard.enter_if_free():
                return None if owner.released else action()
            return None
        finally:
            owner.guard.leave()


def _set_access(mapping: Mapping, *, denied: bool) -> None:
    try:
        mapping.deny(denied)
    except ClosedError:
        raise NotOpenError("this memory is released") from None
    except OSError as error:
        raise limits.from_oserror(error, "cannot change the access to purgeable memory", mapping.size) from None


class _Block:
    """The use of memory that is not composite by a `with` block of `NonVolatile`."""

    intact: bool | None = None
    """Whether the contents were intact; None: not entered, or interrupted by a signal handler before."""

    def __init__(self, owner: MemoryOwner) -> None:
        self._owner = owner

    def enter(self) -> bool:
        """Make the memory non-volatile; return whether the contents are intact."""
        with self._owner.guard:
            self._owner.require_purge_control().enter(self)
        assert self.intact is not None
        return self.intact

    def leave(self, *, failed: bool) -> None:
        """Make it volatile again, or Empty if it was to be filled again and this `failed`."""
        with self._owner.guard:
            if then := self._end(failed=failed):
                with contextlib.suppress(KeptError):  # the other process does the same at the end of its block
                    self._owner.change_purgeable(*then)

    def _end(self, *, failed: bool) -> tuple[int, int] | None:
        control = self._owner.purge_control
        if self.intact is None or control is None or self._owner.released:
            return None
        return control.leave(self, failed=failed)

    def __del__(self) -> None:
        # An interrupt occurred at the start or the end of the `with` block.
        if self.intact is not None:
            self._owner.guard.when_free(self._leave_collected)

    def _leave_collected(self) -> None:
        """End the block for the destructor, which must not wait, with the guard held."""
        if then := self._end(failed=True):
            _change(self._owner, then)  # its memory may be garbage of the same cycle, and already freed


class NonVolatile(Uncopyable):
    """The context manager of `IOMemoryDescriptor.nonvolatile`.

    Composite memory is kept non-volatile by the controls of the memory of its parts. Blocks of other descriptors of
    the same memory, which may overlap in time, are thus counted together, and only the last makes it volatile.
    """

    def __init__(self, owner: MemoryOwner) -> None:
        self._owner = owner
        self._entered: list[list[_Block]] = []

    def __enter__(self) -> bool:
        with self._owner.guard:
            self._owner.require_purge_control()  # before any part becomes non-volatile
        entered: list[_Block] = []
        intact = True
        try:
            for origin in dict.fromkeys(self._owner.origins()):
                entered.append(_Block(origin))
                intact &= entered[-1].enter()
        except BaseException:
            _leave(entered, failed=True)
            raise
        self._entered.append(entered)
        return intact

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        with_block.leave(partial(_leave, self._entered.pop(), failed=error is not None), error)


def _leave(blocks: list[_Block], *, failed: bool) -> None:
    # Not by an ExitStack: after an interrupt, it forms a cycle with the exception, and the destructors of the other
    # blocks would wait for the garbage collector.
    try:
        while blocks:
            blocks.pop().leave(failed=failed)
    finally:
        if blocks:  # also if another one fails
            _leave(blocks, failed=failed)


def change_when_free(owner: MemoryOwner, then: tuple[int, int]) -> None:
    """Change the state of memory that is not composite, for a destructor, which must not wait."""
    owner.guard.when_free(partial(_change, owner, then))


def _change(owner: MemoryOwner, then: tuple[int, int]) -> None:
    """Change the state of memory that is not composite, with its guard held, if that is still possible."""
    with contextlib.suppress(IOReturnError):
        owner.change_purgeable(*then)
