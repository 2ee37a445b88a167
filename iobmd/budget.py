"""What an allocation may spend on looking for contiguous or low memory: `iobmd.policy`."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_SECONDS = 5.0
ALWAYS = 64 << 20  # so little may be held without looking at what the host has left


class Policy(NamedTuple):
    """The policy in force."""

    reserve: bool = False
    memory_budget: int | None = None
    time_budget: float | None = None


_DEFAULT = Policy()
_current: contextvars.ContextVar[Policy] = contextvars.ContextVar("iobmd.policy", default=_DEFAULT)


@contextlib.contextmanager
def policy(
    *, reserve: bool = False, memory_budget: int | None = None, time_budget: float | None = None
) -> Iterator[None]:
    """Say what the factories inside of the `with` may spend looking for contiguous or low memory.

    Parameters
    ----------
    reserve : bool
        The hugetlb pools may be raised for a buffer, and are put back (needs root). Off, no setting of the host is
        ever changed.
    memory_budget : int, optional
        Bytes that may be held at a time while looking, but at least the buffer's own; all others are given back.
        Default: half of what is available. Never more than leaves a sixteenth of the host's memory available.
    time_budget : float, optional
        Seconds after which no more memory is taken. Default: 5.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: a negative budget.

    Notes
    -----
    A context variable: it holds in this thread or asyncio task, not in threads that run already. An inner policy
    replaces an outer one whole.
    """
    if (memory_budget or 0) < 0 or (time_budget or 0) < 0:
        raise IOReturnError(IOReturn.kIOReturnBadArgument, "a budget cannot be negative")
    token = _current.set(Policy(reserve, memory_budget, time_budget))
    try:
        yield
    finally:
        _current.reset(token)


def may_reserve() -> bool:
    """Say whether the hugetlb pools may be raised."""
    return _current.get().reserve


class Budget:
    """What is left of the policy's budget for one search."""

    def __init__(self) -> None:
        self._policy = _current.get()
        self._begin = time.monotonic()

    def allows(self, size: int) -> bool:
        """Say whether `size` bytes may be held at a time."""
        asked = self._policy.memory_budget
        if asked is not None and size > asked:
            return False
        return size <= ALWAYS or size <= self.bytes

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes that may be held at a time; asked for late, for it takes 0.1 ms."""
        try:
            memory = procfs.meminfo()
        except OSError:  # no /proc, or of processes only: what is free is the least that is available
            pages = {"MemAvailable": "SC_AVPHYS_PAGES", "MemTotal": "SC_PHYS_PAGES"}
            memory = {name: os.sysconf(pages[name]) * PAGE_SIZE for name in pages}
        # The host keeps a sixteenth, whoever asks: below that it swaps, or kills.
        spare = max(0, memory["MemAvailable"] - memory["MemTotal"] // 16)
        asked = self._policy.memory_budget
        return min(memory["MemAvailable"] // 2 if asked is None else asked, spare)

    @property
    def elapsed(self) -> float:
        """Seconds since the search began."""
        return time.monotonic() - self._begin

    @property
    def over(self) -> bool:
        """Whether the time is used up."""
        seconds = self._policy.time_budget
        return self.elapsed >= (DEFAULT_SECONDS if seconds is None else seconds)
