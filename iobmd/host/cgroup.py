"""The control groups around a process, as directories: hierarchies of version 1 and 2, wherever they are mounted.

/proc/PID/cgroup names the group of a process, and the field `root` of /proc/self/mountinfo the group that a mount
shows, both relative to the root of the *reader's* cgroup namespace (cgroup_namespaces(7)). The root of a mount from
outside the namespace is "/../..", which shows the number of levels in between, but not their names: they are
found by comparing the process ids that the groups list.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from iobmd import procfs
from iobmd.host.fact import lines, read_text

_ESCAPE = r"\\([0-7]{3})"
_DELETED = " (deleted)"


class HierarchyMount(NamedTuple):
    """Where a hierarchy is mounted."""

    root: str
    """The group at the mount point, relative to the root of this process's cgroup namespace."""
    place: str
    """The mount point."""
    unified: bool
    """Whether it is version 2, with all controllers in one hierarchy."""


class Cgroup(NamedTuple):
    """A control group that is visible to this process."""

    name: str
    """Its path below the mount point, "/" for the mounted group."""
    directory: str
    unified: bool
    """As for `HierarchyMount`."""

    def file(self, name: str) -> str:
        """Return the path of one of its files."""
        return f"{self.directory}/{name}"


def mounts(controller: str) -> list[HierarchyMount]:
    """Return the mounts of the version 1 and version 2 hierarchies that may have a controller, such as "memory"."""
    found = []
    for line in lines(read_text("/proc/self/mountinfo")):
        where, _, system = line.partition(" - ")
        if not system.startswith("cgroup"):
            continue
        kind, _source, options = system.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            _id, _parent, _device, root, place, *_rest = where.split(" ")
            found.append(HierarchyMount(_unescaped(root), _unescaped(place), kind == "cgroup2"))
    return found


def membership(pid: int | None = None) -> str:
    """Return the text of /proc/PID/cgroup, by default of this process; empty if it cannot be read.

    The text changes when the process is moved to another group.
    """
    try:
        path = "/proc/self/cgroup" if pid is None or pid == os.getpid() else procfs.memory_file(pid, "cgroup")
    except OSError:  # the process has exited
        return ""
    return read_text(path) or ""


def around(controller: str, pid: int | None = None, member: str | None = None) -> list[Cgroup]:
    """Return the groups around a process, in each hierarchy that may have a controller.

    Parameters
    ----------
    controller : str
        Such as "memory" or "hugetlb".
    pid : int, optional
        The process, by default this one.
    member : str, optional
        Its `membership`, if already read.

    Returns
    -------
    list of Cgroup
        For each hierarchy, the group of the process and then its ancestors, up to the mounted one. Groups above that
        are not visible.
    """
    found = []
    mounted = mounts(controller)
    for line in lines(membership(pid) if member is None else member):
        number, controllers, path = line.split(":", 2)
        unified = number == "0"
        if unified or controller in controllers.split(","):
            candidates = [mount for mount in mounted if mount.unified == unified]
            if path.endswith(_DELETED):  # an exiting process may be in a deleted group
                path = os.path.dirname(path)
            found += _shown(path, candidates, os.getpid() if pid is None else pid)
    return found


def own(controller: str, *, unified: bool) -> Cgroup | None:
    """Return this process's group in the version 2 hierarchy, or in the version 1 hierarchy of a controller."""
    return next((group for group in around(controller) if group.unified == unified), None)


def _shown(path: str, candidates: list[HierarchyMount], pid: int) -> list[Cgroup]:
    """Return the group `path` and its ancestors, from the mount that shows the most of them."""
    for mount in sorted(candidates, key=_height):
        below = _below(mount, path, pid)
        if below is not None and os.path.isdir(f"{mount.place}/{'/'.join(below)}"):
            names = ["/".join(below[:count]) for count in range(len(below), -1, -1)]
            place = mount.place.rstrip("/")
            return [Cgroup(f"/{name}", f"{place}/{name}".rstrip("/"), mount.unified) for name in names]
    return []


def _height(mount: HierarchyMount) -> int:
    """Return the depth of a mount's root below the root of the namespace; negative if above."""
    parts = _parts(mount.root)
    return len(parts) - 2 * parts.count("..")


def _below(mount: HierarchyMount, path: str, pid: int) -> list[str] | None:
    """Return the path from a mount's root to the group `path`; None if the mount does not show it."""
    root, group = _parts(mount.root), _parts(path)
    if group[: len(root)] == root and ".." not in group[len(root) :]:  # otherwise it is above the mount
        return group[len(root) :]
    up = group.count("..")
    if any(part != ".." for part in root) or up > len(root):
        return None
    return _search(mount.place, len(root) - up, group[up:], pid)


_found: dict[tuple[str, int, str], str] = {}
"""Cache of `_search`, because a host may have thousands of groups: by mount point, depth, and remaining path."""


def _search(place: str, depth: int, rest: list[str], pid: int) -> list[str] | None:
    """Return the path to the group of a process, whose first `depth` names are unknown."""
    key = place, depth, "/".join(rest)
    known = _found.get(key)
    for name in (known, *_descendants(place, "", depth)) if known else _descendants(place, "", depth):
        if _lists(f"{place}/{name}/{key[2]}", pid):
            _found[key] = name
            return [*name.split("/"), *rest]
    return None


def _descendants(place: str, name: str, depth: int) -> Iterator[str]:
    """Iterate over the groups that are `depth` levels below."""
    if not depth:
        yield name
        return
    children: list[str] = []
    with contextlib.suppress(OSError), os.scandir(f"{place}/{name}") as entries:  # it may be deleted, or unreadable
        children += [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    for child in children:
        yield from _descendants(place, f"{name}/{child}" if name else child, depth - 1)


def _lists(directory: str, pid: int) -> bool:
    return str(pid) in (read_text(f"{directory}/cgroup.procs") or "").split()


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part]


def _unescaped(text: str) -> str:
    """Undo the escapes of mountinfo for space, tab, newline and backslash."""
    return re.sub(_ESCAPE, lambda match: chr(int(match[1], 8)), text)
