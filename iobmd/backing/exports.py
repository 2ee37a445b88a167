"""`Exports`: the dma-bufs of shared memory, which is in use as long as one of them is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd.errors import BusyError
from iobmd.memory import dma_buf
from iobmd.units import format_count

if TYPE_CHECKING:
    from iobmd._internal import process_local


class Exports:
    """Descriptors of dma-bufs. The kernel counts the references to each, this one included."""

    __slots__ = ("_all",)

    def __init__(self) -> None:
        self._all: list[process_local.Fd] = []

    def add(self, exported: process_local.Fd) -> None:
        """Register a dma-buf by a descriptor that nothing else uses."""
        self._all = [*self._used(), exported]

    def _used(self) -> list[process_local.Fd]:
        return [one for one in self._all if dma_buf.references(one.fileno()) > 1]

    def require_unused(self) -> None:
        """Raise BusyError while others use a dma-buf of the memory."""
        self._all = self._used()
        if self._all:
            count = sum(dma_buf.references(one.fileno()) - 1 for one in self._all)
            busy = BusyError(
                f"the memory is in use as a dma-buf ({format_count(count, 'reference')}): close its descriptors, "
                "unmap it, and make the drivers release it"
            )
            busy.viewed = True
            raise busy
