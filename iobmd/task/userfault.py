"""Memory whose page faults are reported to a userfaultfd(2), by which another thread or process supplies its pages.

Only VmFlags of /proc/PID/smaps shows which memory that is. The kernel walks all page tables for it, 7 ms for 1 GiB in
small pages, and the mmap(2) calls of the task wait. It is therefore not read from a large task if there is no
userfaultfd.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from iobmd import host, procfs
from iobmd._internal import pidns

if TYPE_CHECKING:
    from collections.abc import Iterator

FLAGS = {"um", "uw", "ui"}
"""VmFlags of areas that are registered for missing, write-protected or minor faults."""
_SUPPLIED = {"um", "ui"}

_LINK = "anon_inode:[userfaultfd]"
_OBJECTS = "/sys/kernel/slab/userfaultfd_ctx_cache/objects"
"""An upper bound of the number of userfaultfds on this host, and NUMA details; for root, with CONFIG_SLUB_DEBUG."""
_SMALL = 256 << 20
"""Resident bytes for which reading smaps takes less time than the search for descriptors (2 ms)."""
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO in linux/proc_ns.h


def supplied(pid: int) -> Iterator[procfs.VMA]:
    """Iterate over the areas of a task whose absent pages a handler supplies. Raises OSError."""
    if procfs.status_bytes("VmRSS", pid) < _SMALL or _may_exist():
        yield from (area for area, flags in procfs.vm_flags(pid) if flags & _SUPPLIED)


def is_open(pid: int | str) -> bool:
    """Return whether a process has a descriptor of a userfaultfd in the table of its main thread. Raises OSError."""
    folder = os.open(f"{pidns.directory(pid)}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return any(_leads_to_one(name, folder) for name in os.listdir(folder))
    finally:
        os.close(folder)


def _leads_to_one(name: str, folder: int) -> bool:
    try:
        return os.readlink(name, dir_fd=folder) == _LINK
    except OSError:  # another thread has closed it
        return False


def _may_exist() -> bool:
    """Return whether any process of this host may have a userfaultfd.

    The handler of a task may be another process, to which the task has sent the descriptor (CRIU, Firecracker). Only
    root on the host sees the descriptors of all processes. Those in a separate table of a thread are not visible: the
    lazy copies of iobmd have one, and their memory is not inherited by a child (MADV_DONTFORK).
    """
    try:
        with open(_OBJECTS) as file:
            if file.read().split()[0] == "0":
                return False
    except OSError:
        pass
    try:
        is_host = os.stat("/proc/self/ns/pid").st_ino == _INITIAL_PID_NAMESPACE
        if not is_host or not host.has_host_capability("CAP_SYS_PTRACE"):
            return True
        return any(_has_one(number) for number in os.listdir("/proc") if number.isdecimal())
    except OSError:
        return True


def _has_one(number: str) -> bool:
    try:
        return is_open(int(number))
    except (FileNotFoundError, ProcessLookupError):  # it has exited
        return False
