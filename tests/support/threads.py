"""Threads of a test, whose errors fail the test."""

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator

PATIENCE = 120.0
"""Seconds to wait for threads that should end."""


@contextlib.contextmanager
def running(*works: Callable[[], object]) -> Iterator[list[threading.Thread]]:
    """Call each of `works` in a separate thread during a `with` block, which ends when the threads have ended.

    The first error in a thread is raised at the end of the block, because pytest only warns of errors in threads, and
    a forked child ignores them.
    """
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    yield threads
    for thread in threads:
        thread.join(PATIENCE)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)


def run_all(*works: Callable[[], object]) -> None:
    """Call each of `works` in a separate thread, and wait for all of them; raises as `running`."""
    with running(*works):
        pass


@contextlib.contextmanager
def on_one_processor() -> Iterator[None]:
    """Run this thread on one processor during a `with` block.

    Large memory is then populated and copied by this thread alone, which reports its progress after each chunk. With
    more processors, others may process all chunks before a busy machine runs this thread, which then reports nothing.
    """
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def collects_without_waiting(
    guard: contextlib.AbstractContextManager[object], garbage: list[object], *, in_thread: bool
) -> bool:
    """Collect objects, as a cycle, while this thread is inside a guard; return whether no destructor waited.

    Parameters
    ----------
    guard
        The guard.
    garbage
        The objects, to which there must be no other reference; it is empty afterwards.
    in_thread
        Whether another thread collects them, or the one that is inside.
    """

    def collect() -> None:
        cycle = garbage[:]
        cycle.append(cycle)
        garbage.clear()
        del cycle
        gc.collect()

    thread = threading.Thread(target=collect, daemon=True)
    with guard:
        if in_thread:
            thread.start()
            thread.join(20)
            waits = thread.is_alive()
        else:
            collect()
            waits = False
    if in_thread:
        thread.join(20)
    return not waits
