"""What allocations may spend on searches, and how much freed memory is kept for them: `iobmd.policy`."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd._internal.arguments import check_flags, check_numbers, optional_integers
from iobmd.errors import BadArgumentError
from iobmd.host import headroom

if TYPE_CHECKING:
    from collections.abc import Iterator

DEFAULT_SECONDS = 5.0
_FOR_OTHERS = 2 << 30
"""Bytes that programs may allocate while a search holds free memory."""
_LEAST_HOST = 8 << 30
"""Size of a host, or a limit, from which free memory is held: on a smaller host, others soon need the rest."""
_KEEP_MOST = 1 << 30
_KEEP_PART = 32
"""The inverse of the part of memory that is kept by default, up to `_KEEP_MOST`."""
NOTHING_REUSED = bool(os.environ.get("IOBMD_NO_REUSE"))
"""Whether neither freed memory nor its addresses are used again, so that a use after free faults: for debugging."""


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
    keep: int | None = None


_DEFAULT = Policy()
_current: contextvars.ContextVar[Policy] = contextvars.ContextVar("iobmd.policy", default=_DEFAULT)


@contextlib.contextmanager
def policy(
    *,
    reserve: bool = False,
    memory_budget: int | None = None,
    time_budget: float | None = None,
    keep: int | None = None,
) -> Iterator[None]:
    """Limit what the factories called inside the `with` block spend on searches and keep for later allocations.

    Parameters
    ----------
    reserve : bool
        Whether hugetlb pools may be enlarged for a buffer, and then restored, and memory may be compacted
        (vm.compact_memory); requires root. Pages of 1 GiB are tried first for half a GiB or more. If False, no
        setting of the host is changed. Its caches are never dropped.
    memory_budget : int, optional
        Bytes that a search may hold at a time, but at least the size of the buffer; the excess is freed. Default:
        half of the available memory, and all of it for fractions of a second in which free memory is neither cleared
        nor mapped. In any case a sixteenth of the host's memory, and of the limit of each memory cgroup that
        contains this process, remains free.
    time_budget : float, optional
        Seconds after which the search ends. Default: 5.
    keep : int, optional
        How many bytes of freed memory this process may keep when a buffer that was allocated inside the block is
        freed. Default: a 32nd of the host's memory or of the tightest cgroup limit, at most 1 GiB. 0: its memory is
        unmapped when it is freed.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: a limit is negative, or not a number (NaN).
    TypeError
        An argument has the wrong type, such as a string for `reserve`.

    Notes
    -----
    The policy is a context variable: it applies to this thread or asyncio task, not to other running threads. An
    inner policy completely replaces an outer one.
    """
    check_flags(reserve=reserve)
    memory_budget, keep = optional_integers(memory_budget=memory_budget, keep=keep)
    if time_budget is not None:
        check_numbers(time_budget=time_budget)
    for name, limit in (("memory_budget", memory_budget), ("time_budget", time_budget), ("keep", keep)):
        if limit is not None and not limit >= 0:  # NaN is not either, and would be no limit
            raise BadArgumentError(f"{name} must be 0 or more, not {limit}")
    with applied(Policy(reserve, memory_budget, time_budget, keep=keep)):
        yield


def reuses() -> bool:
    """Return whether any memory may be kept after a buffer that is allocated now is freed."""
    return _current.get().keep != 0 and not NOTHING_REUSED


def keep_limit() -> int:
    """Return how many bytes may be kept after a buffer that is allocated now is freed."""
    keep = _current.get().keep
    if NOTHING_REUSED:
        return 0
    return _default_keep() if keep is None else keep


@functools.cache
def _default_keep() -> int:
    return min(headroom.tightest().limit // _KEEP_PART, _KEEP_MOST)


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

    @property
    def untouched(self) -> int:
        """Bytes that may be held for a fraction of a second without being populated (`ballast`).

        None on a host of less than 8 GiB, and none in a memory cgroup: others may reach its limit in that time, and
        the kernel would kill one of them.
        """
        asked = self._policy.memory_budget
        if self._tightest.group or self._tightest.limit < _LEAST_HOST:
            return 0
        return max(0, min(self.most, self._tightest.left - _FOR_OTHERS)) if asked is None else min(self.most, asked)

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
