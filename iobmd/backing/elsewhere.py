"""Memory of a shared object in another task, or mapped in none."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NoReturn

from iobmd._native.mapping import FaultError
from iobmd.backing.shared import SharedBacking
from iobmd.errors import UnsupportedError
from iobmd.host import headroom
from iobmd.memory import residency
from iobmd.memory.populate import populate
from iobmd.remote.sharing import RemoteMapping, touch
from iobmd.task import diagnosis
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Buffer

    from iobmd._native.mapping import Mapping
    from iobmd.backing import Contents
    from iobmd.memory.shmem import SharedObject
    from iobmd.task.task import Task


class RemoteBacking(SharedBacking):
    """Memory in another task. This process maps it too, to access it, and to populate it before the task is stopped.

    Parameters as those of `SharedBacking`.
    """

    def __init__(
        self,
        shared: SharedObject,
        task: Task,
        *,
        wired: bool,
        purgeable: bool = False,
        contents: Contents | None = None,
        guard: int = 0,
    ) -> None:
        self._there: RemoteMapping | None = None
        super().__init__(shared, wired=wired, purgeable=purgeable, contents=contents)
        try:
            self._there = RemoteMapping(task, shared.cut(0, shared.size), guard=guard)
        except BaseException:
            self.close()
            raise
        self.task, self.stopped_ns = task, self._there.stopped_ns
        if wired:
            touch(task, self.address, self.size)
        if self.runs:
            self.runs.count_from(self.mapping.address, self.address)

    @property
    def address(self) -> int:
        """Address in `task`."""
        return self._there.address if self._there else self.mapping.address

    def lost(self) -> int | None:
        """Return the first address at which its task, or this process, has unmapped or replaced it."""
        found = [super().lost(), self._there.lost() if self._there else None]
        return min((lost for lost in found if lost is not None), default=None)

    def exported(self) -> NoReturn:
        """Raise: it is mapped in the other task."""
        raise _not_here(f"in task {self.task.pid}" if self.task else "")

    def close(self) -> None:
        """Unmap it in its task, if that still exists, and here. Raises as `RemoteMapping.close`; idempotent."""
        if self._there:
            self.mapping.seal()  # raises while it is in use, before anything is unmapped in the task
            try:
                self._there.close()
            except BaseException:
                self.mapping.unseal()
                raise
        super().close()


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
        """Return `length` bytes from `offset` on."""
        with self.here() as mapping:
            headroom.require(length, swappable=True)
            self._require_room_to_read(mapping, offset, length)
            return mapping.read(offset, length)

    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill `buffer` from `offset` on."""
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
        raise _not_here("mapped in no task")


def _not_here(where: str) -> UnsupportedError:
    return UnsupportedError(f"this memory is {where}, and cannot be viewed here: use map() for a view")
