"""Large work on a range of memory, cut into pieces and run on several threads (the native calls release the GIL)."""

import _thread
import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Sequence

PIECE = 4 << 20
"""Bytes of a piece: some huge pages, and short enough to see an interrupt or a dying task soon."""

THREADS_FROM = 16 << 20
"""Bytes from which a second thread pays: at 8 MiB two take as long as one, at 16 MiB two thirds (measured)."""

MOST_THREADS = 8

Work = Callable[[int, int], tuple[int, int]]
"""Does the bytes `offset`, `size`; returns how many were done, and the error number that ended it."""

Progress = Callable[[int], None]


def threads(size: int) -> int:
    """Return on how many threads work on `size` bytes runs."""
    if size < THREADS_FROM:
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), MOST_THREADS))


def run(
    work: Work, size: int, progress: Progress | None = None, cuts: Sequence[int] | None = None
) -> tuple[int, int]:
    """Do `size` bytes in pieces.

    Parameters
    ----------
    work, size
        What does a piece, and the bytes of all.
    progress
        Called in this thread, now and then, with the number of bytes done so far.
    cuts
        Offsets at which pieces begin, ascending from 0, where pieces of `PIECE` bytes are of unlike work.

    Returns
    -------
    tuple[int, int]
        How many bytes from the start are done, and the error number that ended it; 0 when all are. `ESRCH` where
        a piece came out short without an error.
    """
    pieces = _Pieces(work, size, range(0, size, PIECE) if cuts is None else cuts)
    try:
        # Where a limit allows no further thread, those that run do all of it. Not by Thread.start(), which waits for
        # its thread to begin: one that finds no memory to begin with never does.
        with contextlib.suppress(RuntimeError, MemoryError):
            for _ in range(min(threads(size), pieces.count) - 1):
                _thread.start_new_thread(pieces.help, ())
        pieces.work(progress)
    finally:
        # Also on KeyboardInterrupt: nobody may write to the memory once the caller has it back.
        pieces.stop()
    return pieces.failure or (size, 0)


class _Pieces:
    """Pieces of one job, handed out in ascending order, and the lowest place where one failed."""

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
        """Do pieces until there are no more."""
        while piece := self._next():
            self._do(*piece)
            if progress:
                progress(self._done)

    def help(self) -> None:
        """As `work`, in another thread; `stop` waits for the piece it is at."""
        while piece := self._next(helping=1):
            try:
                self._do(*piece)
            except BaseException:  # no memory: the thread that waits has to know
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
        # Pieces below this one are all handed out and will be finished, so the lowest wins.
        failure = offset, error
        self.failure = min(self.failure or failure, failure)

    def _next(self, helping: int = 0) -> tuple[int, int] | None:
        with self._lock:
            piece = None if self.failure else next(self._pieces, None)
            self._helping += helping * (piece is not None)
            return piece

    def stop(self) -> None:
        """Hand out no more, and wait for the pieces that helpers are at, however often Ctrl-C is pressed."""
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
