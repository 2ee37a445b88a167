"""Where and how new memory is mapped: an address, over reserved address space, with or without rights to write."""

from __future__ import annotations

import errno
from typing import NamedTuple

from iobmd._native.mapping import Mapping
from iobmd.errors import BadArgumentError, NoResourcesError, UnsupportedError
from iobmd.host import limits
from iobmd.units import format_size

PROTECTIONS = "r", "rw", "rx", "rwx"


class Placement(NamedTuple):
    """The address of new memory, and what its task may do with it."""

    at: int = 0
    """Address of the first byte; 0: any."""
    overwrite: bool = False
    """Whether it replaces reserved address space, instead of being mapped where nothing is."""
    protection: str = "rw"
    """What its task may do with it: one of `PROTECTIONS`."""

    def space(self, size: int) -> Mapping | None:
        """Reserve the addresses, before the kernel chooses them for something else; None if any will do.

        Raises
        ------
        IOReturnError
            `kIOReturnNoResources`: memory is mapped there. `kIOReturnBadArgument`: the range is not reserved.
            `kIOReturnNoMemory`.
        """
        if not self.at:
            return None
        where = f"cannot map {format_size(size)} at {self.at:#x}"
        try:
            return Mapping.space(self.at, size, self.overwrite)
        except FileExistsError as error:
            if not self.overwrite:
                raise NoResourcesError(f"{where}: memory is mapped there", error.errno or 0) from None
            message = (
                f"{where}: the range is not reserved at {error.filename}; reserve it by a private anonymous mapping "
                "without access (mmap with PROT_NONE)"
            )
            raise BadArgumentError(message, error.errno or 0) from None
        except OSError as error:
            raise limits.from_oserror(error, where, size) from None


def move(mapping: Mapping, space: Mapping | None) -> None:
    """Move a new mapping into its space, if it has one.

    All kinds of memory are made elsewhere first, also contiguous memory, which is collected from many places: moving
    them changes page tables only. Raises `kIOReturnNoMemory`; `kIOReturnUnsupported` for huge pages of a pool.
    """
    if space is None:
        return
    where = f"cannot map {format_size(space.size)} at {space.address:#x}"
    try:
        mapping.move(space)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise UnsupportedError(
                f"{where}: only hugetlb pages were found, which cannot be moved", errno.EINVAL
            ) from None
        raise limits.from_oserror(error, where, space.size) from None
