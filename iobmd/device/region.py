"""`Region`: a range of device memory, as a part of a file that can be mapped."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from iobmd._internal.process_local import Fd
from iobmd.constants import IOMapOptions, IOReturn
from iobmd.errors import IOReturnError, NotPermittedError, NotPrivilegedError, UnsupportedError
from iobmd.host import limits
from iobmd.units import PAGE_SIZE, round_down, round_up

if TYPE_CHECKING:
    from typing_extensions import Buffer

UNCACHED, COMBINED = IOMapOptions.kIOMapInhibitCache, IOMapOptions.kIOMapWriteCombineCache


class Region:
    """Memory of a device.

    Parameters
    ----------
    what : str
        Its name, for messages.
    file : Fd, optional
        The file that maps it; None: a subclass opens it on first use.
    start : int
        Offset in the file of the page that contains its first byte.
    in_page : int
        Offset of its first byte in that page.
    size : int
        In bytes.
    address : int, optional
        The bus address of its first byte, as this processor uses it; None: unknown.
    cache : IOMapOptions
        The cache mode of its mappings.
    """

    mappable = True
    """Whether it can be mapped; otherwise it is only read and written through its file."""
    maps_parts = True
    """Whether a mapping may begin after its first page."""

    def __init__(
        self,
        what: str,
        file: Fd | None,
        start: int,
        size: int,
        *,
        in_page: int = 0,
        address: int | None = None,
        cache: IOMapOptions = UNCACHED,
    ) -> None:
        self.what = what
        self._file = file
        self._start = start
        self.in_page = in_page
        self.size = size
        self.address = address
        self.cache = cache

    def file(self) -> Fd:
        """Return the descriptor of its file."""
        assert self._file  # of each region whose subclass does not open it
        return self._file

    def pages(self, offset: int, length: int) -> tuple[int, int]:
        """Return the offset in the file, and the size, of the pages that contain a range.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: the device does not respond to accesses. `kIOReturnUnsupported`: the range cannot be
            mapped.
        """
        self.require_ready()
        first = round_down(self.in_page + offset, PAGE_SIZE)
        return self._start + first, round_up(self.in_page + offset + length, PAGE_SIZE) - first

    def require_ready(self) -> None:
        """Raise `kIOReturnNotReady` if the device is known not to respond to accesses."""

    def refusal(self, error: OSError) -> IOReturnError | None:
        """Return the error for an mmap(2) of its file that failed; None if the reason is not the file."""
        if error.errno in (errno.EPERM, errno.EACCES):
            message = (
                f"{self.what} cannot be mapped: the kernel is locked down (/sys/kernel/security/lockdown), which "
                "forbids accesses to devices from processes; use VFIO"
            )
            return NotPermittedError(message, error.errno)
        return None

    def read_into(self, _offset: int, _buffer: Buffer) -> None:
        """Read a range through the file, if it cannot be mapped."""
        raise UnsupportedError(f"{self.what} is not read through a file")

    def write(self, _offset: int, _data: Buffer) -> None:
        """Write a range through the file, if it cannot be mapped."""
        raise UnsupportedError(f"{self.what} is not written through a file")

    def export(self, _offset: int, _length: int) -> int:
        """Return the descriptor of a dma-buf of a part.

        Raises
        ------
        IOReturnError
            `kIOReturnUnsupported`: it cannot be exported. `kIOReturnBadArgument`.
        """
        message = f"{self.what} cannot be exported: only VFIO exports memory of devices as dma-bufs (ofVFIO)"
        raise UnsupportedError(message)

    def close(self) -> None:
        """Close its file at the end of its last use. Idempotent."""
        if self._file:
            self._file.close()


def opened(path: str, what: str, absent: str, flags: int = 0) -> Fd:
    """Open the file of a region for reading and writing.

    Parameters
    ----------
    path : str
        The file.
    what : str
        The name of its contents, for messages.
    absent : str
        Why it may be absent.
    flags : int
        Further flags of open(2).

    Raises
    ------
    IOReturnError
        `kIOReturnNotPrivileged`; `kIOReturnUnsupported`: it does not exist; `kIOReturnNoResources`.
    """
    try:
        return Fd(os.open(path, os.O_RDWR | os.O_CLOEXEC | flags), what)
    except PermissionError as error:
        message = f"cannot open {path} for {what}: run as root, or let root chown it to this user"
        raise NotPrivilegedError(message, error.errno or 0) from None
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnsupportedError(f"there is no {path} for {what}: {absent}", error.errno or 0) from None
    except OSError as error:
        raise limits.from_oserror(error, f"cannot open {path} for {what}") from None


def no_device(message: str) -> IOReturnError:
    """Return the error for a device that does not exist."""
    return IOReturnError(IOReturn.kIOReturnNoDevice, message, errno.ENODEV)
