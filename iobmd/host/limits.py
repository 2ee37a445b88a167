"""Limits of a process and of the host that a failed system call has reached, and the errors that name them."""

import errno
import resource
from collections.abc import Iterator
from typing import NamedTuple

from iobmd import procfs
from iobmd.constants import IOReturn
from iobmd.errors import NO_DESCRIPTOR, CannotWireError, IOReturnError, NoMemoryError, NoResourcesError
from iobmd.host.fact import read_int, read_text
from iobmd.host.privilege import lifts_memlock

_NEARLY = 3
"""Mappings that aligning and splitting one temporarily requires."""


class Limit(NamedTuple):
    """A limit that was reached."""

    name: str
    """The limit, in the kernel's spelling."""
    value: int
    """The limit itself."""
    used: int
    """How much of it is in use."""
    remedy: str
    """How to raise it."""
    counted: str = ""
    """The unit that it counts; empty for bytes."""

    def __str__(self) -> str:
        if self.counted:
            return f"{self.name} is {self.value}, and there are {self.used} {self.counted}; {self.remedy}"
        return f"{self.name} is {self.value} bytes, {self.used} of them in use; {self.remedy}"


def met_by_mapping(size: int, pid: int | None = None) -> Limit | None:
    """Return the limit that prevents a process from mapping another `size` bytes, or None.

    Parameters
    ----------
    size : int
        In bytes.
    pid : int, optional
        The process, by default this one.

    Notes
    -----
    Checks vm.max_map_count (admin-guide/sysctl/vm.rst), RLIMIT_AS and RLIMIT_DATA (getrlimit(2)), and the commit
    limit if vm.overcommit_memory is 2 (mm/overcommit-accounting.rst).
    """
    try:
        return next((limit for limit in _candidates(pid) if _is_met(limit, size)), None)
    except (OSError, KeyError):  # /proc is hidden, or the process has exited
        return None


def memlock(size: int, pid: int | None = None) -> Limit | None:
    """Return RLIMIT_MEMLOCK of a process if it prevents locking `size` more bytes; parameters as `met_by_mapping`."""
    limit = memlock_of(pid)
    return limit if limit and _is_met(limit, size) else None


def memlock_of(pid: int | None = None) -> Limit | None:
    """Return RLIMIT_MEMLOCK of a process, reached or not; None if it is not limited."""
    try:
        return None if lifts_memlock(pid) else _of_process(_MEMLOCK, pid)
    except (OSError, KeyError):
        return None


def pins(size: int) -> Limit | None:
    """Return RLIMIT_MEMLOCK if it prevents a driver from pinning another `size` bytes of this process.

    Drivers compare it with VmPin of the process, which also contains the pins of io_uring; mlock(2) compares it with
    VmLck.
    """
    try:
        limit = None if lifts_memlock(None) else _of_process(_PINS, None)
    except (OSError, KeyError):
        return None
    return limit if limit and _is_met(limit, size) else None


def _is_met(limit: Limit, size: int) -> bool:
    return limit.used + (_NEARLY if limit.counted else size) > limit.value


def _candidates(pid: int | None) -> Iterator[Limit]:
    if most := read_int("/proc/sys/vm/max_map_count"):
        with open(procfs.memory_file("self" if pid is None else pid, "maps"), "rb", buffering=1 << 16) as file:
            count = sum(1 for _line in file)
        yield Limit("vm.max_map_count", most, count, f"sysctl vm.max_map_count={2 * most}, as root", "mappings")
    yield from filter(None, (_of_process(kind, pid) for kind in (_SPACE, _DATA)))
    if read_int("/proc/sys/vm/overcommit_memory") == 2:
        memory = procfs.meminfo()
        remedy = "sysctl vm.overcommit_memory=0 or a larger vm.overcommit_ratio, as root; or add swap space"
        yield Limit("the host's commit limit", memory["CommitLimit"], memory["Committed_AS"], remedy)


class _Kind(NamedTuple):
    """A resource limit (getrlimit(2))."""

    name: str
    number: int
    row: str
    """Its row in /proc/PID/limits, which, unlike prlimit(2), shows those of others without CAP_SYS_RESOURCE."""
    used: str
    """Its field in /proc/PID/status."""
    shell: str
    option: str
    """Its option of prlimit(1)."""


_SPACE = _Kind("RLIMIT_AS", resource.RLIMIT_AS, "Max address space", "VmSize", "-v", "as")
_DATA = _Kind("RLIMIT_DATA", resource.RLIMIT_DATA, "Max data size", "VmData", "-d", "data")
_MEMLOCK = _Kind("RLIMIT_MEMLOCK", resource.RLIMIT_MEMLOCK, "Max locked memory", "VmLck", "-l", "memlock")
_PINS = _MEMLOCK._replace(used="VmPin")


def _of_process(kind: _Kind, pid: int | None) -> Limit | None:
    if pid is None:
        soft = resource.getrlimit(kind.number)[0]
        if soft == resource.RLIM_INFINITY:
            return None
        unit = f"systemd's Limit{kind.name.removeprefix('RLIMIT_')}="
        remedy = f"raise it (`ulimit {kind.shell} KIB`, `prlimit --{kind.option}=BYTES`, {unit})"
        return Limit(kind.name, soft, _used(kind), remedy)
    found = read_text(procfs.memory_file(pid, "limits")) or ""
    value = found.partition(kind.row)[2].split(maxsplit=1)
    if not value or value[0] == "unlimited":
        return None
    remedy = f"raise it (`prlimit --pid {pid} --{kind.option}=BYTES`)"
    return Limit(f"{kind.name} of task {pid}", int(value[0]), procfs.status_bytes(kind.used, pid), remedy)


def _used(kind: _Kind) -> int:
    """Return how much of a limit this process uses; 0 without /proc."""
    try:
        return procfs.status_bytes(kind.used)
    except OSError:
        return 0


def from_oserror(error: OSError | OverflowError, doing: str, size: int = 0) -> IOReturnError:
    """Return the error for a system call on this process that failed while `doing` something with `size` bytes."""
    number = getattr(error, "errno", None) or errno.ENOMEM
    if number == errno.EAGAIN and (limit := memlock(size)):
        why = f"this process locks all its mappings (mlockall), and {limit}"
        return CannotWireError(f"{doing}: {why}", number)
    if number in NO_DESCRIPTOR:
        why = "no file descriptor is free; close some, or raise `ulimit -n`"
        return NoResourcesError(f"{doing}: {why}", number)
    if number == errno.ENOMEM:
        why = str(met_by_mapping(size) or "no address space or no memory is left")
        return NoMemoryError(f"{doing}: {why}", number)
    return IOReturnError(IOReturn.kIOReturnError, f"{doing}: {error}", number)
