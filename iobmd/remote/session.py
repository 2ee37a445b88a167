"""Sessions with another task: stopping it, and what is done in it, by a tracer of its own (`cython_ext/tracer.h`).

What is decided before a stop is decided here: which thread it is to be, and how that goes on. From the first to the
last ptrace call on a thread of the task everything is native. If this process is killed, the tracer ends what was
made in the task by itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from typing import TYPE_CHECKING, TypeVar

from iobmd import host
from iobmd._internal import process_local
from iobmd._native import tracer as native
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError, NoResourcesError, TaskTimeoutError
from iobmd.remote import epoll_sleep, freezer, preflight, syscall_instruction, threads
from iobmd.remote.guest import SYSCALLS, Call, Guest, Result, call
from iobmd.task import diagnosis
from iobmd.task.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_T = TypeVar("_T")

PATIENCE = 2.0  # seconds for a thread to stop, and for another tracer to end
_SHORT = 0.2  # seconds for one thread of several
_ATTEMPTS = 10
_SHOWN = 100  # threads whose states a message has: each takes a millisecond on a busy machine
_CLONE_VM, _CLONE_FS, _CLONE_FILES = 0x100, 0x200, 0x400
_NO_STACK = 8  # nothing is mapped there: released by a tracer that died, a guest ends at its first instruction
_GIB = 1 << 30


class StrangerSeized(Exception):  # noqa: N818 (it is let go, and another try is made)
    """A thread has ended, and another process's got its number, before it was seized by that."""


_guards = [process_local.Guard() for _ in range(64)]
"""One for each task, or for a few: only one tracer of ours stops a task at a time."""


def guard_of(task: Task) -> process_local.Guard:
    """Return the guard inside of which a task is stopped."""
    return _guards[task.pid % len(_guards)]


class Session:
    """A tracer of a task, and what it makes there: `end` it whatever happens.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound`, `kIOReturnUnsupported`: with the reason. `kIOReturnNoResources`:
        no process can be made.
    """

    def __init__(self, task: Task) -> None:
        preflight.require_processor()
        options = _options_for(task)
        self.task = task
        self._deadline = time.monotonic() + PATIENCE
        self._refusals = 0  # without a tracer: one may have ended since, but not each time
        # To Yama's scope 1 only a parent may trace, and that is we.
        is_thread = host.yama_scope() == 1 and not host.has_capability("CAP_SYS_PTRACE")
        try:
            self._tracer = native.Tracer(
                task.pid, syscall_instruction.find(task), options, is_thread, PATIENCE, _SHORT
            )
        except OSError as error:
            if isinstance(error, IOReturnError):
                raise
            message = f"cannot trace a task: {error.strerror}; this process can have no more processes"
            raise NoResourcesError(message, error.errno or 0) from None

    @property
    def stopped_ns(self) -> int:
        """For how long a thread of the task stood still, at most, all in all."""
        return self._tracer.stopped_ns

    def stop(self, *calls: Call) -> list[int]:
        """Stop one thread of the task, have it make system calls that never wait, and let it go on.

        Raises
        ------
        IOReturnError
            As the constructor; `kIOReturnTimeout`: no thread stops.
        OSError
            As a system call failed there.
        StrangerSeized
        """
        program = [_packed(one) for one in calls]
        while True:
            known = _candidates(self.task)
            status = self._tracer.stop(known, program)
            if not self._is_again(status):
                break
        self._require(status, calls)
        return self._tracer.results

    def guest(self, *, standing: bool = False) -> Guest:
        """Make a guest, which ends with the session. Raises as `stop`; `kIOReturnNoResources`: the task may not.

        If it is to be `standing`, every thread of the task stands still until the end.
        """
        try:
            if standing:
                self._freeze(native.GUEST, 0)
            else:
                self.stop(call("clone", _CLONE_VM | _CLONE_FS | _CLONE_FILES, _NO_STACK, 0, 0, 0))
        except OSError as error:
            if error.errno != errno.EAGAIN or isinstance(error, IOReturnError):
                raise
            message = (
                f"task {self.task.pid} can have no more processes, of which it needs one for a moment "
                f"({error.strerror}): its RLIMIT_NPROC, or the pids.max of its cgroup"
            )
            raise NoResourcesError(message, error.errno) from None
        if not self._tracer.guest:
            raise self._unseen()
        return Guest(self.task, self._tracer.guest, self._run)

    def _run(self, calls: Sequence[Call], deadline: float, may_wait: bool) -> list[int]:
        program = [_packed(one) for one in calls]
        self._require(self._tracer.run(program, deadline, may_wait), calls, of_guest=True)
        return self._tracer.results

    def freeze(self) -> None:
        """Stop every thread of the task, until `thaw` or `end`. Raises as `stop`."""
        self._freeze(native.NO_PROCESS, 0)

    def _freeze(self, wanted: int, deadline: float) -> None:
        self._deadline = time.monotonic() + PATIENCE
        while self._is_again(status := self._tracer.freeze(_sleeping(self.task), wanted, deadline)):
            pass
        self._require(status, [call("clone")])

    def thaw(self) -> None:
        """Let every thread go on."""
        self._tracer.thaw()

    def snapshot(self, patience: float) -> Task:
        """Make a child that shares the memory of the task copy-on-write, and never runs, while every thread stands.

        It is made by a guest, because where a userfaultfd reports forks (UFFD_FEATURE_EVENT_FORK) the call waits
        until the report is read; it shares the descriptors altogether (CLONE_FILES), so that none stays open for it.
        The task gets no signal (no SIGCHLD).

        Raises as `guest`; `kIOReturnTimeout`: it takes longer than so many seconds.
        """
        self._freeze(native.SNAPSHOT, time.monotonic() + patience)
        return Task(self._tracer.child)

    def end(self, *, failed: bool) -> None:
        """End what was made in the task, and let it go; what was mapped stays unless this is a failure."""
        self._deadline = time.monotonic() + PATIENCE
        try:
            while self._tracer.guest:
                # Where the task cannot be stopped once more, on busy processors or by other tracers, a zombie is left
                # until it exits.
                status = self._tracer.collect(_candidates(self.task), failed)
                # A thread that ends in the middle, because another one executes a program, leaves it to others.
                ended = status == native.ENDED and time.monotonic() < self._deadline
                if not ended and not self._is_again(status):
                    break
        except OSError:  # it is gone, or refuses
            pass
        finally:
            self._tracer.end()

    def _is_again(self, status: int) -> bool:
        """Say whether another try may succeed, after a moment."""
        if status in (native.GONE, native.LATE, native.UNREADABLE):
            if not self.task.alive:
                raise diagnosis.gone(f"task {self.task.pid} is gone: it exited")
            if status == native.UNREADABLE:
                self._tracer.use(syscall_instruction.find(self.task))
            return time.monotonic() < self._deadline
        if status != native.REFUSED:
            return False
        refusal = OSError(self._tracer.error, os.strerror(self._tracer.error))
        tracer = preflight.tracer(self.task.pid, self._tracer.refused)
        if tracer == 0:
            self._refusals += 1
            if self._refusals > _ATTEMPTS:
                raise preflight.refused(self.task.pid, refusal)
        elif tracer is not None and time.monotonic() > self._deadline:
            raise preflight.traced_by_another(self.task.pid, tracer)
        time.sleep(0.002)
        return True

    def _require(self, status: int, calls: Sequence[Call], *, of_guest: bool = False) -> None:
        """Raise what a status stands for."""
        if status == native.DONE:
            return
        pid, tracer = self.task.pid, self._tracer
        name = calls[tracer.failed].name if tracer.failed < len(calls) else "a system call"
        if status == native.FAILED:
            raise OSError(tracer.error, f"{name} in task {pid}: {os.strerror(tracer.error)}")
        if status == native.STRANGER:
            raise StrangerSeized
        if status in (native.GONE, native.LATE, native.UNREADABLE):
            raise _never_stopped(self.task)
        if status == native.UNSEEN:
            raise self._unseen()
        if status == native.ENDED:
            if of_guest and self.task.alive:
                message = f"the process that makes system calls for us in task {pid} was killed"
                raise IOReturnError(IOReturn.kIOReturnError, message)
            raise diagnosis.gone(f"task {pid} is gone: it exited, ran another program, or a thread of it ended")
        code, message = {
            native.HELD: (
                IOReturn.kIOReturnTimeout,
                f"task {pid} does not run: {freezer.why(pid) or 'no processor is left to it'}",
            ),
            native.CHANGED: (
                IOReturn.kIOReturnError,
                f"task {pid} has changed its code, and made another system call in place of {name}",
            ),
            native.IS_32_BIT: (
                IOReturn.kIOReturnUnsupported,
                f"task {pid} is a 32-bit program: its system calls are others",
            ),
            native.DIVERTED: (
                IOReturn.kIOReturnUnsupported,
                f"task {pid} diverts its system calls to a handler (PR_SET_SYSCALL_USER_DISPATCH)",
            ),
            native.STUCK: (IOReturn.kIOReturnTimeout, f"{name} in task {pid} did not return in time"),
            native.NO_MEMORY: (IOReturn.kIOReturnNoMemory, f"no memory for the threads of task {pid}"),
            native.SIGNALLED: (
                IOReturn.kIOReturnError,
                f"task {pid} got {_signal(tracer.error)} during an injected system call",
            ),
        }[status]
        raise IOReturnError(code, message)

    def _unseen(self) -> IOReturnError:
        message = f"task {self.task.pid} made a process that this one does not see"
        return IOReturnError(IOReturn.kIOReturnError, message)


def with_guest(task: Task, work: Callable[[Guest], None], *, standing: bool = False) -> int:
    """Make system calls in a guest of a task by `work`, while the task runs on: calls that may wait.

    If it is to be `standing`, the task stands still for the calls, which must not wait then: in a task that runs one
    program after the other (execve(2)), a guest is left behind with the memory of a former one.

    Returns for how many nanoseconds a thread of the task stood still, at most: while the guest was made, or while it
    was waited for.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound`, `kIOReturnUnsupported`: with the reason; `kIOReturnTimeout`: no
        thread stops. `kIOReturnNoResources`: this process, or the task, can have no more processes.
    OSError
        As a system call failed in the task. All that was mapped there is unmapped then.
    """

    def attempt() -> int:
        with guard_of(task), _opened(task) as session:
            work(session.guest(standing=standing))
        return session.stopped_ns

    return _again(task, attempt)


def stop(task: Task) -> int:
    """Stop one thread of a task, and let it go on; returns for how many nanoseconds it stood still.

    Raises as `with_guest`.
    """

    def attempt() -> int:
        with guard_of(task), _opened(task) as session:
            session.stop()
        return session.stopped_ns

    return _again(task, attempt)


def frozen(task: Task, before: Callable[[], None], work: Callable[[], bool], tries: int) -> tuple[bool, int]:
    """Do `work` while every thread of a task stands still, until it returns True, and `before` right before that.

    Returns whether it did, and for how many nanoseconds the task stood still, all in all. Raises as `with_guest`.
    """

    def attempt() -> tuple[bool, int]:
        done = False
        with guard_of(task), _opened(task) as session:
            for _ in range(tries):
                before()
                session.freeze()
                try:
                    done = work()
                finally:
                    session.thaw()
                if done:
                    break
        return done, session.stopped_ns

    return _again(task, attempt)


class Snapshot:
    """A child of a task that shares its memory copy-on-write and never runs, inside of the `with`.

    Parameters
    ----------
    origin : Task
        Whose memory it is.
    resident : int
        How many bytes of it are resident: their page tables are copied.

    Raises
    ------
    OSError
        As `with_guest`. `EAGAIN`: the task can have no more processes.
    """

    def __init__(self, origin: Task, resident: int) -> None:
        self._origin = origin
        self._patience = PATIENCE + resident / _GIB
        self._session: Session | None = None
        self.stopped_ns = 0
        """For how long a thread of the task stood still, at most, all in all."""

    def __enter__(self) -> Task:
        return _again(self._origin, self._make)

    def _make(self) -> Task:
        with guard_of(self._origin):
            self._session = session = Session(self._origin)
            try:
                return session.snapshot(self._patience)
            except BaseException:
                insist(self._end)
                raise

    def __exit__(self, *_: object) -> None:
        with guard_of(self._origin):
            insist(self._end)

    def _end(self) -> None:
        if self._session:
            self._session.end(failed=True)
            self.stopped_ns += self._session.stopped_ns
            self._session = None


def _again(task: Task, attempt: Callable[[], _T]) -> _T:
    """Return what an attempt returns; make another while it is for what may pass."""
    deadline = time.monotonic() + PATIENCE
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(StrangerSeized):
            return attempt()
        if time.monotonic() > deadline:  # a task that makes threads without end has such numbers each time
            break
    raise _never_stopped(task)


@contextlib.contextmanager
def _opened(task: Task) -> Iterator[Session]:
    session = Session(task)
    failed = True
    try:
        yield session
        failed = False
    finally:
        insist(lambda: session.end(failed=failed))


def insist(action: Callable[[], None]) -> None:
    """Do what takes something away; once more if an interrupt came in between, which is raised after that."""
    try:
        action()
    except IOReturnError:
        raise
    except BaseException:
        action()
        raise


_Known = tuple[int, int, int, int]
"""A thread, as `native.Tracer.stop` takes it."""


def _candidates(task: Task) -> list[_Known]:
    return [_known(task, one) for one in threads.candidates(task.pid)]


def _sleeping(task: Task) -> list[_Known]:
    """Return the threads that sleep in epoll_wait, and since when."""
    found = []
    deadline = time.monotonic() + PATIENCE / 2
    for tid in threads.thread_ids(task.pid):
        if time.monotonic() > deadline:  # those that are left begin their sleep again
            break
        if threads.call(task.pid, tid) in epoll_sleep.EPOLL and (one := threads.activity(task.pid, tid)):
            found.append(_known(task, one))
    return found


def _known(task: Task, activity: threads.Activity) -> _Known:
    sleep = epoll_sleep.look(task, activity)
    return activity.tid, activity.cpu, *(sleep or (0, 0))


def _packed(one: Call) -> tuple[int, list[int], list[int], int]:
    """Return a call as `native.Tracer` takes it."""
    values = [value.plus if isinstance(value, Result) else value for value in one.arguments]
    of = [value.of if isinstance(value, Result) else -1 for value in one.arguments]
    return SYSCALLS[one.name], values, of, one.made


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _options_for(task: Task) -> int:
    """As `preflight.check`; waits a moment for a tracer that is about to end, as other users of iobmd are."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return preflight.check(task)
        except preflight.Traced:
            if time.monotonic() > deadline:
                tracer = preflight.tracer(task.pid, task.pid)
                raise preflight.traced_by_another(task.pid, tracer or 0) from None
        time.sleep(0.002)


def _never_stopped(task: Task) -> TaskTimeoutError:
    """Return the error for a task none of whose threads stops."""
    some = threads.thread_ids(task.pid)[:_SHOWN]
    states = ", ".join(sorted({state for tid in some if (state := threads.state(task.pid, tid))}))
    why = freezer.why(task.pid) or (
        "it sleeps uninterruptibly, waits for a child that it made by vfork, or for a page fault that is not served"
    )
    message = f"task {task.pid} did not stop within {PATIENCE:g} s (its threads are in state {states}): {why}"
    return TaskTimeoutError(message)
