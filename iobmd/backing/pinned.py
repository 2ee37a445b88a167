"""Pins of pages: the common part of all memory that is not composite."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Protocol

from iobmd._native import mapping
from iobmd.constants import IOMapOptions

if TYPE_CHECKING:
    from iobmd._native.pagemap import RunTable
    from iobmd.task.task import Task


class Pin(Protocol):
    """Pages that are pinned or locked."""

    @property
    def holds_frames(self) -> bool:
        """Whether the pages cannot move to other frames."""

    @property
    def holds_pages(self) -> bool:
        """Whether the pages remain in memory."""

    def release(self, *, wait: bool = True) -> None:
        """Release the pages; without `wait`, for destructors, as soon as no other thread prevents it. Idempotent."""


class Pinned(abc.ABC):
    """Memory with at most one pin at a time, and with known page frames during that time."""

    has_bytes = True
    mapped_read_only = False
    cache_mode = IOMapOptions.kIOMapCopybackCache
    """The cache mode of its mappings, the only one that Linux offers for main memory."""
    runs: RunTable | None = None
    pin_refusal = ""
    """Why the kernel refused to pin it when it was allocated; empty if it did not, or if it is pinned since."""
    _pin: Pin | None = None

    _generation = 0
    """The process that pinned it (`mapping.generation`): a forked child has private memory in other frames."""

    @abc.abstractmethod
    def read_runs(self, *, gaps: bool = False) -> RunTable | None:
        """Read the present physical runs of the pages."""

    def _hold_pin(self, pin: Pin) -> None:
        """Hold a pin until `unpin`, or release it if the page frames cannot be read."""
        try:
            # Read afterwards, because pinning may move a page once.
            self.runs = self.read_runs() if pin.holds_frames else None
        except BaseException:
            pin.release()
            raise
        self._pin = pin
        self.pin_refusal = ""
        self._generation = mapping.generation()

    def tasks_to_stop(self) -> list[Task]:
        """Return the other tasks in which `seal` unmaps memory: none."""
        return []

    def has_guard_pages(self, _offset: int, _length: int) -> bool:
        """Return False."""
        return False

    def unpin(self, *, wait: bool = True) -> None:
        """Release the pin, so that the kernel may move the pages again. `wait` as `Pin.release`."""
        if self._pin:
            self._pin.release(wait=wait)
        self._pin = self.runs = None
