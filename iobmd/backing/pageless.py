"""The common part of backings without pages of memory: nothing can be read, moved or freed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from iobmd.backing.mapped import span
from iobmd.constants import IOMapOptions
from iobmd.errors import NamedError, UnsupportedError
from iobmd.host import headroom
from iobmd.memory.mlock import Wiring
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from iobmd._native.pagemap import RunTable
    from iobmd.backing import Backing
    from iobmd.memory.shmem import FileExtent, SharedObject
    from iobmd.purgeable import Purgeable
    from iobmd.task.task import Task


class PagelessBacking:
    """`size` bytes of no memory. It counts as pinned, because it never moves, and `pin` has nothing to do."""

    error: type[NamedError] = UnsupportedError
    """The error of accesses to its bytes."""
    refusal: str
    """The message of that error."""

    cache_mode = IOMapOptions.kIOMapDefaultCache
    composite = False
    has_bytes = False
    mapped_read_only = False
    pin_refusal = ""
    purgeable: Purgeable | None = None
    shared: SharedObject | None = None
    stopped_ns = 0
    task: Task | None = None
    address = 0
    wiring = Wiring.PINNED

    def __init__(self, size: int) -> None:
        self.size = size

    def has_guard_pages(self, _offset: int, _length: int) -> bool:
        """Return False."""
        return False

    def in_page(self, offset: int) -> int:
        """Return the offset of a byte in its page."""
        return offset % PAGE_SIZE

    def span(self, offset: int, length: int) -> int:
        """Return the total size of the pages that contain a range."""
        return span(self.in_page(offset), length)

    if TYPE_CHECKING:

        @property
        def runs(self) -> RunTable:
            """Its physical runs, which never change; each subclass has them."""

    def pin(self) -> None:
        """Do nothing: there are no pages."""

    def unpin(self, *, wait: bool = True) -> None:
        """Do nothing, as `pin`."""

    def read_runs(self, *, gaps: bool = False) -> RunTable:  # noqa: ARG002 (the protocol's)
        """As `runs`."""
        return self.runs

    def lost(self) -> int | None:
        """Return None: no program can unmap it."""
        return None

    def huge_bytes(self) -> int:
        """Return 0: there are no pages."""
        return 0

    def page_counts(self) -> tuple[int, int]:
        """Return zeros: there are no pages."""
        return 0, 0

    # --- operations that require bytes

    def here(self, *, populated: bool = False) -> NoReturn:  # noqa: ARG002 (the protocol's)
        """Raise: there are no pages to map."""
        raise self.error(self.refusal)

    def exported(self) -> NoReturn:
        """Raise, as `here`."""
        raise self.error(self.refusal)

    def read(self, _offset: int, _length: int) -> bytes:
        """Raise, as `here`, unless the range is empty."""
        self.require_bytes(_offset, _length)
        return b""

    def read_into(self, _offset: int, buffer: Buffer) -> None:
        """Raise, as `here`, unless the range is empty."""
        self.require_bytes(_offset, memoryview(buffer).nbytes)

    def write(self, _offset: int, data: Buffer) -> None:
        """Raise, as `here`, unless the range is empty."""
        self.require_bytes(_offset, memoryview(data).nbytes)

    def copy_to(self, _offset: int, length: int, _destination: int) -> int:
        """Raise, as `here`, unless the range is empty."""
        self.require_bytes(_offset, length)
        return 0

    def write_back(self, _offset: int, length: int, *, drop: bool) -> None:  # noqa: ARG002 (the protocol's)
        """Raise, as `here`, unless the range is empty."""
        self.require_bytes(_offset, length)

    def require_bytes(self, _offset: int, length: int) -> None:
        """Raise, as `here`, unless the range is empty."""
        if length:
            raise self.error(self.refusal)

    def file_extents(self, _offset: int, _length: int) -> list[FileExtent]:
        """Raise, as `here`."""
        raise self.error(self.refusal)

    # --- its end

    def tasks_to_stop(self) -> list[Task]:
        """Return an empty list: it is mapped in no task."""
        return []

    def seal(self) -> None:
        """Do nothing: nothing uses it."""

    def unseal(self) -> None:
        """Do nothing, as `seal`."""

    def drop(self) -> None:
        """Do nothing, as `seal`."""

    def close(self) -> None:
        """Do nothing, as `seal`."""


def collected(backing: Backing, offset: int, length: int) -> bytes:
    """Return bytes that can only be read into a buffer. Raises `kIOReturnNoMemory` if they do not fit twice."""
    headroom.require(2 * length, swappable=True)
    data = bytearray(length)
    backing.read_into(offset, data)
    return bytes(data)
