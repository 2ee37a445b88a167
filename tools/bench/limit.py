"""A temporary memory cgroup with a limit."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def limited(size: int) -> Iterator[Path]:
    """Create a memory cgroup of `size` bytes without swap; yield its cgroup.procs. Raises OSError if refused."""
    legacy = _ROOT / "memory"
    group = (legacy if (legacy / "cgroup.procs").exists() else _ROOT) / f"iobmd-bench-{os.getpid()}"
    limits = ("memory.limit_in_bytes",) if legacy in group.parents else ("memory.max", "memory.swap.max")
    group.mkdir()
    try:
        (group / limits[0]).write_text(str(size))
        for swap in limits[1:]:
            (group / swap).write_text("0")
        yield group / "cgroup.procs"
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """Remove it when the kernel has removed its last process."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.02)
    group.rmdir()
