"""Memory of a shared object: the same pages for every process that maps it, a forked child for one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from iobmd import numa
from iobmd._native import memory
from iobmd.backing.mapped import MappedBacking
from iobmd.errors import CannotWireError
from iobmd.populate import populate
from iobmd.purgeable.agreed import AgreedState
from iobmd.units import PAGE_SIZE, pages
from iobmd.wiring import make_resident

if TYPE_CHECKING:
    from iobmd._native.mapping import Mapping
    from iobmd.backing import Contents
    from iobmd.shmem import SharedObject


class SharedBacking(MappedBacking):
    """Memory of a shared object, mapped here; it owns the object.

    Parameters
    ----------
    shared : SharedObject
        The object, all of which is mapped.
    wired : bool
        Keep it resident (mlock), and pinned where the kernel lets us.
    purgeable : bool
        It may be taken while it is volatile; the object has `TRAILER` bytes behind it for that.
    contents : Contents, optional
        What to fill it with.
    """

    def __init__(
        self, shared: SharedObject, *, wired: bool, purgeable: bool = False, contents: Contents | None = None
    ) -> None:
        super().__init__(wired=wired)
        self._shared = shared
        self._immovable = wired and shared.immovable
        try:
            self.mapping = shared.map(0, shared.size)
        except BaseException:
            shared.close()
            raise
        try:
            numa.place(self.mapping.address, self.size)
            if purgeable:
                self.purgeable = AgreedState(shared)
            if contents:
                contents.fill(self.mapping.address)
            if wired:
                self._wire()
        except BaseException:
            self.close()
            raise

    def _wire(self) -> None:
        populate(self.mapping.address, self.size)
        make_resident(self.mapping.address, self.size)
        with contextlib.suppress(CannotWireError):  # resident, then, and it says so
            self.pin()
        if self._immovable:
            self.runs = self.read_runs()

    @property
    def shared(self) -> SharedObject:
        """The object."""
        return self._shared

    @property
    def size(self) -> int:
        """Bytes of it, whole pages."""
        return self._shared.size

    def view(self, offset: int, size: int, at: int, writable: bool, guard: int) -> Mapping:
        """Map whole pages of it once more in this process. Raises as `SharedObject.map`."""
        return self._shared.map(offset, size, at, writable, guard)

    def page_counts(self) -> tuple[int, int]:
        """Count the pages that are resident, mapped here or not. All are dirty: there is no file to drop them for."""
        with self.here() as mapping:
            resident = memory.incore(mapping.address, pages(self.size), PAGE_SIZE).count(1)
        return resident, resident

    def close(self) -> None:
        """Unpin, unmap, and let go of the object. As `MappedBacking.close`."""
        super().close()
        self._shared.close()
