"""`Handle`: a descriptor's use of memory, from its initialization to its release."""

from __future__ import annotations

import contextlib
import os
import warnings
from functools import partial
from typing import TYPE_CHECKING, Self, SupportsIndex

from iobmd._internal import with_block
from iobmd.descriptors import device_access, memory_map, registrations
from iobmd.descriptors.options import COPY_ON_WRITE, DIRECTION_MASK, DIRECTION_NAMES
from iobmd.descriptors.ownership import MemoryOwner
from iobmd.errors import BusyError, IOReturnError, NotOpenError

if TYPE_CHECKING:
    from iobmd.backing import Backing


class Handle:
    """The lifetime of a descriptor: its memory, its options, and how often it prepared the memory."""

    _owner: MemoryOwner | None = None
    _options = 0
    _prepared = 0  # how often by this handle; its owner counts all pins
    _state = "not initialised"

    def _hold(self, backing: Backing, options: int, length: int) -> Self:
        """Initialize as the handle of memory, after releasing the previous memory if there is any."""
        self._release(in_use=False)
        self._owner = MemoryOwner(backing, length, type(self).__name__)
        device_access.restrict(self._owner, options)
        self._options = options
        self._state = "open"
        return self

    @property
    def _copies_when_mapped(self) -> bool:
        """Whether maps show copies (`kIOMemoryMapCopyOnWrite`)."""
        return bool(self._options & COPY_ON_WRITE)

    def free(self) -> None:
        """Release the memory; the descriptor is unusable afterwards. Idempotent.

        Leaving a `with` block also releases the descriptor while views or arrays of it exist; the memory is freed
        with the last of them. It raises only if the memory is prepared, mapped or registered and the block has raised
        nothing: the exception of a block is never replaced.

        Memory with dependents (`IOSubMemoryDescriptor`, `IOMultiMemoryDescriptor`, descriptors of ranges of its
        addresses) is freed with the last of them.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while it is prepared, mapped or registered, a `memoryview` of it exists, or a copy
            is in progress: nothing is freed.
        """
        self._release(in_use=False)

    def _release(self, *, in_use: bool) -> None:
        """Release the memory as `free`; `in_use`: even while it is viewed, by views that hold the owner."""
        owner = self._owner
        if owner is None:
            return
        with owner.guard:
            if owner.has_handle:  # otherwise another thread was faster
                registrations.require_none(owner)  # a memory region has a map too
                if mapped := memory_map.uses(owner):
                    raise BusyError(f"{self!r} is still mapped (map count {mapped}): call unmap() first")
                if not in_use and (views := self._views()):
                    raise BusyError(
                        f"{self!r} is in use (view count {views}): release its memoryviews and arrays first"
                    )
                owner.remove_handle(in_use=in_use)
        self._owner, self._state = None, "released"
        if self._prepared:  # in a forked child, which inherits no pins, and may describe other memory
            self._prepared = 0

    release = free

    def _views(self) -> int:
        """Return the number of existing views of a buffer's memory."""
        return 0

    def _memory(self) -> MemoryOwner:
        """Return its memory, for the modules of this package, `dma` and `iommu`. Raises `kIOReturnNotOpen`."""
        owner = self._owner  # read once: another thread may release it
        if owner is None or not owner.has_handle:
            return self._late_memory()
        return owner

    def _late_memory(self) -> MemoryOwner:
        """Return the owner of memory that has none before its first use. Raises `kIOReturnNotOpen`."""
        raise NotOpenError(f"this {type(self).__name__} is {self._state}")

    def _usable_memory(self) -> MemoryOwner:
        """Return its memory as `_memory`, and check that this process may use it after a fork."""
        owner = self._memory()
        owner.require_backing()
        return owner

    def __repr__(self) -> str:
        name, owner = type(self).__name__, self._owner  # read once, as above
        if owner is None:
            return f"<{name} {self._state}>"
        direction = DIRECTION_NAMES[self._options & DIRECTION_MASK]
        return f"<{name}, length {owner.length}, direction {direction}, {self._state}>"

    def __reduce_ex__(self, _protocol: SupportsIndex) -> str | tuple[object, ...]:
        owner = self._owner
        if owner and owner.backing and owner.backing.shared:
            remedy = (
                "use iobmd.share to pass it to a process that calls iobmd.attach, or withCopy to copy it; "
                "multiprocessing passes it without further calls"
            )
        else:
            remedy = "use withCopy to copy it; iobmd.share passes shared memory (shared=True) to other processes"
        raise TypeError(f"{type(self).__name__} owns its memory and cannot be copied or pickled; {remedy}")

    def __enter__(self) -> Self:
        self._usable_memory()
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        try:
            with_block.leave(lambda: self._release(in_use=True), error)
        finally:
            if error is not None and self._owner:  # it could not be released, and cannot be released later
                self._abandon()

    def __del__(self) -> None:
        """Undo every `prepare` that was not completed. Memory is released with its last user, without `free`."""
        if self._owner is None:
            return
        what = repr(self) if self._prepared and self._owner.maker == os.getpid() else ""
        self._abandon()
        if what:
            warnings.warn(f"{what} was never completed", ResourceWarning, stacklevel=2, source=self)

    def _abandon(self) -> None:
        """End the use of the memory where errors cannot be raised, and undo every `prepare`."""
        owner, self._owner, self._state = self._owner, None, "released"
        if owner is None:
            return
        if self._prepared:
            owner.guard.when_free(partial(self._undo_all, owner))
        # Without the guard, which the interrupted thread may hold. The owner releases the memory when it is
        # collected: now, or with the last of its dependents and of the maps and views that are garbage of the same
        # cycle.
        owner.has_handle = False

    def _undo_all(self, owner: MemoryOwner) -> None:
        """Undo every `prepare`, for a destructor, with the guard held."""
        while self._prepared:
            if owner.maker == os.getpid():  # a forked child inherits no pins
                with contextlib.suppress(IOReturnError):  # it may be garbage of the same cycle, and already released
                    owner.unpin(wait=False)
            self._prepared -= 1
