"""The range that is inspected: a task, a part of one, or a buffer."""

import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

from iobmd import procfs
from iobmd._native.crosstask import HeldBuffer
from iobmd.errors import NO_DESCRIPTOR, BadArgumentError, IOReturnError
from iobmd.host import limits
from iobmd.procfs import USER_END, VMA
from iobmd.task import diagnosis
from iobmd.task.task import ADDRESS_END, Task, as_task, check_range, kernel_task
from iobmd.units import HUGE_PAGE_SIZE

_T = TypeVar("_T")

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from iobmd.task.identity import Process
    from iobmd.task.task import AnyTask


@runtime_checkable
class Mapped(Protocol):
    """The interface of buffers and maps that this package uses; the classes are defined in a higher package."""

    def _mapped_range(self) -> tuple[Task, int, int]:
        """Return the task in which it is mapped, and its start and end address. Raises IOReturnError."""
        ...


@runtime_checkable
class _Process(Protocol):
    """The interface by which a `Task` and a psutil.Process are recognized: psutil may not be loaded."""

    @property
    def pid(self) -> int: ...


Target: TypeAlias = "Task | int | Process | Mapped | Buffer | Where"
"""What is inspected: a task, as `Task`, pid or psutil.Process; a buffer or map of iobmd; or any other buffer."""


class Where(NamedTuple):
    """A range of a task's address space, in bytes."""

    task: Task
    """The task."""
    start: int
    """The first address."""
    end: int
    """The end address."""
    held: object = None
    """An object that keeps a buffer mapped."""

    @property
    def whole(self) -> bool:
        """Whether it is the whole address space."""
        return not self.start and self.end == ADDRESS_END

    @property
    def cuts_no_huge_page(self) -> bool:
        """Whether its bounds cannot be inside a huge page."""
        return not (self.start % HUGE_PAGE_SIZE or self.end % HUGE_PAGE_SIZE)

    @property
    def cuts_an_area(self) -> bool:
        """Whether one of its bounds is inside an area."""
        return not self.whole and any(area.start < self.start or area.end > self.end for area in self.areas())

    def areas(self) -> Iterator[VMA]:
        """Iterate over the areas that overlap it, ascending. Raises IOReturnError."""
        low, high = self.known
        # Reading the text of all areas takes three quarters of the time of querying each.
        found = procfs.maps(self.task.pid) if self.whole else procfs.areas(self.task.pid, low, high)
        for area in of_task(self.task, found, may_be_none=not self.whole):
            if area.start < high:
                yield area

    @property
    def known(self) -> tuple[int, int]:
        """Its start, and its end or that of pagemap."""
        return self.start, min(self.end, USER_END)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Iterate over the ranges to read: the areas of the whole address space, or the range itself."""
        if self.whole:
            yield from ((area.start, area.end) for area in self.areas())
        elif self.end > USER_END:
            raise past_the_end(self.end - 1)
        elif self.start < self.end:
            yield self.start, self.end


def past_the_end(address: int) -> BadArgumentError:
    """Return the error for an address outside the user address space."""
    tag = address >> 56
    remedy = f"; remove the tag {tag:#x} from its top byte" if os.uname().machine == "aarch64" and tag else ""
    return BadArgumentError(f"address {address:#x} is past the end of the user address space{remedy}")


def of_task(task: Task, found: Iterator[_T], *, may_be_none: bool = False) -> Iterator[_T]:
    """Iterate over areas of a task from /proc, after verifying that they belong to this task.

    Every task has an area: if there is none, its memory no longer exists, unless only a range is read
    (`may_be_none`).

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound`, `kIOReturnUnsupported` (a kernel thread).
    """
    with _MapsAccess(task):
        first = next(found, None)
        # A file that was opened while the task was alive cannot belong to another task that has reused its pid.
        if (first is None and not may_be_none) or not task.alive:
            raise diagnosis.without_memory(task.pid)
        if first is not None:
            yield first
        yield from found


def name_of(task: Task) -> str:
    """Return the name of the program that a task runs. Raises IOReturnError."""
    with _MapsAccess(task):
        return procfs.status(task.pid).get("Name", "")


class _MapsAccess:
    """Access to /proc/PID/maps or smaps in a `with` block; errors of the kernel are raised as IOReturnError."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, IOReturnError) or not isinstance(error, OSError):
            return
        if isinstance(error, PermissionError):
            raise diagnosis.refused(self._task.pid, error.errno or 0, "memory map") from None
        if isinstance(error, (FileNotFoundError, ProcessLookupError)) or error.errno == errno.EOPNOTSUPP:
            raise diagnosis.without_memory(self._task.pid) from None
        if error.errno in NO_DESCRIPTOR:
            raise limits.from_oserror(error, f"cannot read the memory map of task {self._task.pid}") from None


def _open_task(target: "AnyTask") -> Task:
    """Return a task; raise `kIOReturnNotOpen` for a snapshot that was closed."""
    task = as_task(target)
    task._require_open()
    return task


def resolve(target: Target, address: int | None = None, size: int | None = None) -> Where:
    """Return the range that the arguments describe.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`, `kIOReturnNotFound`, `kIOReturnUnsupported` (a buffer that is mapped in no task),
        `kIOReturnNotOpen` (a snapshot that was closed).
    TypeError
        The target is of another type.
    """
    if isinstance(target, Where):
        return target
    if address is not None or size is not None:
        if address is None or size is None:
            raise BadArgumentError("a range requires both an address and a size")
        address, size = check_range(address, size)
        return Where(_open_task(cast("AnyTask", target)), address, address + size)
    if isinstance(target, Mapped):
        return Where(*target._mapped_range(), target)
    if isinstance(target, (int, _Process)):
        return Where(_open_task(target), 0, ADDRESS_END)
    try:
        held = HeldBuffer(target, False)
    except TypeError:
        raise TypeError(f"target must be a task, a process id or a buffer, not {target!r}") from None
    return Where(kernel_task, held.address, held.address + held.size, held)
