"""Heat: which memory of a process is used, by the best method that is available."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from iobmd._native import mman
from iobmd.errors import BadArgumentError, UnsupportedError
from iobmd.pagemap.damon import Damon
from iobmd.pagemap.range import resolve
from iobmd.pagemap.referenced import ReferencedBits
from iobmd.pagemap.sampling import Heat, Method, Sampler, check_interval, every_area, sampled
from iobmd.pagemap.tracker import Tracker

if TYPE_CHECKING:
    from collections.abc import Callable

    from iobmd.pagemap.range import Target, Where
    from iobmd.pagemap.sampling import Chooses


def heat(
    target: Target,
    seconds: float,
    *,
    method: Method | str | None = None,
    intervals: int = 20,
    userfaultfd: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Heat:
    """Sample which memory of a process is used.

    Parameters
    ----------
    target : Task, int, psutil.Process, a buffer or a map of iobmd, or anything with the buffer protocol
        The process, or the buffer.
    seconds : float
        The duration of the sampling.
    method : Method or str, optional
        How use is detected. By default ``accessed``, if the kernel supports it and `userfaultfd` is either not needed
        or passed; otherwise ``referenced``.
    intervals : int
        The number of intervals into which the time is divided; each is at least `sampling.SHORTEST` seconds long.
    userfaultfd : int, optional
        For ``accessed`` and ``written`` in another process: a userfaultfd(2) that was created there and not used. It
        is closed. Such a descriptor can be obtained with pidfd_getfd(2); the command creates one there (`iobmd
        pagemap --heat`).
    progress : callable, optional
        Called after each interval, with the seconds since the beginning.

    Returns
    -------
    Heat
        The samples. If the process exits during the sampling, or Ctrl-C is pressed, those until then.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: the intervals are too short, or `userfaultfd` is needed. `kIOReturnUnsupported`: the
        kernel lacks the method. `kIOReturnBusy`: another program uses DAMON. `kIOReturnNotPrivileged`,
        `kIOReturnNotPermitted`, `kIOReturnNotFound`.

    Notes
    -----
    ``referenced`` clears the referenced bits of the process (proc_pid_clear_refs(5)), by which the kernel selects the
    memory to reclaim. ``accessed`` and ``written`` cost the process a page fault for the first use of a page in each
    interval. Nothing remains if this process is killed.
    """
    where = resolve(target)
    if method is not None and method not in list(Method):
        raise BadArgumentError(f"{method!r} is not one of {', '.join(Method)}")
    chosen = Method(method or best_method(where, userfaultfd))
    sampler = open_sampler(where, chosen, check_interval(seconds, intervals), userfaultfd)
    return sampled(sampler, where, seconds, intervals, progress=progress)


def best_method(where: Where, userfaultfd: int | None = None) -> Method:
    """Return the method that shows most, among those that are available without more privileges."""
    if (where.task.is_current or userfaultfd is not None) and tracks_accesses():
        return Method.ACCESSED
    return Method.REFERENCED


def open_sampler(
    where: Where,
    method: Method,
    interval: float,
    userfaultfd: int | None = None,
    chooses: Chooses = every_area,
) -> Sampler:
    """Return the sampler of a method, for intervals of a number of seconds and certain areas; the rest as `heat`."""
    if method == Method.DAMON:
        return Damon(where, interval, chooses)
    if method == Method.REFERENCED:
        return ReferencedBits(where, chooses)
    if userfaultfd is None:
        if not where.task.is_current:
            message = f"the method {method} requires a userfaultfd(2) of process {where.task.pid}: pass userfaultfd="
            raise BadArgumentError(message)
        try:
            userfaultfd = mman.open_userfaultfd()
        except OSError as error:
            raise UnsupportedError(f"cannot create a userfaultfd(2): {error.strerror}", error.errno or 0) from None
    return Tracker(where, userfaultfd, accesses=method == Method.ACCESSED, chooses=chooses)


def tracks_accesses() -> bool:
    """Return whether the kernel can track reads and writes of pages (UFFD_FEATURE_RWP_ASYNC, Linux 7.3)."""
    with contextlib.suppress(OSError):
        fd = mman.open_userfaultfd()
        try:
            mman.configure_tracker(fd, True)
            return True
        finally:
            os.close(fd)
    return False
