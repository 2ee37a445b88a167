"""`IOGuardPageMemoryDescriptor`: inaccessible pages, to be part of a concatenation."""

from __future__ import annotations

from typing import Self

from iobmd._internal.arguments import check_integers
from iobmd.backing.guard_pages import GuardBacking
from iobmd.constants import IOOptionBits
from iobmd.descriptors.descriptor import IOMemoryDescriptor
from iobmd.errors import BadArgumentError
from iobmd.units import PAGE_SIZE, round_up

_MOST = 1 << 47  # the address space of a process


class IOGuardPageMemoryDescriptor(IOMemoryDescriptor):
    """Guard pages: a map of them is inaccessible, so that an overrun of the memory before or after them faults.

    As a part of an `IOMultiMemoryDescriptor` it separates other descriptors' memory, by as many pages as requested.
    Maps that contain guard pages cannot be viewed, because a view would access all of them; map the parts between
    them for views. Guard pages need not be freed, and have neither bytes nor physical addresses.

    Source: IOKit's IOGuardPageMemoryDescriptor.h, where guard pages are memory that occupies page frames.
    """

    _initializer = "initWithSize"

    @classmethod
    def withSize(cls, size: int) -> Self:
        """Describe `size` bytes of guard pages, as `initWithSize`."""
        self = cls()
        self.initWithSize(size)
        return self

    def initWithSize(self, size: int) -> bool:
        """Describe guard pages; may be called again. Returns True.

        Parameters
        ----------
        size : int
            In bytes, rounded up to whole pages.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument`: not positive, or larger than an address space.
        """
        check_integers(size=size)
        if not 0 < size <= _MOST:
            raise BadArgumentError(
                f"guard pages of {size} bytes: the size must be positive, and fit into an address space"
            )
        size = round_up(int(size), PAGE_SIZE)
        self._hold(GuardBacking(size), int(IOOptionBits.kIODirectionInOut), size)
        return True
