"""The results of benchmarks, and their medians."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from iobmd.cli.child import python

if TYPE_CHECKING:
    from collections.abc import Callable


class Result(NamedTuple):
    """A figure with its floor or peer."""

    what: str
    figure: str
    """The figure itself, with its unit."""
    against: str
    """The floor or peer, and its figure in the same run."""
    ratio: float
    goal: str
    met: bool


def seconds(action: Callable[[], object]) -> float:
    """Return the duration of `action` in seconds."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def medians(rounds: int, *actions: Callable[[], float]) -> list[float]:
    """Return the median result of each of `actions`.

    They alternate, so that a slow moment of the host affects all, and each runs twice, the first time unmeasured: on
    a virtual machine the first touch of memory that was free for a long time waits for the host to back it.
    """
    samples = [[(action(), action())[1] for action in actions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*samples, strict=True)]


def at_most(what: str, unit_figure: str, against: str, ratio: float, limit: float) -> Result:
    """Report a ratio that should not exceed a limit."""
    return Result(what, unit_figure, against, ratio, f"≤ {limit:g}", ratio <= limit)


def at_least(what: str, unit_figure: str, against: str, ratio: float, limit: float) -> Result:
    """Report a ratio that should not be below a limit."""
    return Result(what, unit_figure, against, ratio, f"≥ {limit:g}", ratio >= limit)


def launcher() -> list[str]:
    """Return the command line that starts `iobmd`."""
    command = Path(sys.executable).with_name("iobmd")
    return [str(command)] if os.access(command, os.X_OK) else python("-m", "iobmd")


def spawned(command: list[str]) -> float:
    """Return the duration of a program's run in seconds."""
    # With cached bytecode, as in an installed program.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env))
