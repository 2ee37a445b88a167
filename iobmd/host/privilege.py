"""Probes of this process's capabilities, and of its limit on locked memory."""

import errno
import os
import resource
import sys
from enum import IntEnum

from iobmd import procfs
from iobmd._native import mman
from iobmd.host.fact import Fact, Status, own_status, scratch
from iobmd.units import PAGE_SIZE, format_size

# Namespace files have the inode number of their namespace; that of the initial user namespace is PROC_USER_INIT_INO.
_INITIAL_USER_NAMESPACE = 0xEFFFFFFD


class Capability(IntEnum):
    """The relevant capabilities, by bit number (capabilities(7), linux/capability.h)."""

    CAP_IPC_LOCK = 14
    """Lock memory beyond RLIMIT_MEMLOCK."""
    CAP_SYS_PTRACE = 19
    """Access processes of other users."""
    CAP_SYS_ADMIN = 21
    """See physical addresses."""


_NAMES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
)  # fmt: skip


def capability_names(bits: int) -> str:
    """Return the names of a set of capabilities (linux/capability.h), as text."""
    return ", ".join(
        f"CAP_{_NAMES[bit]}" if bit < len(_NAMES) else f"capability {bit}"
        for bit in range(bits.bit_length())
        if bits >> bit & 1
    )


_PURPOSES = {
    Capability.CAP_IPC_LOCK: "lock and pin any amount of memory",
    Capability.CAP_SYS_ADMIN: "physical addresses; shared memory in huge pages",
    Capability.CAP_SYS_PTRACE: "copy from processes of other users, up to Yama scope 2",
}


def has_capability(name: str) -> bool:
    """Return whether this process has the effective capability `name` in its user namespace.

    Parameters
    ----------
    name : str
        The kernel's name of one of `Capability`, such as "CAP_SYS_ADMIN".

    Raises
    ------
    KeyError
        No member of `Capability` has this name.

    Notes
    -----
    Source: CapEff in proc_pid_status(5); False if /proc is not mounted. See `has_host_capability`.
    """
    return bool(int(own_status().get("CapEff", "0"), 16) >> Capability[name] & 1)


def in_initial_user_namespace() -> bool:
    """Return whether this process is in the initial user namespace (user_namespaces(7))."""
    try:
        return os.stat("/proc/self/ns/user").st_ino == _INITIAL_USER_NAMESPACE
    except OSError:
        # No /proc, or a kernel without user namespaces, which has only the initial one.
        return True


def has_host_capability(name: str) -> bool:
    """Return whether the capability `name` applies to resources of the host.

    The kernel requires CAP_IPC_LOCK (locking beyond the limit) and CAP_SYS_ADMIN (physical addresses) in the initial
    user namespace: the capabilities of a rootless container do not count. Raises as `has_capability`.
    """
    return has_capability(name) and in_initial_user_namespace()


def lifts_memlock(pid: int | None = None) -> bool:
    """Return whether CAP_IPC_LOCK lifts a process's limit on locked memory, by default this one's. Raises OSError."""
    if pid is None:
        return has_host_capability("CAP_IPC_LOCK")
    effective = int(procfs.status(pid)["CapEff"], 16) >> Capability.CAP_IPC_LOCK & 1
    return bool(effective) and os.stat(f"/proc/{pid}/ns/user").st_ino == _INITIAL_USER_NAMESPACE


def memlock_limit() -> int | None:
    """Return how many bytes this process may lock or pin; None if it is not limited.

    It is not limited if RLIMIT_MEMLOCK is unlimited or CAP_IPC_LOCK lifts it (mlock(2), getrlimit(2)). mlock is
    counted per process, io_uring's pins per user; the two counters are independent.
    """
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or has_host_capability("CAP_IPC_LOCK"):
        return None
    return soft


def capability_remedy() -> str:
    """Return how to run this interpreter with the relevant capabilities, one alternative per line."""
    if not in_initial_user_namespace():
        return "leave the user namespace (rootless container, unshare -U): its capabilities do not count here"
    names = [capability.name.lower() for capability in Capability]
    container = " ".join(f"--cap-add {name.removeprefix('cap_').upper()}" for name in names)
    # A copy, because every user who may execute the interpreter itself would gain the capabilities; in the same
    # directory, from which it finds its virtual environment (pyvenv.cfg) and its packages.
    private = os.path.join(os.path.dirname(os.path.abspath(sys.executable)), "iobmd-python")
    return (
        "run as root (sudo)\n"
        f"groupadd iobmd; install -g iobmd -m 0750 {os.path.realpath(sys.executable)} {private}; "
        f"setcap {','.join(names)}+ep {private}  # as root; its members may do all of this\n"
        f"systemd unit: AmbientCapabilities={' '.join(names).upper()}\n"
        f"container: {container}"
    )


def memlock_remedy() -> str:
    """Return how to raise the limit on locked memory, one alternative per line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    highest = "unlimited" if hard == resource.RLIM_INFINITY else str(hard >> 10)
    shell = f"ulimit -l {highest}  # in the shell; the maximum of its hard limit"
    if soft == hard:
        shell = "ulimit -l unlimited  # in a shell of root that then starts this program"
    return (
        f"{shell}\n"
        "prlimit --memlock=unlimited:unlimited --pid PID  # as root, for a running process\n"
        "/etc/security/limits.conf: * - memlock unlimited  # from the next login\n"
        "systemd unit: LimitMEMLOCK=infinity\n"
        "container: --ulimit memlock=-1, or --cap-add IPC_LOCK, which lifts the limit"
    )


def capability(which: Capability) -> Fact:
    """Probe one capability of this process."""
    if "CapEff" not in own_status():
        value = {"effective": None, "host": None}
        return Fact(which.name, Status.NO, value, "unknown without /proc", _PURPOSES[which])
    effective, host = has_capability(which.name), has_host_capability(which.name)
    status = Status.YES if host else Status.LIMITED if effective else Status.NO
    summary = {Status.YES: "effective", Status.LIMITED: "only in its user namespace"}.get(status, "missing")
    remedy = "" if host else capability_remedy()
    return Fact(which.name, status, {"effective": effective, "host": host}, summary, _PURPOSES[which], remedy)


def memlock() -> Fact:
    """Report RLIMIT_MEMLOCK, and how much this process has locked (VmLck) and pinned (VmPin), in bytes."""
    limits = [
        None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_MEMLOCK)
    ]
    fields = own_status()
    locked, pinned = (int(fields.get(name, "0").split()[0]) << 10 for name in ("VmLck", "VmPin"))
    bound = memlock_limit()
    value = {"soft": limits[0], "hard": limits[1], "effective": bound, "locked": locked, "pinned": pinned}
    summary = "unlimited" if limits[0] is None else format_size(limits[0])
    if limits[0] is not None and bound is None:
        summary += ", lifted by CAP_IPC_LOCK"
    summary += f"; {format_size(locked)} locked, {format_size(pinned)} pinned"
    status = Status.YES if bound is None else Status.LIMITED if bound >= PAGE_SIZE else Status.NO
    purpose = "how much memory may be wired"
    return Fact("RLIMIT_MEMLOCK", status, value, summary, purpose, "" if bound is None else memlock_remedy())


def mlock() -> Fact:
    """Probe mlock(2): lock a page of this process, which is unlocked when it is unmapped."""
    name, purpose = "mlock", "wired buffers: memory that stays in RAM"
    try:
        with scratch() as page:
            mman.lock(page.address, page.size)
    except OSError as error:
        why, remedy = _why_not_locked(error)
        return Fact(name, Status.NO, False, why, purpose, remedy)
    return Fact(name, Status.YES, True, "a page was locked", purpose)


def _why_not_locked(error: OSError) -> tuple[str, str]:
    bound = memlock_limit()
    # The kernel returns EPERM for a limit of 0, and ENOMEM or (from mmap, under mlockall) EAGAIN for one that is
    # reached.
    if bound is not None and (bound < PAGE_SIZE or error.errno in (errno.ENOMEM, errno.EAGAIN)):
        return f"RLIMIT_MEMLOCK ({format_size(bound)}) leaves no room for a page", memlock_remedy()
    if error.errno in (errno.EPERM, errno.ENOSYS):
        remedy = "allow mlock in the seccomp profile (container: --security-opt seccomp=unconfined)"
        return f"{error.strerror}; a seccomp filter or security module forbids it", remedy
    return f"{error.strerror}", "free some memory"
