"""Pins: from `prepare` to `complete` no page moves, whatever the kernel does; memory that is only locked moves."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import iobmd
from iobmd import IOMemoryDescriptor, Wiring, kernel_task, kIODirectionInOut

from .. import kernel
from ..context import Found, Held, Skipped, release
from .allocations import check_addresses, check_new

if TYPE_CHECKING:
    from ..context import Context

_HUGE = 2 << 20
_HELD = 6
"""Maximum number of pinned buffers that a thread holds."""


def prepare(context: Context) -> None:
    """Prepare pageable memory, once or several times, and complete it equally often."""
    size = context.chance.choice((1, 4096, 20_000, 64 << 10))
    times = context.chance.choice((1, 1, 2))
    with iobmd.allocate(size, wired=False, shared=context.chance.random() < 0.3) as buffer:
        content = check_new(context, buffer, size)
        done = 0
        try:
            for _ in range(times):
                buffer.prepare()
                done += 1
            frames = check_addresses(context, buffer, buffer.getBytesNoCopy(), size)
            context.check_frames(buffer.getBytesNoCopy(), frames, "prepared memory")
        finally:
            for _ in range(done):
                buffer.complete()
        context.check_bytes(buffer.readBytes(0, size), content, "memory after complete()")


def existing(context: Context) -> None:
    """Prepare memory of this process that iobmd did not allocate."""
    size = context.chance.choice((1, 16)) * kernel.PAGE
    address = kernel.map_private(size)
    try:
        with IOMemoryDescriptor.withAddressRange(address, size, kIODirectionInOut, kernel_task) as descriptor:
            content = context.chance.randbytes(size)
            descriptor.writeBytes(0, content)
            descriptor.prepare()
            try:
                check_addresses(context, descriptor, address, size)
            finally:
                descriptor.complete()
            context.check_bytes(descriptor.readBytes(0, size), content, "existing memory")
    finally:
        kernel.unmap(address, size)


def hold(context: Context) -> None:
    """Begin to hold pinned memory for many events, or release the memory that was held for longest."""
    if len(context.held) >= _HELD:
        held = context.held.popleft()
        _check(context, held)
        release(held)
        return
    if context.chance.random() < 0.3 and not context.profile.is_short_of_memory:
        context.held.append(_hold_existing(context))
        return
    size = context.chance.choice((4096, 64 << 10, 512 << 10))
    with contextlib.ExitStack() as undo:
        buffer = undo.enter_context(iobmd.allocate(size, shared=context.chance.random() < 0.3))
        if buffer.wiring is not Wiring.PINNED:
            raise Skipped
        context.held.append(_held(context, buffer, buffer.getBytesNoCopy(), size, is_existing=False))
        undo.pop_all()


def _hold_existing(context: Context) -> Held:
    """Return prepared small pages, which MADV_COLLAPSE could collapse into a huge page."""
    address = kernel.map_private(2 * _HUGE)
    try:
        kernel.advise(address, 2 * _HUGE, kernel.MADV_NOHUGEPAGE)
        descriptor = IOMemoryDescriptor.withAddressRange(address, 2 * _HUGE, kIODirectionInOut, kernel_task)
        with contextlib.ExitStack() as undo:
            undo.callback(descriptor.free)
            descriptor.prepare()
            undo.callback(descriptor.complete)
            kernel.advise(address, 2 * _HUGE, kernel.MADV_HUGEPAGE)
            held = _held(context, descriptor, address, 2 * _HUGE, is_existing=True)
            undo.pop_all()
    except BaseException:
        kernel.unmap(address, 2 * _HUGE)
        raise
    return held


def _held(context: Context, buffer: IOMemoryDescriptor, address: int, size: int, *, is_existing: bool) -> Held:
    content = context.chance.randbytes(4096)
    buffer.writeBytes(size - 4096, content)
    frames = check_addresses(context, buffer, address, size)
    return Held(buffer, address, size, frames, content, is_existing)


def _check(context: Context, held: Held) -> None:
    context.check_frames(held.address, held.frames, "held memory")
    context.check_bytes(held.buffer.readBytes(held.size - 4096, 4096), held.content, "held memory")
    context.count("pinned_pages_seen", len(held.frames))


def verify(context: Context) -> None:
    """Check that held memory has the same frames and contents as before."""
    if not context.held:
        raise Skipped
    _check(context, context.chance.choice(context.held))


def collapse(context: Context) -> None:
    """Collapse held memory to huge pages (MADV_COLLAPSE): the kernel refuses, or moves nothing."""
    if not context.held:
        raise Skipped
    held = context.chance.choice(context.held)
    start, end = -(-held.address // _HUGE) * _HUGE, (held.address + held.size) & -_HUGE
    if start >= end:
        raise Skipped
    with contextlib.suppress(OSError):  # EAGAIN, EBUSY: it is pinned
        kernel.advise(start, end - start, kernel.MADV_COLLAPSE)
    context.count("collapses")
    _check(context, held)


def control(context: Context) -> None:
    """Check whether memory that is only locked has moved, which shows that the disturbances are effective."""
    size = 2 * _HUGE
    if context.profile.is_short_of_memory:
        raise Skipped
    if context.control is None:
        address = kernel.map_private(size)
        kernel.advise(address, size, kernel.MADV_NOHUGEPAGE)
        try:
            kernel.advise(address, size, kernel.MADV_POPULATE_WRITE)
            kernel.lock(address, size)
        except OSError:
            kernel.unmap(address, size)
            raise Skipped from None
        context.control = address, context.pagemap.frames(address, size)
        return
    address, before = context.control
    after = context.pagemap.frames(address, size)
    if context.pagemap.absent(address, size):  # a page that is being migrated is not absent
        raise Found("frames_moved", "locked memory is not resident")
    context.count("locked_pages_seen", len(after))
    context.count("locked_pages_moved", sum(old != new for old, new in zip(before, after, strict=True)))
    context.control = address, after
    if context.chance.random() < 0.1:
        kernel.advise(address, size, kernel.MADV_HUGEPAGE)
        with contextlib.suppress(OSError):
            kernel.advise(address, size, kernel.MADV_COLLAPSE)
