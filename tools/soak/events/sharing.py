"""Memory handed to another descriptor or process by `share` and `attach`: the same pages on both sides."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import iobmd

from .. import kernel
from ..context import Found, Skipped
from .forks import in_child

if TYPE_CHECKING:
    from ..context import Context


def handed_over(context: Context) -> None:
    """Share a buffer over a socket, and attach it at the other end."""
    size = context.chance.choice((100, 4096, 64 << 10))
    content = context.chance.randbytes(size)
    one, other = _sockets()
    with one, other, iobmd.allocate(size, shared=True) as buffer:
        buffer.writeBytes(0, content)
        iobmd.share(buffer, one).close()
        with iobmd.attach(other, wired=False) as attached:
            context.check_bytes(attached.readBytes(0, size), content, "attached memory")
            attached.writeBytes(0, content[::-1])
            context.check_bytes(buffer.readBytes(0, size), content[::-1], "shared memory")
            mine = context.pagemap.frames(buffer.getBytesNoCopy(), size)
            theirs = context.pagemap.frames(attached.getBytesNoCopy(), size)
            if any(a and b and a != b for a, b in zip(mine, theirs, strict=True)):
                raise Found("wrong_addresses", "shared and attached memory have different frames")


def _sockets() -> tuple[socket.socket, socket.socket]:
    try:
        return socket.socketpair()
    except OSError:  # no descriptor is free, which is not a fault of iobmd
        raise Skipped from None


def to_child(context: Context) -> None:
    """Share a buffer with a forked process, which attaches it and writes to it."""
    content = context.chance.randbytes(4096)
    one, other = _sockets()
    with one, other, iobmd.allocate(4096, wired=False, shared=True) as buffer:
        buffer.writeBytes(0, content)
        iobmd.share(buffer, one).close()

        def work() -> bool:
            with iobmd.attach(other, wired=False) as attached:
                same: bool = attached.readBytes(0, 4096) == content
                attached.writeBytes(0, content[::-1])
                return same

        if not in_child(context, work):
            raise Found("wrong_bytes", "a forked process read wrong bytes in shared memory")
        context.check_bytes(
            kernel.read_memory(os.getpid(), buffer.getBytesNoCopy(), 4096), content[::-1], "shared memory"
        )
