"""Memory of other descriptors, end to end: one part of one, or several of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol, TypeVar

from iobmd._native.runs import concatenated
from iobmd.constants import IOReturn, kIOMemoryIncoherentIOFlush, kIOMemoryIncoherentIOStore
from iobmd.errors import IOReturnError, NotOpenError
from iobmd.memory.mlock import Wiring
from iobmd.purgeable.composite import CompositeState
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Buffer

    from iobmd._internal.weak_registry import WeakRegistry
    from iobmd._native.mapping import Mapping
    from iobmd._native.runs import RunTable
    from iobmd.backing import Backing
    from iobmd.memory.shmem import SharedObject, Stretch
    from iobmd.purgeable import Purgeable
    from iobmd.task.task import Task

    _T = TypeVar("_T")

_FIRMNESS = (Wiring.PAGEABLE, Wiring.RESIDENT, Wiring.PINNED)


class Owner(Protocol):
    """What a part needs of the descriptor whose memory it is."""

    _prepared: int

    @property
    def _children(self) -> WeakRegistry[JoinedBacking]:
        """What is made of its memory."""

    @property
    def wiring(self) -> Wiring:
        """How firmly the memory stays where it is."""

    def _memory(self) -> Backing: ...

    def _runs(self, backing: Backing) -> RunTable: ...

    def readBytesInto(self, offset: int, buffer: Buffer) -> int:
        """Fill a buffer."""

    def writeBytes(self, offset: int, data: Buffer) -> int:
        """Copy bytes there."""

    def performOperation(self, options: int, offset: int, length: int) -> None:
        """Write cache lines back, or drop them."""

    def prepare(self, forDirection: int = 0) -> None:
        """Pin it, counted."""

    def complete(self, forDirection: int = 0) -> None:
        """Undo one `prepare`."""

    def setPurgeable(self, newState: int) -> int:
        """Set the purgeable state; returns the one before."""

    @property
    def lazily_freed(self) -> int:
        """Bytes that the kernel may take at any moment."""

    def verify(self) -> None:
        """Look whether it is where it was when it was pinned."""

    def _require_mapped(self) -> None:
        """Look whether the program has unmapped it."""

    def _orphaned(self) -> None:
        """Give the memory back if it was freed and only what was made of it has kept it."""


class Part(NamedTuple):
    """Bytes of a descriptor's memory."""

    owner: Owner
    offset: int
    length: int


class _Piece(NamedTuple):
    """What of a range lies in one part."""

    part: int
    """Its number."""
    offset: int
    """Of its first byte in the owner's memory."""
    start: int
    """Of its first byte in the range."""
    length: int


class JoinedBacking:
    """Parts behind each other. It has no memory of its own, and keeps the descriptors of its parts.

    Parts that follow each other in the same descriptor become one.
    """

    stopped_ns = 0

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = _merged(parts)
        self._pins = 0
        self._table: RunTable | None = None
        for part in self.parts:
            part.owner._children.add(self)

    def _pieces(self, offset: int, length: int) -> Iterator[_Piece]:
        begin = 0
        for index, part in enumerate(self.parts):
            low, high = max(offset, begin), min(offset + length, begin + part.length)
            if low < high:
                yield _Piece(index, part.offset + low - begin, low - offset, high - low)
            begin += part.length

    def _with(self, index: int, action: Callable[[Owner], _T]) -> _T:
        """Do something with the descriptor of a part, which may just be handing its memory to another."""
        while True:
            owner = self._part(index).owner
            try:
                return action(owner)
            except NotOpenError:
                if self._part(index).owner is owner:
                    raise

    def _part(self, index: int) -> Part:
        parts = self.parts  # once: another thread may close it
        if index >= len(parts):
            raise IOReturnError(IOReturn.kIOReturnNotOpen, "another thread has released this memory")
        return parts[index]

    def replace(self, old: Owner, new: Owner) -> None:
        """Have the memory from another descriptor."""
        self.parts = tuple(part._replace(owner=new) if part.owner is old else part for part in self.parts)
        new._children.add(self)

    # --- where it is

    def _backing(self, index: int) -> Backing:
        return self._with(index, lambda owner: owner._memory())

    def _backings(self) -> list[Backing]:
        return [self._backing(index) for index in range(len(self.parts))]

    @property
    def task(self) -> Task | None:
        """The task of its address; None where it has none."""
        return self._backing(0).task if len(self.parts) == 1 else None

    @property
    def address(self) -> int:
        """Where it is in `task`; 0 where it is in several parts."""
        if self.task is None:
            return 0
        return self._backing(0).address + self._part(0).offset

    @property
    def size(self) -> int:
        """Bytes of its descriptors' memory, whole pages."""
        return sum(backing.size for backing in self._backings())

    def in_page(self, offset: int) -> int:
        """Return the place of a byte in its page."""
        for index, place, _start, _length in self._pieces(offset, 1):
            return self._backing(index).in_page(place)
        return 0

    def span(self, offset: int, length: int) -> int:
        """Return how many bytes the pages have that hold a range, those of each part counted by themselves."""
        pieces = self._pieces(offset, length)
        return sum(self._backing(piece.part).span(piece.offset, piece.length) for piece in pieces)

    def exported(self) -> tuple[Mapping, int]:
        """Return where it is mapped here."""
        if len(self.parts) != 1:
            raise _in_parts()
        mapping, first = self._backing(0).exported()
        return mapping, first + self._part(0).offset

    def here(self, *, populated: bool = False) -> NoReturn:  # noqa: ARG002 (the protocol's)
        """Refuse: what it is made of is mapped as a whole."""
        raise _in_parts()

    @property
    def shared(self) -> SharedObject | None:
        """None: `stretches` has its pages."""
        return None

    def stretches(self, offset: int, length: int) -> list[Stretch]:
        """Return the pages that hold a range. Parts of it meet between two pages, or go on in the same one."""
        found: list[Stretch] = []
        end = 0  # the place in its page where the part before ends
        for index, place, start, size in self._pieces(offset, length):
            backing = self._backing(index)
            begin, more = backing.in_page(place), backing.stretches(place, size)
            if start and (begin or end):
                if begin != end or not _is_same_page(found[-1], more[0]):
                    raise _unaligned(offset + start)
                more[0] = more[0]._replace(offset=more[0].offset + PAGE_SIZE, length=more[0].length - PAGE_SIZE)
            found += [stretch for stretch in more if stretch.length]
            end = (begin + size) % PAGE_SIZE
        return found

    # --- its bytes

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on."""
        data = bytearray(length)
        self.read_into(offset, data)
        return bytes(data)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` from `offset` on."""
        with memoryview(buffer) as view, view.cast("B") as target:
            for index, place, start, size in self._pieces(offset, target.nbytes):
                into = target[start : start + size]
                self._with(index, lambda owner: owner.readBytesInto(place, into))  # noqa: B023

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`."""
        with memoryview(data) as view, view.cast("B") as source:
            for index, place, start, size in self._pieces(offset, source.nbytes):
                piece = source[start : start + size]
                self._with(index, lambda owner: owner.writeBytes(place, piece))  # noqa: B023

    def write_back(self, offset: int, length: int, *, drop: bool) -> None:
        """Write the cache lines of a range back to memory, and `drop` them from the caches if asked to."""
        operation = kIOMemoryIncoherentIOFlush if drop else kIOMemoryIncoherentIOStore
        for index, place, _start, size in self._pieces(offset, length):
            self._with(index, lambda owner: owner.performOperation(operation, place, size))  # noqa: B023

    # --- wiring

    @property
    def wiring(self) -> Wiring:
        """That of the part that is held least."""
        held = [self._with(index, lambda owner: owner.wiring) for index in range(len(self.parts))]
        return min(held, key=_FIRMNESS.index, default=Wiring.PINNED)

    def pin(self) -> None:
        """Prepare every descriptor it has parts of, once more; all or none."""
        done: list[int] = []
        try:
            for index in range(len(self.parts)):
                self._with(index, lambda owner: owner.prepare())
                done.append(index)
        except BaseException:
            for index in done:
                self._with(index, lambda owner: owner.complete())
            raise
        self._pins += 1

    def unpin(self) -> None:
        """Undo one `pin`."""
        self._pins -= 1
        self._table = None
        for index in range(len(self.parts)):
            self._with(index, lambda owner: owner.complete())

    @property
    def runs(self) -> RunTable | None:
        """Where its bytes lie, counted from `address`; kept while it is pinned, for then nothing changes it."""
        table = self._table  # once: another thread may unpin it
        if table is None or not self._pins:
            self._table = table = self._joined_runs()
        return table

    def _joined_runs(self) -> RunTable:
        tables = []
        for index in range(len(self.parts)):
            backing, part = self._backing(index), self._part(index)
            tables.append((part.owner._runs(backing), backing.address + part.offset, part.length))
        return concatenated(tables, self.address)

    def lost(self) -> int | None:
        """Have each descriptor look for itself, which raises `kIOReturnVMError`; None."""
        for index in range(len(self.parts)):
            self._with(index, lambda owner: owner._require_mapped())
        return None

    def read_runs(self, *, gaps: bool = False) -> RunTable | None:  # noqa: ARG002 (the protocol's)
        """As `runs`, after each descriptor has looked whether its memory is where it was."""
        for index in range(len(self.parts)):
            self._with(index, lambda owner: owner.verify())
        return self._joined_runs()

    def huge_bytes(self) -> int:
        """Count the bytes of its descriptors' memory that huge pages map."""
        return sum(backing.huge_bytes() for backing in self._backings())

    def page_counts(self) -> tuple[int, int]:
        """Count the pages of its descriptors' memory, as IOKit does: those of all of it."""
        counted = [backing.page_counts() for backing in self._backings()]
        return sum(resident for resident, _ in counted), sum(dirty for _, dirty in counted)

    @property
    def purgeable(self) -> Purgeable | None:
        """What sets the state of all of its descriptors; None where they have none."""
        if not self.parts or not all(backing.purgeable for backing in self._backings()):
            return None
        return CompositeState(list({id(owner): owner for owner in self.origins()}.values()))

    def origins(self) -> list[Owner]:
        """Return the descriptors that have memory of their own."""
        found: list[Owner] = []
        for index in range(len(self.parts)):
            backing = self._backing(index)
            found += backing.origins() if isinstance(backing, JoinedBacking) else [self._part(index).owner]
        return found

    def close(self) -> None:
        """Let go of the descriptors; those that were kept for it alone give their memory back. Idempotent."""
        parts, done = self.parts, 0
        try:
            for part in parts:
                part.owner._children.remove(self)
                part.owner._orphaned()
                done += 1
        except BaseException:
            for part in parts[done:]:
                part.owner._children.add(self)
            raise
        self.parts = ()


def _merged(parts: Sequence[Part]) -> tuple[Part, ...]:
    found: list[Part] = []
    for part in parts:
        if found and found[-1].owner is part.owner and found[-1].offset + found[-1].length == part.offset:
            found[-1] = found[-1]._replace(length=found[-1].length + part.length)
        elif part.length:
            found.append(part)
    return tuple(found)


def _is_same_page(before: Stretch, after: Stretch) -> bool:
    """Say whether a stretch begins with the page that the one before it ends with."""
    return before.fd == after.fd and before.offset + before.length == after.offset + PAGE_SIZE


def _in_parts() -> NoReturn:
    message = "this memory is in several parts, and at no one address: map() gives it one, where it is shared"
    raise IOReturnError(IOReturn.kIOReturnUnsupported, message)


def _unaligned(offset: int) -> IOReturnError:
    return IOReturnError(
        IOReturn.kIOReturnBadArgument,
        f"two parts meet at offset {offset}, in the middle of a page: they cannot be mapped behind each other",
    )
