"""What an allocation may spend on looking for contiguous or low memory: `iobmd.policy`."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd.errors import BadArgumentError
from iobmd.host import headroom

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_SECONDS = 5.0
_MORE_MEMORY = "allow more (iobmd.policy(memory_budget=…))"


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
        Default: half of what is available. Never more than leaves a sixteenth of the host's memory, and of the limit
        of each memory cgroup around this process.
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
        raise BadArgumentError("a budget cannot be negative")
    token = _current.set(Policy(reserve, memory_budget, time_budget))
    try:
        yield
    finally:
        _current.reset(token)


class Budget:
    """What is left of the policy's budget for one search."""

    def __init__(self) -> None:
        self._policy = _current.get()
        self._begin = time.monotonic()

    @functools.cached_property
    def _tightest(self) -> headroom.Room:
        return headroom.tightest()

    def measure(self, held: int) -> None:
        """Measure again what is left, while the search holds `held` bytes: other processes allocate memory too."""
        room = headroom.tightest()
        self._tightest = room._replace(left=room.left + held)

    @property
    def most(self) -> int:
        """What no policy can exceed: the host, or a cgroup, would run short, and swap or kill."""
        return max(0, self._tightest.left - self._tightest.limit // 16)

    @property
    def bytes(self) -> int:
        """Bytes that may be held at a time; asked for late, for it takes 0.2 ms."""
        asked = self._policy.memory_budget
        return min(self.most, self._tightest.left // 2 if asked is None else asked)

    def remedy(self, size: int | None = None) -> str:
        """Return how to have `size` bytes held at a time, or just more than now; "" where no policy can."""
        if self.most >= size if size is not None else self.most > self.bytes:
            return _MORE_MEMORY
        return ""

    def why_no_more(self) -> str:
        """Say what keeps any policy from allowing more."""
        return self._tightest.report()

    @property
    def may_reserve(self) -> bool:
        """Whether the hugetlb pools may be raised."""
        return self._policy.reserve

    @property
    def elapsed(self) -> float:
        """Seconds since the search began."""
        return time.monotonic() - self._begin

    @property
    def over(self) -> bool:
        """Whether the time is used up."""
        seconds = self._policy.time_budget
        return self.elapsed >= (DEFAULT_SECONDS if seconds is None else seconds)
