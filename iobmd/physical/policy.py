"""Limits on searches for contiguous or masked memory: `iobmd.policy`."""

from __future__ import annotations

import contextlib
import contextvars
import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd._internal.arguments import check_integers, check_numbers
from iobmd.errors import BadArgumentError
from iobmd.host import headroom

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_SECONDS = 5.0


class Names(NamedTuple):
    """How the fields of a policy are set, for messages; by default in Python."""

    reserve: str = "iobmd.policy(reserve=True)"
    memory_budget: str = "iobmd.policy(memory_budget=…)"
    time_budget: str = "iobmd.policy(time_budget=…)"


class Policy(NamedTuple):
    """The policy in force."""

    reserve: bool = False
    memory_budget: int | None = None
    time_budget: float | None = None
    names: Names = Names()


_DEFAULT = Policy()
_current: contextvars.ContextVar[Policy] = contextvars.ContextVar("iobmd.policy", default=_DEFAULT)


@contextlib.contextmanager
def policy(
    *, reserve: bool = False, memory_budget: int | None = None, time_budget: float | None = None
) -> Iterator[None]:
    """Limit the searches for contiguous or masked memory of the factories called inside the `with` block.

    Parameters
    ----------
    reserve : bool
        Whether hugetlb pools may be enlarged for a buffer, and then restored (requires root). If False, no setting of
        the host is changed.
    memory_budget : int, optional
        Bytes that a search may hold at a time, but at least the size of the buffer; the excess is freed. Default:
        half of the available memory. In any case a sixteenth of the host's memory, and of the limit of each memory
        cgroup around this process, remains free.
    time_budget : float, optional
        Seconds after which the search ends. Default: 5.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: a negative budget.

    Notes
    -----
    The policy is a context variable: it applies to this thread or asyncio task, not to other running threads. An
    inner policy completely replaces an outer one.
    """
    check_integers(memory_budget=memory_budget or 0)
    check_numbers(time_budget=time_budget or 0)
    if (memory_budget or 0) < 0 or (time_budget or 0) < 0:
        raise BadArgumentError("a budget cannot be negative")
    with applied(Policy(reserve, memory_budget, time_budget)):
        yield


@contextlib.contextmanager
def applied(wanted: Policy) -> Iterator[None]:
    """Apply a policy inside the `with` block."""
    token = _current.set(wanted)
    try:
        yield
    finally:
        _current.reset(token)


class Budget:
    """The remaining budget of one search."""

    def __init__(self) -> None:
        self._policy = _current.get()
        self._begin = time.monotonic()
        self._measured: headroom.Room | None = None

    @property
    def _tightest(self) -> headroom.Room:
        if self._measured is None:
            self._measured = headroom.tightest()
        return self._measured

    def measure(self, held: int) -> None:
        """Measure the remaining memory again while the search holds `held` bytes: other processes allocate too."""
        room = headroom.tightest()
        self._measured = room._replace(left=room.left + held)

    @property
    def most(self) -> int:
        """The limit for every policy: beyond it the host or a cgroup would run out of memory, and swap or kill."""
        return max(0, self._tightest.left - self._tightest.limit // 16)

    @property
    def bytes(self) -> int:
        """Bytes that may be held at a time; determined on demand, because it takes 0.2 ms."""
        asked = self._policy.memory_budget
        return min(self.most, self._tightest.left // 2 if asked is None else asked)

    def remedy(self, size: int | None = None) -> str:
        """Return the remedy that permits holding `size` bytes, or more than now; "" if no policy can."""
        if self.most >= size if size is not None else self.most > self.bytes:
            return f"allow more ({self.names.memory_budget})"
        return ""

    def why_no_more(self) -> str:
        """Return the reason why no policy can allow more."""
        return self._tightest.report()

    @property
    def names(self) -> Names:
        """How the policy is changed."""
        return self._policy.names

    @property
    def may_reserve(self) -> bool:
        """Whether hugetlb pools may be enlarged."""
        return self._policy.reserve

    @property
    def elapsed(self) -> float:
        """Seconds since the search began."""
        return time.monotonic() - self._begin

    @property
    def over(self) -> bool:
        """Whether the time is exhausted."""
        seconds = self._policy.time_budget
        return self.elapsed >= (DEFAULT_SECONDS if seconds is None else seconds)
