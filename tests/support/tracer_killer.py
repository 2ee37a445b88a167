"""Acting before one of the ptrace(2) calls of a tracer, at a certain point of a stop: killing it, for example."""

import ctypes
import os
import signal
import traceback
from collections.abc import Callable

from ptrace.binding import func

from iobmd.errors import NotFoundError, TaskTimeoutError
from support.child import die_with_parent

_GET_SYSCALL_INFO, _ENTRY = 0x420E, 1
_SYSCALL_STOP = signal.SIGTRAP | 0x80  # with PTRACE_O_TRACESYSGOOD
_O_EXITKILL, _WALL = 1 << 20, 0x40000000
_PTRACE = {"x86_64": 101, "aarch64": 117}[os.uname().machine]
_SEIZE = 0x4206
_GETSIGMASK, _RSEQ, _DISPATCH = 0x420A, 0x420F, 0x4211
_READING = {
    func.PTRACE_PEEKDATA, func.PTRACE_GETREGS, func.PTRACE_GETREGSET, func.PTRACE_GETEVENTMSG,
    _GET_SYSCALL_INFO, _GETSIGMASK, _RSEQ, _DISPATCH,
}  # fmt: skip
"""Requests that only read: to be killed before one of them is the same as before the next call."""
_REACHED, _NOT_REACHED, _FAILED = 3, 4, 5  # exit codes


class _Info(ctypes.Structure):
    """What ptrace(2) reports of a system call that begins (struct ptrace_syscall_info)."""

    _fields_ = (
        ("at", ctypes.c_uint8),
        ("unused", ctypes.c_uint8 * 3),
        ("architecture", ctypes.c_uint32),
        ("where", ctypes.c_uint64 * 2),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
        ("more", ctypes.c_uint64 * 2),
    )


def kill_tracer(operation: Callable[[], object], point: int) -> bool:
    """Perform an operation in another process, and kill its tracer before ptrace call `point`.

    Calls count from PTRACE_SEIZE, without those that only read. Return False if there are fewer: nothing is killed.
    The operation may fail with `ChildProcessError`, an error that is caused by it, because the task is gone, or
    because it takes too long on a busy machine.
    """
    left = point

    def is_wanted(request: int) -> bool:
        nonlocal left
        left -= request not in _READING
        return left < 0

    return before_call(operation, is_wanted, lambda pid: os.kill(pid, signal.SIGKILL))


def before_call(
    operation: Callable[[], object], is_wanted: Callable[[int], bool], act: Callable[[int], object]
) -> bool:
    """Perform an operation in another process; call `act` with its tracer's id before a ptrace call of the tracer.

    Calls count from PTRACE_SEIZE on; the first for whose request `is_wanted` returns True is chosen. Return False if
    there is none.
    Errors as for `kill_tracer`.
    """
    # The debugger waits for any child, and must therefore be a separate process.
    debugger = os.fork()
    if not debugger:
        code = 1
        try:
            die_with_parent()
            code = _debug(operation, is_wanted, act)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(debugger, 0)[1])
    assert code in (_REACHED, _NOT_REACHED), code
    return code == _REACHED


def _debug(operation: Callable[[], object], is_wanted: Callable[[int], bool], act: Callable[[int], object]) -> int:
    """Run the operation in a child, and return the exit code of the debugger."""
    user = os.fork()
    if not user:
        _use(operation)
    os.waitpid(user, 0)
    options = func.PTRACE_O_TRACESYSGOOD | func.PTRACE_O_TRACECLONE | func.PTRACE_O_TRACEFORK | _O_EXITKILL
    func.ptrace(func.PTRACE_SETOPTIONS, user, 0, options)
    func.ptrace(func.PTRACE_SYSCALL, user)
    tracer = 0
    reached = False
    while True:
        pid, status = os.waitpid(-1, _WALL)
        if not os.WIFSTOPPED(status):
            if pid == user:
                return _FAILED if status else _REACHED if reached else _NOT_REACHED
            continue
        passed = os.WSTOPSIG(status)
        if passed == _SYSCALL_STOP and not reached and (request := _ptrace_request(pid)) is not None:
            if not tracer and request == _SEIZE:
                tracer = pid
            if pid == tracer and is_wanted(request):
                act(pid)
                reached = True
        if status >> 16 or passed in (_SYSCALL_STOP, signal.SIGSTOP, signal.SIGTRAP):
            passed = 0
        try:
            func.ptrace(func.PTRACE_SYSCALL, pid, 0, passed)
        except func.PtraceError:  # it was killed
            continue


def _use(operation: Callable[[], object]) -> None:
    try:
        func.ptrace(func.PTRACE_TRACEME)
        os.kill(os.getpid(), signal.SIGSTOP)
        operation()
    except ChildProcessError:
        os._exit(0)
    except (TaskTimeoutError, NotFoundError):
        os._exit(0)
    except BaseException as error:
        if isinstance(error.__cause__ or error.__context__, ChildProcessError):
            os._exit(0)
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _ptrace_request(pid: int) -> int | None:
    """Return the request of a ptrace call that a process is about to make, or None."""
    info = _Info()
    func.ptrace(_GET_SYSCALL_INFO, pid, ctypes.sizeof(info), ctypes.addressof(info))
    return int(info.arguments[0]) if info.at == _ENTRY and info.number == _PTRACE else None
