"""What another thread finds out: for calls that the kernel may not return from for as long as another program likes.

Whoever holds the lock of an address space (mmap_lock) keeps all those waiting that read the maps, the page tables or
the memory of its process, and only SIGKILL ends that wait. A process can hold it for as long as it likes, by mapping
something else over a file of its own file server (FUSE), which has to write that back first.
"""

import _thread
import time
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import TypeVar

_T = TypeVar("_T")


def relayed(produce: Callable[[], Iterable[Iterable[_T]]], patience: float) -> Iterator[_T]:
    """Iterate over the items of batches that a thread of its own produces.

    Parameters
    ----------
    produce : callable
        Returns the batches, each an iterable of items; empty ones show that it goes on.
    patience : float
        The longest time between two batches, in seconds.

    Raises
    ------
    TimeoutError
        None came. The thread is left alone: it ends with its call, or with the process.
    BaseException
        What `produce` raised.
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
