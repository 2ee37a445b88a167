"""Probes for memory in other tasks: system calls there, pidfd_getfd, and shared memory in huge pages."""

import errno
import os

from iobmd._native import crosstask, mman, tracer
from iobmd.host.fact import Fact, Status, has_seccomp_filter
from iobmd.host.privilege import capability_remedy


def system_calls() -> Fact:
    """Report whether system calls can be made in other tasks, on this processor."""
    name, purpose = "calls in tasks", "allocate in other tasks, map into them, copy from them as of one moment"
    if not tracer.PROCESSOR:
        return Fact(name, Status.NO, False, f"not on {os.uname().machine}", purpose, "an x86-64 or aarch64 host")
    return Fact(name, Status.YES, True, tracer.PROCESSOR, purpose)


def pidfd_getfd() -> Fact:
    """Probe pidfd_getfd(2) (Linux 5.6) on this process."""
    name, purpose = "pidfd_getfd", "bring shared memory into another task, whatever its namespaces"
    fetched = pidfd = -1
    try:
        pidfd = os.pidfd_open(os.getpid())
        fetched = crosstask.fetch_descriptor(pidfd, pidfd)
    except OSError as error:
        remedy = "Linux 5.6 or later"
        if error.errno in (errno.EPERM, errno.ENOSYS) and has_seccomp_filter():
            remedy = "allow pidfd_getfd in the seccomp profile (container: --cap-add SYS_PTRACE)"
        return Fact(name, Status.NO, False, f"{error.strerror}", purpose, remedy)
    finally:
        for descriptor in (fetched, pidfd):
            if descriptor >= 0:
                os.close(descriptor)
    return Fact(name, Status.YES, True, "works", purpose)


def huge_shared() -> Fact:
    """Probe a detached tmpfs mount with huge pages (fsopen(2), Linux 5.2)."""
    name, purpose = "huge tmpfs", "shared memory in huge pages, regardless of shmem_enabled"
    try:
        os.close(mman.mount_tmpfs({"huge": "within_size"}))
    except OSError as error:
        known = {errno.ENOSYS: "Linux 5.2 or later", errno.EINVAL: "a kernel with CONFIG_TRANSPARENT_HUGEPAGE"}
        remedy = known.get(error.errno or 0, capability_remedy())
        return Fact(name, Status.LIMITED, False, f"{error.strerror}: memfds in small pages", purpose, remedy)
    return Fact(name, Status.YES, True, "works", purpose)
