"""Purgeable memory: the contents are those that the state promises, and only volatile memory is reclaimed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import iobmd
from iobmd import IOPurgeable

from .. import kernel
from ..context import Found

if TYPE_CHECKING:
    from iobmd import IOBufferMemoryDescriptor

    from ..context import Context

_VOLATILE = IOPurgeable.kIOMemoryPurgeableVolatile
_NON_VOLATILE = IOPurgeable.kIOMemoryPurgeableNonVolatile
_EMPTY = IOPurgeable.kIOMemoryPurgeableEmpty


def private(context: Context) -> None:
    """Make private memory volatile, let the kernel reclaim pages of it or not, and make it non-volatile again."""
    pages = context.chance.choice((1, 4, 16, 64))
    size = pages * kernel.PAGE
    with iobmd.allocate(size, wired=False, purgeable=True) as buffer:
        address = buffer.getBytesNoCopy()
        content = context.chance.randbytes(size)
        buffer.writeBytes(0, content)
        for _ in range(context.chance.choice((1, 3))):
            purges = context.shared.purges.ended()
            buffer.setPurgeable(_VOLATILE)
            if taken := context.chance.choice((0, 0, 1, pages)):
                first = context.chance.randrange(pages - taken + 1)
                with contextlib.suppress(OSError):  # EINVAL: iobmd has locked it temporarily
                    kernel.advise(address + first * kernel.PAGE, taken * kernel.PAGE, kernel.MADV_PAGEOUT)
            lost = context.pagemap.absent(address, size)
            old = buffer.setPurgeable(_NON_VOLATILE)
            context.check_state(old, buffer.readBytes(0, size), content, lost)
            context.count("pages_taken", lost)
            if old == _EMPTY and not lost and not _may_be_taken(context, purges):
                raise Found("wrong_purge_states", "Empty was returned, but nothing had been reclaimed")
            _check_kept(context, buffer, content if old == _VOLATILE else bytes(size))
            if old == _EMPTY:
                buffer.writeBytes(0, content)


def _may_be_taken(context: Context, purges: int) -> bool:
    """Return whether the kernel or another thread may have taken memory since `purges` was that of ended purges."""
    return context.profile.squeezed or not context.shared.purges.none_since(purges) or context.host_reclaims()


def _check_kept(context: Context, buffer: IOBufferMemoryDescriptor, content: bytes) -> None:
    context.count("purges_intact" if any(content[:64]) else "purges_empty")
    with contextlib.suppress(OSError):
        kernel.advise(buffer.getBytesNoCopy(), len(buffer), kernel.MADV_PAGEOUT)
    context.check_bytes(buffer.readBytes(0, len(buffer)), content, "non-volatile memory")


def shared(context: Context) -> None:
    """Make shared memory volatile, purge it or not, and make it non-volatile again."""
    size = context.chance.choice((1, 16)) * kernel.PAGE
    with iobmd.allocate(size, wired=False, purgeable=True, shared=True) as buffer:
        content = context.chance.randbytes(size)
        buffer.writeBytes(0, content)
        purges = context.shared.purges.ended()
        buffer.setPurgeable(_VOLATILE)
        if emptied := context.chance.random() < 0.2:
            buffer.setPurgeable(_EMPTY)
        old = buffer.setPurgeable(_NON_VOLATILE)
        context.check_state(old, buffer.readBytes(0, size), content, 1 if emptied else 0)
        if old == _EMPTY and not emptied and not _may_be_taken(context, purges) and not context.host_waits():
            raise Found("wrong_purge_states", "Empty was returned for shared memory that was not purged")
        _check_kept(context, buffer, content if old == _VOLATILE else bytes(size))


def everything(context: Context) -> None:
    """Purge all volatile memory of the process, including that of other threads."""
    with iobmd.allocate(kernel.PAGE, wired=False, purgeable=True) as buffer:
        content = context.chance.randbytes(kernel.PAGE)
        buffer.writeBytes(0, content)
        if context.chance.random() < 0.5:
            buffer.setPurgeable(_VOLATILE)
            with context.shared.purges.one():
                iobmd.purge()
            if buffer.setPurgeable(_NON_VOLATILE) != _EMPTY:
                raise Found("wrong_purge_states", "purge() left volatile memory")
            content = bytes(kernel.PAGE)
        else:
            with context.shared.purges.one():
                iobmd.purge()
        context.check_bytes(buffer.readBytes(0, kernel.PAGE), content, "memory after purge()")
