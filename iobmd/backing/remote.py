"""Memory of a shared object that is mapped in another task."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from iobmd.backing.placement import ANYWHERE, Placement
from iobmd.backing.shared import SharedBacking, not_mapped_here
from iobmd.remote.mapping import RemoteMapping, touch

if TYPE_CHECKING:
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
        placement: Placement = ANYWHERE,
    ) -> None:
        self._there: RemoteMapping | None = None
        super().__init__(shared, wired=wired, purgeable=purgeable, contents=contents)
        self.mapped_read_only = "w" not in placement.protection
        try:
            self._there = RemoteMapping(
                task,
                shared.cut(0, shared.size),
                at=placement.at,
                writable=not self.mapped_read_only,
                executable="x" in placement.protection,
                guard=guard,
            )
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
        raise not_mapped_here(f"in task {self.task.pid}" if self.task else "")

    def leave(self) -> None:
        """Leave the memory to its task when this is closed."""
        if self._there:
            self._there.leave()

    def tasks_to_stop(self) -> list[Task]:
        """Return the task in which `seal` unmaps it, if it does."""
        return [self._there.task] if self._there and self._there.is_mapped else []

    def seal(self) -> None:
        """Prevent further use, and unmap it in its task, if that still exists. Raises as `RemoteMapping.close`."""
        super().seal()  # raises while it is in use, before anything is unmapped in the task
        try:
            if self._there:
                self._there.close()
        except BaseException:
            self.unseal()
            raise

    def drop(self) -> None:
        """As `close`, for a destructor, which must not wait: its task unmaps it when that can be stopped."""
        self._there = None
        super().drop()
