"""Purging of volatile memory: on request (`purge`), and of shared memory by a thread under memory pressure.

The kernel reclaims private volatile memory itself, but cannot reclaim shared memory. While this process has purgeable
shared memory, which any process that maps it may make volatile, a thread monitors the kernel's pressure files and
free memory, and purges whole buffers in IOKit's order.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import NamedTuple, Protocol

from iobmd._internal import log, process_local
from iobmd._internal.arguments import check_integers
from iobmd._internal.weak_registry import WeakRegistry
from iobmd.errors import BadArgumentError, IOReturnError
from iobmd.host import headroom
from iobmd.purgeable import Order
from iobmd.purgeable.monitor import Watch

_SLOWEST = 0.25  # seconds between checks of free memory, unless an event comes first
_FASTEST = 0.005
_RATE = 1 << 30  # assumed maximum rate of allocation between checks, in bytes per second
_SHARE = 4  # pressure does not show how much is missing: each time, purge a quarter of the volatile memory


class Candidate(NamedTuple):
    """Volatile memory of one descriptor."""

    order: Order
    size: int
    """Size in bytes, whether reclaimed or not."""


class Control(Protocol):
    """The control of the purgeable state of memory."""

    def is_shared(self) -> bool:
        """Whether it is open, and other processes may map it."""

    def candidate(self, *, wait: bool) -> Candidate | None:
        """Return it if it is volatile; None if not, or if this thread (without `wait`: any thread) is changing it."""

    def purge(self, *, wait: bool) -> int:
        """Purge it if it is still volatile; return the number of bytes freed, 0 as above."""


_known: WeakRegistry[Control] = WeakRegistry()


def know(control: Control) -> None:
    """Register purgeable memory; a forked child has that of its parent."""
    _known.add(control)
    if control.is_shared():
        _thread.start()


def watch() -> None:
    """Check soon, because shared memory became volatile."""
    _thread.wake()


def purge(target_bytes: int | None = None) -> int:
    """Purge volatile memory of this process, private and shared: whole buffers, in IOKit's order.

    Obsolete memory is purged first, then groups 0 to 7; within a group first FIFO memory, longest volatile first,
    then LIFO memory, most recently volatile first.

    Parameters
    ----------
    target_bytes : int, optional
        Stop after this number of bytes is freed. Default: purge all.

    Returns
    -------
    int
        The number of bytes freed, without those that the kernel had already reclaimed.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: negative.

    Notes
    -----
    Memory that another process is changing, or whose change was interrupted by the calling signal handler, is
    skipped.
    """
    if target_bytes is not None:
        check_integers(target_bytes=target_bytes)
    if target_bytes is not None and target_bytes < 0:
        raise BadArgumentError(f"cannot purge {target_bytes} bytes")
    return _purge(_volatile(shared_only=False, wait=True), target_bytes, wait=True)


def _controls(*, shared_only: bool) -> list[Control]:
    found = _known.all()
    return [one for one in found if one.is_shared()] if shared_only else found


def _volatile(*, shared_only: bool, wait: bool) -> list[tuple[Candidate, Control]]:
    """Return the volatile memory in the order of purging."""
    found: list[tuple[Candidate, Control]] = []
    for one in _controls(shared_only=shared_only):
        with contextlib.suppress(OSError):  # truncated by a peer, which must not prevent purging other memory
            if candidate := one.candidate(wait=wait):
                found.append((candidate, one))
    return sorted(found, key=lambda pair: pair[0].order.key)


def _purge(volatile: list[tuple[Candidate, Control]], target: int | None, *, wait: bool) -> int:
    freed = 0
    for _candidate, one in volatile:
        if target is not None and freed >= target:
            break
        with contextlib.suppress(IOReturnError):  # locked by others, or being changed: skip it
            freed += one.purge(wait=wait)
    return freed


def relieve(missing: int) -> None:
    """Purge as much volatile shared memory as is missing."""
    _purge(_volatile(shared_only=True, wait=False), missing, wait=False)


headroom.on_shortage(relieve)


class _Purger:
    """The thread. It runs while purgeable shared memory is open, and shortly after."""

    def __init__(self) -> None:
        self._runs = False
        self._idle = False
        self._watch: Watch | None = None  # of the most recent thread
        self._guard = process_local.Guard()

    def start(self) -> None:
        """Start it unless it is running. If no thread can be started, memory is purged only on request."""
        with contextlib.suppress(IOReturnError, RuntimeError), self._guard:
            if not self._runs:
                threading.Thread(target=self._run, name="iobmd-purger", daemon=True).start()
                self._runs = True
                log.debug("the thread that purges volatile shared memory is started")

    def _run(self) -> None:
        with Watch() as watch:
            self._watch = watch
            pressed = False
            while not self._over():
                pause = _SLOWEST
                self._idle = True  # before the check: memory that becomes volatile later calls `wake`
                with contextlib.suppress(OSError):  # whatever the error, the next check is another attempt
                    self._idle, pause = _look(pressed)
                pressed = watch.wait(pause)

    def wake(self) -> None:
        """End the pause of a thread that found no volatile memory."""
        if self._idle and (watch := self._watch):
            self._idle = False
            watch.wake()

    def _over(self) -> bool:
        """Return whether it may end, so that the next memory starts another."""
        with self._guard:
            self._runs = bool(_controls(shared_only=True))
            return not self._runs

    def forked(self) -> None:
        """Restart in a forked child, which has the memory but not the thread."""
        if self._watch:
            self._watch.close()
        self._watch, ran, self._runs = None, self._runs, False
        if ran:
            self.start()


_thread = _Purger()
os.register_at_fork(after_in_child=_thread.forked)


def _look(pressed: bool) -> tuple[bool, float]:
    """Purge as much shared memory as is missing; return whether none is volatile, and when to check again."""
    volatile = _volatile(shared_only=True, wait=False)
    if not volatile:
        return True, _SLOWEST
    missing = headroom.shortage()
    if pressed:
        missing = max(missing, sum(candidate.size for candidate, _one in volatile) // _SHARE)
    if missing > 0:
        _purge(volatile, missing, wait=False)
    return False, min(_SLOWEST, max(_FASTEST, -missing / _RATE))
