"""The same buffers by keyword: `iobmd.allocate` and `iobmd.copy`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from iobmd.backing.contents import CopyOf, FrozenCopyOf
from iobmd.constants import IOOptionBits
from iobmd.descriptors.buffer import IOBufferMemoryDescriptor
from iobmd.descriptors.options import DIRECTION_NAMES
from iobmd.errors import BadArgumentError
from iobmd.task import transfer
from iobmd.task.task import as_task, kernel_task

if TYPE_CHECKING:
    from iobmd._internal.chunked import Progress
    from iobmd.task.task import AnyTask

# Plain numbers: an operation on members of an enumeration takes 2 µs, and a small buffer not much more.
DIRECTIONS = {name: direction for direction, name in enumerate(DIRECTION_NAMES)}
CACHES = {
    "default": int(IOOptionBits.kIOMapDefaultCache),
    "inhibit": int(IOOptionBits.kIOMapInhibitCache),
    "writethru": int(IOOptionBits.kIOMapWriteThruCache),
    "copyback": int(IOOptionBits.kIOMapCopybackCache),
    "writecombine": int(IOOptionBits.kIOMapWriteCombineCache),
}
_PAGEABLE = int(IOOptionBits.kIOMemoryPageable)
_CONTIGUOUS = int(IOOptionBits.kIOMemoryPhysicallyContiguous)
_PURGEABLE = int(IOOptionBits.kIOMemoryPurgeable)
_SHARED = int(IOOptionBits.kIOMemoryKernelUserShared)


def allocate(
    size: int,
    *,
    task: AnyTask | None = kernel_task,
    wired: bool = True,
    contiguous: bool = False,
    purgeable: bool = False,
    shared: bool = False,
    alignment: int = 1,
    physical_mask: int = 0,
    cache: str = "default",
    direction: str = "inout",
    node: int | None = None,
) -> IOBufferMemoryDescriptor:
    """Allocate a zeroed buffer.

    Parameters
    ----------
    size : int
        In bytes.
    task : Task, int or psutil.Process
        Whose address space it is mapped in.
    wired : bool
        Keep it resident; False: pageable.
    contiguous, purgeable, shared, physical_mask
        As the IOKit options of these names.
    alignment : int
        A power of two.
    cache : str
        ``"default"``, ``"inhibit"``, ``"writethru"``, ``"copyback"`` or ``"writecombine"``.
    direction : str
        ``"none"``, ``"in"``, ``"out"`` or ``"inout"``.
    node : int, optional
        The NUMA node whose memory it is to be (mbind(2)). Wired memory is all of that node; pageable memory comes
        from there as it is touched, while the node has any.

    Raises
    ------
    IOReturnError
        As `IOBufferMemoryDescriptor.initWithPhysicalMask`, which says what this version supports.
        `kIOReturnBadArgument`: the node has no memory; `kIOReturnNoResources`: not as much is free there.
    """
    form = _Form(wired, contiguous, purgeable, shared, alignment, physical_mask, cache, direction)
    return form.make(IOBufferMemoryDescriptor(node=node), task, size)


def copy(
    task: AnyTask,
    address: int,
    size: int,
    *,
    freeze: bool = False,
    unreadable: str = "raise",
    timeout: float = transfer.TIMEOUT,
    progress: Progress | None = None,
    **as_allocate: Any,
) -> IOBufferMemoryDescriptor:
    """Allocate a buffer that holds a copy of memory of a task.

    Parameters
    ----------
    task : Task, int or psutil.Process
        The task to copy from.
    address, size : int
        Address there, and the number of bytes.
    freeze : bool
        Copy the bytes as they are at one moment. The source stands still for it: for as long as a snapshot takes
        (a child that shares its private memory), or for the whole copy where that is less, or the memory is shared.
        `source_stopped_ns` of the buffer tells for how long.
    unreadable : str
        ``"raise"``: the copy is exact, or an error is raised. ``"zero"``: bytes that cannot be read are zero, and
        `holes` of the buffer lists them as offsets and lengths in bytes.
    timeout : float
        Seconds to wait for another program that has to deliver a page and delivers nothing, as for `Task.read`.
    progress : callable, optional
        Called now and then with the number of bytes copied.
    **as_allocate
        `wired` and the other keywords of `allocate`; the buffer is made in this process.

    Raises
    ------
    IOReturnError
        As `IOBufferMemoryDescriptor.withCopy`; with `freeze` also `kIOReturnNotPermitted`, `kIOReturnTimeout` and
        `kIOReturnUnsupported` (this process itself, or python-ptrace is missing), when the source cannot be stopped.

    Notes
    -----
    Nothing is created in the source, see `Task.read`; a pageable copy stays as sparse as its source. With `freeze`
    every thread of the source is stopped by ptrace(2), and no other process that shares its memory.
    """
    if unreadable not in ("raise", "zero"):
        raise BadArgumentError(f"unreadable must be 'raise' or 'zero', not {unreadable!r}")
    contents = (FrozenCopyOf if freeze else CopyOf)(
        as_task(task), address, size, skip=unreadable == "zero", timeout=timeout, progress=progress
    )
    return _Form(**as_allocate).make(IOBufferMemoryDescriptor(contents=contents), kernel_task, size)


class _Form(NamedTuple):
    """The keywords that `allocate` and `copy` share."""

    wired: bool = True
    contiguous: bool = False
    purgeable: bool = False
    shared: bool = False
    alignment: int = 1
    physical_mask: int = 0
    cache: str = "default"
    direction: str = "inout"

    def make(self, buffer: IOBufferMemoryDescriptor, task: AnyTask | None, size: int) -> IOBufferMemoryDescriptor:
        """Initialise `buffer` as these keywords say."""
        options = _named(DIRECTIONS, "direction", self.direction) | _named(CACHES, "cache", self.cache)
        options |= 0 if self.wired else _PAGEABLE
        options |= _CONTIGUOUS if self.contiguous else 0
        options |= _PURGEABLE if self.purgeable else 0
        options |= _SHARED if self.shared else 0
        buffer.initWithPhysicalMask(task, options, size, self.alignment, self.physical_mask)
        return buffer


def _named(names: dict[str, int], what: str, name: str) -> int:
    if name not in names:
        raise BadArgumentError(f"{what} must be one of {', '.join(names)}, not {name!r}")
    return names[name]
