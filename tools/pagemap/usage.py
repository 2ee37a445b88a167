"""The memory of each process of the host, from the sums that the kernel keeps: no pages are read."""

from __future__ import annotations

import functools
import os
import pwd
import re
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from iobmd import host, procfs
from iobmd._internal import pidns
from iobmd._internal.relay import relayed
from iobmd.errors import BusyError, IOReturnError, NotFoundError, NotPermittedError, UnsupportedError
from iobmd.host import cgroup, limits
from iobmd.pagemap.area import BEARABLE, areas, is_bearable
from iobmd.pagemap.range import resolve
from iobmd.pagemap.reader import Reader
from iobmd.task.task import Task
from iobmd.units import format_count

from .columns import brief
from .look import Hidden
from .process import rollup
from .total import Total

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

_T = TypeVar("_T")
_NAME = 15
"""Bytes that the kernel keeps of the name of a program."""
_PATIENCE = 2.0
"""Seconds that a process may make the kernel wait: the server of a file that it maps (FUSE) may not answer."""


class Usage(NamedTuple):
    """The memory of a process."""

    pid: int
    name: str
    """The name of the program. Its arguments are in the memory of the process, which is not read."""
    user: str
    cgroup: str
    """The path of its memory cgroup; empty if it was not needed."""
    container: str
    """The short id or the name of its container, according to the cgroup; empty if there is none."""
    total: Total


def visited(
    visit: Callable[[int], _T | None], progress: Callable[[int, int], object], busy: list[int]
) -> Iterator[_T]:
    """Iterate over the results of a function for each process, without None.

    A process for which the kernel waits too long is added to `busy`. Raises IOReturnError, and what `visit` raises.
    """
    try:
        pids = pidns.pids()
    except OSError as error:
        raise limits.from_oserror(error, "cannot list the processes") from None
    position = 0

    def produce() -> Iterator[list[_T]]:
        nonlocal position
        for index in range(position, len(pids)):
            position = index
            progress(index, len(pids))
            found = visit(pids[index])
            yield [] if found is None else [found]

    while position < len(pids):
        try:
            yield from relayed(produce, _PATIENCE)
            break
        except TimeoutError as error:
            if isinstance(error, IOReturnError):
                raise
            busy.append(pids[position])
            position += 1
    progress(len(pids), len(pids))


def _them(number: int) -> str:
    return "it" if number == 1 else "them"


class _Status(NamedTuple):
    """What /proc/PID/status shows to everyone; sizes in bytes."""

    name: str
    uid: int
    sizes: dict[str, int]
    """Sizes by field; without VmRSS, the process is a kernel thread, or has exited."""


class Processes:
    """The processes that are selected on the command line, and the number of those that are not visible.

    Attributes
    ----------
    refused : int
        Processes that this user may not inspect, and the RSS that their status shows.
    busy : list of int
        Those that made the kernel wait.
    undivided : int
        Those whose PSS is unknown, because reading it would block them.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        in_rows = arguments.json or arguments.csv or arguments.openmetrics or arguments.by in ("cgroup", "container")
        self._needs_cgroup = bool(in_rows or arguments.cgroup or arguments.container)
        self.refused = self.refused_bytes = self.undivided = 0
        self.busy: list[int] = []
        self.time = time.time()

    def usages(self, progress: Callable[[int, int], object]) -> Iterator[Usage]:
        """Iterate over the processes; those that exit are left out. Raises as `visited`."""
        return visited(self._usage, progress, self.busy)

    def hidden(self) -> list[Hidden]:
        """Return what is not shown."""
        found = []
        if self.refused:
            what = f"{format_count(self.refused, 'process', 'processes')} with {brief(self.refused_bytes)} of RSS"
            remedy = "" if host.has_capability("CAP_SYS_PTRACE") else "run as root, or with CAP_SYS_PTRACE"
            found.append(Hidden(what, f"no permission to trace {_them(self.refused)}", remedy))
        if self.busy:
            what = f"process {', '.join(map(str, self.busy))}"
            found.append(Hidden(what, f"the kernel waits for its memory for more than {_PATIENCE:g} s", ""))
        if self.undivided:
            what = f"PSS of {format_count(self.undivided, 'process', 'processes')}; in the sums, their USS counts"
            why = f"reading smaps would block {_them(self.undivided)}"
            if self._arguments.smaps is False:
                why = "--no-smaps was given"
            found.append(Hidden(what, why, "--smaps", ("pss", "pss%")))
        return found

    def _usage(self, pid: int) -> Usage | None:
        try:
            status = _status(pid)
            if "VmRSS" not in status.sizes:
                return None
            found = Usage(pid, status.name, _user_name(status.uid), *self._group(pid), Total())
            if not self._chooses(found, status.uid):
                return None
            try:
                self._measure(found, status)
            except (PermissionError, NotPermittedError):
                self.refused += 1
                self.refused_bytes += status.sizes["VmRSS"]
                return None
        except (FileNotFoundError, ProcessLookupError, NotFoundError, UnsupportedError):  # it has exited
            return None
        except BusyError:
            self.busy.append(pid)
            return None
        return found

    def _chooses(self, found: Usage, uid: int) -> bool:
        wanted = self._arguments
        return (
            (wanted.name is None or _has_text(found.name, wanted.name))
            and (wanted.user is None or wanted.user == uid)
            and (wanted.cgroup is None or wanted.cgroup in found.cgroup)
            and (wanted.container is None or _is_id(wanted.container, found.container))
        )

    def _group(self, pid: int) -> tuple[str, str]:
        if not self._needs_cgroup:
            return "", ""
        path = memory_cgroup(cgroup.membership(pid))
        return path, container_of(path)

    def _measure(self, found: Usage, status: _Status) -> None:
        if self._arguments.smaps is not False and (self._arguments.smaps or self._is_bearable(found.pid, status)):
            _add_rollup(found.total, rollup(found.pid), status.sizes)
            return
        # Without smaps, PSS is known where nothing is shared.
        for area in areas(found.pid, details=False):
            found.total.counted(area)
        self.undivided += found.total.pss is None

    def _is_bearable(self, pid: int, status: _Status) -> bool:
        if status.sizes["VmRSS"] <= BEARABLE:
            return True
        task = Task(pid)
        with Reader(task) as reader:
            return is_bearable(resolve(task), reader)


def _status(pid: int) -> _Status:
    fields = procfs.status(pid)
    sizes = {name: int(text[:-3]) << 10 for name, text in fields.items() if text.endswith(" kB")}
    return _Status(fields.get("Name", ""), int(fields["Uid"].split()[0]), sizes)


def user_of(pid: int) -> str:
    """Return the name of the user of a process, or the UID if it has none; empty if the process has exited."""
    try:
        return _user_name(_status(pid).uid)
    except (FileNotFoundError, ProcessLookupError):
        return ""


@functools.cache
def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _add_rollup(total: Total, counters: dict[str, int], sizes: dict[str, int]) -> None:
    """Set the sums of a process from smaps_rollup and status, as areas would add up to them."""
    private = counters["Private_Hugetlb"]
    hugetlb = private + counters["Shared_Hugetlb"]
    total.size = sizes.get("VmSize", 0)
    total.resident = counters["Rss"] + hugetlb
    total.anonymous = counters["Anonymous"] + private
    total.file_or_shared = total.resident - total.anonymous
    total.shmem = min(total.file_or_shared, sizes.get("RssShmem", 0))
    total.file = total.file_or_shared - total.shmem
    total.uss = counters["Private_Clean"] + counters["Private_Dirty"] + private
    total.shared = total.resident - total.uss
    total.pss = counters["Pss"] + private
    total.swapped = counters["Swap"]
    total.huge = sum(counters.get(name, 0) for name in procfs.HUGE)
    total.locked = min(total.resident, sizes.get("VmLck", 0))
    total.lazy_free = counters.get("LazyFree", 0)


def _has_text(name: str, text: str) -> bool:
    """Return whether a program has a text in its name, whose end the kernel may have cut (proc_pid_comm(5))."""
    return text in name or (len(os.fsencode(name)) == _NAME and text.startswith(name))


def _is_id(wanted: str, container: str) -> bool:
    """Return whether an id, whole or abbreviated, is that of a container."""
    return bool(wanted and container) and (container.startswith(wanted) or wanted.startswith(container))


def memory_cgroup(membership: str) -> str:
    """Return the path of the group that accounts memory, from the text of /proc/PID/cgroup."""
    unified = ""
    for line in membership.splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return path
        if number == "0":
            unified = path
    return unified


def container_of(path: str) -> str:
    """Return the short id or the name of the container whose group a path is in; empty if it names none."""
    for part in reversed(path.split("/")):
        if match := re.search(r"(?:^|[-:])([0-9a-f]{64})(?:\.scope)?$", part):
            return match[1][:12]
        if match := re.fullmatch(r"(?:lxc\.payload\.|machine-)(.+?)(?:\.scope)?", part):
            return match[1]
    return ""
