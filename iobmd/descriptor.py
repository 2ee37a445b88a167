"""`IOMemoryDescriptor`: what every memory descriptor can do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from iobmd import pagemap
from iobmd.constants import IOOptionBits, IOReturn
from iobmd.errors import IOReturnError
from iobmd.request import DIRECTION_MASK
from iobmd.wiring import Wiring

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from iobmd.backing import Backing


class IOMemoryDescriptor:
    """A range of memory with a length, a direction and a task. Made by the factories of its subclasses.

    Methods may be called from any thread. Memory that goes away under a copy is impossible: `free` refuses while
    one is under way. In a forked child a wired descriptor refuses to work, for mlock(2) is not inherited: the
    child's copy of the memory is not wired. A pageable one goes on there with the child's copy-on-write memory.
    """

    _backing: Backing | None = None
    _length = 0
    _options = 0
    _tag = 0
    _maker = 0  # pid of the process that made it
    _state = "not initialised"

    def getLength(self) -> int:
        """Return the length in bytes."""
        self._memory()
        return self._length

    def getDirection(self) -> IOOptionBits:
        """Return the direction of transfers: `kIODirectionNone`, `In`, `Out` or `InOut`."""
        self._memory()
        return IOOptionBits(self._options & DIRECTION_MASK)

    def getFlags(self) -> IOOptionBits:
        """Return the options it was made with, and its present direction."""
        self._memory()
        return IOOptionBits(self._options)

    def getTag(self) -> int:
        """Return the number set by `setTag`, 0 at first."""
        return self._tag

    def setTag(self, tag: int) -> None:
        """Keep a number of the caller's with the descriptor."""
        self._tag = tag

    @property
    def wiring(self) -> Wiring:
        """How firmly the memory stays where it is."""
        return self._memory().wiring

    def readBytes(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on.

        Raises
        ------
        IOReturnError
            `kIOReturnBadArgument` when the range passes the end of the descriptor's length.
        """
        backing = self._memory()
        self._check_range(offset, length)
        return backing.read(offset, length)

    def readBytesInto(self, offset: int, buffer: Buffer) -> int:
        """Fill the writable `buffer` from `offset` on; return its size in bytes. Raises as `readBytes`."""
        backing = self._memory()
        size = memoryview(buffer).nbytes
        self._check_range(offset, size)
        backing.read_into(offset, buffer)
        return size

    def writeBytes(self, offset: int, data: Buffer) -> int:
        """Copy all of `data` to `offset`; return its size in bytes. Raises as `readBytes`, with nothing written."""
        backing = self._memory()
        size = memoryview(data).nbytes
        self._check_range(offset, size)
        backing.write(offset, data)
        return size

    def getPageCounts(self) -> tuple[int, int]:
        """Return how many pages are resident, and how many of those are dirty (written to), as pagemap says."""
        backing = self._memory()
        return pagemap.resident_and_dirty(backing.task, backing.address, backing.size)

    def free(self) -> None:
        """Give the memory back; the descriptor cannot be used afterwards. Idempotent, and so is leaving `with`.

        Raises
        ------
        IOReturnError
            `kIOReturnBusy` while a `memoryview` of it is alive or a copy is under way: nothing is freed then.
        """
        if self._backing is None:
            return
        try:
            self._backing.close()
        except BufferError as error:
            message = f"{self!r} is in use ({error}): release its memoryviews and arrays first"
            raise IOReturnError(IOReturn.kIOReturnBusy, message) from None
        self._backing = None
        self._state = "released"

    release = free

    def _memory(self) -> Backing:
        """Return where the bytes live, or raise `kIOReturnNotOpen`."""
        if self._backing is None:
            raise IOReturnError(IOReturn.kIOReturnNotOpen, f"this {type(self).__name__} is {self._state}")
        if self._maker != os.getpid() and self._backing.wiring is not Wiring.PAGEABLE:
            raise IOReturnError(
                IOReturn.kIOReturnNotOpen,
                f"this {type(self).__name__} is wired memory of process {self._maker}, and fork does not pass wiring "
                f"on to process {os.getpid()}: make the buffer after the fork, or a pageable one before it",
            )
        return self._backing

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self._length:
            raise IOReturnError(
                IOReturn.kIOReturnBadArgument,
                f"offset {offset} with length {length} is not inside of the descriptor's {self._length} bytes",
            )

    def __len__(self) -> int:
        return self.getLength()

    def __enter__(self) -> Any:
        self._memory()
        return self

    def __exit__(self, *_error: object) -> None:
        self.free()
