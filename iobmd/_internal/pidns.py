"""Process ids in the pid namespace of this process and in that of /proc (pid_namespaces(7)).

A pid belongs to the pid namespace of the calling process. /proc may have other pids: it lists the processes of the
namespace in which it was mounted, so that after `unshare --pid` without `--mount-proc`, in a sandbox or in a chroot
with the host's /proc, the pid of this process names another process there. This process is therefore always read as
/proc/self and /proc/thread-self, and other pids are translated (`directory`).
"""

import errno
import os


def directory(pid: int | str) -> str:
    """Return the directory in which /proc describes a process.

    Parameters
    ----------
    pid : int or str
        A pid of this process's pid namespace; "self" for this process.

    Raises
    ------
    OSError
        `ENOENT`: /proc is not mounted, or belongs to a pid namespace without this process. `ESRCH`: there is no such
        process. `EOPNOTSUPP`: /proc has other pids, and pidfd_open(2), which translates them, is missing.
    """
    if pid in ("self", os.getpid()):
        return "/proc/self"
    return f"/proc/{_number_there(int(pid)) if is_foreign() else pid}"


def found_before(pid: int) -> tuple[bytes, int] | None:
    """Return the last result of `directory`, and the device number of its file system.

    None if `directory` must be called. The caller must check whether another /proc was mounted since.
    """
    own = os.getpid()
    if _foreign is None or _foreign[0] != own or _foreign[2]:
        return None
    return b"/proc/self" if pid == own else b"/proc/%d" % pid, _foreign[1]


_foreign: tuple[int, int, bool] | None = None


def is_foreign() -> bool:
    """Return whether /proc belongs to another pid namespace. Raises as `directory`.

    Determined from NSpid in its status (Linux 4.1), which lists the pids of a process in the namespace of /proc and
    in each nested namespace: a single pid if they are the same. Determined once for each file system mounted at
    /proc.
    """
    global _foreign  # noqa: PLW0603
    mounted = os.getpid(), os.stat("/proc").st_dev
    if _foreign is None or _foreign[:2] != mounted:
        _foreign = *mounted, _depth() > 0
    return _foreign[2]


def _forget() -> None:
    global _foreign  # noqa: PLW0603
    _foreign = None


os.register_at_fork(after_in_child=_forget)


def _depth() -> int:
    """Return the depth of this process's pid namespace below that of /proc."""
    return len(_numbers("/proc/self")) - 1


def _numbers(folder: str) -> list[int]:
    """Return the ids of the process in a directory of /proc, in the namespace of /proc and in each nested one."""
    with open(f"{folder}/status", "rb", buffering=0) as file:
        return [int(number) for number in file.read().partition(b"\nNSpid:")[2].partition(b"\n")[0].split()]


def _number_there(pid: int) -> int:
    """Return the pid of a process in /proc."""
    try:
        descriptor = _pidfd(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EMFILE, errno.ENFILE):
            raise
        message = f"/proc belongs to another pid namespace, and pidfd_open is refused ({error.strerror})"
        raise OSError(errno.EOPNOTSUPP, message) from None
    try:
        with open(f"/proc/thread-self/fdinfo/{descriptor}") as lines:
            number = int(lines.read().partition("\nPid:")[2].split(maxsplit=1)[0])
    finally:
        os.close(descriptor)
    if number <= 0:  # it has exited
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return number


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
    return os.pidfd_open(pid, os.O_EXCL)  # PIDFD_THREAD, Linux 6.9: it is the id of a thread


def number_here(folder: str) -> int:
    """Return the id, in this process's pid namespace, of the process in a directory of /proc; 0 if it has none."""
    numbers, depth = _numbers(folder), _depth()
    return numbers[depth] if depth < len(numbers) else 0


def pids() -> list[int]:
    """Return the pids of the processes that both /proc and this process's pid namespace contain. Raises OSError."""
    listed = sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    if not is_foreign():
        return listed
    found = []
    for number in listed:
        try:
            pid = number_here(f"/proc/{number}")
            # Sibling namespaces have the same pids.
            if pid and (pid == os.getpid() or _number_there(pid) == number):
                found.append(pid)
        except OSError:  # it exited, is hidden, or is not in this pid namespace
            continue
    return sorted(found)
