"""What a caller asks of a buffer, checked against IOKit's rules (IOBufferMemoryDescriptor.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from iobmd._version import __version__
from iobmd.constants import IOOptionBits, IOReturn
from iobmd.descriptors import caching
from iobmd.errors import IOReturnError
from iobmd.memory.shmem import NAME
from iobmd.physical.search import ALL_ADDRESSES, PhysicalConstraints
from iobmd.task.task import Task, as_task, kernel_task
from iobmd.units import PAGE_SIZE, is_power_of_two

if TYPE_CHECKING:
    import psutil

DIRECTION_MASK = 0x3
CACHE_MASK = 0xF00

_PAGEABLE = int(IOOptionBits.kIOMemoryPageable)
_PURGEABLE = int(IOOptionBits.kIOMemoryPurgeable)
_SHARED = int(IOOptionBits.kIOMemoryKernelUserShared)
_KNOWN = CACHE_MASK | sum({int(option) for option in IOOptionBits})

_MOST = (1 << 63) - 2 * PAGE_SIZE  # bytes of a file (off_t), less what rounding and a trailer add

_CONTIGUOUS = int(IOOptionBits.kIOMemoryPhysicallyContiguous | IOOptionBits.kIOMemoryHostPhysicallyContiguous)

_OF_NEW_MEMORY = _CONTIGUOUS | _PAGEABLE | _PURGEABLE

_NOT_YET = {
    int(IOOptionBits.kIOMemoryClearEncrypt): "encrypted memory",
    int(IOOptionBits.kIOMemoryUseReserve): "the reserve",
}
"""Options of the contract that this version does not have, and what they ask for."""


class Request(NamedTuple):
    """A checked request: sizes in bytes."""

    task: Task | None
    """Whose address space it is mapped in; None: in none."""
    options: int
    capacity: int
    want: PhysicalConstraints | None
    """What is asked of the physical addresses; None: nothing that not any page has."""
    contiguous: bool
    """Asked to be in one piece, by an option or by its alignment."""
    guard: int = 0
    """Bytes on each side that nobody can touch."""
    tag: int = 0
    """What its mappings are named by; 0: nothing."""

    @property
    def name(self) -> str:
        """The name of its mappings, where the kernel shows one."""
        return f"{NAME}:{self.tag}" if self.tag else NAME

    @property
    def here(self) -> bool:
        """Whether it is mapped in this process."""
        return self.task is not None and self.task.is_current

    @property
    def wired(self) -> bool:
        """Whether the memory stays resident."""
        return not self.options & _PAGEABLE

    @property
    def purgeable(self) -> bool:
        """Whether the system may take it while it is volatile."""
        return bool(self.options & _PURGEABLE)

    @property
    def shared(self) -> bool:
        """Whether other processes may map it."""
        return bool(self.options & _SHARED)


def check_request(
    task: Task | int | psutil.Process | None,
    options: int,
    capacity: int,
    alignment: int,
    physical_mask: int,
    guarded: bool = False,
    tags: tuple[int, int] = (0, 0),
) -> Request:
    """Check a request for a buffer; the parameters are those of `initWithPhysicalMask`, and what factories add.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`, or `kIOReturnUnsupported` for what this version does not have.
    """
    options = int(options)
    if capacity <= 0:
        raise _bad(f"a buffer's size must be positive, not {capacity}")
    if alignment not in (0, 1) and not is_power_of_two(alignment):
        raise _bad(f"alignment {alignment} is not a power of two")
    if not 0 <= physical_mask < 1 << 64:
        raise _bad(f"physical mask {physical_mask:#x} is not a 64-bit mask")
    if capacity + alignment > _MOST:
        raise _bad(f"size {capacity:#x} with alignment {alignment:#x} exceeds every address space")
    _check_options(options)
    if guarded:
        _check_guarded(task, options)
    want, contiguous = _physical(options, capacity, alignment, physical_mask)
    if options & _PAGEABLE and (want or contiguous):
        what = want or PhysicalConstraints(capacity, contiguous)
        raise _bad(f"pageable memory moves, and cannot be {what}: leave kIOMemoryPageable out")
    where = None if task is None else kernel_task if task is kernel_task else as_task(task)
    tag = _tag(tags, in_kernel=where is None or where is kernel_task)
    return Request(where, options, capacity, want, contiguous, PAGE_SIZE if guarded else 0, tag)


def _physical(options: int, capacity: int, alignment: int, mask: int) -> tuple[PhysicalConstraints | None, bool]:
    """Return what is asked of physical addresses, None when any page will do, and whether contiguity is asked."""
    allowed = ALL_ADDRESSES
    if mask:
        # The bits below the mask's lowest are free within a piece of that alignment (initWithPhysicalMask of IOKit).
        lowest = mask & -mask
        allowed = mask | (max(lowest, PAGE_SIZE) - 1)
        if alignment <= 1:
            alignment = max(lowest, PAGE_SIZE)
    contiguous = bool(options & _CONTIGUOUS) or alignment > PAGE_SIZE
    if allowed == ALL_ADDRESSES and alignment <= PAGE_SIZE and (capacity <= PAGE_SIZE or not contiguous):
        return None, contiguous
    return PhysicalConstraints(capacity, contiguous, max(alignment, 1), allowed), contiguous


def check_existing(options: int) -> int:
    """Return the options of a descriptor of memory that exists already.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument` for what can only be asked of new memory; `kIOReturnUnsupported` as `check_request`.
    """
    options = int(options)
    _check_options(options)
    if options & _OF_NEW_MEMORY:
        raise _bad(f"options {options:#x} ask for memory as it can only be made, and this memory exists already")
    return options


def check_direction(direction: int) -> int:
    """Return `direction` if it is one of the four of IOKit."""
    if not 0 <= direction <= DIRECTION_MASK:
        raise _bad(f"direction {direction:#x} is none of kIODirectionNone, In, Out and InOut")
    return int(direction)


def _check_options(options: int) -> None:
    if options < 0 or options & ~_KNOWN:
        raise _bad(f"options {options:#x} have unknown bits {options & ~_KNOWN & 0xFFFFFFFFFFFFFFFF:#x}")
    if options & _PURGEABLE and not options & _PAGEABLE:
        raise _bad("kIOMemoryPurgeable needs kIOMemoryPageable: wired memory cannot be taken back")
    for bits, meaning in _NOT_YET.items():
        if options & bits:
            raise unsupported(meaning)
    caching.check(options)


def _tag(tags: tuple[int, int], *, in_kernel: bool) -> int:
    """Return the tag of a mapping: in `kernel_task` the first, else the second; the other where that is 0."""
    if tags == (0, 0):
        return 0
    if any(not 0 <= tag < 1 << 32 for tag in tags):
        raise _bad(f"tags {tags} are not 32-bit numbers")
    return (tags[0] or tags[1]) if in_kernel else (tags[1] or tags[0])


def _check_guarded(task: object, options: int) -> None:
    if options & (_PAGEABLE | _CONTIGUOUS):
        raise _bad("memory with guard pages is neither pageable nor contiguous: leave those options out")
    if task is None:
        raise _bad("memory that is mapped in no task has no guard pages; map it with kIOMapGuardedSmall")


def _bad(message: str) -> IOReturnError:
    return IOReturnError(IOReturn.kIOReturnBadArgument, message)


def unsupported(what: str) -> IOReturnError:
    """Return the error for a part of the contract that this version does not have."""
    return IOReturnError(IOReturn.kIOReturnUnsupported, f"iobmd {__version__} does not support {what} yet")
