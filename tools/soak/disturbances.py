"""Disturbances of the host, the workers and the targets by the supervisor during the events."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from . import pressure

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from .options import Options
    from .targets import TargetProcess
    from .workers import WorkerProcess

_COMPACT = Path("/proc/sys/vm/compact_memory")


class Disturbances:
    """Compaction, pressure, kills and pauses at random moments.

    Parameters
    ----------
    options : Options
        The options of the run.
    workers, targets
        The processes that are killed and paused.
    cgroup : Path or None
        The memory cgroup to fill.
    """

    def __init__(
        self, options: Options, workers: list[WorkerProcess], targets: list[TargetProcess], cgroup: Path | None
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.left_out: dict[str, str] = {}
        self._chance = random.Random(f"{options.seed}/disturbances")
        self._workers, self._targets, self._cgroup = workers, targets, cgroup
        self._filler: subprocess.Popen[bytes] | None = None
        self._compaction: threading.Thread | None = None
        self._means: dict[Callable[[], None], float] = {
            self._kill_worker: 5.0,
            self._kill_target: 4.0,
            self._pause_worker: 3.0,
            self._pause_target: 2.0,
            self._compact: 2.0,
        }
        """Average interval in seconds."""
        if not _can_compact():
            del self._means[self._compact]
            self.left_out["compaction"] = f"{_COMPACT} cannot be written"
        if options.spare_workers:
            del self._means[self._kill_worker], self._means[self._pause_worker]
            self.left_out["kills and pauses of workers"] = "--spare-workers"
        if options.calm:
            self._means.clear()
            self.left_out["kills and pauses"] = "--calm"
        now = time.monotonic()
        self._due = {action: now + self._chance.expovariate(1 / mean) for action, mean in self._means.items()}

    def work(self) -> None:
        """Perform the disturbances that are due."""
        now = time.monotonic()
        for action, due in self._due.items():
            if now >= due:
                action()
                self._due[action] = time.monotonic() + self._chance.expovariate(1 / self._means[action])
        if self._cgroup is not None and (self._filler is None or self._filler.poll() is not None):
            self._filler = pressure.start_filler(self._cgroup)
        if self._cgroup is not None:
            self.counts["oom_kills"] = pressure.kills(self._cgroup)

    def _compact(self) -> None:
        if self._compaction is not None and self._compaction.is_alive():
            return
        self._compaction = threading.Thread(target=_COMPACT.write_text, args=("1",), daemon=True)
        self._compaction.start()
        self.counts["compactions"] += 1

    def _kill_worker(self) -> None:
        worker = self._chance.choice(self._workers)
        if worker.kill_if_working():
            self.counts["workers_killed"] += 1

    def _kill_target(self) -> None:
        target = self._chance.choice(self._targets)
        if target.ready:
            target.kill()
            target.start()
            self.counts["targets_killed"] += 1

    def _pause_worker(self) -> None:
        self._chance.choice(self._workers).pause(self._chance.uniform(0, 0.2))
        self.counts["workers_paused"] += 1

    def _pause_target(self) -> None:
        self._chance.choice(self._targets).pause(self._chance.uniform(0, 0.2))
        self.counts["targets_paused"] += 1

    def end(self) -> None:
        """Stop disturbing."""
        if self._compaction is not None:
            self._compaction.join(60)
        if self._filler is not None:
            self._filler.kill()
            self._filler.wait()


def _can_compact() -> bool:
    try:
        _COMPACT.open("w").close()
    except OSError:
        return False
    return True
