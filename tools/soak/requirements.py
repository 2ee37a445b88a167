"""What kinds of events need of the host, each probed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from . import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

_CAP_SYS_PTRACE = 19


def _frames() -> str:
    return "" if kernel.shows_frames() else "page frame numbers are hidden (no CAP_SYS_ADMIN)"


def _ptrace() -> str:
    if importlib.util.find_spec("ptrace") is None:
        return "python-ptrace is not installed (the extra `remote`)"
    if os.uname().machine != "x86_64":
        return "system calls in other tasks need x86-64"
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and int(scope.read_text()) >= (3 if kernel.has_capabilities(_CAP_SYS_PTRACE) else 2):
        return f"{scope} is {scope.read_text().strip()}: nobody may trace"
    return ""


PROBES: dict[str, Callable[[], str]] = {"frames": _frames, "ptrace": _ptrace, "": str}


def missing() -> dict[str, str]:
    """Return why each requirement is not met, for those that are not."""
    return {name: reason for name, probe in PROBES.items() if (reason := probe())}
