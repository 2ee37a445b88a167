"""One thread of another task, stopped, and system calls in it (ptrace(2), x86-64).

All of it belongs to one OS thread of ours. If that ends early, the kernel lets the other thread run on.
"""

from __future__ import annotations

import errno
import struct
import time
from typing import TYPE_CHECKING

from iobmd._native.crosstask import HeldBuffer
from iobmd.errors import NotReadyError, UnsupportedError, VMError
from iobmd.remote import gadget, restart, threads, tracing
from iobmd.remote.tracee import StrangerSeized, Tracee, Unreadable

if TYPE_CHECKING:
    from iobmd.task.task import Task

_CODE_32 = 0x23  # the code segment of 32-bit programs


class Stop(Tracee):
    """A thread that is being stopped: `wait` until it is, and `release` it whatever happens.

    While it is stopped, nothing may be waited for that its task alone can do, such as a page fault that a thread of
    the task answers (userfaultfd(2)): the calls made here never wait, and memory is read where that needs no fault.
    What may wait is done by a `Guest`.

    Parameters
    ----------
    task : Task
        Its process.
    activity : threads.Activity
        The thread, and what it does.
    options : int
        As `preflight.check` returns them.

    Raises
    ------
    OSError
        As ptrace(2): the thread has ended, or may not be traced.
    StrangerSeized
        It has ended, and its number is another process's. That is traced until this OS thread ends, which has to be
        at once; no stop, option or register of it was changed.
    """

    def __init__(self, task: Task, activity: threads.Activity, options: int) -> None:
        super().__init__(task, task.pid, activity.tid)
        self._changed = False  # what it is to go on with is not what it stopped with
        self._mask: bytes | None = None
        self.options = options
        self._sleep = restart.look(task.pid, activity)
        tracing.seize(self._tid)
        if not threads.belongs(task, self._tid):  # from now on its number is no other's
            raise StrangerSeized
        self.began = time.monotonic_ns()
        tracing.interrupt(self._tid)

    @property
    def stands(self) -> bool:
        """Whether it was seen to stand still."""
        return self._registers is not None

    def wait(self, deadline: float) -> None:
        """Wait until it stands still between two instructions of its own.

        Raises
        ------
        NotStopped
            Not until the `deadline` (time.monotonic).
        IOReturnError
            `kIOReturnNotFound`.
        """
        while not (why := self._look(self._why, deadline, interruptible=True)).is_event_stop:
            tracing.run(self._tid, why.number)  # a signal came first: to its handler with it
        self._save()

    def _why(self) -> tracing.Signal | None:
        return tracing.stopped_for(self._tid)

    def _save(self) -> None:
        self._registers = tracing.registers(self._tid)
        if restart.undo_eintr(self.task, self._tid, self._registers, self._sleep):
            # At once: it then goes on as it should even if this process is killed before it lets it go.
            tracing.set_registers(self._tid, self._registers)

    def ready(self, instruction: int) -> None:
        """Make it ready for system calls, by the system call `instruction` of its task.

        Raises
        ------
        IOReturnError
            `kIOReturnUnsupported`: a 32-bit program, or one that diverts its system calls.
        Unreadable
            Its restartable sequences are not known at this moment.
        """
        if self._registers.cs == _CODE_32:
            message = f"task {self.task.pid} is a 32-bit program: its system calls are others"
            raise UnsupportedError(message)
        if tracing.diverts_syscalls(self._tid):
            message = f"task {self.task.pid} diverts its system calls to a handler (PR_SET_SYSCALL_USER_DISPATCH)"
            raise UnsupportedError(message)
        # It may have run another program since.
        self.gadget = instruction if gadget.is_at(self.task, instruction) else gadget.find(self.task)
        tracing.set_options(self._tid, self.options)
        self._abort_rseq()
        self._mask = tracing.signal_mask(self._tid)
        tracing.set_signal_mask(self._tid)

    def _abort_rseq(self) -> None:
        """Do what the kernel does as it interrupts a restartable sequence; our calls hide that from it (rseq(2))."""
        area = tracing.rseq_area(self._tid)
        if not area:
            return
        try:
            (descriptor,) = struct.unpack("=Q", self._read(area + 8, 8))
            if not descriptor:
                return
            _version, _flags, start, length, abort = struct.unpack("=IIQQQ", self._read(descriptor, 32))
        except VMError:  # that of a program before an exec
            return
        if 0 <= self._registers.rip - start < length:
            self._registers.rip = abort
            self._changed = True

    def _read(self, address: int, size: int) -> bytes:
        """Read the memory of its task, where that needs no page fault that might wait for it. Raises Unreadable."""
        data = bytearray(size)
        try:
            with HeldBuffer(data, True) as held:
                self.task.copy_in(address, held.address, size, resident_only=True)
        except NotReadyError:
            raise Unreadable from None
        return bytes(data)

    def call(self, name: str, *arguments: int) -> int:
        """As `Tracee.call`."""
        self._changed = True
        return super().call(name, *arguments)

    def release(self) -> int:
        """Let it go on where it was; returns for how many nanoseconds it did not, at the most."""
        try:
            if self._registers is None and (why := tracing.stopped_for(self._tid)) and why.is_event_stop:
                self._save()  # it stopped late, and nobody has looked
            if self._mask is not None:
                tracing.set_signal_mask(self._tid, self._mask)
            if self._registers is not None and self._changed:
                tracing.set_registers(self._tid, self._registers)
            tracing.detach(self._tid)
        except OSError as error:  # it died, or has not stopped yet: that ends with the thread that traces it
            if error.errno != errno.ESRCH:
                raise
        return time.monotonic_ns() - self.began
