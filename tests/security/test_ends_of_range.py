"""Numbers at the ends of their range: each entry point works or raises an error of iobmd, never another one."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import iobmd
from iobmd import IOBufferMemoryDescriptor, IODMACommand, IOMemoryDescriptor, IOReturnError, IOSubMemoryDescriptor
from iobmd.units import PAGE_SIZE

TOP = 1 << 63
SIZES = [
    0,
    -1,
    (1 << 62) + 1,
    TOP - PAGE_SIZE,
    TOP - 1,
    TOP,
    2 * TOP - PAGE_SIZE,
    2 * TOP - 1,
    2 * TOP,
    1 << 70,
    -TOP,
    -(1 << 70),
]
OFFSETS = [0, 1, *SIZES[1:]]
SIZE = 1 << 16


@pytest.fixture
def memory() -> Iterator[IOBufferMemoryDescriptor]:
    with iobmd.allocate(SIZE, wired=False, shared=True) as buffer:
        yield buffer


def refused_or_done(call: Callable[..., Any], *arguments: object, **keywords: object) -> None:
    try:
        result = call(*arguments, **keywords)
    except IOReturnError as error:
        assert "too large to convert" not in str(error), arguments
    except (OverflowError, ValueError) as error:
        pytest.fail(f"{type(error).__name__}: {error} for {arguments}, {keywords}")
    else:
        for end in ("unmap", "free"):
            getattr(result, end, lambda: None)()


@pytest.mark.parametrize("size", SIZES, ids=hex)
def test_sizes_of_new_memory(size: int) -> None:
    Buffer, task = IOBufferMemoryDescriptor, iobmd.kernel_task  # noqa: N806 (a class)
    for wired in (False, True):
        refused_or_done(iobmd.allocate, size, wired=wired)
        refused_or_done(iobmd.allocate, PAGE_SIZE, alignment=size, wired=wired)
    for where, purgeable in itertools.product((task, None), (False, True)):
        refused_or_done(iobmd.allocate, size, wired=False, shared=True, purgeable=purgeable, task=where)
    refused_or_done(Buffer.withCapacity, size, 3)
    refused_or_done(Buffer.withOptions, 3, PAGE_SIZE, size)
    refused_or_done(Buffer.inTaskWithGuardPages, task, 3, size)
    refused_or_done(Buffer.inTaskWithPhysicalMask, task, 3, PAGE_SIZE, min(size, 0))


@pytest.mark.parametrize("offset", OFFSETS, ids=hex)
def test_ranges_of_a_task(offset: int, memory: IOBufferMemoryDescriptor) -> None:
    task, real = iobmd.current_task(), memory.getBytesNoCopy()
    refused_or_done(task.readinto, offset, bytearray(8))
    refused_or_done(task.write, offset, b"12345678")
    for size, address in itertools.product(SIZES, (offset, real)):
        refused_or_done(task.read, address, size)
        refused_or_done(iobmd.copy, task, address, size)
        refused_or_done(IOBufferMemoryDescriptor.withCopy, task, 3, task, address, size)
        refused_or_done(IOMemoryDescriptor.withAddressRange, address, size, 3, task)
        refused_or_done(IOMemoryDescriptor.withAddressRanges, [(real, 8), (address, size)], 3, task)


@pytest.mark.parametrize("offset", OFFSETS, ids=hex)
@pytest.mark.parametrize("task", [iobmd.kernel_task, None], ids=["here", "nowhere"])
def test_ranges_of_memory(offset: int, task: iobmd.Task | None) -> None:
    with iobmd.allocate(SIZE, wired=False, shared=True, task=task) as memory:
        refused_or_done(memory.writeBytes, offset, b"x")
        refused_or_done(memory.readBytesInto, offset, bytearray(8))
        for size in SIZES:
            refused_or_done(memory.readBytes, offset, size)
            refused_or_done(memory.performOperation, 1, offset, size)
            refused_or_done(memory.segments, offset, size)
            refused_or_done(IOSubMemoryDescriptor.withSubRange, memory, offset, size, 3)
            refused_or_done(memory.createMappingInTask, iobmd.kernel_task, 0, 1, offset, size)
            refused_or_done(memory.createMappingInTask, iobmd.kernel_task, offset, 0, 0, size)


@pytest.mark.parametrize("number", OFFSETS, ids=hex)
@pytest.mark.needs("frames")
def test_numbers_of_dma_commands(number: int, memory: IOBufferMemoryDescriptor) -> None:
    for which in range(5):
        limits = [64, 0, 0, 0, 1]
        limits[which] = number
        refused_or_done(IODMACommand.withSpecification, *limits)
    memory.prepare()
    try:
        command = IODMACommand.withSpecification(64)
        command.setMemoryDescriptor(memory)
        refused_or_done(command.genIOVMSegments, 0, number)
        refused_or_done(command.genIOVMSegments, number)
        refused_or_done(command.readBytes, number, 4)
        refused_or_done(command.readBytes, 0, number)
        refused_or_done(command.writeBytes, number, b"x")
        command.clearMemoryDescriptor()
    finally:
        memory.complete()
