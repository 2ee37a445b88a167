"""Where a descriptor's bytes live. Each kind of memory is one module; this is what they have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping
    from iobmd._native.pagemap import RunTable
    from iobmd.memory.mlock import Wiring
    from iobmd.memory.shmem import FileExtent, SharedObject
    from iobmd.purgeable import Purgeable
    from iobmd.task.task import Task


class Contents(Protocol):
    """What new memory is filled with."""

    def fill(self, destination: int, *, huge: int = 0, sparse: bool = False) -> bool:
        """Copy it to zeroed memory of this process. Returns whether some of that was left untouched.

        Parameters
        ----------
        destination : int
            Address in this process.
        huge : int
            Size of the huge pages that it may get, 0 for none.
        sparse : bool
            Let only those ranges have huge pages that are copied whole.
        """

    def resident(self) -> int:
        """Return how many bytes, at least, are not absent where they come from."""


class Backing(Protocol):
    """Memory that one `MemoryOwner` has."""

    composite: bool
    """It consists of parts of other memory, which is pinned with it, each time."""

    stopped_ns: int
    """For how long, at the most, a thread of `task` stood still as it was made."""

    @property
    def task(self) -> Task | None:
        """The task whose address space `address` belongs to; None: it is mapped in none, or not in one piece."""

    @property
    def runs(self) -> RunTable | None:
        """Where it lies while it is pinned, counted from `address`; None where the kernel hides that."""

    @property
    def purgeable(self) -> Purgeable | None:
        """What takes it and keeps it, when it was made purgeable."""

    @property
    def shared(self) -> SharedObject | None:
        """The object that its pages are of, when they are those of one."""

    @property
    def wiring(self) -> Wiring:
        """How firmly it stays where it is."""

    def here(self, *, populated: bool = False) -> AbstractContextManager[Mapping]:
        """Have its pages mapped in this process inside of a `with`, all of them in place if `populated`.

        Raises `kIOReturnUnsupported` where they are not, or not in one piece.
        """

    def pin(self) -> None:
        """Pin every page and record where it lies. Raises `kIOReturnCannotWire`."""

    def unpin(self) -> None:
        """Undo `pin`."""

    def read_runs(self, *, gaps: bool = False) -> RunTable | None:
        """Read where it lies now, as `runs`; with `gaps`, pages that are gone are in no run, else an error."""

    def lost(self) -> int | None:
        """Return the first address at which the program has unmapped it, or mapped something else; None: nowhere."""

    def huge_bytes(self) -> int:
        """Count the bytes that huge pages map."""

    @property
    def address(self) -> int:
        """Address in `task`."""

    @property
    def size(self) -> int:
        """Bytes mapped, whole pages."""

    def write_back(self, offset: int, length: int, *, drop: bool) -> None:
        """Write the cache lines of a range back to memory, and `drop` them from the caches if asked to."""

    def page_counts(self) -> tuple[int, int]:
        """Return how many pages are resident, and how many of those are dirty."""

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on."""

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` from `offset` on."""

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`."""

    def exported(self) -> tuple[Mapping, int]:
        """Return where it is mapped in this process: the mapping, and the offset in that of its first byte.

        Raises `kIOReturnUnsupported` where it is not.
        """

    def in_page(self, offset: int) -> int:
        """Return the place of the byte `offset` in its page."""

    def span(self, offset: int, length: int) -> int:
        """Return how many bytes the pages have that hold a range; a page counts for each piece that it holds."""

    def file_extents(self, offset: int, length: int) -> list[FileExtent]:
        """Return the pages that hold a range, for mapping them at further places.

        Raises `kIOReturnUnsupported` for private ones, `kIOReturnBadArgument` where pages are not filled.
        """

    def close(self) -> None:
        """Give the memory back. Raises BufferError while it is in use; idempotent."""
