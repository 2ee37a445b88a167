"""Memory of a shared object (memfd): the same pages for every process that maps it, a forked child for one."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from iobmd import headroom, refusals
from iobmd._native import memory
from iobmd._native.mapping import Mapping
from iobmd.backing.mapped import MappedBacking
from iobmd.constants import IOReturn
from iobmd.errors import CannotWireError, IOReturnError
from iobmd.purgeable.agreed import TRAILER, AgreedState
from iobmd.units import PAGE_SIZE, format_size, pages, round_up
from iobmd.wiring import make_resident

if TYPE_CHECKING:
    from iobmd.pieces import Progress
    from iobmd.task import Task

# linux/fcntl.h: without them a process that has the descriptor could cut the memory away under the others.
_F_ADD_SEALS, _F_SEAL_SHRINK, _F_SEAL_GROW = 1033, 0x2, 0x4


class SharedBacking(MappedBacking):
    """Zeroed memory of a shared object, mapped here. Parameters as those of `AnonymousBacking`."""

    def __init__(
        self,
        size: int,
        *,
        wired: bool,
        purgeable: bool = False,
        source: tuple[Task, int] | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(wired=wired)
        if wired or source:
            headroom.require(size, swappable=not wired)
        whole = round_up(size, PAGE_SIZE)
        try:
            self._fd = _create(whole + (TRAILER if purgeable else 0))
        except OSError as error:
            raise refusals.own(error, f"cannot make a shared object of {format_size(size)}") from None
        try:
            self.mapping = Mapping.file(self._fd, whole)
        except OSError as error:
            os.close(self._fd)
            raise refusals.own(error, f"cannot map {format_size(size)}") from None
        try:
            if purgeable:
                self.purgeable = AgreedState(self._fd, whole)
            if source:
                task, address = source
                task.copy_in(address, self.address, size, progress=progress)
            if wired:
                make_resident(self.address, self.size)
                with contextlib.suppress(CannotWireError):  # resident, then, and it says so
                    self.pin()
        except BaseException:
            self.close()
            raise

    def view(self, offset: int, size: int, at: int, writable: bool, guard: int) -> Mapping:
        """Map whole pages of it once more, as `Mapping.view`.

        Raises
        ------
        IOReturnError
            `kIOReturnNoResources`: something is mapped at `at`. `kIOReturnNoMemory`: no address space.
        """
        try:
            return Mapping.view(self._fd, offset, size, at, writable, guard)
        except FileExistsError as error:
            message = f"{at:#x} to {at + size:#x} is not free: something is mapped there"
            raise IOReturnError(IOReturn.kIOReturnNoResources, message, error.errno or 0) from None
        except OSError as error:
            raise refusals.own(error, f"cannot map {format_size(size)}") from None

    def show_in(self, mapping: Mapping, offset: int) -> None:
        """Show whole pages of it, from `offset` on, where `mapping` showed others."""
        try:
            mapping.redirect(self._fd, offset)
        except OSError as error:
            raise refusals.own(error, "cannot redirect a mapping") from None

    def page_counts(self) -> tuple[int, int]:
        """Count the pages that are resident, mapped here or not. All are dirty: there is no file to drop them for."""
        resident = memory.incore(self.address, pages(self.size), PAGE_SIZE).count(1)
        return resident, resident

    def close(self) -> None:
        """Unpin, unmap, and let go of the object, which goes with its last user. As `MappedBacking.close`."""
        super().close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _create(size: int) -> int:
    fd = os.memfd_create("iobmd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
    except BaseException:
        os.close(fd)
        raise
    return fd
