"""Signals that end a command which holds a resource, or which the kernel may block."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


_ENDING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
_LOOK = 0.5  # seconds between two checks for pending signals
_UNTIL = 4  # checks after which a signal has been pending for too long


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """End the program on a signal even while the kernel blocks the main thread until SIGKILL.

    This happens while a task holds the lock of its address space (see `relay`): a signal remains pending until the
    wait ends. A second thread, in which the signal is blocked, detects it (sigpending(2)) and ends the program. Do
    not use this in commands that stop tasks: their tracers are safer in a single-threaded program.
    """
    over, ended = _thread.allocate_lock(), _thread.allocate_lock()
    over.acquire()
    ended.acquire()
    watched = set(_ENDING) - signal.pthread_sigmask(
        signal.SIG_BLOCK, []
    )  # signals blocked by the caller remain pending

    def watch() -> None:
        try:
            looks = dict.fromkeys(watched, 0)
            while not over.acquire(timeout=_LOOK):
                pending = signal.sigpending()
                looks = {number: count + 1 if number in pending else 0 for number, count in looks.items()}
                if late := next((number for number, count in looks.items() if count >= _UNTIL), 0):
                    os.write(2, b"iobmd: interrupted while the kernel was waiting for another process\n")
                    os._exit(128 + late)
        finally:
            ended.release()

    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)  # inherited by the thread
    try:
        _thread.start_new_thread(watch, ())
    except (RuntimeError, MemoryError):  # no thread can be started
        ended.release()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield
    finally:
        over.release()
        ended.acquire()  # the next command of this process starts another thread


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt, once each, where handlers can be set."""

    def interrupt(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the cleanup
        raise KeyboardInterrupt

    before = {}
    try:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            before[number] = signal.signal(number, interrupt)
    except ValueError:  # not in the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
