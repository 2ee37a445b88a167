"""Forks while buffers exist: pinned pages remain with the parent, and other memory can be used in the child too."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import time
from typing import TYPE_CHECKING

import iobmd
from iobmd import IOReturn, IOReturnError

from .. import kernel
from ..context import Found, Skipped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..context import Context

_SAME, _DIFFERENT, _FAILED = 0, 3, 4


def in_child(context: Context, work: Callable[[], bool]) -> bool:
    """Call `work` in a forked child and return its result.

    Raises
    ------
    Found
        The child ended in another way, or did not end, because it inherits every lock that another thread held.
    Skipped
        No process could be created.
    """
    with _stack_file() as stack:
        child = _fork(context, work, stack)
        context.count("forks")
        status = _wait(child)
        if os.WIFSIGNALED(status):
            number = signal.Signals(os.WTERMSIG(status))
            if number is signal.SIGKILL and context.profile.squeezed:
                raise Skipped  # the cgroup that is filled ran out of memory
            fault = "hangs" if number is signal.SIGALRM else "crashes"
            trace = os.pread(stack, 4096, 0).decode(errors="replace")
            raise Found(fault, f"a forked child was ended by {number.name}\n{trace}".rstrip())
    code = os.WEXITSTATUS(status)
    if code == _FAILED:
        if context.profile.refusals:
            raise Skipped
        raise Found("unexpected_errors", "a forked child raised an exception: see the worker's log")
    return code == _SAME


@contextlib.contextmanager
def _stack_file() -> Iterator[int]:
    """Yield a file for the stack of a child that hangs."""
    try:
        stack = os.memfd_create("stack")
    except OSError:
        raise Skipped from None
    try:
        yield stack
    finally:
        os.close(stack)


def _fork(context: Context, work: Callable[[], bool], stack: int) -> int:
    """Start a child that does `work`, and return its pid."""
    parent = os.getpid()
    try:
        child = os.fork()
    except OSError:
        raise Skipped from None
    if child:
        return child
    code = _FAILED
    try:
        kernel.die_with_parent(parent)
        patience = max(1, int(context.shared.patience / 2))
        faulthandler.dump_traceback_later(patience * 0.8, file=stack)
        signal.alarm(patience)
        code = _SAME if work() else _DIFFERENT
    except BaseException as error:
        os.write(2, f"forked child: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(code)


def _wait(child: int) -> int:
    """Return the wait status of a child, which exits by itself after a time."""
    pause = 0.0005
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)


def fork(context: Context) -> None:
    """Fork with wired, pageable and shared memory, and write to it on both sides."""
    size = 16 << 10
    with (
        iobmd.allocate(size) as wired,
        iobmd.allocate(size, wired=False) as pageable,
        iobmd.allocate(size, wired=False, shared=True) as shared,
    ):
        content = context.chance.randbytes(size)
        for buffer in (wired, pageable, shared):
            buffer.writeBytes(0, content)
        address = wired.getBytesNoCopy()
        pinned = wired.wiring is iobmd.Wiring.PINNED
        frames = context.pinned_frames(address, size)

        def work() -> bool:
            same = pageable.readBytes(0, size) == content and shared.readBytes(0, size) == content
            pageable.writeBytes(0, bytes(size))
            shared.writeBytes(0, content[::-1])
            try:
                wired.readBytes(0, 1)
            except IOReturnError as error:
                return same and error.code == IOReturn.kIOReturnNotOpen
            return False

        if not in_child(context, work):
            raise Found("wrong_bytes", "a forked child read wrong bytes, or could use wired memory")
        wired.writeBytes(0, content[::-1])
        if pinned:
            context.check_frames(address, frames, "pinned memory after a fork")
        context.check_bytes(pageable.readBytes(0, size), content, "the parent's private memory")
        context.check_bytes(shared.readBytes(0, size), content[::-1], "memory shared with a child")
