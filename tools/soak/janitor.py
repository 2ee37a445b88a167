"""Removal of the files and the cgroup of a run, even if its supervisor was killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_PATIENCE = 10.0  # seconds for the processes of the run to end


class Janitor:
    """A process that waits until the supervisor exits or calls `finish`, and then removes what the run created.

    Parameters
    ----------
    folder : Path
        The directory to remove.
    cgroup : Path or None
        The cgroup to remove, with all processes that still run in it.
    """

    def __init__(self, folder: Path, cgroup: Path | None) -> None:
        reading, self._writing = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(self._writing)
                _wait_and_remove(reading, folder, cgroup)
            finally:
                os._exit(0)
        os.close(reading)

    def finish(self) -> None:
        """Remove everything now, and wait for it."""
        os.close(self._writing)
        os.waitpid(self.pid, 0)


def _wait_and_remove(pipe: int, folder: Path, cgroup: Path | None) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(pipe, 1)  # until no process has the other end of the pipe open
    if cgroup is not None:
        _remove_cgroup(cgroup)
    shutil.rmtree(folder, ignore_errors=True)


def _remove_cgroup(cgroup: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while cgroup.exists() and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            for pid in (cgroup / "cgroup.procs").read_text().split():
                os.kill(int(pid), signal.SIGKILL)  # only processes of the run ever enter it
        with contextlib.suppress(OSError):
            cgroup.rmdir()
            return
        time.sleep(0.05)
