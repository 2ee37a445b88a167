"""What new memory is filled with: a copy of a task's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
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


class FrozenCopyOf:
    """As `CopyOf`, as it is at one moment; `stopped_ns` tells afterwards for how long the task stood still for it."""

    def __init__(self, copied: CopyOf) -> None:
        self._copied = copied
        self.stopped_ns = 0

    def check(self) -> None:
        """As `CopyOf.check`."""
        self._copied.check()

    def fill(self, destination: int, *, huge: int = 0) -> None:
        """As `CopyOf.fill`. Raises what keeps the task from being stopped, too."""
        task, address, size, progress = self._copied
        if task.is_current:
            message = "this process cannot stand still while it copies from itself: freeze is for other tasks"
            raise IOReturnError(IOReturn.kIOReturnUnsupported, message)
        from iobmd.remote import freeze  # noqa: PLC0415 (with ctypes: half of what `import iobmd` takes)

        self.stopped_ns = freeze.copy(freeze.Source(task, address, size, destination, huge, progress))
