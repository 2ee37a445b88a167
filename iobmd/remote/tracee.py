"""System calls in a thread of another process that this OS thread traces (ptrace(2), x86-64)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from iobmd._native import apart, crosstask
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError, TaskTimeoutError
from iobmd.remote import preflight, threads, tracing
from iobmd.task import diagnosis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iobmd.task.task import Task

    _T = TypeVar("_T")

SYSCALLS = {
    "mmap": 9, "munmap": 11, "socketpair": 53, "recvmsg": 47, "close": 3, "clone": 56, "wait4": 61,
    "close_range": 436, "mlock": 149, "munlock": 150, "mprotect": 10, "io_uring_setup": 425, "io_uring_register": 427,
}  # fmt: skip
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
_NO_CALL = (1 << 64) - 1  # in orig_rax: the registers are not those of an interrupted system call
_WORD = (1 << 64) - 1
_INSTRUCTION = 2  # bytes of a system call instruction
_BEGIN = 1.0  # seconds for a thread to begin a call
_AGAIN = (-512, -513, -514)
"""Results by which the kernel would begin a call again after a signal, here SIGSTOP, which cannot be blocked."""
_SPINS = 100  # looks at a thread before they are spaced out, a tenth of a millisecond or two

_yield_processor = ctypes.PyDLL(None).sched_yield  # without releasing the GIL


class NotStopped(Exception):  # noqa: N818 (another thread may do)
    """The thread did not stop in time: it is in an uninterruptible sleep, or frozen."""


class Unreadable(Exception):  # noqa: N818 (it may pass)
    """What has to be read of a stopped thread is in a page that is not present: its fault could wait for the task."""


class StrangerSeized(Exception):  # noqa: N818 (it is let go, and another try is made)
    """A thread has ended, and another process's got its number, before it was seized by that."""


class InterruptedJob(Exception):  # noqa: N818 (its cause is raised in the calling thread)
    """The caller was interrupted, or this process was killed: the wait is given up."""


def check_interrupt() -> None:
    """Raise `InterruptedJob` if what this thread does is to be given up."""
    if apart.interrupted():
        raise InterruptedJob


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Finish what is inside even when the caller is interrupted: what was made in the other task is taken away."""
    apart.shield(1)
    try:
        yield
    finally:
        apart.shield(-1)


class Tracee:
    """A thread that this OS thread traces, and that makes system calls while it is stopped between two of its own.

    Parameters
    ----------
    task : Task
        Whose memory and descriptors its calls are about.
    pid, tid : int
        Its process and its own number.
    """

    def __init__(self, task: Task, pid: int, tid: int) -> None:
        self.task = task
        self.child = 0
        """The process that its last clone made, as this process counts."""
        self._pid = pid
        self._tid = tid
        self._registers: Any = None
        self.gadget = 0
        self.options = 0

    def call(self, name: str, *arguments: int) -> int:
        """Make a system call in the thread that never waits, for it cannot be left; returns its result.

        Raises
        ------
        OSError
            As the call failed there.
        IOReturnError
            `kIOReturnNotFound`: the thread died. `kIOReturnTimeout`: the thread does not run.
        """
        return self._call(name, arguments, None, interruptible=False)

    def _call(self, name: str, arguments: tuple[int, ...], deadline: float | None, *, interruptible: bool) -> int:
        """As `call`. Raises NotStopped and InterruptedJob too: it has not returned until then."""
        if name == "clone":
            tracing.set_options(self._tid, self.options, report_children=True)
        until = time.monotonic() + _BEGIN
        while True:
            result = self._once(name, arguments, deadline, interruptible=interruptible)
            if result not in _AGAIN:
                break
            if time.monotonic() > until:  # signals that cannot be blocked never cease
                raise self.does_not_run()
        if -4096 < result < 0:
            raise OSError(-result, f"{name} in task {self.task.pid}: {os.strerror(-result)}")
        return result & _WORD if name == "mmap" else result

    def _once(self, name: str, arguments: tuple[int, ...], deadline: float | None, *, interruptible: bool) -> int:
        """Make a call as `_call`, and return its result as the kernel does."""
        regs = tracing.copy_of(self._registers)
        regs.rip, regs.rax, regs.orig_rax = self.gadget, SYSCALLS[name], _NO_CALL
        for register, value in zip(_ARGUMENTS, arguments, strict=False):
            setattr(regs, register, value & _WORD)
        tracing.set_registers(self._tid, regs)
        try:
            stop = self._to_syscall_stop(time.monotonic() + _BEGIN, at_exit=False)
        except NotStopped:  # it can be left still; a frozen task does not begin a call
            self._take_back()
            raise self.does_not_run() from None
        expected = tracing.AUDIT_ARCH_X86_64, self.gadget + _INSTRUCTION, SYSCALLS[name]
        if stop.begun[: 3 + len(arguments)] != (*expected, *(value & _WORD for value in arguments)):
            self._skip_call()
            message = f"task {self.task.pid} has changed its code, and made another system call in place of {name}"
            raise IOReturnError(IOReturn.kIOReturnError, message)
        return self._to_syscall_stop(deadline, at_exit=True, interruptible=interruptible).result

    def _skip_call(self) -> None:
        """Have the call that it is about to make not made.

        Another thread of its task may write to the code at any time, and so choose the call. Seccomp filters are
        suspended for it (`preflight.check`): no call may pass but ours.
        """
        regs = tracing.registers(self._tid)
        regs.orig_rax = _NO_CALL
        tracing.set_registers(self._tid, regs)
        with contextlib.suppress(NotStopped):
            self._to_syscall_stop(time.monotonic() + _BEGIN, at_exit=True)

    def _to_syscall_stop(
        self, deadline: float | None, *, at_exit: bool, interruptible: bool = False
    ) -> tracing.SyscallStop:
        tracing.run_to_syscall_stop(self._tid)
        while True:
            try:
                stop = self._look(lambda: tracing.syscall_stop(self._tid), deadline, interruptible=interruptible)
            except OSError as error:
                if isinstance(error, IOReturnError) or error.errno != errno.EBUSY:
                    raise
                self._pass_over_signal()
                continue
            if stop.at_exit == at_exit:
                return stop
            tracing.run_to_syscall_stop(self._tid)

    def does_not_run(self) -> TaskTimeoutError:
        """Return the error for a thread that stops, but does not go on to a system call."""
        from iobmd.remote import freezer  # noqa: PLC0415 (for the message only)

        message = f"task {self.task.pid} does not run: {freezer.why(self.task.pid) or 'no processor is left to it'}"
        return TaskTimeoutError(message)

    def _take_back(self) -> None:
        """Have it stop before the call that it does not begin."""
        tracing.interrupt(self._tid)
        with contextlib.suppress(NotStopped):
            self._look(lambda: tracing.stopped_for(self._tid), time.monotonic() + _BEGIN)

    def _pass_over_signal(self) -> None:
        """Go on after a stop by what cannot be blocked: SIGSTOP, which stops its process all the same, or a fault."""
        why = tracing.stopped_for(self._tid)
        if why is None:
            return
        number = 0
        if why.is_clone:
            self.child = tracing.event_message(self._tid)
        elif not why.is_event_stop:
            number = why.number
            if number != signal.SIGSTOP:
                message = f"task {self.task.pid} got {signal.Signals(number).name} during an injected system call"
                raise IOReturnError(IOReturn.kIOReturnError, message)
        tracing.run_to_syscall_stop(self._tid, number)

    def _look(self, look: Callable[[], _T | None], deadline: float | None, *, interruptible: bool = False) -> _T:
        """Wait for what `look` finds: at first without giving the processor's time to other threads of ours.

        Raises
        ------
        NotStopped
            Not until the deadline.
        InterruptedJob
        IOReturnError
            `kIOReturnNotFound`.
        """
        spins = 0
        while (found := look()) is None:
            spins += 1
            if spins < _SPINS:
                _yield_processor()
                continue
            if threads.state(self._pid, self._tid) in ("", "Z", "X", "x") or not self._is_ours():
                raise self._ended()
            if deadline is not None and time.monotonic() > deadline:
                raise NotStopped
            if interruptible:
                check_interrupt()
            time.sleep(0.00005 if spins < 2 * _SPINS else 0.0005)
        return found

    def _is_ours(self) -> bool:
        """Say whether it is traced: a thread that runs another program (execve(2)) gets the number of its task."""
        try:
            return preflight.tracer(self._pid, self._tid) in (None, threading.get_native_id())
        except IOReturnError:  # no descriptor is free to look: not to be given up in the middle of a call
            return True

    def _ended(self) -> IOReturnError:
        message = f"task {self.task.pid} is gone: it exited, ran another program, or its thread {self._tid} ended"
        return diagnosis.gone(message)

    def fetch(self, fd: int) -> int:
        """Return a descriptor of this process for one of the thread's. Raises OSError."""
        try:
            return crosstask.fetch_descriptor(self.task.pidfd, fd)
        except ProcessLookupError:
            # The first thread of the task has exited. Another's pidfd does as well (PIDFD_THREAD, Linux 6.9).
            return self._fetch_by(os.O_EXCL, fd)

    def _fetch_by(self, flags: int, fd: int) -> int:
        pidfd = os.pidfd_open(self._tid, flags)
        try:
            if tracing.stopped_for(self._tid) is None:  # else the number was its own when the pidfd was opened
                raise self._ended()
            return crosstask.fetch_descriptor(pidfd, fd)
        finally:
            os.close(pidfd)
