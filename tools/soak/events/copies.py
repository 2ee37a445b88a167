"""Copies of other tasks' memory: the bytes are correct, and the tasks are not disturbed."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import iobmd
from iobmd import IOBufferMemoryDescriptor, Task, kernel_task

from .. import kernel
from ..board import MOMENT, PATTERN, SCRATCH_SLICE, SPARSE, Target
from ..context import Found

if TYPE_CHECKING:
    from ..context import Context

_PAGEABLE = int(iobmd.kIOMemoryPageable)


def _part(context: Context, largest: int = PATTERN) -> tuple[int, int]:
    size = min(largest, 1 << context.chance.randrange(21))
    return context.chance.randrange(PATTERN - size + 1), size


def _memory(context: Context) -> Target:
    return context.chance.choice((Target.PRIVATE, Target.SHARED))


def read(context: Context) -> None:
    """Read a target's memory."""
    with context.target() as peer:
        offset, size = _part(context, 64 << 10)
        data = Task(peer.pid).read(peer[_memory(context)] + offset, size)
        context.check_bytes(data, peer.expected[offset : offset + size], "Task.read")


def readinto(context: Context) -> None:
    """Read a target's memory into an array."""
    with context.target() as peer:
        offset, size = _part(context)
        data = bytearray(size)
        Task(peer.pid).readinto(peer[_memory(context)] + offset, data)
        context.check_bytes(bytes(data), peer.expected[offset : offset + size], "Task.readinto")


def write(context: Context) -> None:
    """Write to the part of a target's memory that belongs to this thread."""
    with context.target() as peer:
        size = 1 << context.chance.randrange(13)
        address = peer.scratch + context.chance.randrange(SCRATCH_SLICE - size + 1)
        content = context.chance.randbytes(size)
        Task(peer.pid).write(address, content)
        seen = kernel.read_memory(peer.pid, address, size)
        if not peer.was_killed:
            context.check_bytes(seen, content, "Task.write")


def copy(context: Context) -> None:
    """Copy a target's memory into a new buffer of some kind."""
    with context.target() as peer:
        offset, size = _part(context)
        address = peer[_memory(context)] + offset
        wired, shared = context.chance.random() < 0.5, context.chance.random() < 0.3
        if context.chance.random() < 0.5:
            buffer = iobmd.copy(peer.pid, address, size, wired=wired, shared=shared)
        else:
            options = 3 | (0 if wired else _PAGEABLE)
            buffer = IOBufferMemoryDescriptor.withCopy(kernel_task, options, Task(peer.pid), address, size)
        with buffer:
            context.check_bytes(buffer.readBytes(0, size), peer.expected[offset : offset + size], "a copy")


def freeze(context: Context) -> None:
    """Copy a target's memory as of one moment."""
    with context.target() as peer:
        offset, size = _part(context)
        with iobmd.copy(peer.pid, peer[_memory(context)] + offset, size, freeze=True, wired=False) as buffer:
            context.check_bytes(buffer.readBytes(0, size), peer.expected[offset : offset + size], "a frozen copy")


def lazy(context: Context) -> None:
    """Copy memory of this process lazily, change it, and check a part of the copy or all of it."""
    size = context.chance.randrange(1, 8 << 20)
    content = context.chance.randbytes(64 << 10) * (size // (64 << 10) + 1)
    with iobmd.allocate(size, wired=False) as source:
        source.writeBytes(0, content[:size])
        with iobmd.copy(kernel_task, source.getBytesNoCopy(), size, wired=False, lazy=True) as buffer:
            source.writeBytes(0, bytes(size))
            if context.chance.random() < 0.5:
                buffer.fetch()
            offset = context.chance.randrange(size)
            with memoryview(buffer) as view:
                data = bytes(view[offset:])
            context.check_bytes(data, content[offset:size], "a lazy copy")


def moment(context: Context) -> None:
    """Copy pages to which a target writes consecutive numbers, and check that all numbers are of one moment."""
    with (
        context.target(Target.MOMENT) as peer,
        iobmd.copy(peer.pid, peer[Target.MOMENT], MOMENT, freeze=True, wired=False) as buffer,
    ):
        data = buffer.readBytes(0, MOMENT)
    numbers = [struct.unpack_from("=Q", data, page)[0] for page in range(0, MOMENT, kernel.PAGE)]
    if numbers != sorted(numbers, reverse=True) or numbers[0] - numbers[-1] > 1:
        raise Found("wrong_bytes", f"a frozen copy is not of one moment: {numbers}")


def sparse(context: Context) -> None:
    """Read shared memory that its owner never touched: zeros. Inspections check that nothing is allocated."""
    with context.target() as peer:
        size = 1 << context.chance.randrange(12, 19)
        offset = context.chance.randrange(SPARSE - size)
        address = peer[Target.SPARSE] + offset
        if context.chance.random() < 0.5:
            data = Task(peer.pid).read(address, size)
        else:
            with iobmd.copy(peer.pid, address, size, wired=False) as buffer:
                data = buffer.readBytes(0, size)
        context.check_bytes(data, bytes(size), "memory that was never touched")


def faulting(context: Context) -> None:
    """Copy memory whose page faults the target serves itself, with and without stopping the target."""
    with context.target(Target.FAULTING) as peer:
        offset, size = _part(context, 64 << 10)
        frozen = context.chance.random() < 0.3
        with iobmd.copy(peer.pid, peer[Target.FAULTING] + offset, size, freeze=frozen, wired=False) as buffer:
            context.check_bytes(buffer.readBytes(0, size), peer.expected[offset : offset + size], "faulting memory")
