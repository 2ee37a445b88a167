"""Large work on a range of memory, cut into pieces and run on several threads (the native calls release the GIL)."""

import _thread
import contextlib
import errno
import os
import threading
from collections.abc import Callable

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


def run(work: Work, size: int, progress: Progress | None = None) -> tuple[int, int]:
    """Do `size` bytes in pieces.

    Returns
    -------
    tuple[int, int]
        How many bytes from the start are done, and the error number that ended it; 0 when all are. `ESRCH` where
        a piece came out short without an error.
    """
    pieces = _Pieces(work, size)
    try:
        # Where a limit allows no further thread, those that run do all of it. Not by Thread.start(), which waits for
        # its thread to begin: one that finds no memory to begin with never does.
        with contextlib.suppress(RuntimeError, MemoryError):
            for _ in range(threads(size) - 1):
                _thread.start_new_thread(pieces.help, ())
        pieces.work(progress)
    finally:
        # Also on KeyboardInterrupt: nobody may write to the memory once the caller has it back.
        pieces.stop()
    return pieces.failure or (size, 0)


class _Pieces:
    """Pieces of one job, handed out in ascending order, and the lowest place where one failed."""

    def __init__(self, work: Work, size: int) -> None:
        self._work = work
        self._size = size
        self._offsets = iter(range(0, size, PIECE))
        self._done = 0
        self._helping = 0
        self.failure: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self._helped = threading.Condition(self._lock)

    def work(self, progress: Progress | None = None) -> None:
        """Do pieces until there are no more."""
        while (offset := self._next()) is not None:
            self._do(offset)
            if progress:
                progress(self._done)

    def help(self) -> None:
        """As `work`, in another thread; `stop` waits for the piece it is at."""
        while (offset := self._next(helping=1)) is not None:
            try:
                self._do(offset)
            except BaseException:  # no memory: the thread that waits has to know
                with self._lock:
                    self._fail(offset, errno.ENOMEM)
            finally:
                with self._lock:
                    self._helping -= 1
                    self._helped.notify()

    def _do(self, offset: int) -> None:
        length = min(PIECE, self._size - offset)
        done, error = self._work(offset, length)
        with self._lock:
            self._done += done
            if done < length:
                self._fail(offset + done, error or errno.ESRCH)

    def _fail(self, offset: int, error: int) -> None:
        # Pieces below this one are all handed out and will be finished, so the lowest wins.
        failure = offset, error
        self.failure = min(self.failure or failure, failure)

    def _next(self, helping: int = 0) -> int | None:
        with self._lock:
            offset = None if self.failure else next(self._offsets, None)
            self._helping += helping * (offset is not None)
            return offset

    def stop(self) -> None:
        """Hand out no more, and wait for the pieces that helpers are at, however often Ctrl-C is pressed."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                with self._lock:
                    self._offsets = iter(range(0))
                    while self._helping:
                        self._helped.wait()
                break
            except KeyboardInterrupt as error:
                interrupt = error
        if interrupt:
            raise interrupt
