"""A userfaultfd(2) of another task, which a guest creates there, and whose descriptor the task never has."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from iobmd._native import mman
from iobmd.errors import IOReturnError, NotPermittedError, UnsupportedError
from iobmd.remote import session

if TYPE_CHECKING:
    from iobmd.remote.guest import Guest
    from iobmd.task.task import Task

_USER_MODE_ONLY = 1


def open_in(task: Task) -> int:
    """Return a new userfaultfd of a task; it acts on the task's memory until it is closed.

    With UFFD_USER_MODE_ONLY it requires no privilege; the kernel still resolves its own page faults where it tracks
    pages without a handler.

    Raises
    ------
    IOReturnError
        As `session.with_guest`. `kIOReturnNotPermitted`: a seccomp filter of the task forbids it.
        `kIOReturnUnsupported`: the kernel lacks userfaultfd(2).
    """
    fetched: list[int] = []

    def create(guest: Guest) -> None:
        fetched.append(guest.fetch(guest.call("userfaultfd", os.O_CLOEXEC | _USER_MODE_ONLY)))

    try:
        if task.is_current:
            return mman.open_userfaultfd()
        session.with_guest(task, create)
    except BaseException as error:
        for fd in fetched:
            os.close(fd)
        if isinstance(error, IOReturnError) or not isinstance(error, OSError):
            raise
        message = f"cannot create a userfaultfd(2) in task {task.pid}: {error.strerror}"
        refusal = NotPermittedError if error.errno in (errno.EPERM, errno.EACCES) else UnsupportedError
        raise refusal(message, error.errno or 0) from None
    return fetched[-1]
