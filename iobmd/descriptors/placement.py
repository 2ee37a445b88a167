"""Where a descriptor's memory lies: the part of `IOMemoryDescriptor` that tells physical addresses."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.memory.mlock import Wiring
from iobmd.physical.layout import Layout, layout
from iobmd.task import diagnosis
from iobmd.task.task import kernel_task

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
        """Check that the memory is mapped where it was, and read every frame again that was recorded.

        Raises
        ------
        IOReturnError
            `kIOReturnVMError`: a page has moved, or the program has unmapped or replaced it; `.address` is the
            virtual address of the first one. Or as `segments`.

        Notes
        -----
        Private memory that other private memory has replaced is found where it is pinned and its frames are visible
        only: else the kernel shows no difference. Memory of shared objects is told by its device and inode.
        """
        backing = self._memory()
        lost = backing.lost()
        try:
            recorded = self._runs(backing)
            now = backing.read_runs(gaps=True)
            if now is None:
                raise _hidden()
        except IOReturnError:
            if lost is None:
                raise
            raise _gone(backing, lost) from None
        moved = recorded.difference(now)
        if lost is not None and (moved is None or lost <= moved):
            raise _gone(backing, lost)
        if moved is not None:
            was, _ = recorded.segment(moved, 1)
            lies, _ = now.segment(moved, 1)
            if not lies:
                raise _gone(backing, moved)
            message = (
                f"the page at {moved:#x} was at physical {was:#x} and is at {lies:#x} now (it has moved, or other "
                "memory is mapped there): do not use it for I/O"
            )
            raise IOReturnError(IOReturn.kIOReturnVMError, message, 0, moved)

    def _require_mapped(self) -> None:
        """Check that the program has not unmapped the memory.

        Raises
        ------
        IOReturnError
            `kIOReturnVMError`, as `verify`, which also sees what has replaced private memory.
        """
        backing = self._memory()
        if (lost := backing.lost()) is not None:
            raise _gone(backing, lost)

    def _runs(self, backing: Backing) -> RunTable:
        pinned, table = backing.wiring is Wiring.PINNED, backing.runs
        if not pinned or backing.wiring is not Wiring.PINNED:  # again: another thread may have unpinned it between
            raise IOReturnError(
                IOReturn.kIOReturnNotReady,
                f"{self!r} is not pinned: its physical addresses could change; call prepare() first",
            )
        if table is None:
            raise _hidden()
        return table


def _hidden() -> IOReturnError:
    return diagnosis.hidden(os.getpid()) or IOReturnError(
        IOReturn.kIOReturnNotPrivileged,
        "the kernel hides physical addresses from this process; run with CAP_SYS_ADMIN",
    )


def _gone(backing: Backing, address: int) -> IOReturnError:
    task = backing.task or kernel_task
    area = None
    with contextlib.suppress(OSError):
        area = procfs.find_vma(task.pid, address)
    what = f"replaced it by {area}" if area else "unmapped it"
    message = f"the memory at {address:#x} of task {task.pid} is gone: the program has {what}"
    return IOReturnError(IOReturn.kIOReturnVMError, message, 0, address)
