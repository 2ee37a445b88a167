"""Taking volatile memory: on request (`purge`), and shared memory by a thread when the system runs short.

The kernel takes private volatile memory by itself. Shared memory it cannot: while this process has purgeable shared
memory, which any process that maps it may make volatile, a thread watches the kernel's pressure files and what is
free, and takes whole buffers in IOKit's order.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import NamedTuple, Protocol

from iobmd._internal import process_local
from iobmd._internal.weak_registry import WeakRegistry
from iobmd.errors import BadArgumentError, IOReturnError
from iobmd.host import headroom
from iobmd.purgeable import Order
from iobmd.purgeable.monitor import Watch

_SLOWEST = 0.25  # seconds between looks at what is free, where nothing tells earlier
_FASTEST = 0.005
_RATE = 1 << 30  # bytes a second by which memory may be filled meanwhile
_SHARE = 4  # pressure does not say how much is missing: a quarter of what is volatile, each time


class Candidate(NamedTuple):
    """Volatile memory of one descriptor."""

    order: Order
    size: int
    """Bytes, taken or not."""


class Control(Protocol):
    """What controls the purgeable state of one memory."""

    def is_shared(self) -> bool:
        """Whether it is open, and other processes may map it."""

    def candidate(self, *, wait: bool) -> Candidate | None:
        """Say whether it is volatile. None while this thread is changing it, or another and we do not `wait`."""

    def purge(self, *, wait: bool) -> int:
        """Take it if it is volatile still; returns the bytes that came free, 0 as above."""


_known: WeakRegistry[Control] = WeakRegistry()


def know(control: Control) -> None:
    """Take note of purgeable memory; a forked child knows that of its parent."""
    _known.add(control)
    if control.is_shared():
        _thread.start()


def watch() -> None:
    """Look soon: shared memory became volatile."""
    _thread.wake()


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

    Notes
    -----
    Memory that cannot be taken now is passed over: what another process is changing, and what a signal handler that
    calls this has interrupted.
    """
    if target_bytes is not None and target_bytes < 0:
        raise BadArgumentError(f"cannot purge {target_bytes} bytes")
    return _purge(_volatile(shared_only=False, wait=True), target_bytes, wait=True)


def _controls(*, shared_only: bool) -> list[Control]:
    found = _known.all()
    return [one for one in found if one.is_shared()] if shared_only else found


def _volatile(*, shared_only: bool, wait: bool) -> list[tuple[Candidate, Control]]:
    """Return what is volatile, in the order it is to be taken."""
    found: list[tuple[Candidate, Control]] = []
    for one in _controls(shared_only=shared_only):
        with contextlib.suppress(OSError):  # a peer has truncated it: that keeps no other memory from being taken
            if candidate := one.candidate(wait=wait):
                found.append((candidate, one))
    return sorted(found, key=lambda pair: pair[0].order.key)


def _purge(volatile: list[tuple[Candidate, Control]], target: int | None, *, wait: bool) -> int:
    freed = 0
    for _candidate, one in volatile:
        if target is not None and freed >= target:
            break
        with contextlib.suppress(IOReturnError):  # locked by others, or being changed: the next one
            freed += one.purge(wait=wait)
    return freed


def relieve(missing: int) -> None:
    """Take as much volatile shared memory as is missing."""
    _purge(_volatile(shared_only=True, wait=False), missing, wait=False)


headroom.on_shortage(relieve)


class _Purger:
    """The thread. It runs while purgeable shared memory is open, and a moment longer."""

    def __init__(self) -> None:
        self._runs = False
        self._idle = False
        self._watch: Watch | None = None  # of the thread that was started last
        self._guard = process_local.Guard()

    def start(self) -> None:
        """Start it unless it runs. Where no thread is to be had, memory is taken on request only."""
        with contextlib.suppress(IOReturnError, RuntimeError), self._guard:
            if not self._runs:
                threading.Thread(target=self._run, name="iobmd-purger", daemon=True).start()
                self._runs = True

    def _run(self) -> None:
        with Watch() as watch:
            self._watch = watch
            pressed = False
            while not self._over():
                pause = _SLOWEST
                self._idle = True  # before the look: what becomes volatile after it is told by `wake`
                with contextlib.suppress(OSError):  # whatever went wrong, the next look tries again
                    self._idle, pause = _look(pressed)
                pressed = watch.wait(pause)

    def wake(self) -> None:
        """End the pause of a thread that saw nothing volatile."""
        if self._idle and (watch := self._watch):
            self._idle = False
            watch.wake()

    def _over(self) -> bool:
        """Say whether it may end, so that the next memory starts another."""
        with self._guard:
            self._runs = bool(_controls(shared_only=True))
            return not self._runs

    def forked(self) -> None:
        """Go on in a forked child, which has the memory and not the thread."""
        if self._watch:
            self._watch.close()
        self._watch, ran, self._runs = None, self._runs, False
        if ran:
            self.start()


_thread = _Purger()
os.register_at_fork(after_in_child=_thread.forked)


def _look(pressed: bool) -> tuple[bool, float]:
    """Take as much shared memory as is missing; returns whether none is volatile, and when to look again."""
    volatile = _volatile(shared_only=True, wait=False)
    if not volatile:
        return True, _SLOWEST
    missing = headroom.shortage()
    if pressed:
        missing = max(missing, sum(candidate.size for candidate, _one in volatile) // _SHARE)
    if missing > 0:
        _purge(volatile, missing, wait=False)
    return False, min(_SLOWEST, max(_FASTEST, -missing / _RATE))
