"""What new memory is filled with: a copy of a task's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iobmd.task import check_range

if TYPE_CHECKING:
    from iobmd.pieces import Progress
    from iobmd.task import Task


class CopyOf(NamedTuple):
    """The `size` bytes at `address` of a task; `progress` is told how many of them are copied."""

    task: Task
    address: int
    size: int
    progress: Progress | None = None

    def check(self) -> None:
        """Raise `kIOReturnBadArgument` unless it is a range of addresses."""
        check_range(self.address, self.size)

    def fill(self, destination: int, *, huge: int = 0) -> None:
        """Copy it to an address of this process, where huge pages of size `huge` may come. Raises as `Task.read`."""
        self.task.copy_in(self.address, destination, self.size, huge=huge, progress=self.progress)
