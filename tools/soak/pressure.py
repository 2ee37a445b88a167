"""Memory pressure: a cgroup with a limit, and a program that fills it repeatedly."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from iobmd.cli.child import python

from . import kernel

LIMIT = 256 << 20
"""Bytes that the cgroup may use: those of a worker, and the same number to be filled."""
_STEP = 4 << 20
_START = "import iobmd_command; from iobmd.tools.soak.pressure import main; main()"


def make_cgroup() -> tuple[Path | None, str]:
    """Create a memory cgroup with a limit; return it, or None and the reason for the failure."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root, limit = (v1, "memory.limit_in_bytes") if (v1 / "cgroup.procs").exists() else (v2, "memory.max")
    group = root / f"iobmd-soak-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        return None, f"no memory cgroup can be created: {error}"
    try:
        (group / limit).write_text(str(LIMIT))
    except OSError as error:
        group.rmdir()
        return None, f"no limit can be set on a memory cgroup: {error}"
    return group, ""


def kills(group: Path) -> int:
    """Return how many processes of a cgroup the OOM killer has ended."""
    for name in ("memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError):
            for line in (group / name).read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def start_filler(group: Path) -> subprocess.Popen[bytes]:
    """Start the program that fills the cgroup."""
    return subprocess.Popen(
        python("-c", _START, str(group), str(os.getpid())),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def main() -> None:
    """Fill the cgroup in the first argument, mostly with memory that the kernel may reclaim.

    It is the first process that the OOM killer selects there.
    """
    group, parent = sys.argv[1:]
    kernel.die_with_parent(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Path("/proc/self/oom_score_adj").write_text("1000")
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    chance = random.Random()
    while True:
        size = chance.randrange(LIMIT // 4, LIMIT, _STEP)
        firm = chance.random() * 0.3  # the part that the kernel may not reclaim
        address = kernel.map_private(size)
        for offset in range(0, size - _STEP + 1, _STEP):
            kernel.advise(address + offset, _STEP, kernel.MADV_POPULATE_WRITE)
            if offset > firm * size:
                kernel.advise(address + offset, _STEP, kernel.MADV_FREE)
            time.sleep(0.005)
        time.sleep(chance.random() * 0.1)
        kernel.unmap(address, size)
        time.sleep(chance.random() * 0.2)
