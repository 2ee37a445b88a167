"""Large work on a range of memory, cut into pieces and run on several threads (the native calls release the GIL)."""

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
    helpers = [threading.Thread(target=pieces.work, name="iobmd-piece") for _ in range(threads(size) - 1)]
    started = []
    try:
        for helper in helpers:
            helper.start()
            started.append(helper)
        pieces.work(progress)
    finally:
        # Also on KeyboardInterrupt: nobody may write to the memory once the caller has it back.
        pieces.stop()
        _join(started)
    return pieces.failure or (size, 0)


class _Pieces:
    """Pieces of one job, handed out in ascending order, and the lowest place where one failed."""

    def __init__(self, work: Work, size: int) -> None:
        self._work = work
        self._size = size
        self._offsets = iter(range(0, size, PIECE))
        self._done = 0
        self.failure: tuple[int, int] | None = None
        self._lock = threading.Lock()

    def work(self, progress: Progress | None = None) -> None:
        while (offset := self._next()) is not None:
            length = min(PIECE, self._size - offset)
            done, error = self._work(offset, length)
            with self._lock:
                self._done += done
                if done < length:
                    # Pieces below this one are all handed out and will be finished, so the lowest wins.
                    failure = (offset + done, error or errno.ESRCH)
                    self.failure = min(self.failure or failure, failure)
            if progress:
                progress(self._done)

    def _next(self) -> int | None:
        with self._lock:
            return None if self.failure else next(self._offsets, None)

    def stop(self) -> None:
        with self._lock:
            self._offsets = iter(range(0))


def _join(started: list[threading.Thread]) -> None:
    """Wait for every thread, however often Ctrl-C is pressed meanwhile."""
    interrupt: KeyboardInterrupt | None = None
    for helper in started:
        while helper.is_alive():
            try:
                helper.join()
            except KeyboardInterrupt as error:
                interrupt = error
    if interrupt:
        raise interrupt
