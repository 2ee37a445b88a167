"""Work on a large range of memory, split into chunks for several threads (the native calls release the GIL)."""

import _thread
import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from typing import ParamSpec

_P = ParamSpec("_P")

PIECE = 4 << 20
"""Bytes of a chunk: a few huge pages, and small enough that an interrupt or the exit of a task is noticed soon."""

THREADS_FROM = 16 << 20
"""Bytes from which a second thread helps: two threads copy 8 MiB no faster than one, 16 MiB in two thirds of the
time."""

MOST_THREADS = 8
"""Copies read and write memory, whose bandwidth a few processors exhaust."""

Work = Callable[[int, int], tuple[int, int]]
"""Processes `size` bytes at `offset`; returns how many were processed, and the error number that ended the work."""

Progress = Callable[[int], None]


class Carried(BaseException):
    """Carries an exception of a caller's function past the handlers of the kernel's errors (OSError)."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def carrying(function: Callable[_P, None]) -> Callable[_P, None]:
    """Return a function that raises `Carried` for an exception of a caller's function."""

    def call(*arguments: _P.args, **keywords: _P.kwargs) -> None:
        try:
            function(*arguments, **keywords)
        except BaseException as error:
            raise Carried(error) from None

    return call


def threads(size: int, most: int = MOST_THREADS) -> int:
    """Return the number of threads for `size` bytes: that of the processors, but not above `most`."""
    if size < THREADS_FROM:
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), most))


def run(
    work: Work,
    size: int,
    progress: Progress | None = None,
    cuts: Sequence[int] | None = None,
    most_threads: int = MOST_THREADS,
) -> tuple[int, int]:
    """Process `size` bytes in chunks.

    Parameters
    ----------
    work, size
        The function that processes a chunk, and the total size in bytes.
    progress
        Called repeatedly in this thread with the number of bytes processed so far.
    cuts
        Offsets at which chunks begin, ascending from 0, if chunks of `PIECE` bytes take unequal work.
    most_threads
        The maximum number of threads, which is otherwise that of the processors.

    Returns
    -------
    tuple[int, int]
        The number of bytes processed from the start, and the error number that ended the work, 0 if it is complete.
        `ESRCH` if a chunk ended early without an error.
    """
    pieces = _Pieces(work, size, range(0, size, PIECE) if cuts is None else cuts)
    try:
        # If a limit permits no further thread, the running ones do all the work. Thread.start() is not used, because
        # it waits for the thread to begin, which a thread without memory never does.
        with contextlib.suppress(RuntimeError, MemoryError):
            for _ in range(min(threads(size, most_threads), pieces.count) - 1):
                _thread.start_new_thread(pieces.help, ())
        pieces.work(progress)
    finally:
        # Also on KeyboardInterrupt: no thread may write to the memory after the return.
        pieces.stop()
    return pieces.failure or (size, 0)


class _Pieces:
    """The chunks of one job, assigned in ascending order, and the lowest failure."""

    def __init__(self, work: Work, size: int, starts: Sequence[int]) -> None:
        self._work = work
        self.count = len(starts)
        self._pieces = zip(starts, itertools.chain(starts[1:], [size]), strict=True)
        self._done = 0
        self._helping = 0
        self.failure: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self._helped = threading.Condition(self._lock)

    def work(self, progress: Progress | None = None) -> None:
        """Process chunks until none is left."""
        while piece := self._next():
            self._do(*piece)
            if progress:
                progress(self._done)

    def help(self) -> None:
        """Like `work`, in another thread; `stop` waits for its current chunk."""
        while piece := self._next(helping=1):
            try:
                self._do(*piece)
            except BaseException:  # no memory: the waiting thread must be notified
                with self._lock:
                    self._fail(piece[0], errno.ENOMEM)
            finally:
                with self._lock:
                    self._helping -= 1
                    self._helped.notify()

    def _do(self, start: int, end: int) -> None:
        done, error = self._work(start, end - start)
        with self._lock:
            self._done += done
            if done < end - start:
                self._fail(start + done, error or errno.ESRCH)

    def _fail(self, offset: int, error: int) -> None:
        # All lower chunks are already assigned and will be finished, so the lowest failure counts.
        failure = offset, error
        self.failure = min(self.failure or failure, failure)

    def _next(self, helping: int = 0) -> tuple[int, int] | None:
        with self._lock:
            piece = None if self.failure else next(self._pieces, None)
            self._helping += helping * (piece is not None)
            return piece

    def stop(self) -> None:
        """Assign no more chunks, and wait for the current ones, however often Ctrl-C is pressed."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                with self._lock:
                    self._pieces = zip()
                    while self._helping:
                        self._helped.wait()
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt:
            raise interrupt
