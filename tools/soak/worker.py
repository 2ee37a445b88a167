"""A worker: a process whose threads execute and check one event after another."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import gc
import json
import multiprocessing.reduction  # noqa: F401 (an ordinary user may not be able to read the interpreter's files)
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from iobmd.api import allocate
from iobmd.constants import IOReturn
from iobmd.descriptors.usage import trim
from iobmd.errors import IOReturnError
from iobmd.units import HUGE_PAGE_SIZE

from . import events, footprint, kernel
from .board import Board, Thread
from .context import Context, Found, Shared, Skipped
from .profiles import PROFILES, Profile, locking_is_limited
from .report import CODES

if TYPE_CHECKING:
    from .events import Kind


class Orders(NamedTuple):
    """The supervisor's orders for a worker."""

    folder: str
    parent: int
    slot: int
    threads: int
    profile: str
    seed: str
    kinds: list[str]
    """All kinds of the run, in the order of the board's counters."""
    life: float
    """Seconds after which it exits and is replaced by the next one."""
    patience: float
    cgroup: str | None


class Runner:
    """Executes the events of one thread.

    Parameters
    ----------
    context : Context
        The context of the thread.
    kinds : list of str
        All kinds of the run.
    """

    def __init__(self, context: Context, kinds: list[str]) -> None:
        self.context = context
        self._index = {name: number for number, name in enumerate(kinds)}
        self._schedule = events.schedule(kinds)
        self._functions = {name: (events.KINDS | events.PLANTED_FAULTS)[name].load() for name in kinds}

    def run(self, kind: Kind) -> None:
        """Execute one event, and record its result."""
        row, index = self.context.row, self._index[kind.name]
        row[Thread.KIND] = index
        self.context.peer = None
        row[Thread.BEGAN] = time.monotonic_ns()
        try:
            self._functions[kind.name](self.context)
        except Skipped:
            row[Thread.BEGAN] = 0
            return
        except Found as found:
            self._report(found.fault, kind, str(found))
        except IOReturnError as error:
            self._refused(kind, error)
        except MemoryError as error:
            if not self.context.profile.address_space:
                self._report("unexpected_errors", kind, f"MemoryError: {error}")
        except Exception as error:
            if self._is_of_this_tool(error):
                row[Thread.BEGAN] = 0
                return
            self._report("unexpected_errors", kind, f"{type(error).__name__}: {error}")
        row[Thread.FIRST_KIND + index] += 1
        row[Thread.EVENTS] += 1
        row[Thread.BEGAN] = 0

    def _is_of_this_tool(self, error: Exception) -> bool:
        """Return whether a limit of the worker prevented the event itself from reading the kernel's files."""
        number = getattr(error, "errno", 0)
        if not self.context.profile.descriptors or number not in (errno.EMFILE, errno.ENFILE):
            return False
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        innermost: str = [name for name in modules if name.startswith("iobmd.")][-1]
        return innermost.startswith("iobmd.tools.")

    def _refused(self, kind: Kind, error: IOReturnError) -> None:
        reason = self._reason(kind, error.code)
        if reason and error.code in CODES:
            self.context.refused(reason, error.code)
        else:
            self._report("unexpected_refusals", kind, f"{error.code.name}: {error}")

    def _reason(self, kind: Kind, code: IOReturn) -> str:
        """Return why a refusal was expected, "" if nothing explains it."""
        profile, peer = self.context.profile, self.context.peer
        if code == IOReturn.kIOReturnNotFound and peer and peer.has_ended:
            return "target ended"
        if code in profile.refusals:
            return profile.reason
        if code == IOReturn.kIOReturnCannotWire and locking_is_limited():
            return "limit"
        return kind.refusals.get(code, "")

    def _report(self, fault: str, kind: Kind, message: str) -> None:
        trace = traceback.format_exc(limit=-8)[-4000:]
        self.context.board.report(
            fault, kind.name, message, profile=self.context.profile.name, thread=self.context.number, trace=trace
        )

    def work(self, over: threading.Event) -> None:
        """Execute events until the end of the work."""
        choose, schedule = self.context.chance.choice, self._schedule
        while not over.is_set():
            self.run(choose(schedule))


class Worker:
    """The threads of this process, from their start to the check for leaks."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.profile: Profile = PROFILES[orders.profile]
        folder = Path(orders.folder)
        self.board = Board(folder)
        # Before the limits apply: files that are opened here are used for the whole life of the worker.
        self._shared = Shared(folder, self.board, self.profile, orders.patience)
        self.runners = [
            Runner(
                Context(
                    self._shared, orders.slot * orders.threads + number, random.Random(f"{orders.seed}/{number}")
                ),
                orders.kinds,
            )
            for number in range(orders.threads)
        ]
        self.over, self.begin, self.leave = threading.Event(), threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._thread, args=(runner,), name=f"soak-{number}", daemon=True)
            for number, runner in enumerate(self.runners)
        ]
        self._done = threading.Semaphore(0)

    def _thread(self, runner: Runner) -> None:
        self.begin.wait()
        try:
            runner.work(self.over)
            runner.context.drain()
        finally:
            self._done.release()
        self.leave.wait()  # its stack is counted before and after

    def run(self) -> None:
        """Work for the ordered time, or until the end of the run, and report leaks."""
        orders = self.orders
        self.profile.enter(Path(orders.cgroup) if orders.cgroup else None)
        kernel.die_with_parent(orders.parent)  # a change of user has cleared the flag
        for thread in self._threads:
            thread.start()
        self._warm_up()
        before = settled()
        self.profile.tighten()
        self.begin.set()
        end = time.monotonic() + orders.life
        while time.monotonic() < end and not self.board.stopping:
            time.sleep(0.05)
        self.over.set()
        for _ in self._threads:
            self._done.acquire()
        self.profile.loosen()
        self._report_left(before)
        self.leave.set()

    def _warm_up(self) -> None:
        """Execute each kind of event once, because iobmd creates permanent resources when they are first needed."""
        runner = self.runners[0]
        with contextlib.suppress(IOReturnError):  # opens the tmpfs, which not every event needs
            allocate(HUGE_PAGE_SIZE, wired=False, shared=True).free()
        for _ in range(2):
            for name in self.orders.kinds:
                if name in events.KINDS:
                    runner.run(events.KINDS[name])
        runner.context.drain()

    def _report_left(self, before: footprint.Footprint) -> None:
        deadline = time.monotonic() + 5  # the kernel ends pins and rings shortly after they were closed
        while (left := settled().left(before)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for fault, (count, message) in left.items():
            self.board.report(fault, "worker", message, count=count, profile=self.profile.name)


def settled() -> footprint.Footprint:
    """Return the resources of this process after garbage collection, without kept memory and iobmd's purger."""
    gc.collect()
    trim()
    for thread in threading.enumerate():
        if thread.name == "iobmd-purger":
            thread.join(5)
    return footprint.Footprint.now()


def main() -> None:
    """Run the worker with the orders in the first argument."""
    orders = Orders(**json.loads(sys.argv[1]))
    kernel.die_with_parent(orders.parent)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor handles Ctrl-C
    warnings.simplefilter("ignore", DeprecationWarning)  # about forks with threads, which are intended
    threading.stack_size(footprint.STACK)
    Worker(orders).run()
    sys.stdout.flush()
    os._exit(0)  # daemon threads may still wait in iobmd


if __name__ == "__main__":
    main()
