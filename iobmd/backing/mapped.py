"""The common part of all memory that this process maps: pins, reading and writing, release."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd import pagemap
from iobmd._native.mapping import ClosedError, FaultError
from iobmd.backing.contents import CopyOf, copied
from iobmd.backing.pinned import Pinned
from iobmd.errors import UnsupportedError
from iobmd.host import headroom
from iobmd.memory import pinning, residency
from iobmd.memory.mlock import Wiring
from iobmd.pagemap.self import resident_and_dirty
from iobmd.task import diagnosis
from iobmd.task.task import kernel_task
from iobmd.units import PAGE_SIZE, round_down, round_up

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping
    from iobmd._native.pagemap import RunTable
    from iobmd.memory.shmem import FileExtent, SharedObject
    from iobmd.purgeable import Purgeable
    from iobmd.task.task import Task


UNREACHABLE = (ClosedError, FaultError)
"""The exceptions of a mapping whose memory is released or unmapped."""


class MappedBacking(Pinned):
    """Memory that this process maps as `mapping`, which the subclass creates."""

    mapping: Mapping
    composite = False

    def __init__(self, *, wired: bool) -> None:
        self.task: Task | None = kernel_task
        self.stopped_ns = 0
        self.purgeable: Purgeable | None = None
        self._wired = wired
        self._immovable = False  # hugetlb pages, which never move, even without a pin

    def here(self, *, populated: bool = False) -> AbstractContextManager[Mapping]:  # noqa: ARG002 (a subclass's)
        """Map it in this process inside a `with` block; `populated`: with all its pages present."""
        return self.mapping

    def treat_caches(self, how: int) -> None:
        """Set how copies treat the processor caches, as `Mapping.cache`."""
        self.mapping.cache = how

    def write_back(self, offset: int, length: int, *, drop: bool) -> None:
        """Write the cache lines of a range back to memory, and `drop` them from the caches if requested."""
        with self.here() as mapping:
            try:
                mapping.write_back(offset, length, drop)
            except UNREACHABLE as error:
                raise diagnosis.unreachable(error) from None

    def pin(self) -> None:
        """Pin every page, and read its frame. Raises `kIOReturnCannotWire`, `kIOReturnNoMemory`."""
        with self.here() as mapping:
            size = self.size
            self._require_room(mapping, 0, size, swappable=False)
            pin = pinning.Pin(mapping.address, size)
        self._hold_pin(pin)

    def _require_room(self, mapping: Mapping, offset: int, length: int, *, swappable: bool = True) -> None:
        """Check that the pages of a range can be faulted in. Hugetlb pages are reserved for their mapping."""
        if self._wired or self._pin or not length:
            return
        shared = self.shared
        if shared and shared.page > PAGE_SIZE:
            return
        first, end = round_down(offset, PAGE_SIZE), round_up(offset + length, PAGE_SIZE)
        is_shared = shared is not None
        mapping.hold()
        try:
            residency.require(mapping.address + first, end - first, swappable=swappable, shared=is_shared)
        finally:
            mapping.release()

    def _require_room_to_read(self, mapping: Mapping, offset: int, length: int) -> None:
        """As `_require_room`: reading allocates untouched shared pages, but maps the zero page in private memory."""
        if self.shared is not None:
            self._require_room(mapping, offset, length)

    def read_runs(self, *, gaps: bool = False) -> RunTable | None:
        """Read its present physical runs, relative to `address`; None if the kernel hides them."""
        with self.here(populated=True) as mapping:
            table = pinning.visible_runs(mapping.address, self.size, gaps=gaps)
            if table is not None:
                table.count_from(mapping.address, self.address)
        return table

    def huge_bytes(self) -> int:
        """Count the bytes mapped by huge pages."""
        with self.here(populated=True) as mapping:
            return pagemap.huge_bytes(mapping.address, self.size)

    @property
    def shared(self) -> SharedObject | None:
        """The object to which its pages belong, if they can be mapped at other addresses."""
        return None

    @property
    def wiring(self) -> Wiring:
        """Whether it is pageable, resident or pinned."""
        if self._pin or self._immovable:
            return Wiring.PINNED
        return Wiring.RESIDENT if self._wired else Wiring.PAGEABLE

    @property
    def address(self) -> int:
        """Address in `task`."""
        return self.mapping.address

    @property
    def size(self) -> int:
        """Mapped size in bytes, in whole pages."""
        return self.mapping.size

    def page_counts(self) -> tuple[int, int]:
        """Count the pages that are resident, and those of them that were written to and not lazily freed since."""
        resident, written = resident_and_dirty(kernel_task, self.mapping.address, self.size)
        lazily_freed = self.purgeable.lazily_freed() if self.purgeable else 0
        return resident, written - lazily_freed // PAGE_SIZE

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes, starting at `offset`."""
        headroom.require(length, swappable=True)
        try:
            self._require_room_to_read(self.mapping, offset, length)
            return self.mapping.read(offset, length)
        except UNREACHABLE as error:
            raise diagnosis.unreachable(error) from None

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes at `offset`."""
        try:
            self._require_room_to_read(self.mapping, offset, memoryview(buffer).nbytes)
            self.mapping.read_into(offset, buffer)
        except UNREACHABLE as error:
            raise diagnosis.unreachable(error) from None

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`."""
        try:
            self._require_room(self.mapping, offset, memoryview(data).nbytes)
            self.mapping.write(offset, data)
        except UNREACHABLE as error:
            raise diagnosis.unreachable(error) from None

    def copy_to(self, offset: int, length: int, destination: int) -> int:
        """Copy bytes to zeroed memory of this process."""
        with self.here() as mapping:
            mapping.hold()
            try:
                return copied(CopyOf(kernel_task, mapping.address + offset, length), destination)
            finally:
                mapping.release()

    def exported(self) -> tuple[Mapping, int]:
        """Return its mapping in this process, and the position of its first byte there."""
        return self.mapping, 0

    def in_page(self, offset: int) -> int:
        """Return the offset of a byte in its page; the first byte is the first of a page."""
        return offset % PAGE_SIZE

    def span(self, offset: int, length: int) -> int:
        """Return the total size of the pages that contain a range."""
        return span(self.in_page(offset), length)

    def file_extents(self, _offset: int, _length: int) -> list[FileExtent]:
        """Raise: private pages can have only one address."""
        raise private()

    def lost(self) -> int | None:
        """Return the first address at which its pages are no longer mapped, or None."""
        lost = self.mapping.lost()
        return None if lost is None else self.address + (lost - self.mapping.address)

    def _certain(self) -> list[tuple[int, int]] | None:
        """Return the ranges of its mapping that certainly map its pages; None if unknown.

        In that case the mapping checks the kind of the memory (`Mapping.close`).
        """
        return None

    def seal(self) -> None:
        """Prevent further use; raise BufferError while it is in use."""
        self.mapping.seal()

    def unseal(self) -> None:
        """Undo `seal`."""
        self.mapping.unseal()

    def drop(self) -> None:
        """As `close`, for a destructor."""
        self.close()

    def close(self) -> None:
        """Seal, unpin and unmap, which also unlocks. Idempotent.

        Memory that the program has unmapped or replaced is not touched.
        """
        self.seal()
        certain = self._certain()  # before pages may move
        self.unpin()
        self.mapping.close(certain)


def span(in_page: int, length: int) -> int:
    """Return the size of the pages that contain a range with this offset in a page."""
    return round_up(in_page + length, PAGE_SIZE) if length else 0


def private() -> UnsupportedError:
    """Return the error for a second mapping of private memory."""
    return UnsupportedError(
        "private memory cannot be mapped a second time: allocate it with kIOMemoryKernelUserShared (shared=True)"
    )
