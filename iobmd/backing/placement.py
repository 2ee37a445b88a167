"""The placement of new memory: its address, whether it replaces reserved address space, and its protection."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, NamedTuple

from iobmd._native.mapping import Mapping
from iobmd.errors import NoResourcesError, UnsupportedError
from iobmd.host import limits
from iobmd.memory import shmem
from iobmd.units import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

PROTECTIONS = "r", "rw", "rx", "rwx"


class Placement(NamedTuple):
    """The address of new memory, and its protection in its task."""

    at: int = 0
    """Address of the first byte; 0: any."""
    overwrite: bool = False
    """Whether it replaces reserved address space; False: nothing may be mapped there."""
    protection: str = "rw"
    """Its protection in its task: one of `PROTECTIONS`."""

    def place(self, size: int, create: Callable[[], Mapping]) -> Mapping:
        """Create a mapping at the address.

        All kinds of memory are first created at other addresses, including contiguous memory, which is collected from
        many ranges; moving them only changes page tables. The address is reserved before, so that the kernel does not
        use it for the new mapping.

        Parameters
        ----------
        size : int
            Size of the mapping in bytes, in whole pages.
        create : callable
            Creates it at any address.

        Raises
        ------
        IOReturnError
            `kIOReturnNoResources`: memory is mapped there. `kIOReturnBadArgument`: the range is not reserved.
            `kIOReturnNoMemory`; `kIOReturnUnsupported` for huge pages of a pool. The addresses are unchanged.
        """
        if not self.at:
            return create()
        with contextlib.ExitStack() as undo:
            # Closed at once: the traceback of an exception may retain them until the caller has mapped memory there.
            space = self._space(size)
            undo.callback(space.close)
            mapping = create()
            undo.callback(mapping.close)
            _move(mapping, space)
            undo.pop_all()
        return mapping

    def _space(self, size: int) -> Mapping:
        where = f"cannot map {format_size(size)} at {self.at:#x}"
        try:
            return Mapping.space(self.at, size, self.overwrite)
        except FileExistsError as error:
            if not self.overwrite:
                raise NoResourcesError(f"{where}: memory is mapped there", error.errno or 0) from None
            raise shmem.not_reserved(where, error) from None
        except OSError as error:
            raise limits.from_oserror(error, where, size) from None


ANYWHERE = Placement()


def _move(mapping: Mapping, space: Mapping) -> None:
    size = space.size
    where = f"cannot map {format_size(size)} at {space.address:#x}"
    try:
        mapping.move(space)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise UnsupportedError(
                f"{where}: only hugetlb pages were found, which cannot be moved", errno.EINVAL
            ) from None
        raise limits.from_oserror(error, where, size) from None
