"""Events that cause faults deliberately, each once per thread. A run with one of them must report the fault."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import iobmd
from iobmd import IOPurgeable
from iobmd.errors import BadArgumentError

from .. import kernel
from ..context import Skipped

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..context import Context

_planted: set[tuple[int, str]] = set()


def _once(plant: Callable[[Context], None]) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        key = context.number, plant.__name__
        if key in _planted:
            raise Skipped
        _planted.add(key)
        try:
            plant(context)
        except Skipped:  # there is no target yet
            _planted.remove(key)
            raise

    return run


@_once
def moved(context: Context) -> None:
    """Treat memory that is only locked as pinned, and make it move."""
    address = kernel.map_private(4 << 20)
    try:
        kernel.advise(address, 4 << 20, kernel.MADV_NOHUGEPAGE)
        kernel.advise(address, 4 << 20, kernel.MADV_POPULATE_WRITE)
        kernel.lock(address, 4 << 20)
        frames = context.pagemap.frames(address, 4 << 20)
        kernel.advise(address, 4 << 20, kernel.MADV_HUGEPAGE)
        kernel.advise(address, 4 << 20, kernel.MADV_COLLAPSE)
        context.check_frames(address, frames, "memory that is only locked")
    finally:
        kernel.unmap(address, 4 << 20)


@_once
def wrong_bytes(context: Context) -> None:
    """Change a byte without the check's knowledge."""
    with iobmd.allocate(4096) as buffer:
        content = context.chance.randbytes(4096)
        buffer.writeBytes(0, content)
        buffer.writeBytes(100, bytes([content[100] ^ 1]))
        context.check_bytes(buffer.readBytes(0, 4096), content, "a changed byte")


@_once
def wrong_state(context: Context) -> None:
    """Report memory as intact although the kernel has reclaimed a page of it."""
    context.check_state(IOPurgeable.kIOMemoryPurgeableVolatile, bytes(4096), bytes(4096), 1)


@_once
def wrong_code(_context: Context) -> None:
    """Refuse without a reason."""
    raise BadArgumentError("refused without a reason")


@_once
def error(_context: Context) -> None:
    """Raise an exception that does not belong to iobmd."""
    raise ZeroDivisionError


@_once
def descriptor(_context: Context) -> None:
    """Leave a file open."""
    os.open("/dev/null", os.O_RDONLY)


@_once
def mapping(_context: Context) -> None:
    """Leave memory mapped."""
    kernel.map_private(64 << 10)


@_once
def locked(_context: Context) -> None:
    """Leave memory locked."""
    kernel.lock(kernel.map_private(64 << 10), 64 << 10)


@_once
def thread(_context: Context) -> None:
    """Leave a thread."""
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()


@_once
def child(_context: Context) -> None:
    """Leave a child process, which ends with this one."""
    parent = os.getpid()
    if not os.fork():
        kernel.die_with_parent(parent)
        signal.pause()


@_once
def hang(_context: Context) -> None:
    """Never end."""
    threading.Event().wait()


@_once
def crash(_context: Context) -> None:
    """Crash."""
    os.kill(os.getpid(), signal.SIGSEGV)


@_once
def disturb(context: Context) -> None:
    """Stop a target without the supervisor's knowledge."""
    with context.target() as peer:
        os.kill(peer.pid, signal.SIGSTOP)


@_once
def kill(context: Context) -> None:
    """Kill a target without the supervisor's knowledge."""
    with context.target() as peer:
        os.kill(peer.pid, signal.SIGKILL)
