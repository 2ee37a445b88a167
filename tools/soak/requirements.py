"""Requirements of kinds of events, each with a probe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd._native.tracer import PROCESSOR

from . import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

_CAP_SYS_PTRACE, _CAP_SYS_ADMIN, _CAP_CHECKPOINT_RESTORE = 19, 21, 40


def _frames() -> str:
    return "" if kernel.shows_frames() else "page frame numbers are hidden (no CAP_SYS_ADMIN)"


def _ptrace() -> str:
    if not PROCESSOR:
        return "system calls in other tasks need x86-64 or aarch64"
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and int(scope.read_text()) >= (3 if kernel.has_capabilities(_CAP_SYS_PTRACE) else 2):
        return f"{scope} is {scope.read_text().strip()}: tracing is not permitted"
    return ""


def _userfaultfd() -> str:
    try:
        os.close(kernel.userfaultfd())
    except OSError as error:
        return f"{error} (vm.unprivileged_userfaultfd)"
    return _ptrace()


def _existing_pages() -> str:
    if kernel.has_capabilities(_CAP_SYS_ADMIN) or kernel.has_capabilities(_CAP_CHECKPOINT_RESTORE):
        return ""
    return "which pages of another task's shared memory exist is visible only with CAP_CHECKPOINT_RESTORE"


PROBES: dict[str, Callable[[], str]] = {
    "frames": _frames,
    "ptrace": _ptrace,
    "userfaultfd": _userfaultfd,
    "existing pages": _existing_pages,
}
"""Requirements by name; each probe returns why it is not met, or ""."""


def missing() -> dict[str, str]:
    """Return the requirements that are not met, each with the reason."""
    return {name: reason for name, probe in PROBES.items() if (reason := probe())}
