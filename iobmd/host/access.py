"""Probes of access to other processes' memory and page positions: process_vm_readv, /proc/PID/mem, Yama, pagemap."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from iobmd._internal import pidns
from iobmd._native import crosstask, pagemap
from iobmd.host.fact import JSON, Fact, Status, has_seccomp_filter, lines, read_int, read_text, scratch
from iobmd.host.privilege import capability_remedy, has_capability
from iobmd.units import PAGE_SIZE

_PATTERN = b"iobmd looks for its own bytes"
_UNCONFINED = (
    "allow {call} in the seccomp profile (container: --cap-add SYS_PTRACE, or --security-opt seccomp=unconfined)"
)
MOUNT_PROC = "mount -t proc proc /proc  # as root, in the pid namespace of this process (unshare: --mount-proc)"
_NOT_DUMPABLE = "prctl(PR_SET_DUMPABLE, 1): the process changed its user, or its program has capabilities"
_MEM_REMEDIES = {errno.EACCES: _NOT_DUMPABLE, errno.ENOENT: MOUNT_PROC}


@contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _copies(memory: int) -> None:
    """Copy bytes within this process as `iobmd` does from others; raise OSError if that fails."""
    size = len(_PATTERN)
    with scratch() as page:
        page.write(0, _PATTERN)
        reached, number, *_ = crosstask.transfer(
            os.getpid(), memory, -1, -1, False, False, page.address, page.address + size, size, PAGE_SIZE
        )
        found = bytearray(size)
        page.read_into(size, found)
    if number:
        raise OSError(number, os.strerror(number))
    if found != _PATTERN:
        raise OSError(errno.EIO, f"{reached - page.address} of {size} bytes were read")


def proc_options() -> dict[str, str]:
    """Return the mount options that restrict /proc (hidepid, gid, subset; proc(5)); empty without /proc."""
    # The last line of a mount point is the topmost mount.
    for line in reversed(lines(read_text("/proc/self/mountinfo"))):
        place, _, system = line.partition(" - ")
        if place.split(" ")[4] == "/proc":
            options = dict(option.partition("=")[::2] for option in system.split(" ")[2].split(","))
            return {name: options[name] for name in ("hidepid", "gid", "subset") if name in options}
    return {}


def proc() -> Fact:
    """Probe whether /proc is mounted, belongs to this pid namespace, and shows all processes and the host."""
    name, purpose = "/proc", "other tasks; positions of pages; limits and their values"
    try:
        foreign = pidns.is_foreign()
    except OSError:
        value: JSON = {"mounted": False}
        missing = "not mounted, or of a pid namespace without this process: no other tasks, no addresses"
        return Fact(name, Status.NO, value, missing, purpose, MOUNT_PROC)
    options = proc_options()
    findings, remedies = [], []
    usable = not foreign or _can_translate()
    if foreign and usable:
        findings.append("of another pid namespace: pids are translated, and tasks cannot be stopped")
        remedies.append(MOUNT_PROC)
    elif foreign:
        findings.append("of another pid namespace, and pidfd_open, which translates pids, is refused")
        remedies += [MOUNT_PROC, _UNCONFINED.format(call="pidfd_open")]
    if _hides_processes(options):
        findings.append(f"hidepid={options['hidepid']} hides the processes of other users")
        remedies.append("mount -o remount,hidepid=0 /proc  # as root; or gid=GROUP, for a group of this process")
        remedies.append("systemd unit: ProtectProc=default; or AmbientCapabilities=CAP_SYS_PTRACE")
    if not os.path.exists("/proc/meminfo"):
        subset = f" (subset={options['subset']})" if "subset" in options else ""
        findings.append(f"shows only processes{subset}: free memory, swap and sysctls are unknown")
        remedies.append("mount -t proc proc /proc  # as root, over this one: subset=pid cannot be undone")
        remedies.append("systemd unit: ProcSubset=all")
    value = {"mounted": True, "foreign": foreign, **options}
    status = Status.NO if not usable else Status.LIMITED if findings else Status.YES
    return Fact(name, status, value, "; ".join(findings) or "shows all processes", purpose, "\n".join(remedies))


def _can_translate() -> bool:
    try:
        pidns.directory(os.getppid() or 1)
    except ProcessLookupError:  # the child has exited: the call works
        return True
    except OSError:
        return False
    return True


def _hides_processes(options: dict[str, str]) -> bool:
    if options.get("hidepid", "0") in ("0", "off") or has_capability("CAP_SYS_PTRACE"):
        return False
    return int(options.get("gid", 0)) not in (*os.getgroups(), os.getegid())


def process_vm_readv() -> Fact:
    """Probe process_vm_readv(2) on this process: whether seccomp and the kernel's configuration permit it.

    A process may always read itself; restrictions by user, Yama and security modules only apply to others.
    """
    name, purpose = "process_vm_readv", "copy from another process at full speed"
    try:
        _copies(-1)
    except OSError as error:
        remedy = _UNCONFINED.format(call=name)
        if error.errno == errno.ENOSYS and not has_seccomp_filter():
            remedy = "a kernel with CONFIG_CROSS_MEMORY_ATTACH"
        return Fact(name, Status.NO, False, f"{error.strerror}", purpose, remedy)
    return Fact(name, Status.YES, True, "allowed", purpose)


def proc_mem() -> Fact:
    """Probe reading /proc/PID/mem, on this process (proc_pid_mem(5))."""
    name, purpose = "/proc/PID/mem", "copy from another process if process_vm_readv is denied"
    try:
        with _opened("/proc/self/mem") as descriptor:
            _copies(descriptor)
    except OSError as error:
        remedy = _MEM_REMEDIES.get(error.errno or 0, "allow it in the policy of the security module")
        return Fact(name, Status.NO, False, f"{error.strerror}", purpose, remedy)
    return Fact(name, Status.YES, True, "allowed", purpose)


def yama_scope() -> int:
    """Return kernel.yama.ptrace_scope; 0 (no restriction) if the kernel lacks Yama.

    Source: Documentation/admin-guide/LSM/Yama.rst (Linux 3.4). It also applies to process_vm_readv and /proc/PID/mem.
    """
    return read_int("/proc/sys/kernel/yama/ptrace_scope") or 0


def yama() -> Fact:
    """Report Yama's scope, and its effect on a process with these capabilities."""
    scope = yama_scope()
    lifted = scope < 3 and has_capability("CAP_SYS_PTRACE")
    meanings = {
        0: "no further restriction",
        1: "only child processes, and those that allow it with PR_SET_PTRACER",
        2: "only with CAP_SYS_PTRACE",
    }
    summary = f"{scope}: {meanings.get(scope, 'no process at all, until the next boot')}"
    if scope == 0 or lifted:
        status, remedy = Status.YES, ""
    else:
        status = Status.LIMITED if scope == 1 else Status.NO
        remedy = f"sysctl kernel.yama.ptrace_scope=0  # as root\n{capability_remedy()}"
    if scope > 2:
        remedy = "set kernel.yama.ptrace_scope=0 in /etc/sysctl.d and reboot: 3 cannot be undone"
    if scope and lifted:
        summary += " (this process has it)" if scope == 2 else ", or with CAP_SYS_PTRACE (this process has it)"
    return Fact("yama.ptrace_scope", status, scope, summary, "which processes can be copied from", remedy)


def pfns_visible() -> bool:
    """Return whether page frame numbers are visible to this process (proc_pid_pagemap(5), hidden since Linux 4.2).

    Raises
    ------
    OSError
        /proc/self/pagemap cannot be read at all.
    """
    with scratch() as page, _opened("/proc/self/pagemap") as descriptor:
        page.write(0, _PATTERN)
        return any(
            frame is not None
            for _present, _swapped, frame, *_flags in pagemap.read_entries(descriptor, page.address // PAGE_SIZE, 1)
        )


def frames() -> Fact:
    """Probe physical addresses: read the frame number of a page of this process from pagemap."""
    name, purpose = "PFN", "physical addresses: contiguity, DMA segments"
    try:
        if pfns_visible():
            return Fact(name, Status.YES, True, "visible", purpose)
    except OSError as error:
        return Fact(name, Status.NO, False, f"pagemap: {error.strerror}", purpose, _pagemap_remedy(error))
    why = "hidden: requires CAP_SYS_ADMIN in the initial user namespace"
    return Fact(name, Status.NO, False, why, purpose, capability_remedy())


def _pagemap_remedy(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "a kernel with CONFIG_PROC_PAGE_MONITOR, and /proc mounted"
    return _NOT_DUMPABLE if error.errno == errno.EACCES else capability_remedy()


def pagemap_scan() -> Fact:
    """Probe the ioctl PAGEMAP_SCAN (Linux 6.7): it must find exactly one page of this process."""
    name, purpose = "PAGEMAP_SCAN", "find resident pages faster than by reading pagemap"
    try:
        with scratch() as page, _opened("/proc/self/pagemap") as descriptor:
            page.write(0, _PATTERN)
            end = page.address + page.size
            found = pagemap.scan(descriptor, page.address, end, pagemap.PAGE_IS_PRESENT, 0)
            works = found == [(page.address, end)]
    except OSError as error:
        known = error.errno not in (errno.ENOTTY, errno.EINVAL)
        summary = f"{error.strerror}" if known else "not in this kernel: pagemap is read instead"
        remedy = _pagemap_remedy(error) if known else "Linux 6.7 or later"
        return Fact(name, Status.NO, False, summary, purpose, remedy)
    if not works:
        return Fact(name, Status.NO, False, "wrong answer: pagemap is read instead", purpose, "another kernel")
    return Fact(name, Status.YES, True, "works", purpose)
