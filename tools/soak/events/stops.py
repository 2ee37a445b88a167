"""Memory allocated and pinned in targets, which are stopped briefly, and in which nothing remains afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import iobmd
from iobmd import IOMemoryDescriptor, Task, Wiring, kIODirectionInOut

from .. import kernel
from ..board import SCRATCH_SLICE
from ..context import Found, insist

if TYPE_CHECKING:
    from ..context import Context, Peer


def _check_frames(context: Context, descriptor: IOMemoryDescriptor, peer: Peer, address: int, size: int) -> None:
    if not context.shared.shows_frames or context.profile.nobody:
        return
    try:
        pagemap = kernel.Pagemap(peer.pid)
    except OSError:  # no descriptor is free, or the target was killed
        return
    try:
        expected = [frame * kernel.PAGE for frame in pagemap.frames(address, size)]
    finally:
        pagemap.close()
    reported = [page for start, length in descriptor.segments() for page in range(start, start + length, kernel.PAGE)]
    if reported != expected and not peer.was_killed:
        raise Found(
            "wrong_addresses",
            f"in a target: pages {list(map(hex, expected))}, iobmd reports {list(map(hex, reported))}",
        )


def allocate(context: Context) -> None:
    """Allocate memory in a target, use it from both sides, and free it."""
    size = context.chance.choice((1, 4)) * kernel.PAGE
    with context.target() as peer:
        task = Task(peer.pid)
        buffer = iobmd.allocate(size, task=task, wired=context.chance.random() < 0.5)
        with insist(buffer.free):
            address = buffer.getBytesNoCopy()
            context.check_bytes(task.read(address, size), bytes(size), "new memory in a target")
            content = context.chance.randbytes(size)
            buffer.writeBytes(0, content)
            seen = kernel.read_memory(peer.pid, address, size)
            if not peer.was_killed:
                context.check_bytes(seen, content, "memory in a target")
            if buffer.wiring is Wiring.PINNED:
                _check_frames(context, buffer, peer, address, size)


def pin(context: Context) -> None:
    """Pin a target's own memory."""
    with context.target() as peer:
        address = -(-peer.scratch // kernel.PAGE) * kernel.PAGE
        size = kernel.PAGE if address != peer.scratch else SCRATCH_SLICE
        with IOMemoryDescriptor.withAddressRange(address, size, kIODirectionInOut, peer.pid) as descriptor:
            descriptor.prepare()
            with insist(descriptor.complete):
                _check_frames(context, descriptor, peer, address, size)
