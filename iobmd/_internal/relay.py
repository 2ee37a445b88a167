"""Results computed in another thread, for system calls that another program can block indefinitely.

While the lock of an address space (mmap_lock) is held, every reader of the maps, page tables or memory of its process
waits, and only SIGKILL ends the wait. A process can hold the lock indefinitely by mapping something over a file of
its own FUSE server, which must first write the file back.
"""

import _thread
import time
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import TypeVar

_T = TypeVar("_T")


def relayed(produce: Callable[[], Iterable[Iterable[_T]]], patience: float) -> Iterator[_T]:
    """Iterate over the items of batches that a separate thread produces.

    Parameters
    ----------
    produce : callable
        Returns the batches, each an iterable of items; empty ones show progress.
    patience : float
        The longest time between two batches, in seconds.

    Raises
    ------
    TimeoutError
        No batch arrived. The thread is abandoned: it ends with its call, or with the process.
    BaseException
        The exception of `produce`.
    """
    queue: SimpleQueue[list[_T] | BaseException | None] = SimpleQueue()
    wanted = True

    def work() -> None:
        last = time.monotonic()
        try:
            for batch in produce():
                items, now = list(batch), time.monotonic()
                if items or now - last > patience / 8:  # each one wakes the other thread
                    queue.put(items)
                    last = now
                if not wanted:
                    return
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    try:
        _thread.start_new_thread(work, ())
    except (RuntimeError, MemoryError):  # no thread can be started: this one waits
        for batch in produce():
            yield from batch
        return
    try:
        while (found := _next(queue, patience)) is not None:
            if isinstance(found, BaseException):
                raise found
            yield from found
    finally:
        wanted = False


def _next(queue: SimpleQueue[_T], patience: float) -> _T:
    try:
        return queue.get(timeout=patience)
    except Empty:
        raise TimeoutError from None
