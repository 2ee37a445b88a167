"""Memory that consists of parts of other memory, end to end: its bytes, and its purgeable state."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from iobmd._native.pagemap import concatenated
from iobmd.backing.pageless import PagelessBacking, collected
from iobmd.constants import IOMapOptions
from iobmd.errors import BadArgumentError, IOReturnError, NotFoundError, UnsupportedError
from iobmd.memory.mlock import Wiring
from iobmd.purgeable import EMPTY, KEEP_CURRENT, NON_VOLATILE, VOLATILE
from iobmd.remote import session
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping
    from iobmd._native.pagemap import RunTable
    from iobmd.backing import Backing
    from iobmd.descriptors.ownership import MemoryOwner, Part
    from iobmd.memory.shmem import FileExtent, SharedObject
    from iobmd.purgeable import Order, Purgeable
    from iobmd.task.task import Task

_FIRMNESS = (Wiring.PAGEABLE, Wiring.RESIDENT, Wiring.PINNED, Wiring.DEVICE)


class Piece(NamedTuple):
    """The portion of a range in one part."""

    owner: MemoryOwner
    offset: int
    """Offset of its first byte in the owner's memory."""
    start: int
    """Offset of its first byte in the range."""
    length: int


class CompositeBacking:
    """Parts of other memory, end to end. It allocates no memory, and holds the owners of its parts.

    Adjacent parts of the same memory are joined. Operations apply to those owners.
    """

    composite = True
    stopped_ns = 0

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = _merged(parts)
        self.has_bytes = all(backing.has_bytes for backing in self._backings())
        self._pins = 0
        self._table: RunTable | None = None
        for part in self._parts:
            part.owner.add_dependent(self)

    @property
    def parts(self) -> tuple[Part, ...]:
        """Its parts, in order."""
        return self._parts

    def pieces(self, offset: int, length: int) -> Iterator[Piece]:
        """Yield the portions of a range in the parts, in order."""
        begin = 0
        for part in self._parts:
            low, high = max(offset, begin), min(offset + length, begin + part.length)
            if low < high:
                yield Piece(part.owner, part.offset + low - begin, low - offset, high - low)
            begin += part.length

    def has_guard_pages(self, offset: int, length: int) -> bool:
        """Return whether a part of a range is guard pages; those elsewhere in its parts' memory do not count."""
        pieces = self.pieces(offset, length)
        return any(one.owner.require_backing().has_guard_pages(one.offset, one.length) for one in pieces)

    # --- addresses and mappings

    def only_part(self) -> Part | None:
        """Return its only part, and thus its address; None if it has several."""
        parts = self._parts  # read once: another thread may release it
        return parts[0] if len(parts) == 1 else None

    def _backings(self) -> list[Backing]:
        return [part.owner.require_backing() for part in self._parts]

    @property
    def pin_refusal(self) -> str:
        """Why the kernel refused to pin one of its parts; empty if it did not."""
        return next((backing.pin_refusal for backing in self._backings() if backing.pin_refusal), "")

    @property
    def cache_mode(self) -> IOMapOptions:
        """The cache mode of its mappings; the default mode if its parts differ."""
        modes = {backing.cache_mode for backing in self._backings()}
        return modes.pop() if len(modes) == 1 else IOMapOptions.kIOMapDefaultCache

    @property
    def task(self) -> Task | None:
        """The task of its address; None: it has no address."""
        part = self.only_part()
        return part.owner.require_backing().task if part else None

    @property
    def mapped_read_only(self) -> bool:
        """Whether iobmd mapped it in `task` without write access."""
        part = self.only_part()
        return part is not None and part.owner.require_backing().mapped_read_only

    @property
    def address(self) -> int:
        """Its address in `task`; 0 if it consists of several parts."""
        part = self.only_part()
        backing = part.owner.require_backing() if part else None
        return backing.address + part.offset if part and backing and backing.task is not None else 0

    @property
    def size(self) -> int:
        """Size of its parts' memory in bytes, in whole pages."""
        return sum(backing.size for backing in self._backings())

    def in_page(self, offset: int) -> int:
        """Return the offset of a byte in its page."""
        for piece in self.pieces(offset, 1):
            return piece.owner.require_backing().in_page(piece.offset)
        return 0

    def span(self, offset: int, length: int) -> int:
        """Return the size of the pages that contain a range, counted separately for each part."""
        pieces = self.pieces(offset, length)
        return sum(piece.owner.require_backing().span(piece.offset, piece.length) for piece in pieces)

    def exported(self) -> tuple[Mapping, int]:
        """Return its mapping in this process."""
        part = self.only_part()
        if part is None:
            raise _in_parts()
        mapping, first = part.owner.require_backing().exported()
        return mapping, first + part.offset

    def here(self, *, populated: bool = False) -> NoReturn:  # noqa: ARG002 (the protocol's)
        """Raise: its parts are mapped separately."""
        raise _in_parts()

    @property
    def shared(self) -> SharedObject | None:
        """None: its pages are those of `file_extents`."""
        return None

    def file_extents(self, offset: int, length: int) -> list[FileExtent]:
        """Return the pages that contain a range. Its parts meet at page boundaries, or continue in the same page."""
        found: list[FileExtent] = []
        end = 0  # the offset in its page at which the previous part ends
        for piece in self.pieces(offset, length):
            backing = piece.owner.require_backing()
            begin, more = backing.in_page(piece.offset), backing.file_extents(piece.offset, piece.length)
            if piece.start and (begin or end):
                if begin != end or not _is_same_page(found[-1], more[0]):
                    raise _unaligned(offset + piece.start)
                more[0] = more[0]._replace(offset=more[0].offset + PAGE_SIZE, length=more[0].length - PAGE_SIZE)
            found += [extent for extent in more if extent.length]
            end = (begin + piece.length) % PAGE_SIZE
        return found

    # --- its bytes

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes, starting at `offset`."""
        return collected(self, offset, length)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes at `offset`."""
        with memoryview(buffer) as view, view.cast("B") as target:
            self.require_bytes(offset, target.nbytes)
            for owner, place, start, size in self.pieces(offset, target.nbytes):
                owner.read_into(place, target[start : start + size])

    def require_bytes(self, offset: int, length: int) -> None:
        """If a part within a range has no bytes, raise its error before any other part is accessed."""
        if self.has_bytes:
            return
        for owner, place, _start, size in self.pieces(offset, length):
            backing = owner.require_backing()
            if isinstance(backing, (CompositeBacking, PagelessBacking)):
                backing.require_bytes(place, size)

    def copy_to(self, offset: int, length: int, destination: int) -> int:
        """As `Backing.copy_to`; parts in other tasks are copied one after the other."""
        stopped = 0
        for owner, place, start, size in self.pieces(offset, length):
            stopped = max(stopped, owner.require_backing().copy_to(place, size, destination + start))
        return stopped

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`."""
        with memoryview(data) as view, view.cast("B") as source:
            self.require_bytes(offset, source.nbytes)
            for owner, place, start, size in self.pieces(offset, source.nbytes):
                owner.write(place, source[start : start + size])

    def write_back(self, offset: int, length: int, *, drop: bool) -> None:
        """Write the cache lines of a range back to memory, and `drop` them from the caches if requested."""
        for owner, place, _start, size in self.pieces(offset, length):
            owner.write_back(place, size, drop=drop)

    # --- wiring

    @property
    def wiring(self) -> Wiring:
        """The weakest wiring of its parts."""
        return min((backing.wiring for backing in self._backings()), key=_FIRMNESS.index, default=Wiring.PINNED)

    def pin(self) -> None:
        """Pin the memory of every part again; all or none."""
        pinned: list[MemoryOwner] = []
        try:
            for part in self._parts:
                with part.owner.guard:
                    part.owner.pin()
                pinned.append(part.owner)
        except BaseException:
            _unpin(pinned)
            raise
        self._pins += 1

    def unpin(self, *, wait: bool = True) -> None:
        """Undo one `pin`; without `wait`, for destructors, parts that are in use are unpinned afterwards."""
        self._pins -= 1
        self._table = None
        owners = [part.owner for part in self._parts]
        if wait:
            _unpin(owners)
            return
        for owner in reversed(owners):
            owner.unpin_when_free()

    @property
    def runs(self) -> RunTable | None:
        """Its physical runs, relative to `address`; cached while it is pinned, because they cannot change."""
        table = self._table  # read once: another thread may unpin it
        if table is None or not self._pins:
            self._table = table = self._joined_runs()
        return table

    def _joined_runs(self) -> RunTable:
        tables = []
        for part in self._parts:
            address = part.owner.require_backing().address + part.offset
            tables.append((part.owner.runs(), address, part.length))
        return concatenated(tables, self.address)

    def lost(self) -> int | None:
        """Check the memory of each part, raising `kIOReturnVMError` on a loss; return None."""
        for part in self._parts:
            part.owner.require_mapped()
        return None

    def read_runs(self, *, gaps: bool = False) -> RunTable | None:  # noqa: ARG002 (the protocol's)
        """Like `runs`, after verifying that the memory of each part is still mapped."""
        for part in self._parts:
            part.owner.verify()
        return self._joined_runs()

    def huge_bytes(self) -> int:
        """Count the bytes of its parts' memory that are mapped by huge pages."""
        return sum(backing.huge_bytes() for backing in self._backings())

    def page_counts(self) -> tuple[int, int]:
        """Count the pages of its parts' memory, as IOKit does: all of it."""
        counted = [backing.page_counts() for backing in self._backings()]
        return sum(resident for resident, _ in counted), sum(dirty for _, dirty in counted)

    @property
    def purgeable(self) -> Purgeable | None:
        """The control of the state of all its memory; None if a part is not purgeable."""
        if not self._parts or not all(backing.purgeable for backing in self._backings()):
            return None
        return CompositeState(list({id(owner): owner for owner in self.origins()}.values()))

    def origins(self) -> list[MemoryOwner]:
        """Return the owners of its parts' memory that are not composite."""
        return [origin for part in self._parts for origin in part.owner.origins()]

    def tasks_to_stop(self) -> list[Task]:
        """Return the other tasks in which `seal` unmaps memory of parts."""
        ending = [part.owner.backing for part in self._parts if part.owner.ends_with(self)]
        return [task for backing in ending if backing for task in backing.tasks_to_stop()]

    def seal(self) -> None:
        """Seal the memory of all parts that have no other user, or of none.

        Memory that was unmapped in one task cannot be restored if another task then refuses. All of them are
        therefore stopped before: a task that another tracer holds, or that is frozen, refuses now. If a task begins
        to refuse after this check, the parts in the tasks before it have already been unmapped.
        """
        if len(tasks := set(self.tasks_to_stop())) > 1:
            for task in tasks:
                with contextlib.suppress(NotFoundError):  # it has exited
                    session.stop(task)
        try:
            for part in sorted(self._parts, key=_is_elsewhere):
                part.owner.seal(self)
        except BaseException:
            self.unseal()
            raise

    def unseal(self) -> None:
        """Undo `seal`."""
        for part in self._parts:
            part.owner.unseal()

    def drop(self) -> None:
        """Do nothing: the owners of its parts are collected with it."""

    def close(self) -> None:
        """End the use of its parts' memory, which is released after its last use. Idempotent."""
        self.seal()  # first, so that the parts remain if one refuses
        with contextlib.ExitStack() as all_of_them:  # also if another one fails
            for part in reversed(self._parts):
                all_of_them.callback(part.owner.remove_dependent, self)
        # The parts remain: a concurrent access of another thread reaches the owners, which refuse released memory.


class CompositeState:
    """The purgeable state of several owners' memory: Empty if one is, otherwise Volatile if one is."""

    shared = False  # the owners have their own controls

    def __init__(self, owners: Sequence[MemoryOwner]) -> None:
        self._owners = owners

    def current(self) -> int:
        """Return the common state."""
        return _combined([owner.set_purgeable(KEEP_CURRENT) for owner in self._owners])

    def make_nonvolatile(self) -> int:
        """Make all of it non-volatile."""
        return _combined([owner.set_purgeable(NON_VOLATILE) for owner in self._owners])

    def make_volatile(self, modifiers: int) -> int:
        """Make all of it volatile, or none while one is prepared; if one refuses, the others remain non-volatile."""
        self._require_unpinned()
        before: list[tuple[MemoryOwner, int]] = []
        try:
            for owner in self._owners:
                before.append((owner, owner.set_purgeable(VOLATILE, modifiers)))
        except BaseException:
            for owner, old in before:
                if old == NON_VOLATILE:
                    with contextlib.suppress(IOReturnError):
                        owner.set_purgeable(NON_VOLATILE)
            raise
        return _combined([old for _owner, old in before])

    def empty(self) -> int:
        """Drop all of its contents, or none while one is prepared."""
        self._require_unpinned()
        return _combined([owner.set_purgeable(EMPTY) for owner in self._owners])

    def _require_unpinned(self) -> None:
        for owner in self._owners:
            owner.require_unpinned()

    def order(self) -> Order | None:
        """Return None: each owner's memory is purged separately."""
        return None

    def purge(self) -> int:
        """Do nothing, for the same reason."""
        return 0

    def before_write(self, offset: int, length: int) -> None:
        """Do nothing: the owners write."""

    def hold(self) -> None:
        """Do nothing: the owners are pinned, and refuse if they are volatile."""

    def release(self) -> None:
        """Do nothing, as `hold`."""

    def lazily_freed(self) -> int:
        """Return how many of its bytes the kernel may reclaim."""
        return sum(owner.lazily_freed() for owner in self._owners)


def _is_elsewhere(part: Part) -> bool:
    """Return whether a part may be mapped in another task; such a mapping ends last: it cannot be restored."""
    backing = part.owner.backing
    return backing is not None and (backing.task is None or not backing.task.is_current)


def _unpin(owners: Sequence[MemoryOwner]) -> None:
    with contextlib.ExitStack() as all_of_them:  # also if another one fails
        for owner in reversed(owners):
            all_of_them.callback(_unpin_one, owner)


def _unpin_one(owner: MemoryOwner) -> None:
    with owner.guard:
        owner.unpin()


def _combined(states: list[int]) -> int:
    if EMPTY in states:
        return EMPTY
    return VOLATILE if VOLATILE in states else NON_VOLATILE


def _merged(parts: Sequence[Part]) -> tuple[Part, ...]:
    found: list[Part] = []
    for part in parts:
        if found and found[-1].owner is part.owner and found[-1].offset + found[-1].length == part.offset:
            found[-1] = found[-1]._replace(length=found[-1].length + part.length)
        elif part.length:
            found.append(part)
    return tuple(found)


def _is_same_page(before: FileExtent, after: FileExtent) -> bool:
    """Return whether an extent begins with the last page of the previous one."""
    return before.fd == after.fd and before.offset + before.length == after.offset + PAGE_SIZE


def _in_parts() -> UnsupportedError:
    return UnsupportedError(
        "this memory consists of several parts and has no single address: map it with map(), if it is shared"
    )


def _unaligned(offset: int) -> BadArgumentError:
    return BadArgumentError(f"two parts meet at offset {offset}, inside a page: they cannot be mapped as one range")
