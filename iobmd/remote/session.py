"""Sessions: stopping a task, and what is done meanwhile, in one OS thread, for the kernel ties tracing to that."""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, TypeVar

from iobmd import own, refusals
from iobmd.constants import IOReturn
from iobmd.errors import IOReturnError
from iobmd.remote import gadget, preflight, threads
from iobmd.remote.stop import NotStopped, Stop

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd.task import Task

_T = TypeVar("_T")

PATIENCE = 2.0  # seconds for a thread to stop, and for another tracer to end
_SHORT = 0.2  # seconds for one thread of several
_ATTEMPTS = 3


_busy: weakref.WeakValueDictionary[int, own.Guard] = weakref.WeakValueDictionary()
os.register_at_fork(after_in_child=_busy.clear)


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
    return in_tracer(task, lambda: stop_one(task, gadget.find(task), work))


def in_tracer(task: Task, body: Callable[[], _T]) -> _T:
    """Return what `body` does in a thread of its own, the only one of ours that traces this task meanwhile."""
    guard = _busy.setdefault(task.pid, own.Guard())
    with guard:
        tracer = _Tracer(body)
        interrupt = tracer.run_to_end()
    if interrupt is not None:
        raise interrupt
    if tracer.error is not None:
        raise tracer.error
    return tracer.result  # type: ignore[return-value]


class _Tracer(threading.Thread):
    """The thread. It ends in bounded time, and with it, by the kernel, whatever it left traced."""

    def __init__(self, body: Callable[[], object]) -> None:
        super().__init__(name="iobmd-tracer", daemon=False)
        self._body = body
        self._done = threading.Event()
        self._cancelled = False
        self.result: object = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Do it."""
        try:
            if not self._cancelled:
                self.result = self._body()
        except BaseException as error:
            self.error = error
        finally:
            del self._body
            self._done.set()

    def run_to_end(self) -> BaseException | None:
        """Start it, and wait until it is done whatever comes; returns what did, for its task is stopped meanwhile."""
        interrupt: BaseException | None = None
        try:
            self.start()
        except RuntimeError as error:  # no thread is to be had
            return IOReturnError(IOReturn.kIOReturnNoResources, f"cannot trace a task: {error}")
        except BaseException as error:
            interrupt, self._cancelled = error, True  # it may have been started, or not
        late = time.monotonic() + PATIENCE
        while not self._done.is_set() and (interrupt is None or self.ident or time.monotonic() < late):
            try:
                self._done.wait(PATIENCE)
                self.join(PATIENCE)
            except BaseException as error:
                interrupt = error
        return interrupt


def options_for(task: Task) -> int:
    """As `preflight.check`; waits a moment for a tracer that is about to end, as other users of iobmd are."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return preflight.check(task)
        except preflight.Traced:
            if time.monotonic() > deadline:
                raise preflight.traced_by_another(task.pid) from None
        time.sleep(0.002)


def seize(task: Task, activity: threads.Activity, options: int) -> Stop | None:
    """Begin to stop a thread; None when it ended. Raises `kIOReturnNotPermitted` with the reason."""
    for _attempt in range(_ATTEMPTS):
        try:
            return Stop(task, activity, options)
        except OSError as error:
            if error.errno == errno.ESRCH:
                return None
            refusal = error
        options_for(task)  # waits for another tracer, if that is why
    raise preflight.refused(task.pid, refusal)


def stop_one(task: Task, instruction: int, work: Callable[[Stop], None]) -> int:
    """As `with_stopped`, in the thread that traces already."""
    options = options_for(task)
    deadline = time.monotonic() + PATIENCE
    late: list[Stop] = []
    try:
        while time.monotonic() < deadline:
            for activity in threads.candidates(task.pid):
                stop = seize(task, activity, options)
                if stop is None:
                    continue
                try:
                    stop.wait(time.monotonic() + _SHORT)
                    stop.ready(instruction)
                    work(stop)
                except NotStopped:
                    late.append(stop)
                    continue
                except BaseException:
                    stop.release()
                    raise
                return stop.release()
            if not task.alive:
                raise refusals.gone(f"task {task.pid} is gone: it exited")
        raise never_stopped(task)
    finally:
        for stop in late:
            stop.release()


def never_stopped(task: Task) -> IOReturnError:
    """Return the error for a task none of whose threads stops."""
    states = ", ".join(sorted({threads.state(task.pid, tid) for tid in threads.thread_ids(task.pid)}))
    message = (
        f"task {task.pid} did not stop for {PATIENCE:g} s (its threads are in state {states}): it sleeps "
        "uninterruptibly, is frozen, or waits for a child that it forked by vfork"
    )
    return IOReturnError(IOReturn.kIOReturnTimeout, message)
