"""Why access to another task failed, as the error to raise: every sentence names the cause and the remedy."""

import errno
import os

from iobmd import host, procfs
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.procfs import PF_EXITING, PF_KTHREAD


def gone(what: str, number: int = errno.ESRCH) -> IOReturnError:
    """Return the error for a task that exited: `what` says which and how we know."""
    return IOReturnError(IOReturn.kIOReturnNotFound, what, number)


def unreadable(pid: int, address: int, *, write: bool = False) -> IOReturnError:
    """Return the error for the byte `address` of the task `pid`, which is not mapped or not accessible."""
    verb = "write to" if write else "read"
    try:
        area = procfs.find_vma(pid, address)
    except OSError:
        area = None
    if area is None:
        why = "no memory is mapped there"
    elif ("w" if write else "r") not in area.perms:
        why = f"it lies in a mapping without {'write' if write else 'read'} permission, {area}"
    else:
        why = f"the kernel cannot fault it in (past the end of its file, a guard page, or a device), in {area}"
    message = f"cannot {verb} address {address:#x} of task {pid}: {why}"
    return IOReturnError(IOReturn.kIOReturnVMError, message, errno.EFAULT, address)


def not_moved(pid: int, number: int, address: int, *, write: bool, timeout: float) -> IOReturnError:
    """Return the error for a transfer from or to the task `pid` that ended at `address` with an error number."""
    if number == errno.ESRCH:
        refusal = without_memory(pid)
    elif number in (errno.EPERM, errno.EACCES):
        refusal = refused(pid, number, "memory")
    elif number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        refusal = own(OSError(number, os.strerror(number)), f"cannot copy from or to task {pid}")
    elif number == errno.ETIMEDOUT:
        message = (
            f"the page at {address:#x} of task {pid} was not delivered within {timeout:g} s: its contents come from "
            "another program (a handler of userfaultfd, or the server of the file) that does not answer; wait longer "
            "with timeout="
        )
        refusal = IOReturnError(IOReturn.kIOReturnTimeout, message, number, address)
    elif number == errno.EDEADLK:
        message = f"the page at {address:#x} of task {pid} has to be delivered by another program"
        refusal = IOReturnError(IOReturn.kIOReturnNotReady, message, number, address)
    else:
        refusal = unreadable(pid, address, write=write)
    return refusal


def refused(pid: int, number: int, what: str) -> IOReturnError:
    """Return the error for a kernel that refused `what` ("memory", "pagemap") of the task `pid`."""
    if not _has_memory(pid):
        # What belongs to a task without memory is root's, so that others are refused for that reason alone.
        return without_memory(pid)
    return IOReturnError(
        IOReturn.kIOReturnNotPermitted, f"no access to the {what} of task {pid}: {_why_refused(pid)}", number
    )


def within(pid: int, error: OSError, doing: str) -> IOReturnError:
    """Return the error for a system call in the task `pid` that failed while `doing` something there."""
    number = error.errno or 0
    code, why = {
        errno.ENOMEM: (
            IOReturn.kIOReturnNoMemory,
            "its address space (RLIMIT_AS), its number of mappings (vm.max_map_count) or the memory is exhausted",
        ),
        errno.EMFILE: (IOReturn.kIOReturnNoResources, "it has three file descriptors free for a moment no more"),
        errno.ENFILE: (IOReturn.kIOReturnNoResources, "the host has no file descriptor free"),
        errno.EPERM: (IOReturn.kIOReturnNotPermitted, _why_refused(pid)),
    }.get(number, (IOReturn.kIOReturnError, str(error)))
    return IOReturnError(code, f"{doing} in task {pid}: {why}", number)


def own(error: OSError | OverflowError, doing: str) -> IOReturnError:
    """Return the error for a system call on this process itself that failed while `doing` something."""
    number = getattr(error, "errno", None) or errno.ENOMEM
    if number in (errno.EMFILE, errno.ENFILE):
        why = "no file descriptor is free; close some, or raise `ulimit -n`"
        return IOReturnError(IOReturn.kIOReturnNoResources, f"{doing}: {why}", number)
    if number == errno.ENOMEM:
        why = (
            "the address space, the overcommit limit (vm.overcommit_memory, `ulimit -v`) or the number of mappings "
            "(vm.max_map_count) is exhausted"
        )
        return IOReturnError(IOReturn.kIOReturnNoMemory, f"{doing}: {why}", number)
    return IOReturnError(IOReturn.kIOReturnError, f"{doing}: {error}", number)


def without_memory(pid: int) -> IOReturnError:
    """Return the error for a task that has no user memory, or none any more."""
    if is_kernel_thread(pid):
        return IOReturnError(
            IOReturn.kIOReturnUnsupported,
            f"task {pid} is a kernel thread: it has no user memory",
            errno.ESRCH,
        )
    return gone(f"the memory of task {pid} is gone: it exited, or replaced its program by exec meanwhile")


def is_kernel_thread(pid: int) -> bool:
    """Say whether `pid` is a kernel thread."""
    try:
        return bool(procfs.flags(pid) & PF_KTHREAD)
    except OSError:  # it is gone
        return False


def _has_memory(pid: int) -> bool:
    try:
        return not procfs.flags(pid) & (PF_EXITING | PF_KTHREAD) or procfs.memory_id(pid) != pid
    except OSError:  # it is gone
        return False


def _why_refused(pid: int) -> str:
    try:
        theirs = procfs.status(pid)["Uid"].split()
    except OSError:
        theirs = []
    if not host.has_capability("CAP_SYS_PTRACE"):
        if theirs and theirs[0] != str(os.getuid()):
            return (
                f"it belongs to uid {theirs[0]}, this process to uid {os.getuid()}; "
                "run as that user or with CAP_SYS_PTRACE"
            )
        if scope := host.yama_scope():
            return (
                f"Yama's kernel.yama.ptrace_scope is {scope}; "
                "run with CAP_SYS_PTRACE, or `sysctl kernel.yama.ptrace_scope=0`"
            )
        if pid == os.getpid():
            return "it has changed its user and is not dumpable; call prctl(PR_SET_DUMPABLE, 1)"
        return "it is not dumpable or runs with more privilege than this process; run with CAP_SYS_PTRACE"
    return "a seccomp filter, a security module or a user namespace forbids it; allow process_vm_readv or ptrace"
