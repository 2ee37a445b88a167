"""`MemoryOwner`: memory and its users. Descriptors are handles on owners; memory is released with its last user."""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from typing import TYPE_CHECKING, NamedTuple

from iobmd._internal import process_local
from iobmd._internal.arguments import integers
from iobmd._internal.weak_registry import WeakRegistry
from iobmd._native import mapping
from iobmd.constants import (
    IOPreparationID,
    kIODirectionPrepareNoFault,
    kIODirectionPrepareNonCoherent,
    kIODirectionPrepareToPhys32,
)
from iobmd.descriptors import frame_checks
from iobmd.descriptors.composite_memory import CompositeBacking
from iobmd.descriptors.options import check_within, require_cache_instruction
from iobmd.descriptors.purge_control import PurgeControl
from iobmd.errors import BusyError, IOReturnError, NotOpenError, NotReadyError, UnsupportedError
from iobmd.memory.mlock import Wiring
from iobmd.purgeable import EMPTY, VOLATILE, purger

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from iobmd._native.pagemap import PhysicalSegment, RunTable
    from iobmd.backing import Backing
    from iobmd.descriptors.mapping_cache import CachedMapping


# As plain integers: with members of an enumeration, `&` takes 2 µs.
_NO_FAULT = int(kIODirectionPrepareNoFault)
_TO_PHYS_32 = int(kIODirectionPrepareToPhys32)
_NON_COHERENT = int(kIODirectionPrepareNonCoherent)
_preparation_ids = itertools.count(1 << 32)  # as in IOKit: distinct from the values of IOPreparationID


class Part(NamedTuple):
    """Bytes of an owner's memory."""

    owner: MemoryOwner
    offset: int
    length: int


class MemoryOwner:
    """The memory of a descriptor: its backing, its pin count, its other mappings, and its users.

    Its users are its handle, the descriptor for which it was created, until that is released, and its dependents,
    composite memory that contains parts of it. The memory is released with the last of them. Users have strong
    references to it, so that an owner whose users are garbage is collected and then releases the memory. It has weak
    references to its dependents, so that garbage does not count and no finalizer needs a lock.

    Methods may be called from any thread. Users acquire `guard` for changes of its state; that of composite memory is
    acquired before those of its parts.

    Parameters
    ----------
    backing : Backing
        The backing with the bytes.
    length : int
        The number of bytes in use.
    kind : str
        The class of its handle, for messages.
    has_handle : bool
        Whether there is a handle; False: only dependents use it.
    maker : int, optional
        The pid of the process that wired it, by default this one.
    """

    __slots__ = (
        "__weakref__", "_dependents", "_kind", "_mappings", "_pinned_for_good", "_preparation", "_sealed",
        "_viewable", "_wired_by", "backing", "guard", "has_handle", "host_only", "length", "maker", "pins",
        "purge_control",
    )  # fmt: skip

    def __init__(
        self, backing: Backing, length: int, kind: str, *, has_handle: bool = True, maker: int | None = None
    ) -> None:
        self.backing: Backing | None = backing
        self._kind = kind
        self._dependents: WeakRegistry[CompositeBacking] | None = None
        self._pinned_for_good = not backing.composite and backing.wiring.is_immovable  # by its options
        self._preparation = 0
        self._sealed = False  # its last user is about to be removed
        self.maker = self._wired_by = os.getpid() if maker is None else maker
        self.guard = process_local.Guard()
        self.has_handle = has_handle
        self.host_only = False  # set by `device_access.restrict`
        self.length = length
        self._mappings: weakref.WeakSet[CachedMapping] | None = None
        self._viewable: WeakRegistry[mapping.Mapping] | None = None
        self.pins = 0
        self.purge_control: PurgeControl | None = None
        if not backing.composite and backing.purgeable:
            self.purge_control = PurgeControl(self, backing.purgeable, backing.size)
            purger.know(self.purge_control)

    def require_backing(self) -> Backing:
        """Return the backing; raise `kIOReturnNotOpen` if it is released."""
        backing = self.backing  # read once: another thread may release it
        if backing is None:
            raise NotOpenError(f"this {self._kind} is released")
        if self._wired_by != os.getpid() and not backing.wiring.survives_fork:
            sharing = ", or pass the result of iobmd.share to iobmd.attach" if backing.shared else ""
            raise NotOpenError(
                f"this {self._kind} is wired memory of process {self._wired_by}, and fork does not pass wiring on to "
                f"process {os.getpid()}: allocate the buffer after the fork, or a pageable one (wired=False){sharing}"
            )
        return backing

    def origins(self) -> list[MemoryOwner]:
        """Return the owners of its memory that are not composite: this one, or those of its parts."""
        backing = self.require_backing()
        return backing.origins() if isinstance(backing, CompositeBacking) else [self]

    # --- its users

    def add_dependent(self, dependent: CompositeBacking) -> None:
        """Register composite memory that contains parts of this."""
        with self.guard:
            self.require_backing()
            if self._sealed:
                raise NotOpenError(f"this {self._kind} is released")
            self._dependents = self._dependents or WeakRegistry()
            self._dependents.add(dependent)

    def remove_dependent(self, dependent: CompositeBacking) -> None:
        """Remove a dependent, and release the memory if it was the last user.

        Raises as `remove_handle`, but never if `seal` has sealed it.
        """
        with self.guard:
            if self._dependents:
                self._dependents.remove(dependent)
            try:
                if not self.has_handle and not self._has_dependents():
                    self._close(in_use=False)
            except BaseException:
                if self._dependents is not None:
                    self._dependents.add(dependent)
                raise

    def ends_with(self, dependent: CompositeBacking) -> bool:
        """Return whether the memory is released when a dependent is removed: it has no other user."""
        return not self.has_handle and not self._has_dependents(apart_from=dependent)

    def seal(self, dependent: CompositeBacking) -> None:
        """Prevent further use, if a dependent that is about to be removed is the last user.

        Raises
        ------
        IOReturnError
            As `remove_handle`.
        """
        with self.guard:
            if self.backing is not None and self.ends_with(dependent):
                self._seal(self.backing)
                self._sealed = True

    def _seal(self, backing: Backing) -> None:
        try:
            self._require_unviewed()
            backing.seal()
        except BufferError as error:
            raise self._in_use(error) from None

    def require_unused(self) -> None:
        """Raise `kIOReturnBusy`, with the guard held, if a view would prevent the end of the last use.

        Memory that its end would unmap in another task is not checked: unmapping it cannot be undone.
        """
        backing = self.require_backing()
        if not (self._has_dependents() or backing.tasks_to_stop()):
            self._seal(backing)
            backing.unseal()

    def unseal(self) -> None:
        """Undo `seal`."""
        with self.guard:
            if self._sealed and self.backing:
                self.backing.unseal()
            self._sealed = False

    def remove_handle(self, *, in_use: bool = False) -> None:
        """End the handle's use, with the guard held, and release the memory if it was the last user; idempotent.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while it is pinned or, unless `in_use`, a `memoryview` of it exists or a copy is in
            progress: nothing changes.
        """
        if self.pins and self._wired_by == os.getpid():  # a forked child inherits no pins
            self.require_unpinned()
        if not self._has_dependents():
            self._close(in_use=in_use)
        self.has_handle = False

    def _has_dependents(self, *, apart_from: CompositeBacking | None = None) -> bool:
        return self._dependents is not None and any(one is not apart_from for one in self._dependents.all())

    def add_mapping(self, added: CachedMapping) -> None:
        """Register another mapping of its memory."""
        if self._mappings is None:
            self._mappings = weakref.WeakSet()
        self._mappings.add(added)
        if isinstance(added.own, mapping.Mapping):
            self._viewable = self._viewable or WeakRegistry()
            self._viewable.add(added.own)

    def remove_mapping(self, removed: CachedMapping) -> None:
        """Remove a mapping, which now maps other memory."""
        if self._mappings is not None:
            self._mappings.discard(removed)
        if self._viewable is not None and isinstance(removed.own, mapping.Mapping):
            self._viewable.remove(removed.own)

    def _require_unviewed(self) -> None:
        """Raise BufferError while a view of another mapping exists, even if its map has ended: it needs the pin."""
        if self._viewable is not None and (views := sum(one.users for one in self._viewable.all())):
            raise BufferError(f"view count {views}")

    @property
    def has_mappings(self) -> bool:
        """Whether its memory may be mapped for maps of its handle."""
        return bool(self._mappings)

    def mappings(self) -> list[CachedMapping]:
        """Return the mappings of its memory for maps of its handle."""
        return list(self._mappings) if self._mappings is not None else []

    def _close(self, *, in_use: bool) -> None:
        """Release the memory; `in_use`: views and copies that use it hold this owner, and the last releases it."""
        if self.backing is None:
            return
        try:
            if not self._sealed:
                self._require_unviewed()
            self.backing.close()
        except BufferError as error:
            if in_use and (not isinstance(error, BusyError) or error.viewed):
                return
            raise self._in_use(error) from None
        self.backing = None

    def _in_use(self, error: BufferError) -> BusyError:
        if isinstance(error, BusyError):  # of a part, or of another task
            return error
        # Raised by the caller: raised here, the variable and the traceback would form a cycle that holds this owner.
        busy = BusyError(f"{self!r} is in use ({error}): release its memoryviews and arrays first")
        busy.viewed = True
        return busy

    @property
    def released(self) -> bool:
        """Whether the memory is released."""
        return self.backing is None

    def __del__(self) -> None:
        backing = getattr(self, "backing", None)
        if backing is None:
            return
        self.backing = None  # first: another thread may just have found it by a weak reference
        # Only maps, views and arrays that are garbage of the same cycle, or end with the interpreter, can still use
        # it. They hold the mapping, which ends with the last of them.
        with contextlib.suppress(OSError, BufferError):
            backing.drop()

    # --- its bytes

    def read(self, offset: int, length: int) -> bytes:
        """As `IOMemoryDescriptor.readBytes`."""
        return self.require_range(offset, length).read(offset, length)

    def read_into(self, offset: int, buffer: Buffer) -> int:
        """As `IOMemoryDescriptor.readBytesInto`."""
        size = memoryview(buffer).nbytes
        self.require_range(offset, size).read_into(offset, buffer)
        return size

    def write(self, offset: int, data: Buffer) -> int:
        """As `IOMemoryDescriptor.writeBytes`."""
        size = memoryview(data).nbytes
        backing = self.require_range(offset, size)
        if self.purge_control:
            self.before_write(offset, size)
        backing.write(offset, data)
        return size

    def require_range(self, offset: int, length: int) -> Backing:
        """Return the backing with the bytes of a range. Raises `kIOReturnNotOpen`, `kIOReturnBadArgument`."""
        backing = self.require_backing()
        check_within(offset, length, self.length, "the descriptor")
        return backing

    def before_write(self, offset: int, length: int) -> None:
        """Ensure that volatile bytes which are about to be written are retained like the others."""
        if self.purge_control:
            with self.guard:
                self.require_backing()  # read again: another thread may have released it
                if not self.purge_control.denied:  # otherwise the write faults
                    self.purge_control.memory.before_write(offset, length)

    def write_back(self, offset: int, length: int, *, drop: bool) -> None:
        """Write the cache lines of a range back to memory, and `drop` them from the caches if requested."""
        require_cache_instruction(mapping.BEST_FLUSH)
        self.require_range(offset, length).write_back(offset, length, drop=drop)

    # --- pins; each of these with the guard held

    def pin(self, direction: int = 0) -> None:
        """Pin it again. `direction` and errors are those of `IOMemoryDescriptor.prepare`."""
        backing = self.require_backing()
        # Memory that is only resident (locked) would be locked twice, and unlocked by the first `unpin`.
        wiring = backing.wiring
        held = wiring.is_immovable or (self.pins > 0 and wiring is Wiring.RESIDENT)
        fresh = backing.composite or not held
        if fresh and self.purge_control:
            self.purge_control.memory.hold()
        undo = fresh and not backing.composite  # the parts undo a failed pin themselves
        try:
            if fresh:
                if direction & _NO_FAULT:
                    frame_checks.require_resident(backing)
                backing.pin()
                undo, self._wired_by = True, os.getpid()
            if direction & _TO_PHYS_32:
                frame_checks.require_low(self._runs(backing))
            if direction & _NON_COHERENT:
                self.write_back(0, self.length, drop=True)
        except BaseException:
            if undo:
                self._release_pin(backing)
            raise
        self.pins += 1

    def unpin(self, *, wait: bool = True) -> None:
        """Undo one `pin`; after the last one the kernel may move the memory again. Raises `kIOReturnNotReady`.

        `wait` as `Backing.unpin`.
        """
        backing = self.require_backing()
        if not self.pins:
            raise NotReadyError(f"{self!r} is not prepared: nothing to complete")
        self.pins -= 1
        if not (self.pins or self._pinned_for_good):
            self._preparation = 0
        if backing.composite or not (self.pins or self._pinned_for_good):
            self._release_pin(backing, wait=wait)

    def unpin_when_free(self) -> None:
        """Undo one `pin` for a destructor, which must not wait, as soon as no thread holds the guard."""
        self.guard.when_free(self._unpin_collected)

    def _unpin_collected(self) -> None:
        with contextlib.suppress(IOReturnError):  # it may be garbage of the same cycle, and already released
            self.unpin(wait=False)

    def preparation_id(self) -> int:
        """As `IOMemoryDescriptor.getPreparationID`, with the guard held."""
        backing = self.require_backing()
        if isinstance(backing, CompositeBacking) and (part := backing.only_part()):
            with part.owner.guard:
                return part.owner.preparation_id()
        if not (self.pins or self._pinned_for_good):
            return IOPreparationID.kIOPreparationIDUnprepared
        self._preparation = self._preparation or next(_preparation_ids)
        return self._preparation

    def _release_pin(self, backing: Backing, *, wait: bool = True) -> None:
        backing.unpin(wait=wait)
        if self.purge_control:
            self.purge_control.memory.release()

    # --- its physical addresses

    @property
    def wiring(self) -> Wiring:
        """Whether it is pageable, resident or pinned."""
        return self.require_backing().wiring

    def runs(self) -> RunTable:
        """Return its physical runs, relative to the backing's address. Raises as `IOMemoryDescriptor.segments`."""
        return self._runs(self.require_backing())

    def _runs(self, backing: Backing) -> RunTable:
        pinned = backing.wiring.is_immovable
        table = backing.runs if pinned else None  # if one of several parts is not pinned, the others may be hidden
        if not pinned or not backing.wiring.is_immovable:  # read again: another thread may have unpinned it
            refusal = backing.pin_refusal
            why = f"{refusal}; prepare() tries again" if refusal else "call prepare() first"
            raise NotReadyError(f"{self!r} is not pinned, so that its physical addresses could change: {why}")
        if table is None:
            raise frame_checks.hidden()
        return table

    def segment(self, offset: int) -> tuple[int, int]:
        """As `IOMemoryDescriptor.getPhysicalSegment`."""
        backing = self.require_backing()
        table = self._runs(backing)
        (offset,) = integers(offset=offset)
        if not 0 <= offset < self.length:
            return 0, 0
        found = table.segment(backing.address + offset, self.length - offset)
        if not found[1] and backing.has_guard_pages(offset, 1):
            raise frame_checks.no_frames()
        return found

    def segments(self, offset: int, length: int) -> list[PhysicalSegment]:
        """As `IOMemoryDescriptor.segments`."""
        backing = self.require_range(offset, length)
        found = self._runs(backing).segments(backing.address + offset, length)
        if backing.has_guard_pages(offset, length) and sum(segment.length for segment in found) < length:
            raise frame_checks.no_frames()
        return found

    def require_mapped(self) -> None:
        """Raise `kIOReturnVMError` if the program has unmapped it. `verify` checks more."""
        frame_checks.require_mapped(self.require_backing())

    def verify(self) -> None:
        """As `IOMemoryDescriptor.verify`."""
        backing = self.require_backing()
        frame_checks.require_unmoved(backing, lambda: self._runs(backing))

    # --- its purgeable state

    def require_purge_control(self) -> PurgeControl:
        """Return the control of its purgeable state, with the guard held. Raises `kIOReturnUnsupported`."""
        backing = self.require_backing()
        if self.purge_control is None:
            if (purgeable := backing.purgeable) is None:
                raise UnsupportedError(
                    f"{self!r} is not purgeable: allocate it with kIOMemoryPageable | kIOMemoryPurgeable, or "
                    "iobmd.allocate(…, wired=False, purgeable=True)"
                )
            self.purge_control = PurgeControl(self, purgeable, backing.size)
        return self.purge_control

    def set_purgeable(self, state: int, modifiers: int = 0) -> int:
        """Set the purgeable state; return the previous one. Raises as `IOMemoryDescriptor.setPurgeable`."""
        with self.guard:
            return self.change_purgeable(state, modifiers)

    def change_purgeable(self, state: int, modifiers: int) -> int:
        """As `set_purgeable`, with the guard held."""
        control = self.require_purge_control()
        if state in (VOLATILE, EMPTY):
            self.require_unpinned()
        return control.change(state, modifiers)

    def require_unpinned(self) -> None:
        """Raise `kIOReturnBusy` while it is pinned."""
        if self.pins:
            count = f"{self.pins}, with DMA commands, mappers and descriptors of parts"
            raise BusyError(f"{self!r} is still prepared (prepare count {count}): call complete() for each first")

    def lazily_freed(self) -> int:
        """Return how many bytes the kernel may reclaim at any time."""
        with self.guard:
            purgeable = self.require_backing().purgeable
            return purgeable.lazily_freed() if purgeable else 0

    def __repr__(self) -> str:
        backing = self.backing  # read once: another thread may release it
        if backing is None:
            return f"<{self._kind} released>"
        task = backing.task
        where = f"in task {task.pid} at {backing.address:#x}, " if task else ""
        return f"<{self._kind} {where}length {self.length}, {backing.wiring.value}>"
