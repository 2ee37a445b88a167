"""The programs in docs/examples, as a user runs them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
MIB = 1 << 20


def run(*arguments: str, procs: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run an example, in a cgroup if one is given."""

    def enter() -> None:
        if procs:
            procs.write_text(str(os.getpid()))

    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=enter,
        timeout=120,
    )


def test_tiles() -> None:
    done = run("tiles.py", "--tiles", "64", "--shows", "300")
    assert (done.returncode, done.stderr) == (0, "")
    assert "300 tiles correct" in done.stdout


@pytest.mark.needs("memory_cgroup")
def test_tiles_under_a_limit_that_would_kill(memory_cgroup: Callable[[int], Path]) -> None:
    """128 tiles of 1 MiB in 64 MiB: decoded again when they were taken, and never killed; with a dict it is."""
    shown = ("--tiles", "128", "--shows", "500")
    done = run("tiles.py", *shown, procs=memory_cgroup(64 * MIB))
    assert (done.returncode, done.stderr) == (0, "")
    assert "500 tiles correct" in done.stdout
    assert " 0 again" not in done.stdout
    assert run("tiles.py", "--plain", *shown, procs=memory_cgroup(64 * MIB)).returncode == -signal.SIGKILL
