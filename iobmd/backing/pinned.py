"""What holds pages in place for a while: the part that all memory has in common that is pinned itself."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Protocol

from iobmd._native import mapping

if TYPE_CHECKING:
    from iobmd._native.pagemap import RunTable


class Pin(Protocol):
    """Pages that are held."""

    @property
    def holds_frames(self) -> bool:
        """Whether they stay in their frames."""

    @property
    def holds_pages(self) -> bool:
        """Whether they stay in memory at all."""

    def release(self) -> None:
        """Let them go. Idempotent."""


class Pinned(abc.ABC):
    """Takes one pin at a time, and knows where the pages lie while it has it."""

    runs: RunTable | None = None
    _pin: Pin | None = None

    _generation = 0
    """The process that took the pin (`mapping.generation`): a forked child has private memory in other frames."""

    @abc.abstractmethod
    def read_runs(self, *, gaps: bool = False) -> RunTable | None:
        """Read where the pages lie now."""

    def _take(self, pin: Pin) -> None:
        """Keep a pin until `unpin`, or release it where it cannot be read where the pages lie."""
        try:
            # Read afterwards: a pin may move a page once.
            self.runs = self.read_runs() if pin.holds_frames else None
        except BaseException:
            pin.release()
            raise
        self._pin = pin
        self._generation = mapping.generation()

    def unpin(self) -> None:
        """Let the kernel move the pages again."""
        if self._pin:
            self._pin.release()
        self._pin = self.runs = None
