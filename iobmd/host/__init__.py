"""Probes of the host: what it supports, and how to enable the rest.

A probe tries an operation and undoes it; it never checks a kernel version or a user id. A missing or unreadable file
is a finding, not an exception. All functions are safe in any thread and after a fork. Nothing is cached, because
limits and capabilities change while a process runs.
"""

from collections.abc import Sequence

from iobmd.host import access, io_uring, lazyfree, limits, pages, pressure, privilege, remote
from iobmd.host.access import MOUNT_PROC, pfns_visible, proc_options, yama_scope
from iobmd.host.fact import Fact, Status
from iobmd.host.io_uring import io_uring_disabled, why_not_pinned
from iobmd.host.pages import (
    HugePool,
    SwapArea,
    has_swap,
    huge_pages_enabled,
    hugetlb_pools,
    pool_remedy,
    swap_areas,
)
from iobmd.host.pressure import PressureFile, cgroup_pressure, pressure_level, psi_files, system_pressure
from iobmd.host.privilege import (
    Capability,
    capability_names,
    capability_remedy,
    has_capability,
    has_host_capability,
    memlock_limit,
    memlock_remedy,
)

__all__ = [
    "Fact",
    "Status",
    "facts",
    "obstacles",
    "can_run_main_job",
    "limits",
    "Capability",
    "has_capability",
    "has_host_capability",
    "capability_names",
    "capability_remedy",
    "memlock_limit",
    "memlock_remedy",
    "huge_pages_enabled",
    "HugePool",
    "hugetlb_pools",
    "pool_remedy",
    "SwapArea",
    "swap_areas",
    "has_swap",
    "pfns_visible",
    "MOUNT_PROC",
    "proc_options",
    "yama_scope",
    "io_uring_disabled",
    "why_not_pinned",
    "PressureFile",
    "system_pressure",
    "cgroup_pressure",
    "psi_files",
    "pressure_level",
]


def facts() -> list[Fact]:
    """Probe everything, in about 50 ms.

    Returns
    -------
    list[Fact]
        Facts with unique names; there is one for each hugetlb page size.
    """
    return [
        pages.kernel(),
        pages.page_size(),
        privilege.mlock(),
        privilege.memlock(),
        access.proc(),
        access.process_vm_readv(),
        access.proc_mem(),
        access.yama(),
        *(privilege.capability(which) for which in Capability),
        access.frames(),
        io_uring.io_uring(),
        access.pagemap_scan(),
        pages.huge_pages(),
        *pages.hugetlb(),
        pages.swap(),
        lazyfree.madv_free(),
        lazyfree.write_tracking(),
        pressure.pressure(),
        pressure.cgroup(),
        remote.system_calls(),
        remote.pidfd_getfd(),
        remote.huge_shared(),
    ]


def obstacles(found: Sequence[Fact]) -> list[Fact]:
    """Return the facts in `found` that prevent the main job.

    The main job is to copy memory from another process into a wired buffer: a page can be locked, Yama does not
    forbid all access, /proc shows tasks, and process_vm_readv or /proc/PID/mem works (either suffices).
    """
    by_name = {fact.name: fact for fact in found}
    copying = [by_name["process_vm_readv"], by_name["/proc/PID/mem"]]
    unusable = [
        fact for fact in (by_name["mlock"], by_name["/proc"], by_name["yama.ptrace_scope"]) if not fact.usable
    ]
    return unusable if any(fact.usable for fact in copying) else unusable + copying


def can_run_main_job(found: Sequence[Fact]) -> bool:
    """Return whether the main job can run here, according to `found` (see `obstacles`)."""
    return not obstacles(found)
