"""The programs in docs/examples, as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def run(*arguments: str, folder: Path = EXAMPLES, procs: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run an example, in a cgroup if one is given. Warnings are errors."""

    def enter() -> None:
        if procs:
            procs.write_text(str(os.getpid()))

    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=enter,
        timeout=120,
    )
