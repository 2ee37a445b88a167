"""The purgeable state of memory in parts of several descriptors, as that of IOKit's IOMultiMemoryDescriptor."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.purgeable import EMPTY, KEEP_CURRENT, NON_VOLATILE, VOLATILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iobmd.purgeable import Order


class Owner(Protocol):
    """A descriptor of purgeable memory."""

    _prepared: int

    @property
    def lazily_freed(self) -> int:
        """Bytes that the kernel may take at any moment."""

    def setPurgeable(self, newState: int) -> int:
        """Set the state; returns the one before."""


class CompositeState:
    """The state of all owners: Empty if one is, else Volatile if one is."""

    shared = False  # those that are know of it themselves

    def __init__(self, owners: Sequence[Owner]) -> None:
        self._owners = owners

    def current(self) -> int:
        """Find out the state."""
        return _together([owner.setPurgeable(KEEP_CURRENT) for owner in self._owners])

    def keep(self) -> int:
        """Make all of it non-volatile."""
        return _together([owner.setPurgeable(NON_VOLATILE) for owner in self._owners])

    def give(self, modifiers: int) -> int:
        """Make all of it volatile, or nothing while one is prepared; where one refuses, what was kept is kept."""
        self._refuse_if_prepared()
        before: list[tuple[Owner, int]] = []
        try:
            for owner in self._owners:
                before.append((owner, owner.setPurgeable(VOLATILE | modifiers)))
        except BaseException:
            for owner, old in before:
                if old == NON_VOLATILE:
                    with contextlib.suppress(IOReturnError):
                        owner.setPurgeable(NON_VOLATILE)
            raise
        return _together([old for _owner, old in before])

    def empty(self) -> int:
        """Drop the content of all of it, or of nothing while one is prepared."""
        self._refuse_if_prepared()
        return _together([owner.setPurgeable(EMPTY) for owner in self._owners])

    def _refuse_if_prepared(self) -> None:
        for owner in self._owners:
            if owner._prepared:
                message = f"{owner!r} is prepared {owner._prepared} times: call complete() as often first"
                raise IOReturnError(IOReturn.kIOReturnBusy, message)

    def order(self) -> Order | None:
        """Tell nothing: the owners are taken one by one."""
        return None

    def purge(self) -> int:
        """Take nothing, for the same reason."""
        return 0

    def before_write(self, offset: int, length: int) -> None:
        """Do nothing: the owners write."""

    def hold(self) -> None:
        """Do nothing: the owners are prepared, and refuse where they are volatile."""

    def let_go(self) -> None:
        """Do nothing, as `hold`."""

    def lazily_freed(self) -> int:
        """Return how many bytes of all of it the kernel may take."""
        return sum(owner.lazily_freed for owner in self._owners)


def _together(states: list[int]) -> int:
    if EMPTY in states:
        return EMPTY
    return VOLATILE if VOLATILE in states else NON_VOLATILE
