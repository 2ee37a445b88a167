"""Monitoring of memory pressure through files of the kernel."""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from pathlib import Path
from typing import Self

from iobmd import host
from iobmd._internal import process_local
from iobmd.host import headroom

_TOTAL = re.compile(r"some .*total=(\d+)")
_STALLED = 0.075  # the fraction of the time in which tasks wait for memory; the kernel's own triggers react 2 s later
_LEVEL = "medium"  # "low" reports every reclaim, including that of old page cache


class Watch:
    """The available sources of memory pressure (root or ordinary user, cgroup v1 or v2), until the end of `with`.

    PSI (Linux 4.20), which every user may read, shows how long tasks have waited for memory. cgroup v1 wakes this
    thread at a level of pressure and when its limit is near, if registering for these events is permitted.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._events: dict[int, bool] = {}  # eventfds, each with whether its event means that memory is short
        self._held: list[process_local.Fd] = []
        self._wakes: process_local.Fd | None = None  # the thread may end and close it while others wake it
        self._waits = [_Waits(Path(path)) for path in host.psi_files()]
        if level := host.pressure_level():
            with contextlib.suppress(OSError):
                self._register(Path(level))
        with contextlib.suppress(OSError):  # no file descriptor is free: it is not woken
            self._event(says=False)
            self._wakes = self._held[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every descriptor; idempotent."""
        while self._held:
            self._held.pop().close()

    def wake(self) -> None:
        """End the present `wait`."""
        if self._wakes:
            with contextlib.suppress(OSError), self._wakes.use() as event:  # already closed
                os.eventfd_write(event, 1)

    def wait(self, seconds: float) -> bool:
        """Wait at most this long; return whether there was pressure during that time."""
        pressed = False
        for fd, _event in self._poll.poll(seconds * 1000):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
                pressed |= self._events[fd]
        many = [waits.many() for waits in self._waits]  # every file must be read
        return pressed or any(many)

    def _register(self, level: Path) -> None:
        """Register for cgroup v1's events: pressure, and an eighth free (admin-guide/cgroup-v1/memory.rst)."""
        limit = int((level.parent / "memory.limit_in_bytes").read_text())
        near = limit - limit // headroom.SPARE
        for file, argument, says in ((level, _LEVEL, True), (level.parent / "memory.usage_in_bytes", near, False)):
            event = self._event(says=says)
            watched = self._hold(os.open(file, os.O_RDONLY | os.O_CLOEXEC))
            (level.parent / "cgroup.event_control").write_text(f"{event} {watched} {argument}")

    def _event(self, *, says: bool) -> int:
        """Return an eventfd that ends `wait`; `says`: whether an event means that memory is short."""
        event = self._hold(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._events[event] = says
        self._poll.register(event, select.POLLIN)
        return event

    def _hold(self, fd: int) -> int:
        self._held.append(process_local.Fd(fd, "what reports pressure"))
        return fd


class _Waits:
    """The time for which tasks have waited for memory, from a PSI file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = self._read()

    def _read(self) -> tuple[float, float]:
        """Return the seconds waited so far, and the present time; zeros if the file was removed with its cgroup."""
        with contextlib.suppress(OSError):
            if found := _TOTAL.match(self._path.read_text()):
                return int(found[1]) / 1e6, time.monotonic()
        return 0.0, time.monotonic()

    def many(self) -> bool:
        """Return whether tasks have waited for much of the time since the last call."""
        waited, now = self._read()
        before, then = self._before
        self._before = waited, now
        return waited - before > (now - then) * _STALLED
