"""Sessions: stopping a task, and what is done meanwhile, in one OS thread, for the kernel ties tracing to that."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, TypeVar, cast

from iobmd import host, procfs
from iobmd._internal import process_local
from iobmd._native import apart
from iobmd.errors import IOReturnError, NoResourcesError, NotReadyError, TaskTimeoutError
from iobmd.remote import freezer, gadget, preflight, threads, tracing
from iobmd.remote.guest import Guest, NoProcess
from iobmd.remote.stop import Stop
from iobmd.remote.tracee import (
    InterruptedJob,
    NotStopped,
    StrangerSeized,
    Unreadable,
    check_interrupt,
    shielded,
)
from iobmd.task import diagnosis

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from iobmd.task.task import Task

_T = TypeVar("_T")

PATIENCE = 2.0  # seconds for a thread to stop, and for another tracer to end
_ATTEMPTS = 10
_COLLECTING = 3  # tries to have a task wait for a guest
_SHOWN = 100  # threads whose states a message has: each takes a millisecond on a busy machine
_SHORT = 0.2  # seconds for one thread of several


_guards = [process_local.Guard() for _ in range(64)]
"""One for each task, or for a few."""


def with_stopped(task: Task, work: Callable[[Stop], None]) -> int:
    """Stop one thread of a task, have `work` make system calls in it, and let it go on.

    Returns for how many nanoseconds, at the most, the thread stood still. `work` leaves what it made where its caller
    finds it, also when this raises an interrupt of the calling thread.

    Raises
    ------
    IOReturnError
        `kIOReturnNotPermitted`, `kIOReturnNotFound`, `kIOReturnUnsupported`: with the reason;
        `kIOReturnTimeout`: no thread stops.
    OSError
        As a system call failed in the task.
    """

    def body() -> int:
        options = options_for(task)
        return stop_one(task, options, gadget.find(task), work)

    return in_tracer(task, body)


def with_guest(task: Task, work: Callable[[Guest], None], *, standing: bool = False) -> int:
    """Make system calls in a guest of a task by `work`, while the task runs on: calls that may wait.

    If it is to be `standing`, the thread that made the guest stands still for the calls, which must not wait then: in
    a task that runs one program after the other (execve(2)), a guest is left behind with the memory of a former one.

    Returns for how many nanoseconds a thread of the task stood still, at most: while the guest was made, or while it
    was waited for. Raises as `with_stopped`.
    """
    caller = os.getpid()

    def body() -> int:
        options, instruction = options_for(task), gadget.find(task)
        guest = Guest(task)
        stopped = 0
        if os.getpid() == caller:  # this is a thread, which ends with this process
            with contextlib.suppress(OSError):  # no more processes: then a zombie is left
                guest.janitor = apart.Janitor()

        def use() -> None:
            guest.begin()
            guest.isolate()
            work(guest)

        def use_while(stop: Stop) -> None:
            guest.make(stop)
            use()
            with shielded():
                guest.end()
                guest.collect(stop)

        try:
            stopped = stop_one(task, options, instruction, use_while if standing else guest.make)
            if not standing:
                use()
        except NoProcess as error:
            message = (
                f"task {task.pid} can have no more processes, of which it needs one for a moment ({error.strerror}): "
                "its RLIMIT_NPROC, or the pids.max of its cgroup"
            )
            raise NoResourcesError(message, error.errno or 0) from None
        finally:
            try:
                stopped = max(stopped, end(guest))
            finally:
                if guest.janitor:
                    guest.janitor.end()
        return stopped

    return in_tracer(task, body)


def end(guest: Guest) -> int:
    """End a guest, and have its task wait for it; returns for how many nanoseconds a thread of it stood still."""
    if not guest.pid:
        return 0
    task = guest.task
    with shielded():
        guest.end()
        # Where the task cannot be stopped once more, on busy processors or by other tracers, a zombie would be left
        # until it exits.
        for _ in range(_COLLECTING):
            try:
                return stop_one(task, options_for(task), guest.gadget, guest.collect)
            except StrangerSeized:  # that is let go with this tracer, not after further tries
                break
            except OSError:
                if not task.alive:
                    break
    return 0


def in_tracer(task: Task, body: Callable[[], _T], *, may_be_apart: bool = True) -> _T:
    """Return what `body` does in a tracer of its own, the only one of ours that traces this task meanwhile.

    That is a thread, or a process that shares our memory and descriptors (`apart`). It ends in bounded time, and with
    it, by the kernel, whatever it left traced. When the calling thread is interrupted, or this process is killed, it
    gives up what it waits for (`tracee.check_interrupt`); the interrupt is raised here after that. A `body` that
    raises StrangerSeized is run again.
    """
    deadline = time.monotonic() + PATIENCE
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(StrangerSeized), _guard_of(task), _registered(apart.Job(body)) as job:
            return cast("_T", _result(task, lambda: job.run(_in_process(task, may_be_apart))))
        if time.monotonic() > deadline:  # a task that makes threads without end has such numbers each time
            break
    raise never_stopped(task)


Leftover = tuple[int, int, int, int, int, int, int]
"""What a tracer holds in a task, as `apart.hold` takes it."""


@contextlib.contextmanager
def beside(task: Task, body: Callable[[Callable[[Leftover], None]], object]) -> Iterator[None]:
    """Have a tracer of its own hold what it made in a task, while the caller does what is inside of the `with`.

    `body` makes it and calls its argument, which returns when the caller is through or was interrupted; it then takes
    away what it made, and in between traces nothing else. If this process is killed in between, that is done without
    it. Raises as `body`.
    """
    job = apart.Job(lambda: body(lambda leftover: apart.hold(job, leftover)))
    with _registered(job):
        try:
            with _guard_of(task):
                holds = _result(task, lambda: job.start(_in_process(task, may_be_apart=True)))
            if holds:
                yield
        except BaseException:
            job.cancel()
            raise
        finally:
            with _guard_of(task):
                _result(task, job.finish)


def _guard_of(task: Task) -> process_local.Guard:
    return _guards[task.pid % len(_guards)]


def _in_process(task: Task, may_be_apart: bool) -> bool:
    tracing.require()  # here: a thread that imports something could wait for us, who wait for it
    return (may_be_apart and _has_advantage(task)) and (
        # To Yama's scope 1 only a parent may trace, and that is we.
        host.yama_scope() != 1 or host.has_capability("CAP_SYS_PTRACE")
    )


def _result(task: Task, of: Callable[[], object]) -> object:
    """Return what a tracer returned, or raise what it raised as the error of ours that fits."""
    try:
        return of()
    except apart.NoThreadError as error:
        raise NoResourcesError(f"cannot trace a task: {error}") from None
    except ProcessLookupError as error:
        if isinstance(error, IOReturnError):
            raise
        raise diagnosis.gone(f"task {task.pid} is gone: it has exited") from None
    except InterruptedJob:
        message = f"what was done in task {task.pid} was given up: the interpreter ends"
        raise NotReadyError(message) from None


@contextlib.contextmanager
def _registered(job: apart.Job) -> Iterator[apart.Job]:
    """Keep the interpreter from ending in the middle of a job, which would leave a task in the middle too."""
    _active.add(job)
    try:
        if sys.is_finalizing() or _ending not in (0, threading.get_ident()):
            raise NotReadyError("cannot trace a task: the interpreter ends")
        yield job
    finally:
        _active.discard(job)


_active: set[apart.Job] = set()
_ending = 0
"""The thread that ends the interpreter."""


def _end() -> None:
    global _ending  # noqa: PLW0603
    _ending = threading.get_ident()
    for job in tuple(_active):  # of other threads, which will not go on
        job.cancel()
    deadline = time.monotonic() + 10
    while _active and time.monotonic() < deadline:
        time.sleep(0.001)


atexit.register(_end)
os.register_at_fork(after_in_child=_active.clear)


def _has_advantage(task: Task) -> bool:
    """Say whether the tracer is better a process of its own.

    Where no other thread of ours can want the GIL, it finishes what is under way if we are killed. Where the task is
    a child of ours, a wait of another thread would take its stops for its end.
    """
    if len(sys._current_frames()) == 1:
        return True
    try:
        return procfs.status(task.pid)["PPid"] == str(os.getpid())
    except (OSError, KeyError):
        return False


def options_for(task: Task) -> int:
    """As `preflight.check`; waits a moment for a tracer that is about to end, as other users of iobmd are."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return preflight.check(task)
        except preflight.Traced:
            if time.monotonic() > deadline:
                tracer = preflight.tracer(task.pid, task.pid)
                raise preflight.traced_by_another(task.pid, tracer or 0) from None
        check_interrupt()
        time.sleep(0.002)


@contextlib.contextmanager
def near(activity: threads.Activity) -> Iterator[None]:
    """Run on the processor of a thread: the two take turns there in a few microseconds, and their clocks are one."""
    allowed = os.sched_getaffinity(0)
    with contextlib.suppress(OSError, ValueError, OverflowError):  # it may be -1
        os.sched_setaffinity(0, {activity.cpu})
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, allowed)


def seize(task: Task, activity: threads.Activity, options: int) -> Stop | None:
    """Begin to stop a thread; None when it ended. Raises `kIOReturnNotPermitted` with the reason."""
    apart.prolong()
    deadline = time.monotonic() + PATIENCE
    refusals_seen = 0  # without a tracer: one may have ended since, but not each time
    while True:
        try:
            with near(activity):
                return Stop(task, activity, options)
        except OSError as error:
            refusal = error
        tracer = preflight.tracer(task.pid, activity.tid)
        if refusal.errno == errno.ESRCH or tracer in (None, threading.get_native_id()):
            return None
        if not tracer:
            refusals_seen += 1
            if refusals_seen > _ATTEMPTS:
                raise preflight.refused(task.pid, refusal)
        elif time.monotonic() > deadline:
            raise preflight.traced_by_another(task.pid, tracer)
        check_interrupt()
        time.sleep(0.002)


def stop_one(task: Task, options: int, instruction: int, work: Callable[[Stop], None]) -> int:
    """As `with_stopped`, in the thread that traces already."""
    deadline = time.monotonic() + PATIENCE
    late: dict[int, Stop] = {}
    try:
        while time.monotonic() < deadline:
            for activity in threads.candidates(task.pid):
                with near(activity):
                    stop = late.pop(activity.tid, None) or seize(task, activity, options)
                    if stop is None:
                        continue
                    try:
                        stop.wait(time.monotonic() + _SHORT)
                    except NotStopped:
                        late[activity.tid] = stop
                        continue
                    except BaseException:
                        stop.release()
                        raise
                    try:
                        stop.ready(instruction)
                        work(stop)
                    except Unreadable:  # another thread, or this one when it has gone on for a while
                        stop.release()
                        continue
                    except BaseException:
                        stop.release()
                        raise
                    return stop.release()
            if not task.alive:
                raise diagnosis.gone(f"task {task.pid} is gone: it exited")
            check_interrupt()
        raise never_stopped(task)
    finally:
        for stop in late.values():
            stop.release()


def never_stopped(task: Task) -> TaskTimeoutError:
    """Return the error for a task none of whose threads stops."""
    some = threads.thread_ids(task.pid)[:_SHOWN]
    states = ", ".join(sorted({state for tid in some if (state := threads.state(task.pid, tid))}))
    why = freezer.why(task.pid) or (
        "it sleeps uninterruptibly, waits for a child that it made by vfork, or for a page fault that is not served"
    )
    message = f"task {task.pid} did not stop within {PATIENCE:g} s (its threads are in state {states}): {why}"
    return TaskTimeoutError(message)
