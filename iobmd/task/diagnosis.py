"""Errors for failed access to another task; each message names the cause and the remedy."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from iobmd import host, procfs
from iobmd._internal import pidns
from iobmd.constants import IOReturn
from iobmd.errors import (
    NO_DESCRIPTOR,
    CannotWireError,
    IOReturnError,
    NoMemoryError,
    NoResourcesError,
    NotFoundError,
    NotOpenError,
    NotPermittedError,
    NotReadyError,
    TaskTimeoutError,
    UnsupportedError,
    VMError,
)
from iobmd.host import limits
from iobmd.procfs import PF_EXITING, PF_KTHREAD
from iobmd.task import obstacles

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd._native.mapping import ClosedError, FaultError


def unless_exhausted(error: OSError, doing: str) -> None:
    """Raise `kIOReturnNoResources` if inspecting a task failed for lack of a file descriptor."""
    if error.errno in NO_DESCRIPTOR:
        raise limits.from_oserror(error, doing) from None


def gone(what: str, number: int = errno.ESRCH) -> NotFoundError:
    """Return the error for a task that exited; `what` names it and the evidence."""
    return NotFoundError(what, number)


def unreadable(
    pid: int, address: int, *, write: bool = False, alive: Callable[[], bool] = lambda: True
) -> IOReturnError:
    """Return the error for the byte `address` of the task `pid`, which is not mapped or not accessible.

    The explanation takes twenty times as long as the failure, and is composed when it is first read. It describes the
    memory at that time, and says so if that does not explain the failure. `alive` returns whether the pid still
    belongs to the task.
    """
    verb = "write to" if write else "read"

    def message() -> str:
        return f"cannot {verb} address {address:#x} of task {pid}: {_why_unreadable(pid, address, write, alive)}"

    return VMError(message, errno.EFAULT, address)


def _why_unreadable(pid: int, address: int, write: bool, alive: Callable[[], bool]) -> str:
    area = obstacle = None
    try:
        obstacle = obstacles.find(pid, address, address + 1, write=write)
        area = obstacle or procfs.find_vma(pid, address)
    except OSError as error:
        if alive():
            return f"the kernel cannot fault it in (/proc does not show what is mapped there: {error.strerror})"
    if not alive():
        return "the cause cannot be determined: it has exited since"
    if obstacle:
        return obstacle.why + (f"; {obstacle.remedy}" if obstacle.remedy else "")
    causes = "a bad page, an I/O error, or it was not mapped yet"
    return f"the kernel could not fault it in at that time ({causes}), in {area}"


def unreachable(error: ClosedError | FaultError) -> IOReturnError:
    """Return the error for memory of this process that was released or unmapped while it was accessed."""
    if not isinstance(error, OSError):
        return NotOpenError("another thread has released this memory")
    if error.address is not None:
        return unreadable(os.getpid(), error.address)
    return NoResourcesError(
        f"memory that may be unmapped is accessed by a child process, which cannot start ({error}): RLIMIT_NPROC "
        "(`ulimit -u`) or the pids limit of a cgroup is reached",
        error.errno or 0,
    )


def not_moved(
    pid: int,
    number: int,
    address: int,
    *,
    write: bool,
    timeout: float,
    alive: Callable[[], bool] = lambda: True,
) -> IOReturnError:
    """Return the error for a transfer from or to the task `pid` that ended at `address` with an error number."""
    if number == errno.ESRCH:
        refusal = without_memory(pid)
    elif number in (errno.EPERM, errno.EACCES):
        refusal = refused(pid, number, "memory")
    elif number in (*NO_DESCRIPTOR, errno.ENOMEM, errno.EAGAIN):
        refusal = limits.from_oserror(OSError(number, os.strerror(number)), f"cannot copy from or to task {pid}")
    elif number == errno.ETIMEDOUT:
        message = (
            f"the page at {address:#x} of task {pid} was not supplied within {timeout:g} s: its contents come from "
            "another program (a userfaultfd handler, or the server of the file) that does not answer; wait longer "
            "with timeout="
        )
        refusal = TaskTimeoutError(message, number, address)
    elif number == errno.EDEADLK:
        message = f"the page at {address:#x} of task {pid} must be supplied by another program"
        refusal = NotReadyError(message, number, address)
    else:
        refusal = unreadable(pid, address, write=write, alive=alive)
    return refusal


def refused(pid: int, number: int, what: str) -> IOReturnError:
    """Return the error if the kernel refused access to `what` ("memory", "pagemap") of the task `pid`."""
    unless_exhausted(OSError(number, os.strerror(number)), f"cannot read the {what} of task {pid}")
    if not _has_memory(pid):
        # The files of a task without memory belong to root: other users are refused for that reason alone.
        return without_memory(pid)
    return NotPermittedError(f"no access to the {what} of task {pid}: {_why_refused(pid)}", number)


def within(pid: int, error: OSError, doing: str, size: int = 0) -> IOReturnError:
    """Return the error for a system call in the task `pid` that failed while `doing` something with `size` bytes."""
    number = error.errno or 0
    if number == errno.EAGAIN and (limit := limits.memlock(size, pid)):
        why = f"the task locks all its mappings (mlockall), and {limit}"
        return CannotWireError(f"{doing} in task {pid}: {why}", number)
    met = limits.met_by_mapping(size, pid) if number == errno.ENOMEM else None
    prefix = f"{doing} in task {pid}: "
    if number == errno.ENOMEM:
        why = str(met or "its address space (RLIMIT_AS, vm.max_map_count) or the memory is exhausted")
        return NoMemoryError(prefix + why, number)
    if number == errno.EMFILE:
        return NoResourcesError(prefix + "its RLIMIT_NOFILE is below 3", number)
    if number == errno.ENFILE:
        return NoResourcesError(prefix + "the host has no file descriptor free", number)
    if number == errno.EPERM:
        return NotPermittedError(prefix + _why_refused(pid), number)
    return IOReturnError(IOReturn.kIOReturnError, prefix + str(error), number)


def own_pagemap(error: OSError) -> IOReturnError:
    """Return the error for this process's own pagemap, which could not be opened or read."""
    if error.errno == errno.ENOENT:
        return hidden(os.getpid()) or UnsupportedError(
            "this kernel has no pagemap (CONFIG_PROC_PAGE_MONITOR), which shows the positions of pages",
            errno.ENOENT,
        )
    return limits.from_oserror(error, "cannot read /proc/self/pagemap")


def hidden(pid: int) -> IOReturnError | None:
    """Return the error for a process that exists and that /proc does not show; None for any other.

    `kIOReturnNotPermitted`: /proc hides it (hidepid, a security module). `kIOReturnUnsupported`: /proc is not
    mounted, belongs to a pid namespace without this process, or to another one whose pids cannot be translated.
    """
    if not _exists(pid):
        return None
    try:
        os.stat(f"{pidns.directory(pid)}/stat")
    except OSError as error:
        number, why = error.errno or 0, error.strerror
    else:
        return None
    remedy = host.MOUNT_PROC.partition("  #")[0]
    if not os.path.exists("/proc/self"):
        what = f"/proc, which describes task {pid}, is not mounted (or is that of another pid namespace)"
        return UnsupportedError(f"{what}; `{remedy}`", number)
    if number == errno.EOPNOTSUPP:
        what = f"cannot determine which process of /proc is task {pid}: {why}"
        return UnsupportedError(f"{what}; `{remedy}`, or allow pidfd_open in the seccomp profile", number)
    if number not in (errno.ENOENT, errno.EPERM, errno.EACCES) or not _exists(pid):
        return None
    option = host.proc_options().get("hidepid")
    because = f"is mounted with hidepid={option} and" if option else "is restricted (by a security module?) and"
    message = (
        f"no access to task {pid}: /proc {because} hides it from this process; run as its user, as a member of the "
        "group in the mount option gid=, or with CAP_SYS_PTRACE; or `mount -o remount,hidepid=0 /proc` (systemd: "
        "ProtectProc=default)"
    )
    return NotPermittedError(message, number)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        pass
    return True


def numbered_otherwise(pid: int) -> IOReturnError | None:
    """Return the error for operations that require equal pids in /proc and system calls; None if they are equal."""
    try:
        if not pidns.is_foreign():
            return None
    except OSError:
        return hidden(pid)
    message = (
        f"/proc belongs to another pid namespace, in which {pid} is another process: task {pid} can be read, but its "
        f"threads cannot be stopped, and psutil cannot be used for it; `{host.MOUNT_PROC.partition('  #')[0]}`"
    )
    return UnsupportedError(message)


def without_memory(pid: int) -> IOReturnError:
    """Return the error for a task without user memory."""
    if error := hidden(pid):
        return error
    if is_kernel_thread(pid):
        return UnsupportedError(
            f"task {pid} is a kernel thread: it has no user memory",
            errno.ESRCH,
        )
    return gone(f"the memory of task {pid} no longer exists: it exited, or executed another program")


def of_32_bits(pid: int) -> UnsupportedError:
    """Return the error for a 32-bit program."""
    return UnsupportedError(f"task {pid} is a 32-bit program, whose system calls iobmd does not make")


def is_kernel_thread(pid: int) -> bool:
    """Return whether `pid` is a kernel thread."""
    try:
        return bool(procfs.flags(pid) & PF_KTHREAD)
    except OSError:  # it is gone
        return False


def _has_memory(pid: int) -> bool:
    try:
        return not procfs.flags(pid) & (PF_EXITING | PF_KTHREAD) or procfs.memory_id(pid) != pid
    except OSError as error:  # it has exited, or no descriptor is free to inspect it
        return error.errno in NO_DESCRIPTOR


def _why_refused(pid: int) -> str:
    if pid == os.getpid():
        return "it has changed its user and is not dumpable; call prctl(PR_SET_DUMPABLE, 1)"
    try:
        theirs, ours = procfs.status(pid), procfs.status()
    except OSError:
        return "/proc does not show why"
    lacking = host.capability_names(int(theirs["CapPrm"], 16) & ~int(ours["CapEff"], 16))
    if not host.has_capability("CAP_SYS_PTRACE"):
        return _why_without_ptrace(int(theirs["Uid"].split()[0]), lacking)
    if _in_another_user_namespace(pid):
        return (
            "it is in another user namespace, in which CAP_SYS_PTRACE of this process does not count; run in that "
            "namespace or in one around it, with CAP_SYS_PTRACE there"
        )
    suspects = [f"that it has capabilities which this process lacks ({lacking})"] if lacking else []
    if ours.get("Seccomp", "0") != "0":
        suspects.append("the seccomp filter of this process (allow process_vm_readv and ptrace in its profile)")
    suspects.append("a security module")
    return f"this process has CAP_SYS_PTRACE; the remaining causes are {' or '.join(suspects)}"


def _why_without_ptrace(uid: int, lacking: str) -> str:
    """Return why access to a process of `uid`, with capabilities that are `lacking` here, requires CAP_SYS_PTRACE.

    In the order of the kernel's checks (__ptrace_may_access and cap_ptrace_access_check, then Yama).
    """
    if uid != os.getuid():
        return f"it belongs to uid {uid}, this process to uid {os.getuid()}; run as that user or with CAP_SYS_PTRACE"
    if lacking:
        return f"it has capabilities that this process lacks ({lacking}); run with these or with CAP_SYS_PTRACE"
    if scope := host.yama_scope():
        return (
            f"Yama's kernel.yama.ptrace_scope is {scope}; "
            "run with CAP_SYS_PTRACE, or `sysctl kernel.yama.ptrace_scope=0`"
        )
    return "it is not dumpable (prctl(2), or its program may not be read by its user); run with CAP_SYS_PTRACE"


def _in_another_user_namespace(pid: int) -> bool:
    folder = pidns.directory(pid)
    try:
        return os.readlink(f"{folder}/ns/user") != os.readlink("/proc/thread-self/ns/user")
    except OSError:  # refused like its memory; the map of its user ids is readable by all users
        pass
    try:
        with open(f"{folder}/uid_map") as theirs, open("/proc/self/uid_map") as ours:
            return theirs.read() != ours.read()
    except OSError:
        return False
