"""The supervisor's handling of workers: it starts, monitors, pauses, kills and replaces them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd.cli.child import python

from . import footprint, kernel
from .board import Board, Thread

if TYPE_CHECKING:
    from collections.abc import Callable

    from .options import Options

_LIFE = (15.0, 40.0)
"""Minimum and maximum lifetime of a worker in seconds."""
_STACKS = 10.0
"""Seconds for a worker to begin with its stacks: on a busy machine, it may not run at once."""
_TAIL = 6000
"""Number of characters of a worker's log that are included in the report of a fault."""


class WorkerProcess:
    """A place for one worker at a time.

    Parameters
    ----------
    folder : Path
        Of the run.
    board : Board
        The shared memory of the run.
    slot : int
        The number of the place.
    options : Options
        Of the run.
    kinds : list of str
        The kinds of events that are possible on this host.
    profiles : list of str
        Names of the profiles of successive workers in this place.
    cgroup : Path or None
        The memory cgroup for workers with a squeezed profile.
    when_killed : callable
        Called after a worker was killed.
    """

    def __init__(
        self,
        folder: Path,
        board: Board,
        slot: int,
        options: Options,
        kinds: list[str],
        profiles: list[str],
        cgroup: Path | None,
        when_killed: Callable[[], None],
    ) -> None:
        self.slot = slot
        self.rows = [board.thread(slot * options.threads + number) for number in range(options.threads)]
        self._folder, self._board, self._options, self._kinds, self._cgroup = folder, board, options, kinds, cgroup
        self._when_killed = when_killed
        self._profiles = itertools.cycle(profiles)
        self._chance = random.Random(f"{options.seed}/{slot}")
        self._killed = False
        self.started = 0
        """How many workers have been started here."""
        self.start()

    def start(self) -> None:
        """Start the next worker."""
        for row in self.rows:
            row[Thread.BEGAN] = 0
        self.profile, self._killed = next(self._profiles), False
        self.started += 1
        self._log = self._folder / f"worker-{self.slot}-{self.started}.log"
        life = self._chance.uniform(*_LIFE)
        orders = {
            "folder": str(self._folder),
            "parent": os.getpid(),
            "slot": self.slot,
            "threads": self._options.threads,
            "profile": self.profile,
            "seed": f"{self._options.seed}/{self.slot}/{self.started}",
            "kinds": self._kinds,
            "life": life,
            "patience": self._options.patience,
            "cgroup": str(self._cgroup) if self._cgroup else None,
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                python("-m", "iobmd.tools.soak.worker", json.dumps(orders)),
                env=os.environ | footprint.ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._ends_by = time.monotonic() + life + 2 * self._options.patience

    def watch(self) -> None:
        """Replace a worker that has ended, and report one that crashed or hangs."""
        code = self.process.poll()
        if code is None:
            self._look_for_hangs()
            return
        if code and not self._killed:
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            self._report("crashes", f"a worker exited unexpectedly, with {how}", log=self.log())
        if not self._board.stopping:
            self.start()

    def _look_for_hangs(self) -> None:
        now = time.monotonic_ns()
        limit = int(self._options.patience * 1e9)
        began = [(row, row[Thread.BEGAN]) for row in self.rows]  # read once: the event may end in between
        late = [row for row, since in began if since and now - since > limit]
        if late:
            names = [self._kinds[row[Thread.KIND]] for row in late]
            message = f"{', '.join(names)} did not end within {self._options.patience:g} s"
        elif time.monotonic() > self._ends_by:
            message = "a worker did not end within its time"
        else:
            return
        stacks = self._stacks()
        if self._killed or self.process.poll() is not None:
            return  # it ended in between
        self._report("hangs", message, kernel=self._kernel_state(), log=stacks)
        self.kill()

    def _stacks(self) -> str:
        """Make the worker write the stacks of its threads to its log, and return them."""
        before = self._log.stat().st_size
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR2)
            deadline = time.monotonic() + _STACKS
            while self._log.stat().st_size == before and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.5)  # they are written line by line
        return self.log()

    def _kernel_state(self) -> list[str]:
        found = []
        pid = self.process.pid
        for folder in [Path(f"/proc/{pid}/task/{thread}") for thread in _threads(pid)]:
            with contextlib.suppress(OSError):
                texts = [(folder / name).read_text().strip() for name in ("comm", "syscall", "wchan")]
                with contextlib.suppress(OSError):
                    texts.append((folder / "stack").read_text().replace("\n", " "))
                found.append(f"{folder.name} {kernel.state(pid, int(folder.name))} {' | '.join(texts)}")
        return found

    def log(self) -> str:
        """Return the end of the worker's log."""
        return self._log.read_text(errors="replace")[-_TAIL:]

    def _report(self, fault: str, message: str, **more: object) -> None:
        self._board.report(fault, "worker", message, worker=self.process.pid, profile=self.profile, **more)

    def kill(self) -> None:
        """Kill it (SIGKILL) and wait for its end."""
        self._killed = True
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self._when_killed()

    def kill_if_working(self) -> bool:
        """Kill it unless it is starting, exiting or already killed; return whether it was killed."""
        if self._killed or self.process.poll() is not None or not self._has_begun:
            return False
        self.kill()
        return True

    @property
    def _has_begun(self) -> bool:
        return any(row[Thread.BEGAN] for row in self.rows)

    def pause(self, seconds: float) -> None:
        """Stop it briefly by SIGSTOP, unless it is starting: until then it does not end with the supervisor."""
        if not self._has_begun:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            self.process.send_signal(signal.SIGCONT)


def _threads(pid: int) -> list[int]:
    try:
        return kernel.threads(pid)
    except OSError:
        return []
