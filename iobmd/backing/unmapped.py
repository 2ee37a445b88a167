"""Memory of a shared object that is mapped in no task."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NoReturn

from iobmd._native.mapping import FaultError
from iobmd.backing.shared import SharedBacking, not_mapped_here
from iobmd.host import headroom
from iobmd.memory import residency
from iobmd.memory.populate import populate
from iobmd.task import diagnosis
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping
    from iobmd.backing import Contents
    from iobmd.memory.shmem import SharedObject


class UnmappedBacking(SharedBacking):
    """Memory mapped in no task. It is mapped temporarily to read, write or pin it.

    Parameters as those of `SharedBacking`. Its address is 0.
    """

    def __init__(
        self, shared: SharedObject, *, wired: bool, purgeable: bool = False, contents: Contents | None = None
    ) -> None:
        super().__init__(shared, wired=wired, purgeable=purgeable, contents=contents)
        self.task = None
        self._cache = 0
        self.mapping.close()

    def treat_caches(self, how: int) -> None:
        """Set how copies treat the processor caches, as `Mapping.cache`."""
        self._cache = how

    def _wire(self) -> None:
        if self._shared.page == PAGE_SIZE:
            residency.require(self.mapping.address, self.size, swappable=False, shared=True)
        # Pinned pages remain resident without a mapping; pages that are only locked would not.
        populate(self.mapping.address, self.size)
        self.pin()

    @contextlib.contextmanager
    def here(self, *, populated: bool = False) -> Iterator[Mapping]:
        """Map it temporarily."""
        if self.mapping.address:  # during the allocation
            yield self.mapping
            return
        mapping = self._shared.map()
        mapping.cache = self._cache
        try:
            if populated:
                populate(mapping.address, self.size)
            yield mapping
        except FaultError as error:
            raise diagnosis.unreachable(error) from None
        finally:
            mapping.close()

    @property
    def address(self) -> int:
        """0, its start."""
        return 0

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes, starting at `offset`."""
        with self.here() as mapping:
            headroom.require(length, swappable=True)
            self._require_room_to_read(mapping, offset, length)
            return mapping.read(offset, length)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes at `offset`."""
        with self.here() as mapping:
            self._require_room_to_read(mapping, offset, memoryview(buffer).nbytes)
            mapping.read_into(offset, buffer)

    def write(self, offset: int, data: Buffer) -> None:
        """Copy `data` to `offset`."""
        with self.here() as mapping:
            self._require_room(mapping, offset, memoryview(data).nbytes)
            mapping.write(offset, data)

    def exported(self) -> NoReturn:
        """Raise: it is not mapped."""
        raise not_mapped_here("mapped in no task")
