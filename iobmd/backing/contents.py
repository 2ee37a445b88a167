"""Initial contents of new memory: a copy of a task's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd._internal.arguments import check_timeout, integers
from iobmd._internal.chunked import Progress, carrying
from iobmd.errors import UnsupportedError
from iobmd.task import attempt, diagnosis, extents, job
from iobmd.task.ranges import joined
from iobmd.task.task import check_range

if TYPE_CHECKING:
    from iobmd._native.crosstask import Ranges
    from iobmd.task.task import Task


class CopyOf:
    """The `size` bytes at `address` of a task.

    Parameters
    ----------
    task, address, size
        The task, the address, and the number of bytes.
    skip : bool
        Whether bytes that cannot be read are zero.
    timeout : float, optional
        Seconds to wait for another program that must supply a page.
    progress : callable, optional
        Called with the number of bytes copied so far, and finally with `size`.

    Attributes
    ----------
    holes : list[tuple[int, int]]
        Offsets and lengths of unreadable bytes, after `fill`.
    stopped_ns : int
        Upper bound of the time for which the task was stopped.
    """

    stopped_ns = 0

    def __init__(
        self,
        task: Task,
        address: int,
        size: int,
        *,
        skip: bool = False,
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        address, size = integers(address=address, size=size)
        check_timeout(timeout)
        self.task = task
        self.address = address
        self.size = size
        self.holes: list[tuple[int, int]] = []
        self._skip = skip
        self._timeout = timeout
        self._progress = carrying(progress) if progress else None
        self._outline: Ranges | None = None
        self._unmapped: Ranges | tuple[()] = ()

    def check(self) -> None:
        """Check the source before memory is allocated.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: it is not a range of addresses. `kIOReturnVMError`: nothing is mapped there in
            this process.
        """
        check_range(self.address, self.size)
        self._unmapped = extents.unmapped(self.task.pid, self.address, self.size)
        if self._unmapped and not self._skip:
            raise diagnosis.unreadable(self.task.pid, self._unmapped[0][0])

    def fill(self, destination: int, *, huge: int = 0, sparse: bool = False, fresh: bool = True) -> bool:
        """As `Contents.fill`. Raises as `Task.read`."""
        left_zero = self.fetch(self.task, destination, huge=huge, sparse=sparse, fresh=fresh)
        self._report_end()
        return left_zero

    def _report_end(self) -> None:
        """Report that everything is copied, even if other threads copied all chunks, or there is only one chunk."""
        if self._progress:
            self._progress(self.size)

    def fetch(
        self,
        task: Task,
        destination: int,
        *,
        huge: int = 0,
        fresh: bool = True,
        sparse: bool = False,
        standing: Progress | None = None,
    ) -> bool:
        """Copy the bytes from `task`, or from another task with the same memory, like `fill`.

        Parameters
        ----------
        fresh
            Whether the destination is zero: nothing was copied to it before.
        standing
            If the task is stopped, called instead of the caller's `progress`, which belongs to another thread;
            other programs are then not waited for.
        """
        outcome = task.copy_in(
            self.address,
            destination,
            self.size,
            huge=huge,
            fresh=fresh,
            sparse=sparse,
            skip=self._skip,
            resident_only=standing is not None,
            timeout=self._timeout,
            progress=standing or self._progress,
            outline=self._outline,
        )
        unread = joined([*outcome.unread, *self._unmapped])
        self.holes = [(start - self.address, end - start) for start, end in unread]
        return outcome.left_zero

    def resident(self) -> int:
        """Return a lower bound of the bytes of the source that exist, in memory or in swap."""
        outline = self._outline = extents.outline(self.task.pid, self.address, self.size, job.patience(self._timeout))
        if outline is None:
            return self.size
        return self.size - outline.size + extents.existing(self.task.pid, outline, job.patience(self._timeout))


def copied(contents: CopyOf, destination: int) -> int:
    """Check the contents and copy them; return an upper bound of the time for which their task was stopped."""
    if contents.size:
        contents.check()
        contents.fill(destination)
    return contents.stopped_ns


class FrozenCopyOf(CopyOf):
    """Like `CopyOf`, as of one moment."""

    def check(self) -> None:
        """As `CopyOf.check`; `kIOReturnUnsupported` for this process."""
        if self.task.is_current:
            message = "this process cannot be stopped while it copies from itself: use freeze for other tasks only"
            raise UnsupportedError(message)
        super().check()

    def fill(self, destination: int, *, huge: int = 0, sparse: bool = False, fresh: bool = True) -> bool:
        """Like `Contents.fill`; also raises the error if the task cannot be stopped."""
        if self.task.is_snapshot:  # it is already as of one moment
            return super().fill(destination, huge=huge, sparse=sparse, fresh=fresh)
        from iobmd.remote import consistent_copy  # noqa: PLC0415 (with ctypes: half of the time of `import iobmd`)

        left_zero = False
        first = True

        def fetch(task: Task, standing: Progress | None) -> None:
            nonlocal left_zero, first
            again, first = not first, False
            left_zero = self.fetch(
                task,
                destination,
                huge=0 if again else huge,
                fresh=fresh and not again,
                sparse=sparse and not again,
                standing=standing,
            )

        attempt.require_unlocked(self.task.pid, job.patience(self._timeout))
        self.stopped_ns = consistent_copy.copy(consistent_copy.CopyRequest(self.task, self.address, self.size, fetch))
        self._report_end()
        return left_zero
