"""The environments of workers: limits, a cgroup, another user."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from iobmd.constants import IOReturn

from . import kernel

NOBODY = 65534
_CAP_SETGID, _CAP_SETUID, _CAP_IPC_LOCK = 6, 7, 14


def locking_is_limited() -> bool:
    """Return whether RLIMIT_MEMLOCK applies to this process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return limit != resource.RLIM_INFINITY and not kernel.has_capabilities(_CAP_IPC_LOCK)


@dataclass(frozen=True)
class Profile:
    """A kind of worker.

    Parameters
    ----------
    name : str
        Its name in reports.
    refusals : frozenset of IOReturn
        Codes that its limits explain.
    reason : str
        The key of `report.REASONS` for these.
    targets : bool
        Whether it may use targets.
    squeezed : bool
        Whether it runs in the memory cgroup, so that the kernel may reclaim volatile memory at any moment.
    locked : int
        RLIMIT_MEMLOCK in bytes, without CAP_IPC_LOCK; 0: unchanged.
    descriptors : int
        Number of file descriptors that it may open in addition to those that it has; 0: unchanged.
    address_space : int
        Number of bytes that it may map in addition to those that it has; 0: unchanged.
    nobody : bool
        Whether it runs as another user, without any capability.
    """

    name: str
    refusals: frozenset[IOReturn] = frozenset()
    reason: str = "limit"
    targets: bool = True
    squeezed: bool = False
    locked: int = 0
    descriptors: int = 0
    address_space: int = 0
    nobody: bool = False

    @property
    def is_short_of_memory(self) -> bool:
        """Whether it must not hold many megabytes for long, so that the run itself does not reach its limits."""
        return bool(self.squeezed or self.address_space or locking_is_limited())

    def enter(self, cgroup: Path | None) -> None:
        """Apply the settings that must precede the first allocation."""
        if self.squeezed and cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))
        if self.locked:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (self.locked, self.locked))
            kernel.drop_locking()
        if self.nobody:
            kernel.become(NOBODY)

    def tighten(self) -> None:
        """Apply limits that are relative to the resources of the process after its warm-up."""
        if self.descriptors:
            highest = max(int(entry.split()[0]) for entry in kernel.descriptors())
            limit = highest + 1 + self.descriptors
            _set_soft(resource.RLIMIT_NOFILE, limit)
        if self.address_space:
            limit = kernel.kibibytes(kernel.status(), "VmSize") * 1024 + self.address_space
            _set_soft(resource.RLIMIT_AS, limit)

    @staticmethod
    def loosen() -> None:
        """Undo `tighten`."""
        for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS):
            _set_soft(kind, resource.getrlimit(kind)[1])


def _set_soft(kind: int, limit: int) -> None:
    resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("plain"),
        Profile("squeezed", frozenset({IOReturn.kIOReturnNoMemory}), squeezed=True),
        Profile("locked memory", frozenset({IOReturn.kIOReturnCannotWire}), locked=1 << 20),
        Profile(
            "descriptors",
            frozenset({IOReturn.kIOReturnNoResources, IOReturn.kIOReturnNotReady, IOReturn.kIOReturnCannotWire}),
            descriptors=3,
        ),
        Profile("address space", frozenset({IOReturn.kIOReturnNoMemory}), address_space=24 << 20),
        Profile(
            "ordinary user",
            frozenset({IOReturn.kIOReturnNotPrivileged, IOReturn.kIOReturnCannotWire}),
            reason="privilege",
            targets=False,
            locked=4 << 20,
            nobody=True,
        ),
    )
}


def schedule(*, cgroup: bool) -> list[list[str]]:
    """Return, for each worker, the profiles under which it runs, one after another."""
    limits = [
        "locked memory",
        "descriptors",
        "address space",
        *(["ordinary user"] if kernel.has_capabilities(_CAP_SETGID, _CAP_SETUID) else []),
    ]
    return [["plain"], ["squeezed" if cgroup else "plain"], limits, ["plain", *reversed(limits)]]
