"""Other processes' memory, and where pages are: process_vm_readv, /proc/PID/mem, Yama, pagemap."""

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
    """Copy bytes within this process as `iobmd` does from others; raise OSError when that fails."""
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
        raise OSError(errno.EIO, f"{reached - page.address} of {size} bytes came")


def proc_options() -> dict[str, str]:
    """Return the mount options of /proc that restrict it (hidepid, gid, subset; proc(5)); none without /proc."""
    # The last line of a mount point is that of the mount on top.
    for line in reversed(lines(read_text("/proc/self/mountinfo"))):
        place, _, system = line.partition(" - ")
        if place.split(" ")[4] == "/proc":
            options = dict(option.partition("=")[::2] for option in system.split(" ")[2].split(","))
            return {name: options[name] for name in ("hidepid", "gid", "subset") if name in options}
    return {}


def proc() -> Fact:
    """Probe whether /proc is mounted, counts as this process does, and shows all processes and the host."""
    name, purpose = "/proc", "other tasks; where pages lie; limits, with their values"
    try:
        foreign = pidns.is_foreign()
    except OSError:
        value: JSON = {"mounted": False}
        missing = "not mounted, or of a pid namespace that this process is not in: no other task, no addresses"
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
        findings.append(f"shows processes only{subset}: free memory, swap and sysctls are not known")
        remedies.append("mount -t proc proc /proc  # as root, over this one: subset=pid cannot be taken back")
        remedies.append("systemd unit: ProcSubset=all")
    value = {"mounted": True, "foreign": foreign, **options}
    status = Status.NO if not usable else Status.LIMITED if findings else Status.YES
    return Fact(name, status, value, "; ".join(findings) or "shows all processes", purpose, "\n".join(remedies))


def _can_translate() -> bool:
    try:
        pidns.directory(os.getppid() or 1)
    except ProcessLookupError:  # it is gone: the call works
        return True
    except OSError:
        return False
    return True


def _hides_processes(options: dict[str, str]) -> bool:
    if options.get("hidepid", "0") in ("0", "off") or has_capability("CAP_SYS_PTRACE"):
        return False
    return int(options.get("gid", 0)) not in (*os.getgroups(), os.getegid())


def process_vm_readv() -> Fact:
    """Probe process_vm_readv(2) on this process: what seccomp and the kernel's build let through.

    A process may always read itself: what users, Yama and security modules say of another one shows only there.
    """
    name, purpose = "process_vm_readv", "copy out of another process at full speed"
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
    name, purpose = "/proc/PID/mem", "copy out of another process where process_vm_readv is denied"
    try:
        with _opened("/proc/self/mem") as descriptor:
            _copies(descriptor)
    except OSError as error:
        remedy = _MEM_REMEDIES.get(error.errno or 0, "allow it in the policy of the security module")
        return Fact(name, Status.NO, False, f"{error.strerror}", purpose, remedy)
    return Fact(name, Status.YES, True, "allowed", purpose)


def yama_scope() -> int:
    """Return kernel.yama.ptrace_scope; 0, no restriction of its own, where the kernel has no Yama.

    Source: Documentation/admin-guide/LSM/Yama.rst (Linux 3.4). It rules process_vm_readv and /proc/PID/mem too.
    """
    return read_int("/proc/sys/kernel/yama/ptrace_scope") or 0


def yama() -> Fact:
    """Report Yama's scope, and what it means for a process with our capabilities."""
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
        remedy = "set kernel.yama.ptrace_scope=0 in /etc/sysctl.d and boot: 3 cannot be taken back"
    if scope and lifted:
        summary += " (this process has it)" if scope == 2 else ", or with CAP_SYS_PTRACE (this process has it)"
    return Fact("yama.ptrace_scope", status, scope, summary, "which processes may be copied from", remedy)


def pfns_visible() -> bool:
    """Say whether the kernel shows this process page frame numbers (proc_pid_pagemap(5), hidden since Linux 4.2).

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
    """Probe physical addresses: look for the frame of a page of our own in pagemap."""
    name, purpose = "PFN", "physical addresses: contiguity, DMA segments"
    try:
        if pfns_visible():
            return Fact(name, Status.YES, True, "visible", purpose)
    except OSError as error:
        return Fact(name, Status.NO, False, f"pagemap: {error.strerror}", purpose, _pagemap_remedy(error))
    why = "hidden: needs CAP_SYS_ADMIN in the first user namespace"
    return Fact(name, Status.NO, False, why, purpose, capability_remedy())


def _pagemap_remedy(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "a kernel with CONFIG_PROC_PAGE_MONITOR, and /proc mounted"
    return _NOT_DUMPABLE if error.errno == errno.EACCES else capability_remedy()


def pagemap_scan() -> Fact:
    """Probe the ioctl PAGEMAP_SCAN (Linux 6.7): it has to find a page of our own, and exactly that."""
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
