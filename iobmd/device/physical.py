"""Physical addresses, mapped by /dev/mem (mem(4)) where the kernel permits it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from iobmd._internal.process_local import Guard
from iobmd.device.region import Region, opened
from iobmd.errors import BadArgumentError, NotPermittedError
from iobmd.units import PAGE_SIZE, round_down

if TYPE_CHECKING:
    from iobmd._internal.process_local import Fd
    from iobmd.errors import IOReturnError

_FILE = "/dev/mem"
_END = 1 << 63
"""The end of the offsets in a file."""


class PhysicalRegion(Region):
    """A range of physical addresses; /dev/mem is opened when it is first mapped.

    Parameters
    ----------
    start, size : int
        The first address, and the number of bytes.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: the range is empty, or exceeds 64-bit addresses.
    """

    def __init__(self, start: int, size: int) -> None:
        if start < 0 or size <= 0 or start + size > 1 << 64:
            raise BadArgumentError(f"{size} bytes at {start:#x} are not a range of physical addresses")
        page = round_down(start, PAGE_SIZE)
        super().__init__(f"physical address {start:#x}", None, page, size, in_page=start - page, address=start)
        self._guard = Guard()

    def file(self) -> Fd:
        """Return the descriptor of /dev/mem.

        O_SYNC: x86 maps memory of devices uncached with it (phys_mem_access_prot_allowed).
        """
        with self._guard:
            if self._file is None:
                absent = "this kernel lacks it (CONFIG_DEVMEM); use ofPCI, ofUIO or ofVFIO"
                self._file = opened(_FILE, self.what, absent, os.O_SYNC)
            return self._file

    def pages(self, offset: int, length: int) -> tuple[int, int]:
        """Return the offset in the file, and the size, of the pages that contain a range, as `Region.pages`."""
        start, size = super().pages(offset, length)
        if start + size > _END:
            raise self._out_of_reach()
        return start, size

    def _out_of_reach(self) -> BadArgumentError:
        return BadArgumentError(f"{self.what} cannot be mapped: this processor cannot generate the address")

    def refusal(self, error: OSError) -> IOReturnError | None:
        """Return the error for an mmap(2) that failed, as `Region.refusal`."""
        if error.errno == errno.EPERM:
            message = (
                f"the kernel does not map {self.what} from {_FILE}: it is main memory (CONFIG_STRICT_DEVMEM), "
                "belongs to a driver (CONFIG_IO_STRICT_DEVMEM), or the kernel is locked down; /proc/iomem lists both"
            )
            return NotPermittedError(message, errno.EPERM)
        if error.errno in (errno.EINVAL, errno.EOVERFLOW):
            return self._out_of_reach()
        return super().refusal(error)
