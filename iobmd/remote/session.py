"""Sessions with another task: stops, guests and snapshots, by a tracer (`cython_ext/tracer.h`).

This module decides before a stop which thread to stop, and how its system call is resumed. From the first to the last
ptrace call on a thread of the task, everything is native. If this process is killed, the tracer ends the processes
and mappings that the session created in the task.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from iobmd import host
from iobmd._internal import process_local
from iobmd._native import tracer as native
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError, NoMemoryError, NoResourcesError, TaskTimeoutError, UnsupportedError
from iobmd.remote import epoll_sleep, freezer, preflight, signal_return, syscall_instruction, threads
from iobmd.remote.guest import Call, Guest, Result, call
from iobmd.task import attempt, diagnosis
from iobmd.task.task import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from iobmd._native.mapping import Mapping

_T = TypeVar("_T")

PATIENCE = 2.0  # seconds for a thread to stop, and for another tracer to end
_SHORT = 0.2  # seconds for a thread to stop, if there are others
_ATTEMPTS = 10
_EXECUTING = 0.05  # seconds for another thread to execute a program
_SHOWN = 100  # threads whose states a message reports: each takes a millisecond on a busy machine
_CLONE_VM, _CLONE_FS, _CLONE_FILES = 0x100, 0x200, 0x400
_NO_STACK = 8  # not mapped: a guest that outlives its tracer faults at its first push


class SharedObject(NamedTuple):
    """A file that a task maps as shared memory, to be copied."""

    path: bytes
    """Leads to the file."""
    inode: int
    """Its inode number."""
    device: int
    """Its device, as stat(2) reports it."""
    offset: int
    """The first byte to copy."""
    size: int
    """In bytes."""
    memory: Mapping
    """Zeroed memory of this process for the copy."""
    has_holes: bool
    """Whether its file system supports SEEK_DATA, so that holes are not copied."""


class ForeignThreadSeized(Exception):  # noqa: N818 (it is detached, and another attempt is made)
    """The thread ended before it was seized, and a thread of another process had reused its number."""


_guards = [process_local.Guard() for _ in range(64)]
"""Each serves the tasks of some pids: at most one tracer of this process stops a task at a time."""


def guard_of(task: Task) -> process_local.Guard:
    """Return the guard that is held while a task is stopped."""
    return _guards[task.pid % len(_guards)]


class Session:
    """A tracer of a task, with its guest or snapshot. It must be ended (`end`) in any case.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound`, `kIOReturnUnsupported`: with the reason. `kIOReturnNoResources`:
        no process can be created.
    """

    def __init__(self, task: Task) -> None:
        preflight.require_processor()
        if task.is_snapshot:
            raise UnsupportedError(f"{task!r} never runs: it can be read, but not stopped, mapped into or pinned")
        attempt.require_unlocked(task.pid, PATIENCE)
        options = _options_for(task)
        self.task = task
        self._deadline = time.monotonic() + PATIENCE
        self._refusals = 0  # while no tracer was found: one may have ended since, but not each time
        # At Yama's scope 1 only an ancestor may trace, such as this process.
        is_thread = host.yama_scope() == 1 and not host.has_capability("CAP_SYS_PTRACE")
        try:
            self._tracer = native.Tracer(task.pid, *_code(task), options, is_thread, PATIENCE, _SHORT)
        except OSError as error:
            if isinstance(error, IOReturnError):
                raise
            message = f"cannot trace task {task.pid}: {error.strerror}; this process can create no other process"
            raise NoResourcesError(message, error.errno or 0) from None

    @property
    def stopped_ns(self) -> int:
        """The total time in nanoseconds for which a thread of the task was stopped, at most."""
        return self._tracer.stopped_ns

    def stop(self, *calls: Call) -> list[int]:
        """Stop one thread of the task, make system calls in it that never wait, and resume it.

        Raises
        ------
        IOReturnError
            As the constructor; `kIOReturnTimeout`: no thread stops.
        OSError
            The error of the system call that failed there.
        ForeignThreadSeized
        """
        program = [_packed(one) for one in calls]
        while True:
            known = _candidates(self.task)
            status = self._tracer.stop(known, program)
            if not self._isagain(status):
                break
        self._require(status, calls)
        return self._tracer.results

    def guest(self, *, standing: bool = False) -> Guest:
        """Create a guest, which ends with the session. Raises as `stop`.

        With `standing`, all threads of the task remain stopped until the end of the session.

        Raises
        ------
        IOReturnError
            `kIOReturnNoResources`: the task can create no process.
        """
        until = time.monotonic() + _EXECUTING
        while not self._tracer.guest:
            try:
                if standing:
                    self._freeze(native.GUEST, 0)
                else:
                    self.stop(call("clone", _CLONE_VM | _CLONE_FS | _CLONE_FILES, _NO_STACK, 0, 0, 0))
            except OSError as error:
                if error.errno != errno.EAGAIN or isinstance(error, IOReturnError):
                    raise
                # While a thread executes a program, no new process may share the working directory (CLONE_FS).
                if time.monotonic() > until:
                    limit = f"({error.strerror}): raise its RLIMIT_NPROC, or the pids.max of its cgroup"
                    message = f"task {self.task.pid} can create no process, but one is needed {limit}"
                    raise NoResourcesError(message, error.errno) from None
                time.sleep(0.002)
            else:
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

    def _freeze(
        self, wanted: int, deadline: float, *, records: bool = False, objects: Sequence[SharedObject] = ()
    ) -> None:
        self._deadline = time.monotonic() + PATIENCE
        while True:
            status = self._tracer.freeze(_sleeping(self.task), wanted, deadline, records, objects)
            if not self._isagain(status):
                break
        if status == native.UNCOPIED:
            error, path = self._tracer.error, os.fsdecode(objects[self._tracer.failed].path)
            message = f"cannot copy the shared memory of task {self.task.pid} from {path}: {os.strerror(error)}"
            raise UnsupportedError(message, error)
        self._require(status, [call("clone")])

    def thaw(self) -> None:
        """Resume every thread."""
        self._tracer.thaw()

    def snapshot(self, patience: float, *, records: bool = False, objects: Sequence[SharedObject] = ()) -> int:
        """Create a process that shares the task's memory copy-on-write and never runs; return its pid.

        It is created by a guest, while all threads are stopped, because if a userfaultfd reports forks
        (UFFD_FEATURE_EVENT_FORK), the call waits until the report is read. The guest then ends. The snapshot is a
        child of the task, whose waits do not see it, and which gets no SIGCHLD. It holds no descriptor of the task,
        and lasts until the end of the session, also if the thread that created the session ends. With `records`, the
        `registers` of all threads are saved. `objects` are copied before the threads resume.

        Raises as `guest`; `kIOReturnTimeout`: it took longer than `patience` seconds. `kIOReturnUnsupported`: an
        object cannot be read.
        """
        self._freeze(native.SNAPSHOT, time.monotonic() + patience, records=records, objects=objects)
        pid = self._tracer.child
        self._deadline = time.monotonic() + PATIENCE
        while True:
            status = self._tracer.stand_alone(_candidates(self.task), time.monotonic() + PATIENCE)
            if status in (native.FAILED, native.STUCK, native.ENDED, native.SIGNALLED) and self._tracer.child == pid:
                self._require(status, [call("close_range"), call("unshare")], of_guest=True)
            # If the task cannot be stopped again now, its guest remains a zombie until the end of the snapshot.
            if not self._tracer.child or not self._isagain(status):
                return pid

    @property
    def registers(self) -> list[tuple[int, int, list[tuple[int, bytes]]]]:
        """The registers of the task's threads when the snapshot was created, as `native.Tracer.registers`."""
        return self._tracer.registers

    def end(self, *, failed: bool) -> None:
        """End the guest or snapshot and release the task; with `failed`, also unmap memory that was mapped."""
        self._deadline = time.monotonic() + PATIENCE
        try:
            with contextlib.suppress(ChildProcessError):
                if self._tracer.guest and not self._tracer.was_killed:
                    self._collect(failed)
            if self._tracer.was_killed and self._tracer.succeed():  # the guest has died with the first one
                self._deadline = time.monotonic() + 3 * PATIENCE  # it must first die
                self._collect(failed)
        except OSError:  # it has exited, or refuses
            pass
        finally:
            self._tracer.end()

    def _collect(self, failed: bool) -> None:
        """Make the task reap the guest and the snapshot. Raises OSError."""
        while True:
            # If the task cannot be stopped again, because of busy processors or another tracer, a zombie remains
            # until the task exits.
            status = self._tracer.collect(_candidates(self.task), failed)
            # If the thread ends during this, because another one executes a program, other threads remain.
            ended = status == native.ENDED and time.monotonic() < self._deadline
            if not self._tracer.guest or (not ended and not self._isagain(status)):
                break

    def _isagain(self, status: int) -> bool:
        """Wait briefly and return whether another attempt may succeed."""
        if status in (native.GONE, native.LATE, native.UNREADABLE):
            self._refusals = 0  # the earlier ones were of a thread that another one, executing a program, replaced
            if not self.task.alive:
                raise diagnosis.gone(f"task {self.task.pid} is gone: it exited")
            if status == native.UNREADABLE:
                # At once: it may soon execute yet another program, before the code for a return would be found.
                self._tracer.use(syscall_instruction.find(self.task), 0, 0)
            elif status == native.GONE:  # all threads that were known; others may not be visible yet
                time.sleep(0.001)
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
        """Raise the error that a status stands for."""
        if status == native.DONE:
            return
        pid, tracer = self.task.pid, self._tracer
        name = calls[tracer.failed].name if tracer.failed < len(calls) else "a system call"
        if status == native.FAILED:
            raise OSError(tracer.error, f"{name} in task {pid}: {os.strerror(tracer.error)}")
        if status == native.FOREIGN_THREAD:
            raise ForeignThreadSeized
        if status in (native.GONE, native.LATE, native.UNREADABLE):
            raise _never_stopped(self.task)
        if status == native.UNSEEN:
            raise self._unseen()
        if status == native.ENDED:
            if of_guest and self.task.alive:
                message = f"the process of iobmd that made system calls in task {pid} was killed"
                raise IOReturnError(IOReturn.kIOReturnError, message)
            raise diagnosis.gone(f"task {pid} is gone: it exited, ran another program, or a thread of it ended")
        raise self._error(status, name)

    def _error(self, status: int, name: str) -> IOReturnError:
        """Return the error for a status of the call `name`."""
        pid = self.task.pid
        if status == native.HELD:
            why = freezer.why(pid) or "other programs occupy its processors, or it is executing one, and waits"
            return TaskTimeoutError(f"task {pid} does not run: {why}")
        if status == native.STUCK:
            return TaskTimeoutError(f"{name} in task {pid} did not return in time")
        if status == native.NO_MEMORY:
            return NoMemoryError(f"no memory for the threads of task {pid}")
        if status == native.IS_32_BIT:
            return diagnosis.of_32_bits(pid)
        if status == native.DIVERTED:
            message = f"task {pid} diverts its system calls to a handler (PR_SET_SYSCALL_USER_DISPATCH)"
            return UnsupportedError(message)
        message = {
            native.CHANGED: f"task {pid} has changed its code, and made another system call instead of {name}",
            native.SIGNALLED: f"task {pid} got {_signal(self._tracer.error)} during an injected system call",
        }[status]
        return IOReturnError(IOReturn.kIOReturnError, message)

    def _unseen(self) -> IOReturnError:
        message = f"task {self.task.pid} created a process that is not visible to this process"
        return IOReturnError(IOReturn.kIOReturnError, message)


def with_guest(task: Task, work: Callable[[Guest], None], *, standing: bool = False, inside: bool = False) -> int:
    """Call `work` with a guest of a task, whose system calls may wait while the task continues to run.

    With `standing`, the task is stopped during the calls, which then must not wait. If a task executes programs
    repeatedly (execve(2)), a guest is otherwise left in the address space of a previous one. `inside`: this thread is
    inside `guard_of(task)`.

    Returns
    -------
    int
        For how many nanoseconds a thread of the task was stopped, at most: to create the guest, or to reap it.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound`, `kIOReturnUnsupported`: with the reason. `kIOReturnTimeout`: no
        thread stopped. `kIOReturnNoResources`: this process or the task can create no process.
    OSError
        The error of a system call in the task. All memory that `work` mapped is then unmapped.
    """

    def attempt() -> int:
        with contextlib.nullcontext() if inside else guard_of(task), _opened(task) as session:
            work(session.guest(standing=standing))
        return session.stopped_ns

    return again(task, attempt)


def stop(task: Task) -> int:
    """Stop one thread of a task and resume it; return for how many nanoseconds it was stopped.

    Raises as `with_guest`.
    """

    def attempt() -> int:
        with guard_of(task), _opened(task) as session:
            session.stop()
        return session.stopped_ns

    return again(task, attempt)


def frozen(task: Task, before: Callable[[], None], work: Callable[[], bool], tries: int) -> tuple[bool, int]:
    """Stop all threads of a task for `work`, and call `before` directly before, until `work` returns True.

    After `tries` attempts, return whether it did, and for how many nanoseconds the task was stopped in total. Raises
    as `with_guest`.
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

    return again(task, attempt)


def again(task: Task, attempt: Callable[[], _T]) -> _T:
    """Return the result of an attempt, which is repeated while it fails for a temporary reason."""
    deadline = time.monotonic() + PATIENCE
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(ForeignThreadSeized):
            return attempt()
        if time.monotonic() > deadline:  # a task that creates threads endlessly may cause this each time
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
    """Perform an action that must not be skipped: if an interrupt ends it, repeat it, then raise the interrupt."""
    try:
        action()
    except IOReturnError:
        raise
    except BaseException:
        action()
        raise


def _code(task: Task) -> tuple[int, int, int]:
    """Return the addresses of a system call instruction, and of the code of `signal_return`."""
    instruction = syscall_instruction.find(task)
    return instruction, *signal_return.code(task, instruction)


_Known = tuple[int, int, int, int, int, int]
"""A thread, in the form that `native.Tracer.stop` accepts."""


def _candidates(task: Task) -> list[_Known]:
    return [_known(task, one) for one in threads.candidates(task.pid)]


def _sleeping(task: Task) -> list[_Known]:
    """Return the threads that sleep in epoll_wait, with the start of their sleep, and the main thread."""
    found = []
    deadline = time.monotonic() + PATIENCE / 2
    for tid in threads.thread_ids(task.pid):
        if time.monotonic() > deadline:  # the others will begin their sleep again
            break
        is_wanted = tid == task.pid or threads.call(task.pid, tid) in epoll_sleep.EPOLL
        if is_wanted and (one := threads.activity(task.pid, tid)):
            found.append(_known(task, one))
    return found


def _known(task: Task, activity: threads.Activity) -> _Known:
    sleep = epoll_sleep.measure(task, activity)
    return activity.tid, activity.cpu, *(sleep or (0, 0)), *signal_return.stack(task, activity)


def _packed(one: Call) -> tuple[int, list[int], list[int], int]:
    """Return a call in the form that `native.Tracer` accepts."""
    values = [value.plus if isinstance(value, Result) else value for value in one.arguments]
    of = [value.of if isinstance(value, Result) else -1 for value in one.arguments]
    return native.MADE_CALLS[one.name], values, of, one.made


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _options_for(task: Task) -> int:
    """Return the result of `preflight.check`, after waiting for a tracer that ends soon, such as another iobmd."""
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
        "it sleeps uninterruptibly, or waits for a child of vfork or for a page fault that is not served"
    )
    message = f"task {task.pid} did not stop within {PATIENCE:g} s (its threads are in state {states}): {why}"
    return TaskTimeoutError(message)
