"""The options of a buffer, checked against IOKit's rules (IOBufferMemoryDescriptor.h)."""

from __future__ import annotations

import functools
from operator import index
from typing import TYPE_CHECKING, NamedTuple

from iobmd._internal.arguments import check_integers, integers
from iobmd._native import mapping
from iobmd.backing.placement import ANYWHERE, PROTECTIONS, Placement
from iobmd.constants import IODirection, IOMapOptions, IOMemoryOperation, IOMemoryTypes, IOOptionBits
from iobmd.errors import BadArgumentError, UnsupportedError
from iobmd.memory.shmem import NAME
from iobmd.physical.search import PhysicalConstraints
from iobmd.physical.zones import ALL_ADDRESSES
from iobmd.task.task import Task, as_task, kernel_task
from iobmd.units import PAGE_SIZE, is_power_of_two

if TYPE_CHECKING:
    from iobmd._internal.chunked import Progress
    from iobmd.task.task import AnyTask

DIRECTION_MASK = 0x3
DIRECTION_NAMES = "none", "in", "out", "inout"
"""By kIODirectionNone, In, Out and InOut, which are 0 to 3 (IOTypes.h)."""
CACHE_MASK = 0xF00
CACHE_MODES = 0x700
"""The cache modes of that field (IOTypes.h); the bit above is kIOMemoryMapperNone."""

_PLAIN_MODES = (int(IOMapOptions.kIOMapDefaultCache), int(IOMapOptions.kIOMapCopybackCache))

_PAGEABLE = int(IOOptionBits.kIOMemoryPageable)
_PURGEABLE = int(IOOptionBits.kIOMemoryPurgeable)
_SHARED = int(IOOptionBits.kIOMemoryKernelUserShared)
_KNOWN = CACHE_MASK | sum({int(option) for option in IOOptionBits})

_MOST = (1 << 63) - 2 * PAGE_SIZE  # bytes of a file (off_t), less the rounding and a trailer

_CONTIGUOUS = int(IOOptionBits.kIOMemoryPhysicallyContiguous | IOOptionBits.kIOMemoryHostPhysicallyContiguous)

_NO_TAGS = 0, 0

SMALL = 64 << 10
"""Size in bytes of the largest buffers whose memory comes from a pool of equal pieces."""

CONCEALED = "concealed"
"""The value of `secret` for memory that is inaccessible between uses."""

_NOT_POOLED = _PURGEABLE | _SHARED | CACHE_MODES

_OF_NEW_MEMORY = _CONTIGUOUS | _PAGEABLE | _PURGEABLE

COPY_ON_WRITE = int(IOOptionBits.kIOMemoryMapCopyOnWrite)
HOST_ONLY = int(IOOptionBits.kIOMemoryHostOnly)

_REMOTE = int(IOOptionBits.kIOMemoryRemote)

_REFUSED = {
    int(IOOptionBits.kIOMemoryClearEncrypt): (
        "kIOMemoryClearEncrypt exempts pages from encryption in swap, but Linux encrypts swap as a whole or not at "
        "all: omit it"
    ),
    int(IOOptionBits.kIOMemoryUseReserve): (
        "kIOMemoryUseReserve allocates from memory that is set aside for drivers, and Linux sets none aside: omit "
        "it, or raise the hugetlb pools for contiguous memory by iobmd.policy(reserve=True)"
    ),
}
"""Options that Linux cannot honor, and the reasons."""

_PREPARE = DIRECTION_MASK | int(
    IODirection.kIODirectionPrepareToPhys32
    | IODirection.kIODirectionPrepareNoFault
    | IODirection.kIODirectionPrepareReserved1
    | IODirection.kIODirectionPrepareNonCoherent
)
_COMPLETE = _PREPARE | int(IODirection.kIODirectionCompleteWithError | IODirection.kIODirectionCompleteWithDataValid)

_TYPE_MASK = int(IOMemoryTypes.kIOMemoryTypeMask)
_VIRTUAL, _PHYSICAL = int(IOMemoryTypes.kIOMemoryTypeVirtual), int(IOMemoryTypes.kIOMemoryTypePhysical)
_OTHER_TYPES = {
    int(IOMemoryTypes.kIOMemoryTypeUPL): "UPLs (kIOMemoryTypeUPL) exist only in XNU: describe ranges of addresses",
    int(IOMemoryTypes.kIOMemoryTypeUIO): "uios (kIOMemoryTypeUIO) exist only in XNU: describe ranges of addresses",
    int(IOMemoryTypes.kIOMemoryTypePersistentMD): (
        "persistent descriptors (kIOMemoryTypePersistentMD) are not needed: keep a reference to the descriptor"
    ),
}
_WITHOUT_EFFECT = int(
    IOMemoryTypes.kIOMemoryAsReference | IOMemoryTypes.kIOMemoryBufferPageable | IOMemoryTypes.kIOMemoryPersistent
)


class Request(NamedTuple):
    """A checked request: sizes in bytes."""

    task: Task | None
    """The task in which it is mapped; None: in none."""
    options: int
    capacity: int
    want: PhysicalConstraints | None
    """Constraints on the physical addresses; None: any page will do."""
    contiguous: bool
    """Whether it must be contiguous, by an option or by its alignment."""
    guard: int = 0
    """Inaccessible bytes on each side."""
    tag: int = 0
    """The number that names its mappings; 0: no name."""
    placement: Placement = ANYWHERE
    """Its address, and its protection in its task."""
    alignment: int = PAGE_SIZE
    """Alignment of its address in this process, if no condition on its physical addresses implies it."""
    piece_alignment: int = 0
    """Alignment of a piece from a pool of equal pieces that it may use; 0: none."""
    private: bool = False
    """Whether memory in another task is private there, unless this process must map it as well."""
    progress: Progress | None = None
    """Called with the number of bytes that are populated."""

    @property
    def name(self) -> str:
        """The name of its mappings, if the kernel shows it."""
        return f"{NAME}:{self.tag}" if self.tag else NAME

    @property
    def here(self) -> bool:
        """Whether it is mapped in this process."""
        return self.task is not None and self.task.is_current

    @property
    def private_there(self) -> bool:
        """Whether it is private memory of another task.

        This process must map the memory itself to search for physical addresses, to purge it, and to write cache
        lines back.
        """
        if not self.private or self.task is None or self.here:
            return False
        return self.want is None and not self.guard and not self.options & (_PURGEABLE | CACHE_MODES)

    @property
    def wired(self) -> bool:
        """Whether the memory stays resident."""
        return not self.options & _PAGEABLE

    @property
    def purgeable(self) -> bool:
        """Whether the system may reclaim it while it is volatile."""
        return bool(self.options & _PURGEABLE)

    @property
    def shared(self) -> bool:
        """Whether other processes may map it."""
        return bool(self.options & _SHARED)


def check_request(
    task: AnyTask | None,
    options: int,
    capacity: int,
    alignment: int,
    physical_mask: int,
    guarded: bool = False,
    tags: tuple[int, int] = _NO_TAGS,
    placement: Placement = ANYWHERE,
) -> Request:
    """Check a request for a buffer; the parameters are those of `initWithPhysicalMask` and its factories.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`, or `kIOReturnUnsupported` for options that are not implemented.
    TypeError
        A number is not an integer.
    """
    plain = task is kernel_task and not guarded and tags == _NO_TAGS and placement is ANYWHERE
    if plain and type(options) is int and not options & CACHE_MODES:
        return _check_plain(options, capacity, alignment, physical_mask)
    where = None if task is None else as_task(task)
    return _check(where, options, capacity, alignment, physical_mask, guarded, tags, placement)


# Programs repeat a few requests, and a check takes longer than the rest of the allocation of a small buffer.
@functools.lru_cache(maxsize=256, typed=True)
def _check_plain(options: int, capacity: int, alignment: int, physical_mask: int) -> Request:
    return _check(kernel_task, options, capacity, alignment, physical_mask)


def _check(
    where: Task | None,
    options: int,
    capacity: int,
    alignment: int,
    physical_mask: int,
    guarded: bool = False,
    tags: tuple[int, int] = _NO_TAGS,
    placement: Placement = ANYWHERE,
) -> Request:
    if not type(capacity) is type(alignment) is type(physical_mask) is int:
        check_integers(capacity=capacity, alignment=alignment, physicalMask=physical_mask)
        capacity, alignment, physical_mask = index(capacity), index(alignment), index(physical_mask)
    if type(options) is not int:
        check_integers(options=options)
        options = int(options)
    if capacity <= 0:
        raise BadArgumentError(f"a buffer's size must be positive, not {capacity}")
    if alignment not in (0, 1) and not is_power_of_two(alignment):
        raise BadArgumentError(f"alignment {alignment} is not a power of two")
    if not 0 <= physical_mask < 1 << 64:
        raise BadArgumentError(f"physical mask {physical_mask:#x} is not a 64-bit mask")
    if capacity + alignment > _MOST:
        raise BadArgumentError(f"size {capacity:#x} with alignment {alignment:#x} exceeds every address space")
    _check_options(options)
    if options & _REMOTE:
        raise BadArgumentError("kIOMemoryRemote describes addresses of another bus, not newly allocated memory")
    if guarded:
        _check_guarded(where, options)
    # Pageable memory moves: only its address can be aligned.
    virtual = alignment if options & _PAGEABLE and where is not None and where.is_current else 1
    want, contiguous = _physical(options, capacity, 1 if virtual > 1 else alignment, physical_mask)
    if options & _PAGEABLE and (want or contiguous):
        what = want or PhysicalConstraints(capacity, contiguous)
        raise BadArgumentError(f"pageable memory moves, and cannot be {what}: omit kIOMemoryPageable")
    tag = _tag(tags, in_kernel=where is None or where is kernel_task)
    if placement is not ANYWHERE:
        _check_placement(placement, where, capacity, max(alignment, PAGE_SIZE))
    guard, virtual = PAGE_SIZE if guarded else 0, max(virtual, PAGE_SIZE)
    request = Request(where, options, capacity, want, contiguous, guard, tag, placement, virtual)
    return request._replace(piece_alignment=max(index(alignment), 1)) if _may_be_pooled(request) else request


def check_secret(request: Request, node: int | None) -> None:
    """Raise `kIOReturnBadArgument` unless the memory can be that of a secret."""
    kinds = {
        "pageable": not request.wired,
        "shared": request.shared,
        "contiguous, masked or aligned above a page": request.want is not None,
        "in another task, or in none": not request.here,
        "at a given address": request.placement is not ANYWHERE,
        "on a given node": node is not None,
        "uncached": bool(request.options & CACHE_MODES),
    }
    if kind := next((kind for kind, is_wanted in kinds.items() if is_wanted), None):
        raise BadArgumentError(f"a secret cannot be {kind}: it is locked private memory of this process")


def _may_be_pooled(request: Request) -> bool:
    return (
        request.capacity <= SMALL
        and not request.options & _NOT_POOLED
        and request.want is None
        and not (request.guard or request.tag)
        and request.placement is ANYWHERE
        and request.here
    )


def _physical(options: int, capacity: int, alignment: int, mask: int) -> tuple[PhysicalConstraints | None, bool]:
    """Return the constraints on physical addresses, None if any page will do, and whether contiguity is required."""
    allowed = ALL_ADDRESSES
    if mask:
        # The bits below the mask's lowest bit are free within memory of that alignment (IOKit's
        # initWithPhysicalMask).
        lowest = mask & -mask
        allowed = mask | (max(lowest, PAGE_SIZE) - 1)
        if alignment <= 1:
            alignment = max(lowest, PAGE_SIZE)
    contiguous = bool(options & _CONTIGUOUS) or alignment > PAGE_SIZE
    if allowed == ALL_ADDRESSES and alignment <= PAGE_SIZE and (capacity <= PAGE_SIZE or not contiguous):
        return None, contiguous
    return PhysicalConstraints(capacity, contiguous, max(alignment, 1), allowed), contiguous


def check_existing(options: int) -> int:
    """Check the options of a descriptor of existing memory, and return them.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument` for options of newly allocated memory; `kIOReturnUnsupported` as `check_request`.
    TypeError
        They are not an integer.
    """
    check_integers(options=options)
    options = int(options)
    _check_options(options)
    if options & _OF_NEW_MEMORY:
        raise BadArgumentError(f"options {options:#x} apply only to newly allocated memory, not to existing memory")
    return options


def check_types(options: int, *, has_task: bool) -> int:
    """Check the options of `initWithOptions`, and return them without the bits of `IOMemoryTypes`.

    Raises
    ------
    IOReturnError
        As `check_existing`; `kIOReturnBadArgument` for a type without its task, or a task without its type.
    """
    kind = int(options) & _TYPE_MASK
    if kind in _OTHER_TYPES:
        raise UnsupportedError(_OTHER_TYPES[kind])
    if kind != (_VIRTUAL if has_task else _PHYSICAL):
        raise BadArgumentError(
            f"type {kind:#x}: addresses of a task are kIOMemoryTypeVirtual, and without a task they are "
            "kIOMemoryTypePhysical"
        )
    return check_existing(int(options) & ~(_TYPE_MASK | _WITHOUT_EFFECT))


def check_remote(options: int, task: object) -> bool:
    """Return whether the options describe addresses of another bus, which belong to no task."""
    if task is not None and options & _REMOTE:
        raise BadArgumentError("addresses of another bus (kIOMemoryRemote) belong to no task: pass None")
    return bool(options & _REMOTE)


def check_prepare(direction: int) -> None:
    """Raise `kIOReturnBadArgument` unless these are directions with flags of `prepare`."""
    if type(direction) is not int or direction & ~_PREPARE:  # a call costs more than the check
        _check_direction_flags(direction, _PREPARE)


def check_complete(direction: int) -> None:
    """Raise `kIOReturnBadArgument` unless these are directions with flags of `prepare` or `complete`."""
    if type(direction) is not int or direction & ~_COMPLETE:
        _check_direction_flags(direction, _COMPLETE)


def _check_direction_flags(direction: int, known: int) -> None:
    check_integers(forDirection=direction)
    if direction & ~known:
        raise BadArgumentError(f"direction {int(direction):#x} has unknown bits")


def check_operation(operation: int) -> None:
    """Raise `kIOReturnUnsupported` unless it is an operation on cache lines."""
    check_integers(options=operation)
    if operation in (IOMemoryOperation.kIOMemoryClearEncrypted, IOMemoryOperation.kIOMemorySetEncrypted):
        raise UnsupportedError(
            "Linux does not encrypt single pages: kIOMemoryClearEncrypted and SetEncrypted have no meaning"
        )
    if operation not in (IOMemoryOperation.kIOMemoryIncoherentIOFlush, IOMemoryOperation.kIOMemoryIncoherentIOStore):
        raise UnsupportedError(f"unknown operation {int(operation):#x}")


def check_descriptor(**values: object) -> None:
    """Raise TypeError for a value without the methods of a descriptor, whose class this module may not import."""
    for name, value in values.items():
        if not hasattr(value, "getDirection"):  # maps lack it, which have a length too
            raise TypeError(f"{name} must be an IOMemoryDescriptor, not {value!r}")


def check_within(offset: int, length: int, size: int, whole: object) -> tuple[int, int]:
    """Return the offset and the length of a range as Python's integers.

    Raises `kIOReturnBadArgument` unless it is within the `size` bytes of `whole`, a name for the message.
    """
    if not type(offset) is type(length) is int:  # a call costs more than the rest
        offset, length = integers(offset=offset, length=length)
    if offset < 0 or length < 0 or offset + length > size:
        raise BadArgumentError(f"offset {offset} with length {length} is not within the {size} bytes of {whole}")
    return offset, length


def check_direction(direction: int) -> int:
    """Return `direction` if it is one of the four of IOKit."""
    check_integers(direction=direction)
    if not 0 <= direction <= DIRECTION_MASK:
        raise BadArgumentError(f"direction {direction:#x} is not kIODirectionNone, In, Out or InOut")
    return int(direction)


def _check_options(options: int) -> None:
    if options < 0 or options & ~_KNOWN:
        raise BadArgumentError(f"options {options:#x} have unknown bits {options & ~_KNOWN & 0xFFFFFFFFFFFFFFFF:#x}")
    if options & _PURGEABLE and not options & _PAGEABLE:
        raise BadArgumentError("kIOMemoryPurgeable requires kIOMemoryPageable: wired memory cannot be reclaimed")
    for bits, reason in _REFUSED.items():
        if options & bits:
            raise UnsupportedError(reason)
    _check_cache_mode(options)


def _tag(tags: tuple[int, int], *, in_kernel: bool) -> int:
    """Return the tag of a mapping: the first in `kernel_task`, otherwise the second; the other one if that is 0."""
    if tags == _NO_TAGS:
        return 0
    for tag in tags:
        check_integers(tag=tag)
    if any(not 0 <= tag < 1 << 32 for tag in tags):
        raise BadArgumentError(f"tags {tags} are not 32-bit numbers")
    return (tags[0] or tags[1]) if in_kernel else (tags[1] or tags[0])


def _check_guarded(task: object, options: int) -> None:
    if options & (_PAGEABLE | _CONTIGUOUS):
        raise BadArgumentError("memory with guard pages cannot be pageable or contiguous: omit these options")
    if task is None:
        raise BadArgumentError("memory that is mapped in no task has no guard pages: map it with kIOMapGuardedSmall")


def _check_placement(placement: Placement, task: Task | None, capacity: int, alignment: int) -> None:
    here = task is not None and task.is_current
    if placement.protection not in PROTECTIONS:
        raise BadArgumentError(f"protection must be one of {', '.join(PROTECTIONS)}, not {placement.protection!r}")
    if placement.protection != "rw" and (here or task is None):
        raise BadArgumentError(f"protection={placement.protection!r} is only for memory in another task")
    if placement.overwrite and not (placement.at and here):
        raise BadArgumentError("overwrite=True replaces address space that this process has reserved: pass address=")
    if placement.at and task is None:
        raise BadArgumentError(
            "memory that is mapped in no task has no address: map it there with createMappingInTask"
        )
    if placement.at < 0 or placement.at + capacity > _MOST:
        raise BadArgumentError(f"no memory of {capacity} bytes can begin at address {placement.at:#x}")
    if placement.at % alignment:
        raise BadArgumentError(
            f"address {placement.at:#x} is not a multiple of {alignment}, the alignment of the memory"
        )


def _check_cache_mode(options: int) -> None:
    """Raise `kIOReturnUnsupported` for a cache mode that cannot be honored."""
    mode = options & CACHE_MODES
    if mode > IOMapOptions.kIOMapWriteCombineCache:
        raise UnsupportedError(f"cache mode {mode:#x} is not available to a process")
    if mode not in _PLAIN_MODES:
        require_cache_instruction(mapping.BEST_FLUSH)


def require_cache_instruction(instruction: int) -> None:
    """Raise `kIOReturnUnsupported` if the processor lacks a cache line `instruction`."""
    if instruction == mapping.NO_FLUSH:
        message = "this processor does not let processes flush cache lines (x86-64 and aarch64 do)"
        raise UnsupportedError(message)


def cache_of_copies(options: int) -> int:
    """Return the value of `Mapping.cache` for these options."""
    return (options & CACHE_MODES) >> 8
