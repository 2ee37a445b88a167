"""Where a descriptor's bytes live. Each kind of memory is one module; this is what they have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping
    from iobmd._native.runs import RunTable
    from iobmd.purgeable import Purgeable
    from iobmd.shmem import SharedObject
    from iobmd.task import Task
    from iobmd.wiring import Wiring


class Contents(Protocol):
    """What new memory is filled with."""

    def fill(self, destination: int, *, huge: int = 0) -> None:
        """Copy it to an address of this process, where huge pages of size `huge` may come."""


class Backing(Protocol):
    """Memory that one descriptor owns."""

    task: Task | None
    """The task whose address space `address` belongs to; None: it is mapped in none."""
    runs: RunTable | None
    """Where it lies while it is pinned, counted from `address`; None where the kernel hides that."""

    stopped_ns: int
    """For how long, at the most, a thread of `task` stood still as it was made."""
    purgeable: Purgeable | None
    """What takes it and keeps it, when it was made purgeable."""

    @property
    def shared(self) -> SharedObject | None:
        """The object that its pages are of, when they can be mapped at further places."""

    @property
    def wiring(self) -> Wiring:
        """How firmly it stays where it is."""

    def here(self, *, populated: bool = False) -> AbstractContextManager[Mapping]:
        """Have it mapped in this process inside of a `with`; `populated`: with every page that it has in place."""

    def pin(self) -> None:
        """Pin every page and record where it lies. Raises `kIOReturnCannotWire`."""

    def unpin(self) -> None:
        """Undo `pin`."""

    def read_runs(self) -> RunTable | None:
        """Read where it lies now, as `runs`."""

    def huge_bytes(self) -> int:
        """Count the bytes that huge pages map."""

    @property
    def address(self) -> int:
        """Address in `task`."""

    @property
    def size(self) -> int:
        """Bytes mapped, whole pages."""

    def page_counts(self) -> tuple[int, int]:
        """Return how many pages are resident, and how many of those are dirty."""

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on."""

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` from `offset` on."""

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`."""

    def exported(self) -> Mapping:
        """Return it as it is mapped in this process. Raises `kIOReturnUnsupported` where it is not."""

    def view(self, offset: int, size: int, at: int, writable: bool, guard: int) -> Mapping:
        """Map whole pages of it once more here, as `Mapping.view`. Raises `kIOReturnUnsupported` for private ones."""

    def close(self) -> None:
        """Give the memory back. Raises BufferError while it is in use; idempotent."""
