"""Backings of descriptors. Each kind of memory is one module; this is their common interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping
    from iobmd._native.pagemap import RunTable
    from iobmd.constants import IOMapOptions
    from iobmd.memory.mlock import Wiring
    from iobmd.memory.shmem import FileExtent, SharedObject
    from iobmd.purgeable import Purgeable
    from iobmd.task.task import Task


class Contents(Protocol):
    """Initial contents of new memory."""

    size: int
    """In bytes."""

    def fill(self, destination: int, *, huge: int = 0, sparse: bool = False, fresh: bool = True) -> bool:
        """Copy the contents to new memory of this process; return whether some of that memory was not touched.

        Parameters
        ----------
        destination : int
            Address in this process.
        huge : int
            Size of the huge pages that the memory may have, 0 for none.
        sparse : bool
            Whether only ranges that are copied completely may have huge pages.
        fresh : bool
            Whether the memory is zero. Otherwise bytes that are not copied are cleared, or freed if it is sparse.
        """

    def resident(self) -> int:
        """Return a lower bound of the bytes that exist in the source."""


class Backing(Protocol):
    """Memory that belongs to one `MemoryOwner`."""

    composite: bool
    """Whether it consists of parts of other memory; pins are then passed on to these."""

    has_bytes: bool
    """Whether all of it can be read; False for guard pages and addresses of another bus."""

    stopped_ns: int
    """Upper bound of the time for which a thread of `task` was stopped for the allocation."""

    @property
    def cache_mode(self) -> IOMapOptions:
        """The cache mode of its mappings."""

    @property
    def pin_refusal(self) -> str:
        """Why the kernel refused to pin it when it was allocated; empty if it did not."""

    @property
    def task(self) -> Task | None:
        """The task to whose address space `address` belongs; None if it is mapped in no task, or not as one range."""

    @property
    def mapped_read_only(self) -> bool:
        """Whether iobmd mapped it in `task` without write access (`protection`)."""

    @property
    def runs(self) -> RunTable | None:
        """Its physical runs while it is pinned, relative to `address`; None if the kernel hides them."""

    @property
    def purgeable(self) -> Purgeable | None:
        """The control of its purgeable state, if it is purgeable."""

    @property
    def shared(self) -> SharedObject | None:
        """The object to which its pages belong, if any."""

    @property
    def wiring(self) -> Wiring:
        """Whether it is pageable, resident or pinned."""

    def has_guard_pages(self, offset: int, length: int) -> bool:
        """Return whether a part of a range is guard pages, which have no page frames."""

    def here(self, *, populated: bool = False) -> AbstractContextManager[Mapping]:
        """Map its pages in this process inside a `with` block, with all of them present if `populated`.

        Raises `kIOReturnUnsupported` if they cannot be mapped, or not as one range.
        """

    def pin(self) -> None:
        """Pin every page and record its frame. Raises `kIOReturnCannotWire`."""

    def unpin(self, *, wait: bool = True) -> None:
        """Undo `pin`; without `wait`, for destructors, as soon as no other thread prevents it."""

    def read_runs(self, *, gaps: bool = False) -> RunTable | None:
        """Read its present physical runs, like `runs`; with `gaps`, absent pages are omitted, otherwise an error."""

    def lost(self) -> int | None:
        """Return the first address at which the program has unmapped or replaced it, or None."""

    def huge_bytes(self) -> int:
        """Count the bytes mapped by huge pages."""

    @property
    def address(self) -> int:
        """Address in `task`."""

    @property
    def size(self) -> int:
        """Mapped size in bytes, in whole pages."""

    def write_back(self, offset: int, length: int, *, drop: bool) -> None:
        """Write the cache lines of a range back to memory, and `drop` them from the caches if requested."""

    def page_counts(self) -> tuple[int, int]:
        """Return how many pages are resident, and how many of those are dirty."""

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes, starting at `offset`."""

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes at `offset`."""

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`."""

    def copy_to(self, offset: int, length: int, destination: int) -> int:
        """Copy bytes to zeroed memory of this process, as of one moment if they are in another task.

        Pages that do not exist are not created. Returns an upper bound of the time in nanoseconds for which another
        task was stopped. Raises as `Task.read`.
        """

    def exported(self) -> tuple[Mapping, int]:
        """Return its mapping in this process, and the offset of its first byte in the mapping.

        Raises `kIOReturnUnsupported` if it has none.
        """

    def in_page(self, offset: int) -> int:
        """Return the offset in its page of the byte at `offset`."""

    def span(self, offset: int, length: int) -> int:
        """Return the size of the pages that contain a range; a page counts for each part that it contains."""

    def file_extents(self, offset: int, length: int) -> list[FileExtent]:
        """Return the pages that contain a range, for mapping them at other addresses.

        Raises `kIOReturnUnsupported` for private pages, `kIOReturnBadArgument` for partial pages.
        """

    def tasks_to_stop(self) -> list[Task]:
        """Return the other tasks in which `seal` unmaps memory."""

    def seal(self) -> None:
        """Prevent further use, so that `close` cannot be refused; idempotent.

        Raises BufferError while it is in use. Memory in another task is unmapped there, which may fail.
        """

    def unseal(self) -> None:
        """Permit use again."""

    def drop(self) -> None:
        """Free the memory, or what this object alone uses of it, for a destructor, which must not wait.

        Raises BufferError and OSError, which the destructor ignores.
        """

    def close(self) -> None:
        """Seal it and free the memory. Raises as `seal`; idempotent."""
