"""Running a part of a test in a forked child: as another user, under a limit, behind a seccomp filter."""

import contextlib
import ctypes
import gc
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

NOBODY = 65534
CAP_IPC_LOCK, CAP_SYS_ADMIN = 1 << 14, 1 << 21
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SYSCALLS = {
    "x86_64": {
        "ioctl": 16, "pread64": 17, "madvise": 28, "mlock": 149, "process_vm_readv": 310, "process_vm_writev": 311,
        "userfaultfd": 323, "io_uring_setup": 425, "io_uring_register": 427, "fsopen": 430, "pidfd_open": 434,
        "pidfd_getfd": 438,
    },
    "aarch64": {
        "ioctl": 29, "pread64": 67, "madvise": 233, "mlock": 228, "process_vm_readv": 270, "process_vm_writev": 271,
        "userfaultfd": 282, "io_uring_setup": 425, "io_uring_register": 427, "fsopen": 430, "pidfd_open": 434,
        "pidfd_getfd": 438,
    },
}[os.uname().machine]  # fmt: skip
NANOSLEEP = {"x86_64": ("35", "230"), "aarch64": ("101", "115")}[os.uname().machine]  # nanosleep, clock_nanosleep


def in_child(
    function: Callable[[], Any],
    *,
    uid: int | None = None,
    memlock: int | None = None,
    deny: dict[str, int] | None = None,
    drop: int = 0,
) -> Any:
    """Return the result of `function` in a forked child; an exception there is raised here.

    `uid` also drops every capability, `drop` a set of them (bits); `memlock` sets RLIMIT_MEMLOCK in bytes; `deny`
    maps names of system calls to the error numbers that a seccomp filter returns for them.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        die_with_parent()
        gc.freeze()  # inherited garbage closes no descriptors and frees no memory, at times that are not known
        try:
            _restrict(uid, memlock, deny or {}, drop)
            outcome: tuple[bool, Any] = True, function()
        except BaseException as error:
            outcome = False, error
        try:
            message = pickle.dumps(outcome)
        except Exception as error:
            message = pickle.dumps((False, RuntimeError(f"{outcome!r}: {error!r}")))
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(message)
        sys.stdout.flush()
        os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            message = pipe.read()
    except BaseException:  # the time limit of the test applies to the child too
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(pid, 0)
    assert message, f"the child died without a message, wait status {status:#x}"
    passed, result = pickle.loads(message)
    if not passed:
        raise result
    return result


def die_with_parent() -> None:
    """Request that the kernel kill this process when the thread that forked it exits (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _restrict(uid: int | None, memlock: int | None, deny: dict[str, int], drop: int) -> None:
    if memlock is not None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock, memlock))
    if uid is not None and os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        # A change of user makes a process undumpable, so that its /proc files belong to root, unlike after a login.
        assert ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0
        die_with_parent()  # the change of user cleared it
    if drop:
        drop_capabilities(drop)
    if deny:
        deny_calls(deny)


def drop_capabilities(drop: int) -> None:
    """Drop capabilities of this process, as bits (capset(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = ctypes.create_string_buffer(struct.pack("=II", 0x20080522, 0)), ctypes.create_string_buffer(24)
    assert libc.capget(header, sets) == 0
    low_effective, low_permitted, *rest = struct.unpack("=6I", sets.raw)
    kept = struct.pack("=6I", low_effective & ~drop, low_permitted & ~drop, *rest)
    assert libc.capset(header, kept) == 0, os.strerror(ctypes.get_errno())


def deny_calls(deny: dict[str, int]) -> None:
    """Make system calls of this process fail from now on, by a seccomp filter (seccomp(2))."""

    def statement(code: int, jump_true: int, jump_false: int, k: int) -> bytes:
        return struct.pack("=HBBI", code, jump_true, jump_false, k)

    program = statement(0x20, 0, 0, 0)  # load the number of the call
    for name, number in deny.items():
        program += statement(0x15, 0, 1, SYSCALLS[name]) + statement(0x06, 0, 0, 0x00050000 | number)
    program += statement(0x06, 0, 0, 0x7FFF0000)  # allow the rest
    kept = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(kept))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) == 0, os.strerror(ctypes.get_errno())


@contextlib.contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a program, and kill it at the end of a `with` block, also after an error: Popen would wait for it."""
    with subprocess.Popen(command, **options) as program:
        try:
            yield program
        finally:
            program.kill()


@contextlib.contextmanager
def sleeping(uid: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Start sleep(1), as user `uid` if given, and wait until it sleeps; the end of the `with` block kills it.

    Popen() returns in the middle of execve(2), when descriptors are closed: no stack, no program is mapped yet.
    """
    with started(["sleep", "1000"], user=uid) as program:
        until_asleep(program.pid)
        yield program


def until_asleep(pid: int) -> None:
    """Wait until a process is in nanosleep(2)."""
    while Path(f"/proc/{pid}/syscall").read_text().split()[0] not in NANOSLEEP:
        time.sleep(0.0005)


@contextlib.contextmanager
def forked(body: Callable[[], object], fork: Callable[[], int] = os.fork) -> Iterator[int]:
    """Run `body` repeatedly in a forked child, which ends with the block or this process. Yield its pid."""
    if not (pid := fork()):
        try:
            die_with_parent()
            while True:
                body()
        finally:
            os._exit(1)
    try:
        yield pid
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the child ended, or was killed"
    finally:
        with contextlib.suppress(OSError):  # it had exited, and was reaped
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
