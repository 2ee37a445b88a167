"""One thread of another task, stopped, and system calls in it (ptrace(2), x86-64).

All of it belongs to one OS thread of ours. If that ends early, the kernel lets the other thread run on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import struct
import time
from typing import TYPE_CHECKING, Any, TypeVar

from iobmd import refusals
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError, VMError
from iobmd.remote import gadget, restart, threads, tracing

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd.task import Task

    _T = TypeVar("_T")

SYSCALLS = {
    "mmap": 9, "munmap": 11, "socketpair": 53, "recvmsg": 47, "close": 3, "clone": 56, "wait4": 61,
    "close_range": 436, "mlock": 149, "munlock": 150, "mprotect": 10, "io_uring_setup": 425, "io_uring_register": 427,
}  # fmt: skip
_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
_NO_CALL = (1 << 64) - 1  # in orig_rax: the registers are not those of an interrupted system call
_WORD = (1 << 64) - 1
_CODE_32 = 0x23  # the code segment of 32-bit programs
_BEGIN = 1.0  # seconds for it to begin a call
_SPINS = 100  # looks at a thread before they are spaced out, a tenth of a millisecond or two

_yield_processor = ctypes.PyDLL(None).sched_yield  # without letting go of the GIL


class NotStopped(Exception):  # noqa: N818 (another thread may do)
    """The thread did not stop in time: it is in an uninterruptible sleep, or frozen."""


class Stop:
    """A thread that is being stopped: `wait` until it is, and `release` it whatever happens.

    Parameters
    ----------
    task : Task
        Its process.
    activity : threads.Activity
        The thread, and what it does.
    options : int
        As `preflight.check` returns them.
    """

    def __init__(self, task: Task, activity: threads.Activity, options: int) -> None:
        self.task = task
        self._tid = activity.tid
        self._saved: Any = None
        self._changed = False  # what it is to go on with is not what it stopped with
        self._mask: bytes | None = None
        self._gadget = 0
        self._options = options
        self.child = 0
        """The process that a clone made, as we count."""
        self._sleep = restart.look(task.pid, activity)
        tracing.seize(self._tid, options)
        self.began = time.monotonic_ns()
        tracing.interrupt(self._tid)

    def wait(self, deadline: float) -> None:
        """Wait until it stands still between two instructions of its own.

        Raises
        ------
        NotStopped
            Not until the `deadline` (time.monotonic).
        IOReturnError
            `kIOReturnNotFound`.
        """
        while not (why := self._look(lambda: tracing.stopped_for(self._tid), deadline)).is_event_stop:
            tracing.run(self._tid, why.number)  # a signal came first: to its handler with it
        self._save()

    def _save(self) -> None:
        self._saved = tracing.registers(self._tid)
        self._changed = restart.undo_eintr(self.task, self._tid, self._saved, self._sleep)

    def ready(self, instruction: int) -> None:
        """Make it ready for system calls, by the system call `instruction` of its task.

        Raises
        ------
        IOReturnError
            `kIOReturnUnsupported`: a 32-bit program, or one that diverts its system calls.
        """
        if self._saved.cs == _CODE_32:
            message = f"task {self.task.pid} is a 32-bit program: its system calls are others"
            raise IOReturnError(IOReturn.kIOReturnUnsupported, message)
        if tracing.diverts_syscalls(self._tid):
            message = f"task {self.task.pid} diverts its system calls to a handler (PR_SET_SYSCALL_USER_DISPATCH)"
            raise IOReturnError(IOReturn.kIOReturnUnsupported, message)
        # It may have run another program since.
        self._gadget = instruction if gadget.is_at(self.task, instruction) else gadget.find(self.task)
        self._abort_rseq()
        self._mask = tracing.signal_mask(self._tid)
        tracing.set_signal_mask(self._tid)

    def _abort_rseq(self) -> None:
        """Do what the kernel does as it interrupts a restartable sequence; our calls hide that from it (rseq(2))."""
        area = tracing.rseq_area(self._tid)
        if not area:
            return
        try:
            (descriptor,) = struct.unpack("=Q", self.task.read(area + 8, 8))
            if not descriptor:
                return
            _version, _flags, start, length, abort = struct.unpack("=IIQQQ", self.task.read(descriptor, 32))
        except VMError:  # that of a program before an exec
            return
        if 0 <= self._saved.rip - start < length:
            self._saved.rip = abort
            self._changed = True

    def call(self, name: str, *arguments: int) -> int:
        """Make a system call in the thread; returns its result.

        Raises
        ------
        OSError
            As the call failed there.
        IOReturnError
            `kIOReturnNotFound`: it died.
        """
        if name == "clone":
            tracing.report_children(self._tid, self._options)
        regs = tracing.copy_of(self._saved)
        regs.rip, regs.rax, regs.orig_rax = self._gadget, SYSCALLS[name], _NO_CALL
        for register, value in zip(_ARGUMENTS, arguments, strict=False):
            setattr(regs, register, value & _WORD)
        tracing.set_registers(self._tid, regs)
        self._changed = True
        self._to_syscall_stop(at_exit=False)
        result = self._to_syscall_stop(at_exit=True)
        if -4096 < result < 0:
            raise OSError(-result, f"{name} in task {self.task.pid}: {os.strerror(-result)}")
        return result & _WORD if name == "mmap" else result

    def _to_syscall_stop(self, *, at_exit: bool) -> int:
        tracing.run_to_syscall_stop(self._tid)
        # Once it has begun a call it cannot be left; before that it can, and a frozen task does not begin one.
        deadline = None if at_exit else time.monotonic() + _BEGIN
        while True:
            try:
                stop = self._look(lambda: tracing.syscall_stop(self._tid), deadline)
            except NotStopped:
                self._take_back()
                message = f"task {self.task.pid} does not run: it is frozen, or kept from any processor"
                raise IOReturnError(IOReturn.kIOReturnTimeout, message) from None
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                self._pass_over_signal()
                continue
            if stop.at_exit == at_exit:
                return stop.result
            tracing.run_to_syscall_stop(self._tid)

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
                message = f"task {self.task.pid} got {signal.Signals(number).name} for a system call of ours"
                raise IOReturnError(IOReturn.kIOReturnError, message)
        tracing.run_to_syscall_stop(self._tid, number)

    def _look(self, look: Callable[[], _T | None], deadline: float | None) -> _T:
        """Wait for what `look` finds: at first without giving the processor's time to other threads of ours."""
        spins = 0
        while (found := look()) is None:
            spins += 1
            if spins < _SPINS:
                _yield_processor()
                continue
            if threads.state(self.task.pid, self._tid) in ("", "Z", "X", "x"):
                raise refusals.gone(f"task {self.task.pid} is gone: it exited, or its thread {self._tid} did")
            if deadline is not None and time.monotonic() > deadline:
                raise NotStopped
            time.sleep(0.00005 if spins < 2 * _SPINS else 0.0005)
        return found

    def release(self) -> int:
        """Let it go on where it was; returns for how many nanoseconds it did not, at the most."""
        try:
            if self._saved is None and (why := tracing.stopped_for(self._tid)) and why.is_event_stop:
                self._save()  # it stopped late, and nobody has looked
            if self._mask is not None:
                tracing.set_signal_mask(self._tid, self._mask)
            if self._saved is not None and self._changed:
                tracing.set_registers(self._tid, self._saved)
            tracing.detach(self._tid)
        except OSError as error:  # it died, or has not stopped yet: that ends with the thread that traces it
            if error.errno != errno.ESRCH:
                raise
        return time.monotonic_ns() - self.began
