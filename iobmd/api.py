"""Buffers by keyword arguments: `iobmd.allocate` and `iobmd.copy`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal

from iobmd._internal import log
from iobmd._internal.arguments import check_flags, check_integers, check_type, optional_integers
from iobmd.backing.contents import CopyOf, FrozenCopyOf
from iobmd.backing.lazy import LazyCopyOf
from iobmd.backing.placement import Placement
from iobmd.constants import IOOptionBits
from iobmd.descriptors.buffer import IOBufferMemoryDescriptor
from iobmd.descriptors.options import CONCEALED, DIRECTION_NAMES, Request, check_request
from iobmd.descriptors.secret import SecretBuffer
from iobmd.errors import BadArgumentError, CannotWireError
from iobmd.remote.task_snapshot import Snapshot
from iobmd.task.task import as_task, kernel_task
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeAlias

    from iobmd._internal.chunked import Progress
    from iobmd.task.task import AnyTask

    Cache: TypeAlias = Literal["default", "inhibit", "writethru", "copyback", "writecombine"]
    Direction: TypeAlias = Literal["none", "in", "out", "inout"]
    Protection: TypeAlias = Literal["r", "rw", "rx", "rwx"]
    Secret: TypeAlias = bool | Literal["concealed"]
    Wired: TypeAlias = bool | Literal["try"]

# Plain integers: an operation on enumeration members takes 2 µs, not much less than a small buffer.
DIRECTIONS = {name: direction for direction, name in enumerate(DIRECTION_NAMES)}
CACHES: dict[str, int] = {
    "default": int(IOOptionBits.kIOMapDefaultCache),
    "inhibit": int(IOOptionBits.kIOMapInhibitCache),
    "writethru": int(IOOptionBits.kIOMapWriteThruCache),
    "copyback": int(IOOptionBits.kIOMapCopybackCache),
    "writecombine": int(IOOptionBits.kIOMapWriteCombineCache),
}
_TRY = "try"
_PAGEABLE = int(IOOptionBits.kIOMemoryPageable)
_CONTIGUOUS = int(IOOptionBits.kIOMemoryPhysicallyContiguous)
_PURGEABLE = int(IOOptionBits.kIOMemoryPurgeable)
_SHARED = int(IOOptionBits.kIOMemoryKernelUserShared)


def allocate(
    size: int,
    *,
    task: AnyTask | None = kernel_task,
    wired: Wired = True,
    contiguous: bool = False,
    purgeable: bool = False,
    shared: bool = False,
    alignment: int = 1,
    physical_mask: int = 0,
    cache: Cache = "default",
    direction: Direction = "inout",
    node: int | None = None,
    address: int | None = None,
    overwrite: bool = False,
    protection: Protection = "rw",
    progress: Progress | None = None,
    secret: Secret = False,
) -> IOBufferMemoryDescriptor:
    """Allocate a zeroed buffer.

    Parameters
    ----------
    size : int
        In bytes.
    task : Task, int or psutil.Process, optional
        The task in whose address space the buffer is mapped; None: it is mapped in no task until `map` is called.
    wired : bool or str
        Whether the memory is wired: resident, and pinned if the kernel permits it. False: pageable. ``"try"``: wired
        if the limit of locked memory permits it, otherwise pageable; the buffer's `wiring` shows which.
    contiguous : bool
        Whether its physical addresses are contiguous; wired memory only.
    purgeable : bool
        Whether the kernel may reclaim it while it is volatile (`IOMemoryDescriptor.setPurgeable`); pageable memory
        only (``wired=False``).
    shared : bool
        Whether other processes can map it, and forked children share it. False: it is private, also in another task,
        which alone maps it and is charged for it; this process reads and writes it there, and cannot map it. Memory
        in another task that is contiguous, masked, aligned above a page, purgeable, on a `node` or with a `cache`
        mode is shared in any case.
    alignment : int
        A power of two, in bytes. Above the page size it implies contiguity, except for pageable memory.
    physical_mask : int
        The bits that physical addresses may have, such as ``0xffffffff`` for memory below 4 GiB; 0: any address.
        Wired memory only. If `alignment` is 1, the lowest bit of the mask is the alignment, which is at least a page.
    cache : str
        How reads and writes by the descriptor treat the processor caches: ``"default"``, ``"inhibit"``,
        ``"writethru"``, ``"copyback"`` or ``"writecombine"`` (see `IOMemoryDescriptor.cache_mode`).
    direction : str
        The direction of transfers: ``"in"``: a device writes the memory, ``"out"``: a device reads it, ``"inout"``:
        both, or ``"none"``.
    node : int, optional
        The NUMA node to allocate from (mbind(2)). All wired memory is on that node; pageable memory is allocated
        there when it is touched, as long as the node has free memory.
    address : int, optional
        The address of its first byte in the task, a multiple of the page size. Nothing may be mapped there.
    overwrite : bool
        Whether to map it over address space of this process that the caller has reserved (a private anonymous mapping
        with PROT_NONE), at `address`. The range is replaced, and is reserved again after the buffer is freed.
    protection : str
        The protection of a buffer in another task: ``"r"``, ``"rw"``, ``"rx"`` or ``"rwx"``. The descriptor can read
        and write it in any case. Private memory is writable in the task too while the descriptor writes to it.
    progress : callable, optional
        Called repeatedly in this thread with the number of bytes populated so far, and finally with `size`. An
        exception that it raises ends the allocation.
    secret : bool or str
        Whether it is for a key or a password: locked, not dumped, zero in a forked child, and cleared when it is
        freed. Secrets of up to 992 bytes share pages, between canaries that `verify` and `free` check. Others have
        separate pages between two inaccessible ones, and end where the second one begins, unless `alignment` prevents
        that. ``"concealed"``: with separate pages, which are inaccessible while there is no `memoryview` or array of
        it and none of its methods runs.

    Raises
    ------
    IOReturnError
        As `IOBufferMemoryDescriptor.initWithPhysicalMask`. `kIOReturnBadArgument`: the node has no memory;
        `kIOReturnNoResources`: it does not have enough free memory, or memory is mapped at `address`.
        `kIOReturnBadArgument`: `address` is not a multiple of the alignment, or not reserved (`overwrite`); or other
        keywords are not possible for a secret, or with ``wired="try"``.
    TypeError
        An argument has the wrong type, such as a float as the size.
    """
    somewhere = address is None and not overwrite and protection == "rw"
    usual = progress is None and secret is False and not isinstance(wired, str)
    if task is kernel_task and node is None and somewhere and usual:
        try:  # contextlib.suppress takes a fifth of the time of a small buffer
            wanted = _known_request(
                size, wired, contiguous, purgeable, shared, alignment, physical_mask, cache, direction
            )
        except TypeError:  # of a value that is not hashable, or that is refused below
            pass
        else:
            if wanted.piece_alignment:
                # Without __init__, which only records differences from the defaults.
                small = IOBufferMemoryDescriptor.__new__(IOBufferMemoryDescriptor)
                if small._acquire_piece(wanted):
                    return small
    options = _options(wired, contiguous, purgeable, shared, cache, direction)
    private = not shared and task is not kernel_task
    _check_secret(secret, wired)
    if somewhere:
        buffer = (
            SecretBuffer(secret, node=node)
            if secret
            else IOBufferMemoryDescriptor(node=node, private=private, progress=progress)
        )
    else:
        (address,) = optional_integers(address=address)
        check_flags(overwrite=overwrite)
        placement = Placement(address or 0, overwrite, protection)
        buffer = (
            SecretBuffer(secret, node=node, placement=placement)
            if secret
            else IOBufferMemoryDescriptor(node=node, placement=placement, private=private, progress=progress)
        )
    return _make(buffer, task, options, size, alignment, physical_mask, optional=isinstance(wired, str))


def copy(
    task: AnyTask,
    address: int,
    size: int,
    *,
    freeze: bool = False,
    lazy: bool = False,
    unreadable: Literal["raise", "zero"] = "raise",
    timeout: float | None = None,
    progress: Progress | None = None,
    wired: Wired = True,
    contiguous: bool = False,
    purgeable: bool = False,
    shared: bool = False,
    alignment: int = 1,
    physical_mask: int = 0,
    cache: Cache = "default",
    direction: Direction = "inout",
    node: int | None = None,
    secret: Secret = False,
) -> IOBufferMemoryDescriptor:
    """Allocate a buffer that holds a copy of memory of a task.

    Parameters
    ----------
    task : Task, int or psutil.Process
        The task to copy from.
    address, size : int
        Address in the task, and the number of bytes.
    freeze : bool
        Copy the bytes as of one moment. The source is stopped while a snapshot is made (a child that shares its
        private memory), or for the whole copy if that is faster or the memory is shared. `source_stopped_ns` of the
        buffer is the duration of the stop.
    lazy : bool
        Return before the bytes are copied, with the contents at the time of the call: see
        `IOBufferMemoryDescriptor.withCopy`.
        Requires ``wired=False``.
    unreadable : str
        ``"raise"``: the copy is exact, or an error is raised. ``"zero"``: bytes that cannot be read are zero, and
        `holes` of the buffer lists them as offsets and lengths in bytes.
    timeout : float, optional
        Seconds to wait for another program, as for `Task.read`.
    progress : callable, optional
        Called repeatedly in this thread with the number of bytes copied so far, and finally with `size`; by a lazy
        copy, not at all. An exception that it raises ends the copy.
    wired, contiguous, purgeable, shared, alignment, physical_mask, cache, direction, node, secret
        As for `allocate`; the buffer is allocated in this process.

    Raises
    ------
    IOReturnError
        As `IOBufferMemoryDescriptor.withCopy`; with `freeze` also `kIOReturnNotPermitted`, `kIOReturnTimeout` and
        `kIOReturnUnsupported` (the source is this process), if the source cannot be
        stopped.
    TypeError
        An argument has the wrong type, such as a float as the size.

    Notes
    -----
    Nothing is allocated in the source, see `Task.read`; a pageable copy is as sparse as its source. With `freeze`,
    all threads of the source are stopped by ptrace(2), but not other processes that share its memory.
    """
    check_flags(freeze=freeze, lazy=lazy)
    _check_secret(secret, wired, lazy=lazy)
    if unreadable not in ("raise", "zero"):
        raise BadArgumentError(f"unreadable must be 'raise' or 'zero', not {unreadable!r}")
    contents = (LazyCopyOf if lazy else FrozenCopyOf if freeze else CopyOf)(
        as_task(task), address, size, skip=unreadable == "zero", timeout=timeout, progress=progress
    )
    options = _options(wired, contiguous, purgeable, shared, cache, direction)
    buffer = (
        SecretBuffer(secret, contents=contents, node=node)
        if secret
        else IOBufferMemoryDescriptor(contents=contents, node=node)
    )
    return _make(buffer, kernel_task, options, size, alignment, physical_mask, optional=isinstance(wired, str))


def snapshot(task: AnyTask, *, limit: int | None = None, freeze_shared: int | None = None) -> Snapshot:
    """Hold the memory of a whole task as of this moment, while the task continues to run.

    Parameters
    ----------
    task : Task, int or psutil.Process
        The task.
    limit : int, optional
        Bytes. The snapshot ends when more than this is copied because the task writes to its memory; see
        `Snapshot.copied_bytes`.
    freeze_shared : int, optional
        Bytes. Shared memory is copied to this process while the task is stopped, if it has at most this size. By
        default it is not frozen, and reading it returns its present contents: `Snapshot.shared`.

    Returns
    -------
    Snapshot
        It can be read wherever a task is accepted, until it is closed.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound`, `kIOReturnUnsupported`: with the reason. `kIOReturnTimeout`: the
        task did not stop. `kIOReturnNoResources`: the task or this process can create no process.
        `kIOReturnNoMemory`: the page tables of the snapshot do not fit the memory limits of the task; or its shared
        memory is larger than `freeze_shared`. `kIOReturnUnsupported`, `kIOReturnTimeout`: shared memory cannot be
        copied during the stop, with the reason. `kIOReturnUnsupported` also for this process and kernel threads.
    OSError
        The task cannot be cloned: the kernel lacks memory.

    Notes
    -----
    All threads of the task are stopped by ptrace(2) while the task is cloned. The time is that of clone(2): 10 to
    26 ms for 1 GiB in 4 KiB pages, and 2 ms in huge pages. Its memory is shared with the snapshot until the task
    writes to it.

    `freeze_shared` freezes shared memory as the task sees it: other processes that map it are not stopped, and may
    write to it while it is copied. Copying takes 40 to 80 ms for 1 GiB.
    """
    return Snapshot(as_task(task), limit=limit, freeze_shared=freeze_shared)


def _options(*names: object) -> int:
    """Return the options for the keywords, in the order of `_options_for`."""
    try:
        return _known_options(*names)
    except TypeError:  # of a value that is not hashable
        return _options_for(*names)  # type: ignore[arg-type]


def _options_for(wired: Wired, contiguous: bool, purgeable: bool, shared: bool, cache: str, direction: str) -> int:
    check_flags(_TRY, wired=wired)
    check_flags(contiguous=contiguous, purgeable=purgeable, shared=shared)
    options = _named(DIRECTIONS, "direction", direction) | _named(CACHES, "cache", cache)
    options |= 0 if wired else _PAGEABLE
    options |= _CONTIGUOUS if contiguous else 0
    options |= _PURGEABLE if purgeable else 0
    options |= _SHARED if shared else 0
    return options


# Allocating a small buffer takes less time than checking its request, and programs repeat a few requests.
@functools.lru_cache(maxsize=256, typed=True)
def _known_request(
    size: int,
    wired: Wired,
    contiguous: bool,
    purgeable: bool,
    shared: bool,
    alignment: int,
    physical_mask: int,
    cache: str,
    direction: str,
) -> Request:
    """Check a request for memory of this process. Raises as `check_request`, and TypeError for wrong types."""
    check_integers(size=size, alignment=alignment, physical_mask=physical_mask)
    options = _options_for(wired, contiguous, purgeable, shared, cache, direction)
    return check_request(kernel_task, options, size, alignment, physical_mask)


_known_options = functools.lru_cache(maxsize=64, typed=True)(_options_for)


def _make(
    buffer: IOBufferMemoryDescriptor,
    task: AnyTask | None,
    options: int,
    size: int,
    alignment: int,
    physical_mask: int,
    *,
    optional: bool,
) -> IOBufferMemoryDescriptor:
    """Initialize `buffer`; `optional`: with pageable memory if it cannot be wired.

    Numbers are checked here too, because these keywords differ from the names in IOKit.
    """
    if not type(size) is type(alignment) is type(physical_mask) is int:  # a call takes a twentieth of an allocation
        check_integers(size=size, alignment=alignment, physical_mask=physical_mask)
    if optional:
        if options & _CONTIGUOUS or physical_mask or alignment > PAGE_SIZE:
            message = "contiguous, masked or aligned memory must be wired, because pageable memory moves"
            raise BadArgumentError(f"{message}: omit wired={_TRY!r}")
        try:
            buffer.initWithPhysicalMask(task, options, size, alignment, physical_mask)
        except CannotWireError as error:
            log.debug("%s; allocating pageable memory", error)
            options |= _PAGEABLE
        else:
            return buffer
    buffer.initWithPhysicalMask(task, options, size, alignment, physical_mask)
    return buffer


def _check_secret(secret: object, wired: object, *, lazy: bool = False) -> None:
    check_flags(CONCEALED, secret=secret)
    if secret and (lazy or type(wired) is str):
        raise BadArgumentError(f"a secret is always wired: omit {'lazy=True' if lazy else f'wired={wired!r}'}")


def _named(names: Mapping[str, int], what: str, name: str) -> int:
    if type(name) is not str:
        check_type(str, **{what: name})
    if name not in names:
        raise BadArgumentError(f"{what} must be one of {', '.join(names)}, not {name!r}")
    return names[name]
