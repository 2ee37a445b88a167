"""How commands are ended that hold something, or that the kernel may keep waiting."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


_ENDING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
_LOOK = 0.5  # seconds between two looks for signals that wait
_UNTIL = 4  # looks at which one has waited too long


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """End the program on a signal even where the kernel keeps the main thread waiting until SIGKILL.

    So it is while a task holds the lock of its address space (see `relay`): a signal stays pending until the wait is
    over. A second thread, which has blocked the signal itself, sees it there (sigpending(2)) and ends the program.
    Not for commands that stop tasks: their tracers are safer in a program of one thread.
    """
    wanted = True
    watched = set(_ENDING) - signal.pthread_sigmask(signal.SIG_BLOCK, [])  # what is blocked here stays pending

    def watch() -> None:
        looks = dict.fromkeys(watched, 0)
        while wanted:
            time.sleep(_LOOK)
            pending = signal.sigpending()
            looks = {number: count + 1 if number in pending else 0 for number, count in looks.items()}
            if late := next((number for number, count in looks.items() if count >= _UNTIL), 0):
                os.write(2, b"iobmd: interrupted while the kernel kept it waiting for another process\n")
                os._exit(128 + late)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)  # which the thread takes over
    try:
        with contextlib.suppress(RuntimeError, MemoryError):  # no thread can be started
            _thread.start_new_thread(watch, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield
    finally:
        wanted = False


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM and SIGHUP interrupt like Ctrl-C, once each, where we may set their handlers."""

    def interrupt(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # what follows tidies up: not to be interrupted again
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
