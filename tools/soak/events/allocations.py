"""Allocations: new memory is zero, retains what is written to it, and has the addresses that iobmd reports."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import iobmd
from iobmd import IOBufferMemoryDescriptor, Wiring, kernel_task

from .. import kernel
from ..context import Found

if TYPE_CHECKING:
    from ..context import Context

_PAGE = kernel.PAGE
_SMALL = (1, 64, 500, 2048, 4096)
_MIDDLE = (5000, 16 << 10, 64 << 10, 100_000)
_LARGE = 4 << 20
_ZEROS = bytes(_LARGE)


def check_new(context: Context, buffer: IOBufferMemoryDescriptor, size: int) -> bytes:
    """Check that new memory is zero and retains the bytes that are written to it; return these."""
    fresh = buffer.readBytes(0, size)
    if fresh != _ZEROS[:size]:
        context.check_bytes(fresh, bytes(size), "new memory")
    content = context.chance.randbytes(min(size, 64)) * -(-size // 64)
    content = content[:size]
    buffer.writeBytes(0, content)
    context.check_bytes(buffer.readBytes(0, size), content, "the written bytes")
    return content


def check_addresses(context: Context, buffer: iobmd.IOMemoryDescriptor, address: int, size: int) -> tuple[int, ...]:
    """Check that pinned memory is present and has the physical addresses that iobmd reports; return its frames."""
    frames = context.pinned_frames(address, size)
    if not context.shared.shows_frames:
        return frames
    if not all(frames):
        raise Found("frames_moved", f"{frames.count(0)} of {len(frames)} pages of pinned memory are not present")
    if context.profile.nobody:
        return frames
    at = address % _PAGE
    expected = [frame * _PAGE for frame in frames]
    reported: list[int] = []
    for start, length in buffer.segments():
        first = start - (at if not reported else 0)
        reported += range(first, start + length, _PAGE)
    if reported != expected:
        raise Found(
            "wrong_addresses", f"pages {list(map(hex, expected))[:8]}, iobmd reports {list(map(hex, reported))[:8]}"
        )
    return frames


def small(context: Context) -> None:
    """Allocate up to a page of wired memory: the cheapest event."""
    size = context.chance.choice(_SMALL)
    with iobmd.allocate(size) as buffer:
        address = buffer.getBytesNoCopy()
        check_new(context, buffer, size)
        if buffer.wiring is Wiring.PINNED:
            check_addresses(context, buffer, address, size)
        elif context.pagemap.absent(address, size):
            raise Found("frames_moved", "a page of resident memory does not exist")


def pageable(context: Context) -> None:
    """Allocate memory that is not wired; an untouched page is not resident, unless it was used before."""
    size = context.chance.choice(_SMALL + _MIDDLE)
    with iobmd.allocate(size, wired=False) as buffer:
        check_new(context, buffer, size)
        address = buffer.getBytesNoCopy()
        pages = len(context.pagemap.entries(address, size))
        if lost := context.pagemap.absent(address, size):
            raise Found("wrong_bytes", f"{lost} of {pages} pages that were written to do not exist")


def wired(context: Context) -> None:
    """Allocate wired private memory of several pages, and also read it in another way."""
    _checked(context, context.chance.choice(_MIDDLE), shared=False)


def shared(context: Context) -> None:
    """Allocate wired shared memory."""
    _checked(context, context.chance.choice(_SMALL + _MIDDLE), shared=True)


def large(context: Context) -> None:
    """Allocate private memory that is large enough for huge pages."""
    _checked(context, _LARGE, shared=False)


def large_shared(context: Context) -> None:
    """Allocate shared memory that is large enough for huge pages."""
    _checked(context, _LARGE, shared=True)


def _checked(context: Context, size: int, *, shared: bool) -> None:
    with iobmd.allocate(size, shared=shared) as buffer:
        address = buffer.getBytesNoCopy()
        content = check_new(context, buffer, size)
        if buffer.wiring is Wiring.PINNED:
            check_addresses(context, buffer, address, size)
        start = address & -_PAGE
        pages = -(-(address + size - start) // _PAGE)
        if kernel.resident(start, pages * _PAGE) != pages and not shared:
            raise Found("frames_moved", "pages of wired memory are not resident (mincore)")
        if size == _LARGE:
            counters = kernel.smaps(address)  # of a mapping that may contain more memory
            if not min(counters.get("Rss", 0), counters.get("Locked", 0)) >= _LARGE >> 10:
                raise Found("frames_moved", f"smaps of wired memory: {counters}")
        context.check_bytes(kernel.read_memory(os.getpid(), address, size), content, "process_vm_readv")


def contiguous(context: Context) -> None:
    """Allocate physically contiguous memory."""
    size = context.chance.choice((16 << 10, 64 << 10, 256 << 10, 1 << 20))
    with iobmd.allocate(size, contiguous=True) as buffer:
        check_new(context, buffer, size)
        frames = check_addresses(context, buffer, buffer.getBytesNoCopy(), size)
        if context.shared.shows_frames and list(frames) != list(range(frames[0], frames[0] + len(frames))):
            raise Found("wrong_addresses", f"contiguous memory of {size} bytes is not contiguous")


def masked(context: Context) -> None:
    """Allocate memory below a physical address."""
    bits = context.chance.choice((33, 34, 36))
    with iobmd.allocate(context.chance.choice((4096, 64 << 10)), physical_mask=(1 << bits) - 1) as buffer:
        size = len(buffer)
        check_new(context, buffer, size)
        frames = check_addresses(context, buffer, buffer.getBytesNoCopy(), size)
        if max(frames) * _PAGE >> bits:
            raise Found("wrong_addresses", f"memory below {bits} bits has frame {max(frames):#x}")


def guarded(context: Context) -> None:
    """Allocate memory between guard pages, and check that these cannot be read."""
    size = context.chance.choice((1, 3)) * _PAGE
    with IOBufferMemoryDescriptor.inTaskWithGuardPages(kernel_task, 3, size) as buffer:
        address = buffer.getBytesNoCopy()
        check_new(context, buffer, size)
        for outside in (address - 1, address + size):
            if kernel.read_memory(os.getpid(), outside, 1):
                raise Found("wrong_bytes", f"a guard page at {outside:#x} can be read")
