"""Where a descriptor's memory lies: the part of `IOMemoryDescriptor` that tells physical addresses."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from iobmd import refusals
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.physical import Layout, layout
from iobmd.wiring import Wiring

if TYPE_CHECKING:
    from iobmd._native.runs import PhysicalSegment, RunTable
    from iobmd.backing import Backing


class Placement:
    """Physical addresses, told only while they cannot change."""

    _length: int

    def _memory(self) -> Backing:
        raise NotImplementedError

    def _check_range(self, offset: int, length: int) -> None:
        raise NotImplementedError

    def getPhysicalAddress(self) -> int:
        """Return the physical address of the first byte. Raises as `segments`."""
        return self.getPhysicalSegment(0)[0]

    def getPhysicalSegment(self, offset: int, options: int = 0) -> tuple[int, int]:  # noqa: ARG002 (IOKit's)
        """Return the physical address of the byte `offset`, and how many bytes from there on are contiguous.

        `(0, 0)` for an offset past the end. Raises as `segments`.
        """
        backing = self._memory()
        table = self._runs(backing)
        if not 0 <= offset < self._length:
            return 0, 0
        return table.segment(backing.address + offset, self._length - offset)

    def segments(self, offset: int = 0, length: int | None = None) -> list[PhysicalSegment]:
        """Return the physically contiguous pieces of a range, in order; each has `.address` and `.length` in bytes.

        Parameters
        ----------
        offset, length : int
            In bytes, any; `length` None: to the end.

        Raises
        ------
        IOReturnError
            `kIOReturnNotReady`: not pinned, so that addresses could change; `prepare()` pins it.
            `kIOReturnNotPrivileged`: the kernel hides the addresses. `kIOReturnBadArgument`: past the end.
        """
        backing = self._memory()
        length = self._length - offset if length is None else length
        self._check_range(offset, length)
        return self._runs(backing).segments(backing.address + offset, length)

    def layout(self) -> Layout:
        """Summarise how the memory lies: runs, the largest, contiguous or not, huge pages. Raises as `segments`."""
        backing = self._memory()
        return layout(self._runs(backing), backing.huge_bytes())

    def verify(self) -> None:
        """Read every frame again, and compare it with what was recorded when the memory was pinned.

        Raises
        ------
        IOReturnError
            `kIOReturnVMError`: a page has moved, `.address` is its virtual address. Or as `segments`.
        """
        backing = self._memory()
        recorded = self._runs(backing)
        now = backing.read_runs()
        if now is None:
            raise _hidden()
        if (moved := recorded.difference(now)) is not None:
            was, _ = recorded.segment(moved, 1)
            lies, _ = now.segment(moved, 1)
            message = (
                f"the page at {moved:#x} was at physical {was:#x} and is at {lies:#x} now: do not use it for I/O"
            )
            raise IOReturnError(IOReturn.kIOReturnVMError, message, 0, moved)

    def _runs(self, backing: Backing) -> RunTable:
        if backing.wiring is not Wiring.PINNED:
            raise IOReturnError(
                IOReturn.kIOReturnNotReady,
                f"{self!r} is not pinned: its physical addresses could change; call prepare() first",
            )
        if backing.runs is None:
            raise _hidden()
        return backing.runs


def _hidden() -> IOReturnError:
    return refusals.hidden(os.getpid()) or IOReturnError(
        IOReturn.kIOReturnNotPrivileged,
        "the kernel hides physical addresses from this process; run with CAP_SYS_ADMIN",
    )
