"""Memory of a shared object: the same pages for every process that maps it, including forked children."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd._internal import log
from iobmd._native import mman
from iobmd.backing.exports import Exports
from iobmd.backing.mapped import MappedBacking, span
from iobmd.backing.placement import ANYWHERE, Placement
from iobmd.errors import CannotWireError, UnsupportedError, VMError
from iobmd.memory import numa, residency
from iobmd.memory.mlock import make_resident
from iobmd.memory.populate import populate
from iobmd.purgeable.shared import SharedState
from iobmd.units import PAGE_SIZE, format_size, pages

if TYPE_CHECKING:
    from iobmd.backing import Contents
    from iobmd.memory.shmem import FileExtent, SharedObject


class SharedBacking(MappedBacking):
    """Memory of a shared object, mapped in this process; it owns the object.

    Parameters
    ----------
    shared : SharedObject
        The object, which is mapped completely.
    wired : bool
        Whether to wire it: mlock, and pin if the kernel permits it.
    purgeable : bool
        Whether it may be purged while it is volatile; the object then has `TRAILER` bytes after it.
    contents : Contents, optional
        Initial contents.
    guard : int
        Inaccessible bytes on each side.
    placement : Placement
        The address.
    alignment : int
        Alignment of any other address.
    """

    def __init__(
        self,
        shared: SharedObject,
        *,
        wired: bool,
        purgeable: bool = False,
        contents: Contents | None = None,
        guard: int = 0,
        placement: Placement = ANYWHERE,
        alignment: int = PAGE_SIZE,
    ) -> None:
        super().__init__(wired=wired)
        self._shared = shared
        self.exports = Exports()
        self._immovable = wired and shared.immovable
        try:
            self.mapping = placement.place(shared.size, lambda: shared.map(guard, alignment))
        except BaseException:
            shared.close()
            raise
        try:
            numa.place(self.mapping.address, self.size)
            if purgeable:
                self.purgeable = SharedState(shared)
            if wired:
                self._populate()
            if contents:
                contents.fill(self.mapping.address)
            if wired:
                self._wire()
        except BaseException:
            self.close()
            raise

    def _populate(self) -> None:
        if self._shared.page == PAGE_SIZE:
            residency.require(self.mapping.address, self.size, swappable=False, shared=True)
        populate(self.mapping.address, self.size, collapse=self._shared.collapses)

    def _wire(self) -> None:
        make_resident(self.mapping.address, self.size)
        try:
            self.pin()
        except CannotWireError as error:
            self.pin_refusal = str(error)
            log.debug("%s; shared memory of %s is resident (mlock), not pinned", error, format_size(self.size))
        if self._immovable:
            self.runs = self.read_runs()

    @property
    def shared(self) -> SharedObject:
        """The object."""
        return self._shared

    @property
    def size(self) -> int:
        """Its size in bytes, in whole pages."""
        return self._shared.size

    def file_extents(self, offset: int, length: int) -> list[FileExtent]:
        """Return the pages of the object that contain a range. Raises as `SharedObject.cut`."""
        in_page = self.in_page(offset)
        return self._shared.cut(offset - in_page, span(in_page, length))

    def page_counts(self) -> tuple[int, int]:
        """Count the resident pages, mapped here or not. All are dirty, because there is no file behind them."""
        with self.here() as mapping:
            try:
                resident = mman.incore(mapping.address, pages(self.size), PAGE_SIZE).count(1)
            except OSError:
                raise VMError("a part of this memory no longer exists: the program has unmapped it") from None
        return resident, resident

    def seal(self) -> None:
        """Prevent further use; raise BufferError while it, or a dma-buf of it, is in use."""
        self.exports.require_unused()
        super().seal()

    def drop(self) -> None:
        """As `close`, for a destructor: dma-bufs keep the pages that they need."""
        self.exports = Exports()
        super().drop()

    def close(self) -> None:
        """Unpin, unmap, and release the object, like `MappedBacking.close`."""
        super().close()
        self._shared.close()


def not_mapped_here(where: str) -> UnsupportedError:
    """Return the error for a view of memory that this process does not map."""
    return UnsupportedError(f"this memory is {where}, and cannot be viewed here: use map() for a view")
