"""The supervisor: starts, disturbs and monitors workers and targets, and reports."""

from __future__ import annotations

import faulthandler
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iobmd._version import __version__

from . import board, events, kernel, pressure, profiles, report, requirements, target
from .board import Board
from .disturbances import Disturbances
from .janitor import Janitor
from .targets import TargetProcess
from .workers import WorkerProcess

if TYPE_CHECKING:
    from .options import Options

_PERIOD = 0.1  # seconds between two checks
_PROGRESS = 5.0  # seconds between two lines
_INSPECT = 0.5  # seconds between two inspections of targets
_SPARE = 120.0  # seconds that a run may take in addition to all limits
_CLOSED = 3.0  # maximum number of seconds for which a target is closed while the supervisor waits for its users


class Supervisor:
    """A run, from its start to its report.

    Parameters
    ----------
    options : Options
        The options of the run.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._children = set(kernel.children())
        self.left_out: dict[str, str] = {}
        self._cgroup, reason = (None, "--calm") if options.calm else pressure.make_cgroup()
        if reason:
            self.left_out["memory pressure"] = reason
        self._folder = Path(tempfile.mkdtemp(prefix="iobmd-soak-"))
        self._janitor = Janitor(self._folder, self._cgroup)
        self._board = Board(self._folder, create=True)
        self._workers: list[WorkerProcess] = []
        self._targets: list[TargetProcess] = []
        self._disturbances: Disturbances | None = None
        self._missing = requirements.missing()
        self._kinds = self._possible_kinds()
        self._seconds = 0.0
        self._next_inspected = 0

    def _possible_kinds(self) -> list[str]:
        known = events.KINDS | events.PLANTED_FAULTS
        for name in self.options.kinds:
            if known[name].needs in self._missing:
                self.left_out[name] = self._missing[known[name].needs]
        return [name for name in self.options.kinds if name not in self.left_out]

    def run(self) -> dict[str, Any]:
        """Run to the end, and return the report."""
        # If this process itself hangs, it exits with its stack on stderr, and the janitor cleans up.
        longest = self.options.seconds + 4 * self.options.patience + _SPARE
        faulthandler.dump_traceback_later(longest, exit=True, file=2)
        try:
            self._start()
            self._work()
            self._end()
        finally:
            faults = self._clean_up()
            faulthandler.cancel_dump_traceback_later()
        disturbances = self._disturbances.counts if self._disturbances else {}
        return report.document(
            self._tally(),
            faults,
            iobmd=__version__,
            host=f"Linux {platform.release()}, {platform.machine()}, {len(os.sched_getaffinity(0))} processors",
            seed=self.options.seed,
            seconds=round(self._seconds, 1),
            workers=sum(worker.started for worker in self._workers),
            disturbances=dict(disturbances),
            left_out=self.left_out,
        )

    def _start(self) -> None:
        sees_pages = "existing pages" not in self._missing
        for number, kind in enumerate(target.KINDS):
            if kind != "faulting" or "userfaultfd" not in self._missing:
                self._targets.append(TargetProcess(self._folder, self._board, number, kind, check_shared=sees_pages))
        places = profiles.schedule(cgroup=self._cgroup is not None)
        for slot in range(self.options.workers):
            self._workers.append(
                WorkerProcess(
                    self._folder,
                    self._board,
                    slot,
                    self.options,
                    self._kinds,
                    places[slot % len(places)],
                    self._cgroup,
                    self._worker_killed,
                )
            )
        self._disturbances = Disturbances(self.options, self._workers, self._targets, self._cgroup)
        self.left_out |= self._disturbances.left_out

    def _worker_killed(self) -> None:
        for each in self._targets:
            each.worker_killed()

    def _work(self) -> None:
        began = time.monotonic()
        progress, inspect = began + _PROGRESS, began
        assert self._disturbances is not None
        while (now := time.monotonic()) < began + self.options.seconds:
            self._watch()
            self._disturbances.work()
            if now >= inspect:
                self._inspect_next()
                inspect = now + _INSPECT
            if now >= progress:
                self._show_progress(now - began)
                progress = now + _PROGRESS
            if self._is_enough():
                break
            time.sleep(_PERIOD)
        self._seconds = time.monotonic() - began

    def _is_enough(self) -> bool:
        """Return whether the requested number of events, or of faults, is reached."""
        if self.options.events and self._tally().events >= self.options.events:
            return True
        return bool(self.options.faults) and len(board.faults(self._folder)) >= self.options.faults

    def _watch(self) -> None:
        for worker in self._workers:
            worker.watch()
        for each in self._targets:
            each.watch(self.options.patience)

    def _inspect_next(self) -> None:
        if self._targets[self._next_inspected].inspect(_CLOSED):
            self._next_inspected = (self._next_inspected + 1) % len(self._targets)

    def _end(self) -> None:
        """Make the workers finish, and inspect every target again."""
        self._board.stop()
        assert self._disturbances is not None
        self._disturbances.end()
        deadline = time.monotonic() + 2 * self.options.patience + 20
        while any(worker.process.poll() is None for worker in self._workers) and time.monotonic() < deadline:
            self._watch()
            time.sleep(_PERIOD)
        self._watch()
        for each in self._targets:
            while not each.inspect(self.options.patience) and time.monotonic() < deadline:
                time.sleep(_PERIOD)

    def _clean_up(self) -> list[dict[str, Any]]:
        """End every process and remove every file; return the faults of the run."""
        self._board.stop()
        if self._disturbances:
            self._disturbances.end()
        for worker in self._workers:
            worker.kill()
        for each in self._targets:
            each.close()
        faults = board.faults(self._folder)
        self._janitor.finish()
        if self._cgroup is not None and self._cgroup.exists():
            faults.append({"fault": "leaked_cgroups", "kind": "run", "message": f"{self._cgroup} is left"})
        if left := set(kernel.children()) - self._children:
            faults.append(
                {"fault": "leaked_processes", "kind": "run", "message": f"left: {left}", "count": len(left)}
            )
        return faults

    def _tally(self) -> report.Tally:
        return report.Tally.of([row for worker in self._workers for row in worker.rows], self._kinds)

    def _show_progress(self, seconds: float) -> None:
        tally, faults = self._tally(), board.faults(self._folder)
        assert self._disturbances is not None
        killed = self._disturbances.counts["workers_killed"] + self._disturbances.counts["targets_killed"]
        print(
            f"{seconds:5.0f} s {tally.events:>11,} events {tally.events / seconds:>8,.0f}/s  killed {killed}"
            f"  moved {tally.control['locked_pages_moved']:,}  faults {len(faults)}"[:80],
            file=sys.stderr,
            flush=True,
        )
