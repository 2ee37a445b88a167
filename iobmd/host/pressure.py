"""Probes of memory pressure: PSI, and the files of this process's cgroup."""

import os
from typing import NamedTuple

from iobmd.host import cgroup as cgroups
from iobmd.host.fact import JSON, Fact, Status, read_text

PSI_MEMORY = "/proc/pressure/memory"
# 150 ms of stalls in 2 s. Without CAP_SYS_RESOURCE, only multiples of 2 s are accepted (Linux 6.5).
_TRIGGER = b"some 150000 2000000\0"


class PressureFile(NamedTuple):
    """A file that reports memory pressure; `notifies`: it can wake a waiter, otherwise it must be polled."""

    path: str
    """The path of the file."""
    notifies: bool
    """Whether it can wake a waiter."""


def _psi(path: str) -> PressureFile | None:
    """Read the file and set a trigger, which ends with its descriptor (Documentation/accounting/psi.rst)."""
    # After booting with psi=0 the file may exist but not be readable.
    if not read_text(path):
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return PressureFile(path, notifies=False)
    try:
        os.write(descriptor, _TRIGGER)
    except OSError:
        return PressureFile(path, notifies=False)
    finally:
        os.close(descriptor)
    return PressureFile(path, notifies=True)


def _pressure_level(path: str) -> PressureFile | None:
    """Probe cgroup v1's file. Events are not tried, because the first one makes the kernel log a warning (6.18)."""
    if not os.access(path, os.F_OK):
        return None
    control = f"{os.path.dirname(path)}/cgroup.event_control"
    notifies = os.access(path, os.R_OK) and os.access(control, os.W_OK)
    return PressureFile(path, notifies=notifies)


def system_pressure() -> PressureFile | None:
    """Return the host's pressure file, None if the kernel has none (PSI, Linux 4.20)."""
    return _psi(PSI_MEMORY)


def cgroup_pressure() -> PressureFile | None:
    """Return the pressure file of this process's cgroup: v2 memory.pressure, v1 memory.pressure_level, or None."""
    unified, legacy = cgroups.own("memory", unified=True), cgroups.own("memory", unified=False)
    found = [
        _psi(unified.file("memory.pressure")) if unified else None,
        _pressure_level(legacy.file("memory.pressure_level")) if legacy else None,
    ]
    files = [file for file in found if file]
    return next((file for file in files if file.notifies), files[0] if files else None)


def psi_files() -> list[str]:
    """Return the readable PSI files: the host's, and that of this process's cgroup (v2)."""
    unified = cgroups.own("memory", unified=True)
    paths = [PSI_MEMORY, *([unified.file("memory.pressure")] if unified else [])]
    return [path for path in paths if read_text(path)]


def pressure_level() -> str | None:
    """Return cgroup v1's memory.pressure_level of this process's cgroup if its events are available."""
    legacy = cgroups.own("memory", unified=False)
    file = _pressure_level(legacy.file("memory.pressure_level")) if legacy else None
    return file.path if file and file.notifies else None


def _fact(name: str, file: PressureFile | None, purpose: str, missing: str, limited: str) -> Fact:
    if file is None:
        return Fact(name, Status.NO, None, "none", purpose, missing)
    value: JSON = {"path": file.path, "notifies": file.notifies}
    if file.notifies:
        return Fact(name, Status.YES, value, f"{file.path} notifies", purpose)
    return Fact(name, Status.LIMITED, value, f"{file.path} must be polled", purpose, limited)


def pressure() -> Fact:
    """Probe the host's memory pressure: read it, and set a temporary trigger."""
    purpose = "purge volatile shared buffers when the host is short of memory"
    missing = "boot parameter: psi=1  # with CONFIG_PSI"
    limited = "CAP_SYS_RESOURCE, or Linux 6.5 or later"
    return _fact("/proc/pressure/memory", system_pressure(), purpose, missing, limited)


def cgroup() -> Fact:
    """Probe memory pressure of this process's cgroup (cgroups(7)), like `pressure`."""
    purpose = "purge volatile shared buffers when the cgroup's limit is near"
    remedy = "systemd-run --user --scope COMMAND  # in a separate cgroup, with cgroup v2"
    return _fact("cgroup pressure", cgroup_pressure(), purpose, remedy, remedy)
