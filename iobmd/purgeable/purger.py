"""Taking volatile memory: on request (`purge`), and shared memory by a thread when the system runs short.

The kernel takes private volatile memory by itself. Shared memory it cannot: while any is volatile, a thread of this
process watches the kernel's pressure files and what is free (`pressure`), and takes whole buffers in IOKit's order.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import NamedTuple, Protocol

from iobmd import headroom, own
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.purgeable import Order
from iobmd.purgeable.pressure import Watch

_POLL = 0.25  # seconds between looks at what is free, where nothing tells earlier
_LINGER = 1  # looks at nothing volatile, after which the thread ends
_SHARE = 4  # pressure does not say how much is missing: a quarter of what is volatile, each time


class Candidate(NamedTuple):
    """Volatile memory of one descriptor."""

    order: Order
    shared: bool
    size: int
    """Bytes, taken or not."""


class Descriptor(Protocol):
    """A descriptor of purgeable memory."""

    def _candidate(self) -> Candidate | None:
        """Say whether it is volatile."""

    def _purge(self) -> int:
        """Take it if it is volatile still; returns the bytes that came free."""


_known: weakref.WeakSet[Descriptor] = weakref.WeakSet()
_lock = own.Locks()


def know(descriptor: Descriptor) -> None:
    """Take note of purgeable memory; a forked child knows that of its parent."""
    with _lock.here():
        # Until it goes away: leaving could come, by a garbage collection, while others look.
        _known.add(descriptor)


def watch() -> None:
    """Have shared memory taken when the system runs short, from now on: some of it is volatile."""
    with _lock.here():
        _thread.start()


def purge(target_bytes: int | None = None) -> int:
    """Take volatile memory of this process now, private and shared: whole buffers, in IOKit's order.

    Obsolete memory goes first, then group 0 to 7; within a group FIFO memory, the longest volatile first, then LIFO
    memory, the latest first.

    Parameters
    ----------
    target_bytes : int, optional
        Stop when so many bytes came free. Default: take all.

    Returns
    -------
    int
        Bytes of memory that came free; what the kernel had taken before does not count.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: negative.
    """
    if target_bytes is not None and target_bytes < 0:
        raise IOReturnError(IOReturn.kIOReturnBadArgument, f"cannot purge {target_bytes} bytes")
    return _purge(_volatile(), target_bytes)


def _volatile() -> list[tuple[Candidate, Descriptor]]:
    """Return what is volatile, in the order it is to be taken."""
    with _lock.here():
        known = list(_known)
    found = [(candidate, one) for one in known if (candidate := one._candidate())]
    return sorted(found, key=lambda pair: pair[0].order.key)


def _purge(volatile: list[tuple[Candidate, Descriptor]], target: int | None) -> int:
    freed = 0
    for _candidate, one in volatile:
        if target is not None and freed >= target:
            break
        freed += one._purge()
    return freed


class _Purger:
    """The thread. It runs while shared memory is volatile, and a second longer."""

    def __init__(self) -> None:
        self._watch: Watch | None = None

    def start(self) -> None:
        """Start it unless it runs. With the lock held."""
        if not self._watch:
            self._watch = Watch()
            threading.Thread(target=self._run, args=(self._watch,), name="iobmd-purger", daemon=True).start()

    def _run(self, watch: Watch) -> None:
        with watch:
            idle = 0
            while idle <= _LINGER or not self._over():
                pressed = watch.wait(_POLL)
                idle = 0 if _relieve(pressed) else idle + 1

    def _over(self) -> bool:
        """Say whether it may end, so that the next memory to become volatile starts another."""
        with _lock.here():
            if any(candidate.shared for candidate, _one in _volatile()):
                return False
            self._watch = None
            return True

    def forget(self) -> None:
        """Close the descriptors of a parent's thread, which a forked child does not have."""
        if self._watch:
            self._watch.close()
        self._watch = None


_thread = _Purger()
os.register_at_fork(after_in_child=_thread.forget)


def _relieve(pressed: bool) -> bool:
    """Take as much shared memory as is missing; returns whether any is volatile."""
    volatile = [pair for pair in _volatile() if pair[0].shared]
    missing = headroom.shortage() if volatile else 0
    if pressed:
        missing = max(missing, sum(candidate.size for candidate, _one in volatile) // _SHARE)
    if missing:
        with contextlib.suppress(OSError):  # whatever went wrong, the next look tries again
            _purge(volatile, missing)
    return bool(volatile)
