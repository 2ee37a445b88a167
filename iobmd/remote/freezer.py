"""The cgroup freezer: whether a task stands still already, as that of a container that is paused.

Version 1 shows it in freezer.state, version 2 in cgroup.events (Linux 5.2); both include frozen ancestors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd.host import cgroup
from iobmd.host.fact import read_text
from iobmd.remote import threads

if TYPE_CHECKING:
    from iobmd.host.cgroup import Cgroup


def why(pid: int) -> str:
    """Return why a task does not run, and what ends that, where a frozen cgroup is the reason; "" elsewhere."""
    frozen = _frozen_around(pid)
    if not frozen:
        return ""
    # The outermost that was frozen itself, not by a group around it.
    for group in reversed(frozen):
        if group.unified and _reads(group, "cgroup.freeze", "1"):
            return _message(group, f"echo 0 > {group.file('cgroup.freeze')}")
        if not group.unified and _reads(group, "freezer.self_freezing", "1"):
            return _message(group, f"echo THAWED > {group.file('freezer.state')}")
    return f"its cgroup {frozen[0].directory} is frozen by one around it"


def _message(group: Cgroup, thaw: str) -> str:
    return f"its cgroup {group.directory} is frozen: thaw it (`{thaw}`, or unpause the container)"


def standing(pid: int) -> dict[int, int] | None:
    """Return how often each thread of a task has left a processor; None unless its cgroup is frozen.

    As long as that is the same, none of them has run.
    """
    if not _frozen_around(pid):
        return None
    try:
        return {tid: _switches(pid, tid) for tid in threads.thread_ids(pid)}
    except (OSError, KeyError, ValueError):  # one ended
        return None


def _switches(pid: int, tid: int) -> int:
    fields = procfs.status(pid, tid)
    return int(fields["voluntary_ctxt_switches"]) + int(fields["nonvoluntary_ctxt_switches"])


def _frozen_around(pid: int) -> list[Cgroup]:
    """Return the groups around a task that are frozen, the innermost first."""
    groups = cgroup.around("freezer", pid)
    return [group for group in groups if _reads(group, *_STATES[group.unified])]


_STATES = {True: ("cgroup.events", "frozen 1"), False: ("freezer.state", "FROZEN")}
"""By what a frozen group is known, by version 2 and by version 1."""


def _reads(group: Cgroup, file: str, line: str) -> bool:
    return line in (read_text(group.file(file)) or "").splitlines()
