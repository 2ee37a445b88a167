"""The cgroup freezer: whether the cgroup of a task is frozen, as in a paused container.

Version 1 reports it in freezer.state, version 2 in cgroup.events (Linux 5.2); both include frozen ancestors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobmd import procfs
from iobmd.host import cgroup
from iobmd.host.fact import read_text
from iobmd.printable import printable
from iobmd.remote import threads

if TYPE_CHECKING:
    from iobmd.host.cgroup import Cgroup


def why(pid: int) -> str:
    """Return a text with the frozen cgroup that stops a task, and the remedy; "" if none is frozen."""
    frozen = _frozen_around(pid)
    if not frozen:
        return ""
    # The outermost group that was itself frozen, not through an ancestor.
    for group in reversed(frozen):
        if group.unified and _reads(group, "cgroup.freeze", "1"):
            return _message(group, "0", "cgroup.freeze")
        if not group.unified and _reads(group, "freezer.self_freezing", "1"):
            return _message(group, "THAWED", "freezer.state")
    return f"its cgroup {printable(frozen[0].directory)} is frozen through an ancestor"


def _message(group: Cgroup, state: str, file: str) -> str:
    import shlex  # noqa: PLC0415 (rarely needed)

    # Another user may have chosen the name, and the reader may execute the command.
    thaw = f"echo {state} > {printable(shlex.quote(group.file(file)))}"
    return f"its cgroup {printable(group.directory)} is frozen: thaw it (`{thaw}`, or unpause the container)"


def switches(pid: int) -> dict[int, int] | None:
    """Return the number of context switches of each thread of a task; None unless its cgroup is frozen.

    As long as the numbers are equal, no thread has run.
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
    """Return the frozen groups that contain a task, the innermost first."""
    groups = cgroup.around("freezer", pid)
    return [group for group in groups if _reads(group, *_STATES[group.unified])]


_STATES = {True: ("cgroup.events", "frozen 1"), False: ("freezer.state", "FROZEN")}
"""The file and the line that identify a frozen group: version 2 (True), version 1 (False)."""


def _reads(group: Cgroup, file: str, line: str) -> bool:
    return line in (read_text(group.file(file)) or "").splitlines()
