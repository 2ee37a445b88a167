"""A model of related descriptors: the bytes of each, their lifetimes, and the operations that are refused.

It is independent of iobmd's implementation: memory is a bytearray, a descriptor a list of pieces of others.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from iobmd import IOReturn
from support import kernel

PAGE = kernel.PAGE
NON_VOLATILE, VOLATILE, EMPTY = 2, 3, 4


@dataclass(eq=False, repr=False)
class Memory:
    """Memory, and its expected bytes."""

    content: bytearray
    address: int
    shared: bool = False
    wired: bool = False
    purgeable: bool = False
    ours: bool = True
    """Whether it was allocated by iobmd."""
    inaccessible: bool = False
    """Whether it is guard pages, without bytes and frames."""
    device: bool = False
    """Whether it is memory of a device: `address` is its bus address, which is fixed, and nothing pins it."""
    remote: bool = False
    """Whether it is addresses of another bus, which are fixed as well: no bytes can be accessed."""
    state: int = NON_VOLATILE
    filled: bool = True
    """Whether it has been written to since it was dropped."""

    @property
    def shares_pages(self) -> bool:
        """Whether other buffers may be in its pages, which then remain mapped."""
        return self.ours and self.wired and not self.shared and len(self.content) <= 2048

    @property
    def has_fixed_address(self) -> bool:
        return self.device or self.remote

    def drop(self) -> None:
        self.filled = False
        self.content[:] = bytes(len(self.content))
        self.state = EMPTY


@dataclass
class Piece:
    """A range of memory, or of another relative."""

    of: Any
    start: int
    length: int


def joined(pieces: list[Piece]) -> list[Piece]:
    """Return the nonempty pieces, with pieces that continue in the same memory joined."""
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].of is piece.of and found[-1].start + found[-1].length == piece.start:
            found[-1] = Piece(piece.of, found[-1].start, found[-1].length + piece.length)
        elif piece.length:
            found.append(piece)
    return found


@dataclass(eq=False, repr=False)
class Relative:
    """A descriptor: `real` is that of iobmd, `parts` are pieces of others, or the whole of one memory."""

    real: Any
    parts: list[Piece]
    children: list[Relative] = field(default_factory=list)
    prepared: int = 0
    """Whether its own user has freed it."""
    maps: int = 0
    views: int = 0
    released: bool = False
    portions: int = 0
    """How many portions were added to an interleaved descriptor."""
    weight: int = 0
    """Its number of pieces of memory; a piece that occurs repeatedly counts repeatedly."""

    def __repr__(self) -> str:
        return f"{self.real!r} of {[(id(piece.of), piece.start, piece.length) for piece in self.parts]}"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(repr(self))

    def __post_init__(self) -> None:
        self.parts = joined(self.parts)
        self.weight = sum(piece.of.weight if isinstance(piece.of, Relative) else 1 for piece in self.parts)
        for parent in self.parents():
            parent.children.append(self)

    def parents(self) -> list[Relative]:
        return list({id(piece.of): piece.of for piece in self.parts if isinstance(piece.of, Relative)}.values())

    @property
    def memory(self) -> Memory | None:
        """The memory with which it was created."""
        of = self.parts[0].of if self.parts else None
        return of if isinstance(of, Memory) and of.ours else None

    @property
    def length(self) -> int:
        return sum(piece.length for piece in self.parts)

    def bytes_at(self, offset: int, length: int) -> list[Piece]:
        """The memory of a range."""
        found: list[Piece] = []
        for piece in self.parts:
            low, high = max(offset, 0), min(offset + length, piece.length)
            if low < high:
                start = piece.start + low
                more = piece.of.bytes_at(start, high - low) if isinstance(piece.of, Relative) else None
                found += [Piece(piece.of, start, high - low)] if more is None else more
            offset -= piece.length
        return joined(found)

    def memories(self) -> list[Memory]:
        """The whole memory of its parts' descriptors, which is prepared and purged as a whole."""
        found = [piece.of.memories() if isinstance(piece.of, Relative) else [piece.of] for piece in self.parts]
        return list({id(memory): memory for some in found for memory in some}.values())

    # --- operations

    def cannot_access(self, offset: int, length: int) -> set[IOReturn]:
        for piece in self.bytes_at(offset, length):
            if piece.of.inaccessible:
                return {IOReturn.kIOReturnVMError}
            if piece.of.remote:
                return {IOReturn.kIOReturnUnsupported}
        return set()

    def is_accessible(self, offset: int, length: int) -> bool:
        return not self.cannot_access(offset, length)

    def cannot_locate(self, offset: int, length: int) -> set[IOReturn]:
        """The refusals of physical addresses: nothing pins the memory, or it contains guard pages."""
        if not self.is_pinned():
            return {IOReturn.kIOReturnNotReady}
        guarded = any(piece.of.inaccessible for piece in self.bytes_at(offset, length))
        return {IOReturn.kIOReturnUnsupported} if guarded else set()

    def has_both_kinds_of_addresses(self) -> bool:
        """Whether some of its memory has fixed addresses, and some is in page frames."""
        return len({piece.of.has_fixed_address for piece in self.bytes_at(0, self.length)}) == 2

    def read(self, offset: int, length: int) -> bytes:
        pieces = self.bytes_at(offset, length)
        return b"".join(bytes(piece.of.content[piece.start : piece.start + piece.length]) for piece in pieces)

    def write(self, offset: int, data: bytes) -> None:
        """Write byte by byte, because it may contain the same memory twice."""
        at = 0
        for piece in self.bytes_at(offset, len(data)):
            piece.of.content[piece.start : piece.start + piece.length] = data[at : at + piece.length]
            piece.of.filled = True
            at += piece.length

    def is_prepared(self) -> bool:
        return self.prepared > 0 or any(child.is_prepared() for child in self.children)

    def is_kept(self) -> bool:
        """Whether it has dependents."""
        return any(not child.released or child.is_kept() for child in self.children)

    def is_pinned(self) -> bool:
        """Whether all of its memory is prepared, by any descriptor."""
        if self.memory:
            return self.memory.wired or self.is_prepared()
        others = [piece.of for piece in self.parts if isinstance(piece.of, Relative)]
        here = [piece.of for piece in self.parts if isinstance(piece.of, Memory)]
        existing = [memory for memory in here if not memory.inaccessible and not memory.has_fixed_address]
        return all(other.is_pinned() for other in others) and (not existing or self.is_prepared())

    # --- refusals

    def cannot_prepare(self) -> set[IOReturn]:
        volatile = any(memory.state == VOLATILE for memory in self.memories())
        return {IOReturn.kIOReturnNotReady} if volatile else set()

    def cannot_free(self) -> set[IOReturn]:
        return {IOReturn.kIOReturnBusy} if self.is_prepared() or self.maps or self.views else set()

    def cannot_set(self, state: int) -> set[IOReturn]:
        memories = self.memories()
        if not memories or not all(memory.purgeable for memory in memories):
            return {IOReturn.kIOReturnUnsupported}
        busy = self.is_prepared() or any(origin.is_prepared() for origin in self.origins())
        return {IOReturn.kIOReturnBusy} if state in (VOLATILE, EMPTY) and busy else set()

    def origins(self) -> list[Relative]:
        if self.memory:
            return [self]
        found = [origin for parent in self.parents() for origin in parent.origins()]
        return list({id(origin): origin for origin in found}.values())

    def is_in_one_place(self) -> bool:
        """Whether it has its own addresses."""
        if len(self.parts) != 1:
            return False
        return not isinstance(self.parts[0].of, Relative) or self.parts[0].of.is_in_one_place()

    def cannot_map(self, offset: int, length: int, *, elsewhere: bool, copied: bool = False) -> set[IOReturn]:
        if not length:
            return {IOReturn.kIOReturnBadArgument}
        if copied:
            return set() if self.is_accessible(offset, length) else {IOReturn.kIOReturnUnsupported}
        pieces = self.bytes_at(offset, length)
        if not elsewhere and self.is_in_one_place():
            return {IOReturn.kIOReturnUnsupported} if pieces[0].of.remote else set()
        found = set() if all(piece.of.shared for piece in pieces) else {IOReturn.kIOReturnUnsupported}
        for before, after in itertools.pairwise(pieces):
            if (before.start + before.length) % PAGE or after.start % PAGE:
                found.add(IOReturn.kIOReturnBadArgument)
        return found
