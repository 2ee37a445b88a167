"""Descriptors of memory that exists already: the part of `IOMemoryDescriptor` that makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from iobmd.backing.existing import RangeBacking
from iobmd.backing.joined import JoinedBacking, Part
from iobmd.constants import IOOptionBits
from iobmd.descriptors import address_index
from iobmd.descriptors.options import check_existing
from iobmd.task.task import as_task, check_range, kernel_task

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import psutil

    from iobmd.backing import Backing
    from iobmd.task.task import Task

    AnyTask = Task | int | psutil.Process

_IN = int(IOOptionBits.kIODirectionIn)


class Existing:
    """The factories over addresses."""

    @classmethod
    def withAddressRange(cls, address: int, length: int, options: int, task: AnyTask) -> Self:
        """Describe `length` bytes that are at `address` of a task already. As `withAddressRanges` with one range."""
        return cls.withAddressRanges([(address, length)], options, task)

    @classmethod
    def withAddressRanges(cls, ranges: Iterable[tuple[int, int]], options: int, task: AnyTask) -> Self:
        """Describe memory that a task has already: ranges of its addresses, one behind the other.

        It can be read, written, prepared and described. Memory of iobmd's is known again by its addresses: it lives
        as long as this descriptor does, is read and written as through its own descriptor, and can be mapped if it is
        shared. All other memory is its task's, which must keep it there.

        Parameters
        ----------
        ranges : iterable of (int, int)
            Address and length in bytes, any; those of length 0 count for nothing.
        options : IOOptionBits
            The direction of transfers. `kIODirectionIn`, among others, needs memory that may be written to.
        task : Task, int or psutil.Process
            Whose addresses.

        Returns
        -------
        IOMemoryDescriptor
            To be freed, or used in a `with`, if it is to let go of what it holds at a known time.

        Raises
        ------
        IOReturnError
            `kIOReturnVMError`: a byte is not mapped, or may not be accessed (`.address`: the first such).
            `kIOReturnBadArgument`, `kIOReturnNotFound`, `kIOReturnNotPermitted`.

        Notes
        -----
        `prepare` pins memory of this process. That of another task it pins through an io_uring made there, which is
        taken away from it again; where that is not to be had, it is made resident (mlock(2), called there). Memory
        that the kernel does not pin stays unprepared: `kIOReturnCannotWire` for read-only memory and shared mappings
        of files on a disk (in another task these are locked), `kIOReturnUnsupported` for memory of a device or of
        memfd_secret(2), `kIOReturnVMError` for what is past the end of a file or a guard page. `.address` is the
        first such byte. An access to memory that went away raises `kIOReturnVMError`, and is safe at any time.
        """
        options = check_existing(options)
        where = as_task(task)
        where = kernel_task if where.is_current else where
        found = list(_found(where, ranges, writable=bool(options & _IN)))
        length = sum(one.length for one in found)
        self: Self = cls._plain()._hold(cls._together(found, options), options, length)
        return self

    @classmethod
    def _together(cls, found: list[Part | RangeBacking], options: int) -> Backing:
        if len(found) == 1 and isinstance(found[0], RangeBacking):
            return found[0]
        return JoinedBacking([one if isinstance(one, Part) else cls._as_part(one, options) for one in found])

    @classmethod
    def _as_part(cls, backing: RangeBacking, options: int) -> Part:
        owner = cls._plain()._hold(backing, options, backing.length)
        owner._inherited = True  # nobody else has it
        return Part(owner, 0, backing.length)

    @staticmethod
    def _plain() -> Any:
        """Return a descriptor of nothing yet, of the class that has no factories of its own."""
        raise NotImplementedError


def _found(task: Task, ranges: Iterable[tuple[int, int]], *, writable: bool) -> Iterator[Part | RangeBacking]:
    """Yield what is at the ranges that have bytes: memory of iobmd, or else ranges, adjacent ones as one."""
    open_range = (0, 0)
    for address, length in ranges:
        check_range(address, length)
        part = address_index.find(task, address, length) if length else None
        if open_range[1] and (part or (length and sum(open_range) != address)):
            yield RangeBacking(task, *open_range, writable=writable)
            open_range = (0, 0)
        if part:
            yield part
        elif length:
            open_range = (open_range[0] if open_range[1] else address), open_range[1] + length
    if open_range[1]:
        yield RangeBacking(task, *open_range, writable=writable)
