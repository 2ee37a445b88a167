"""ptrace(2) on a thread that this OS thread traces, in python-ptrace's terms.

python-ptrace is an extra (`pip install iobmd[remote]`), and loaded when it is first used: it is GPL-2.0-only. Its
constants and register layout are what we need of it. The call itself keeps the GIL: a stop of another program must
not last longer because other threads of ours compute.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import select
import signal
import struct
import time
import warnings
from functools import cache
from typing import Any, NamedTuple

from iobmd.errors import UnsupportedError

# Younger than what python-ptrace knows (linux/ptrace.h).
_SEIZE, _INTERRUPT = 0x4206, 0x4207
_GETSIGMASK, _SETSIGMASK = 0x420A, 0x420B
_GET_SYSCALL_INFO = 0x420E  # Linux 5.3
_GET_RSEQ_CONFIGURATION = 0x420F  # Linux 5.13
_GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211  # Linux 6.4
O_SUSPEND_SECCOMP = 1 << 21
WALL = 0x40000000
"""In waits: for processes that send no signal at their end, too (__WALL)."""
O_EXITKILL = 1 << 20
"""The traced process is killed when its tracer ends (Linux 3.8): for what we made ourselves."""
_EVENT_STOP = 128
_SYSCALL_EXIT = 2
AUDIT_ARCH_X86_64 = 0xC000003E  # linux/audit.h
_SIGSET = 8
_ALL_SIGNALS = b"\xff" * _SIGSET


class Signal(NamedTuple):
    """What a thread stopped for."""

    number: int
    code: int

    @property
    def is_event_stop(self) -> bool:
        """Whether it is the stop that was asked for, or that of its whole process by SIGSTOP."""
        return self.code >> 8 == _EVENT_STOP

    @property
    def is_clone(self) -> bool:
        """Whether it has just made a new process, which begins stopped and traced by us."""
        return self.code >> 8 == int(_binding().PTRACE_EVENT_CLONE)


@cache
def _binding() -> Any:
    """Return python-ptrace's binding of the C library's ptrace."""
    try:
        with warnings.catch_warnings():
            # datetime.utcfromtimestamp, as it is imported
            warnings.simplefilter("ignore", DeprecationWarning)
            from ptrace.binding import func  # type: ignore[import-untyped] # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise UnsupportedError(
            f"system calls in another task need python-ptrace ({error}): pip install 'iobmd[remote]'"
        ) from None
    return func


@cache
def _library_call() -> Any:
    call = ctypes.PyDLL(None, use_errno=True).ptrace
    call.argtypes = (ctypes.c_ulong,) * 4
    call.restype = ctypes.c_long
    return call


def require() -> None:
    """Raise `kIOReturnUnsupported` where python-ptrace is missing, or the processor is another."""
    if platform.machine() != "x86_64":
        raise UnsupportedError(
            f"system calls in another task are made on x86-64 only, and this is {platform.machine()}"
        )
    _binding()


def _ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> int:
    result: int = _library_call()(request, tid, address, data)
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")
    return result


def seize(tid: int) -> None:
    """Trace a thread without stopping it, and without options: whose it is can only be found out afterwards."""
    _ptrace(_SEIZE, tid)


def set_options(tid: int, options: int, *, report_children: bool = False) -> None:
    """Set the options of a stopped thread: the calls below report a system call's own stops apart from signals.

    With `report_children` it reports the processes that it makes, which are then traced too.
    """
    binding = _binding()
    wanted = options | binding.PTRACE_O_TRACESYSGOOD | (binding.PTRACE_O_TRACECLONE if report_children else 0)
    _ptrace(binding.PTRACE_SETOPTIONS, tid, 0, wanted)


def interrupt(tid: int) -> None:
    """Ask a traced thread to stop. Raises ProcessLookupError if this OS thread does not trace it."""
    _ptrace(_INTERRUPT, tid)


def kill(pid: int, patience: float) -> None:
    """Kill a process if this OS thread traces it, and reap it as its tracer, within so many seconds.

    Its number may be another process's by now: any thread of ours that waits for any child can reap it as its tracer,
    and then its parent can. The number was its own when the pidfd was opened, if it is traced afterwards still.
    """
    pidfd = _pidfd(pid)
    kind, number = (os.P_PID, pid) if pidfd < 0 else (os.P_PIDFD, pidfd)
    deadline = time.monotonic() + patience
    try:
        interrupt(pid)
        _kill(pid, pidfd)
        while time.monotonic() < deadline and not os.waitid(kind, number, os.WEXITED | os.WNOHANG | WALL):
            _wait_for_end(pidfd, deadline)
    except (ProcessLookupError, ChildProcessError):
        pass
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _wait_for_end(pidfd: int, deadline: float) -> None:
    if pidfd < 0:
        time.sleep(0.0002)
        return
    ended = select.poll()
    ended.register(pidfd, select.POLLIN)
    ended.poll(max(0.0, deadline - time.monotonic()) * 1e3)


def _pidfd(pid: int) -> int:
    """Return a pidfd; -1 where no descriptor is free, or a seccomp filter forbids it. Raises ProcessLookupError."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return -1


def _kill(pid: int, pidfd: int) -> None:
    if pidfd >= 0:
        with contextlib.suppress(PermissionError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return
    # Of tracees of this OS thread only. Before Linux 5.18 it kills a stopped one only.
    _ptrace(_binding().PTRACE_KILL, pid)


def stopped_for(tid: int) -> Signal | None:
    """Return why a traced thread is stopped; None while it runs, or when it is gone."""
    info = ctypes.create_string_buffer(128)
    try:
        _ptrace(_binding().PTRACE_GETSIGINFO, tid, 0, ctypes.addressof(info))
    except OSError as error:
        if error.errno == errno.ESRCH:
            return None
        raise
    number, _errno, code = struct.unpack_from("=iii", info)
    return Signal(number, code)


class SyscallStop(NamedTuple):
    """A stop at a system call."""

    at_exit: bool
    result: int
    begun: tuple[int, ...] = ()
    """At its begin: its architecture (AUDIT_ARCH_…), the address behind its instruction, its number and arguments."""


def syscall_stop(tid: int) -> SyscallStop | None:
    """Return at which end of a system call a traced thread is stopped; None when it runs.

    Raises
    ------
    OSError
        `EBUSY`: it is stopped for something else.
    """
    info = ctypes.create_string_buffer(88)
    try:
        _ptrace(_GET_SYSCALL_INFO, tid, len(info), ctypes.addressof(info))
    except OSError as error:
        if error.errno == errno.ESRCH:
            return None
        raise
    if not info.raw[0]:
        raise OSError(errno.EBUSY, "stopped by a signal")
    if info.raw[0] == _SYSCALL_EXIT:
        return SyscallStop(at_exit=True, result=struct.unpack_from("=q", info, 24)[0])
    architecture, address = struct.unpack_from("=IQ", info, 4)
    return SyscallStop(at_exit=False, result=0, begun=(architecture, address, *struct.unpack_from("=7Q", info, 24)))


def run_to_syscall_stop(tid: int, number: int = 0) -> None:
    """Let it run until the next begin or end of a system call."""
    _ptrace(_binding().PTRACE_SYSCALL, tid, 0, number)


def run(tid: int, number: int = 0) -> None:
    """Let it run on, with a signal or without."""
    _ptrace(_binding().PTRACE_CONT, tid, 0, number)


def detach(tid: int) -> None:
    """Trace it no longer, and let it run on."""
    _ptrace(_binding().PTRACE_DETACH, tid)


def registers(tid: int) -> Any:
    """Return its registers, a ctypes structure with their names (user_regs_struct)."""
    found = _binding().ptrace_registers_t()
    _ptrace(_binding().PTRACE_GETREGS, tid, 0, ctypes.addressof(found))
    return found


def set_registers(tid: int, values: Any) -> None:
    """Set its registers."""
    _ptrace(_binding().PTRACE_SETREGS, tid, 0, ctypes.addressof(values))


def copy_of(values: Any) -> Any:
    """Return a copy of registers."""
    return type(values).from_buffer_copy(values)


def signal_mask(tid: int) -> bytes:
    """Return which signals it blocks."""
    mask = ctypes.create_string_buffer(_SIGSET)
    _ptrace(_GETSIGMASK, tid, _SIGSET, ctypes.addressof(mask))
    return mask.raw


def set_signal_mask(tid: int, mask: bytes = _ALL_SIGNALS) -> None:
    """Have it block signals; SIGKILL and SIGSTOP cannot be."""
    kept = ctypes.create_string_buffer(mask, _SIGSET)
    _ptrace(_SETSIGMASK, tid, _SIGSET, ctypes.addressof(kept))


def rseq_area(tid: int) -> int:
    """Return the address of its restartable sequences area (rseq(2)); 0: none, or the kernel is older than 5.13."""
    return _first_word(_GET_RSEQ_CONFIGURATION, tid, 24)


def diverts_syscalls(tid: int) -> bool:
    """Say whether it has its system calls sent to a handler of its own (PR_SET_SYSCALL_USER_DISPATCH)."""
    return _first_word(_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, 32) != 0


def _first_word(request: int, tid: int, size: int) -> int:
    """Return the first word of a configuration of `size` bytes, 0 where the kernel does not know the request."""
    configuration = ctypes.create_string_buffer(size)
    try:
        _ptrace(request, tid, size, ctypes.addressof(configuration))
    except OSError as error:
        if error.errno == errno.EIO:
            return 0
        raise
    return int(struct.unpack_from("=Q", configuration)[0])


def event_message(tid: int) -> int:
    """Return what an event of a traced thread tells: the new process of a fork."""
    message = ctypes.c_ulong()
    _ptrace(_binding().PTRACE_GETEVENTMSG, tid, 0, ctypes.addressof(message))
    return message.value
