"""Probe of io_uring, whose long-term pins keep pages at their physical addresses."""

import errno
import time

from iobmd._native import uring
from iobmd.host.fact import Fact, Status, has_seccomp_filter, read_int, scratch
from iobmd.host.privilege import has_host_capability, memlock_limit, memlock_remedy
from iobmd.units import format_size

_SYSCTL = "kernel.io_uring_disabled"
_SECCOMP = (
    "allow io_uring_setup and io_uring_register in the seccomp profile (container: --security-opt seccomp=unconfined)"
)


def io_uring_disabled() -> int | None:
    """Return kernel.io_uring_disabled: 0: enabled, 1: for privileged processes only, 2: disabled.

    None if the kernel lacks it: before Linux 6.6, or built without io_uring
    (Documentation/admin-guide/sysctl/kernel.rst).
    """
    return read_int("/proc/sys/kernel/io_uring_disabled")


def _pin_a_page() -> None:
    with scratch() as page:
        table = uring.Table(1)
        try:
            table.pin(page.address, page.size)
        finally:
            table.close()


def _pin_patiently() -> None:
    # The kernel uncharges a closed ring in a worker, up to 25 ms later (measured): near the limit, the ring of an
    # earlier probe or of another process of this user may still count.
    for _ in range(5):
        try:
            return _pin_a_page()
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
        time.sleep(0.02)
    return _pin_a_page()


def io_uring() -> Fact:
    """Probe pinning: create a ring and register one page with it (io_uring_register(2), Linux 5.1)."""
    name, purpose = "io_uring", "pinned buffers: physical addresses that cannot change"
    try:
        _pin_patiently()
    except OSError as error:
        why, remedy = why_not_pinned(error)
        return Fact(name, Status.NO, {"pins": False, "errno": error.errno}, why, purpose, remedy)
    return Fact(name, Status.YES, {"pins": True, "errno": 0}, "a page was pinned", purpose)


def why_not_pinned(error: OSError) -> tuple[str, str]:
    """Return why io_uring refused to pin with `error`, and how to enable it (one alternative per line)."""
    if error.errno == errno.EPERM:
        return _why_forbidden(f"{error.strerror}")
    if error.errno == errno.ENOSYS:
        # The sysctl exists only with io_uring: if it exists, a filter must have returned the error.
        if io_uring_disabled() is not None or has_seccomp_filter():
            return "a seccomp filter hides it (ENOSYS)", _SECCOMP
        return "not built into this kernel (ENOSYS)", "a kernel with CONFIG_IO_URING, Linux 5.1 or later"
    if error.errno in (errno.EFAULT, errno.EOPNOTSUPP):
        return f"the kernel does not pin memory of this kind ({error.strerror})", ""
    bound = memlock_limit()
    if error.errno == errno.ENOMEM and bound is not None:
        return (
            f"RLIMIT_MEMLOCK ({format_size(bound)} for all pins of this user) leaves no room",
            memlock_remedy(),
        )
    return f"{error.strerror}", "see the error: descriptors (ulimit -n) or memory may be exhausted"


def _why_forbidden(reason: str) -> tuple[str, str]:
    disabled = io_uring_disabled()
    open_again = f"sysctl {_SYSCTL}=0  # as root"
    if disabled == 2:
        return f"{_SYSCTL} is 2: disabled", open_again
    if disabled == 1 and not has_host_capability("CAP_SYS_ADMIN"):
        group = "sysctl kernel.io_uring_group=GID  # as root: for members of that group only"
        return f"{_SYSCTL} is 1: requires CAP_SYS_ADMIN or membership in its group", f"{open_again}\n{group}"
    if has_seccomp_filter():
        return "a seccomp filter forbids it (EPERM)", _SECCOMP
    return f"{reason}; a security module forbids it", "allow io_uring in its policy (SELinux: io_uring permissions)"
