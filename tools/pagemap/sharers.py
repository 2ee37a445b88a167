"""`--sharers`: the other processes that map the files and the shared memory of a process."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd.errors import BusyError
from iobmd.units import format_count

from .look import Hidden
from .progress import show_progress
from .usage import visited

if TYPE_CHECKING:
    from .look import Look


_SHOWN = 3
"""The most pids of one program that are listed."""


class Sharer(NamedTuple):
    """A process that maps something of the inspected one."""

    pid: int
    name: str
    files: frozenset[tuple[str, int]]
    """The common files, as devices and inode numbers."""


def _listed(pids: list[int]) -> str:
    """Return the first pids, and the number of the others."""
    shown = pids if len(pids) <= _SHOWN else pids[: _SHOWN - 1]
    others = [f"{len(pids) - len(shown)} more"] if len(shown) < len(pids) else []
    return ", ".join([*map(str, shown), *others])


class Sharers:
    """The processes that map the same files or shared memory, by the names of groups of areas.

    Memory that forked processes share is not found: it belongs to no file. `--frame` finds its processes.
    """

    def __init__(self, look: Look) -> None:
        self._pid = look.task.pid
        self._busy: list[int] = []
        self._refused = 0
        self._names: dict[tuple[str, int], set[str]] = defaultdict(set)
        for area in look.where.areas():
            if area.inode:
                self._names[area.device, area.inode].add(look.names.name_of(area))
        self._by_name: dict[str, list[Sharer]] = defaultdict(list)
        with show_progress("processes") as progress:
            for sharer in visited(self._visit, progress, self._busy):
                for name in {name for file in sharer.files for name in self._names[file]}:
                    self._by_name[name].append(sharer)

    def of(self, name: str) -> list[Sharer]:
        """Return the other processes that map what a group of areas maps."""
        return self._by_name.get(name, [])

    def note(self, group: str) -> str:
        """Return the number of these processes, their names and pids; empty if there are none."""
        found = self.of(group)
        programs: dict[str, list[int]] = defaultdict(list)
        for sharer in found:
            programs[sharer.name].append(sharer.pid)
        by_number = sorted(programs.items(), key=lambda program: -len(program[1]))
        names = ", ".join(f"{program} ({_listed(pids)})" for program, pids in by_number)
        return f"{format_count(len(found), 'process', 'processes')}: {names}" if found else ""

    def hidden(self) -> list[Hidden]:
        """Return what is not shown."""
        missing = self._refused + len(self._busy)
        what = f"what {format_count(missing, 'other process maps', 'other processes map')}"
        return [Hidden(what, "no permission to trace them, or the kernel waits", "")] if missing else []

    def _visit(self, pid: int) -> Sharer | None:
        if pid in (self._pid, os.getpid()):
            return None
        try:
            files = frozenset((area.device, area.inode) for area in procfs.maps(pid) if area.inode)
            common = files & self._names.keys()
            return Sharer(pid, procfs.status(pid).get("Name", ""), common) if common else None
        except PermissionError:
            self._refused += 1
        except BusyError:
            self._busy.append(pid)
        except (FileNotFoundError, ProcessLookupError):  # it has exited
            pass
        return None
