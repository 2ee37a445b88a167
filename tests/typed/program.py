"""A typed program that uses iobmd. `tools/lint` checks it with mypy --strict and pyright.

Each `assert_type` fails if a signature is less precise or different; each `type: ignore` fails if a wrong call is
accepted (both type checkers report unused ones). Tests run it too.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from collections.abc import Callable
from typing import TYPE_CHECKING, assert_type

import iobmd
from iobmd import (
    IOBufferMemoryDescriptor,
    IODMACommand,
    IOMapOptions,
    IOMemoryDescriptor,
    IOMemoryMap,
    IOMultiMemoryDescriptor,
    IOOptionBits,
    IOPurgeable,
    IOReturn,
    IOReturnError,
    IOSubMemoryDescriptor,
    PhysicalSegment,
    PurgeableCache,
    Task,
    Wiring,
)
from iobmd.units import PAGE_SIZE


class OwnBuffer(IOBufferMemoryDescriptor):
    """The factories and `with` return the subclass."""


def buffers() -> None:
    """Allocate, transfer and describe."""
    with iobmd.allocate(PAGE_SIZE, cache="default", direction="out") as buf:
        assert_type(buf, IOBufferMemoryDescriptor)
        assert_type(buf.readBytes(0, 5), bytes)
        assert_type(buf.writeBytes(0, b"hello"), int)
        assert_type(len(buf), int)
        assert_type(memoryview(buf)[0], int)
        assert_type(buf.wiring, Wiring)
        assert_type(buf.getDirection(), IOOptionBits)
        assert_type(buf.cache_mode, tuple[IOMapOptions, IOMapOptions])
        assert_type(buf.getPageCounts(), tuple[int, int])
        assert_type(buf.copyContext(), object)
        if buf.wiring is Wiring.PINNED:
            assert_type(buf.prepare(), IOReturn)
            assert_type(buf.complete(), IOReturn)
    with iobmd.allocate(PAGE_SIZE, wired="try") as optional:
        assert_type(optional.wiring, Wiring)
    with OwnBuffer.withOptions(iobmd.kIODirectionInOut, 100) as own:
        assert_type(own, OwnBuffer)
    with OwnBuffer.withBytes(b"abc", iobmd.kIODirectionOut) as filled:
        assert_type(filled, OwnBuffer)
        with iobmd.copy(iobmd.kernel_task, filled.getBytesNoCopy(), 3, wired=False, unreadable="zero") as copied:
            assert_type(copied, IOBufferMemoryDescriptor)
            assert_type(copied.holes, list[tuple[int, int]])


def family() -> None:
    """Maps, parts, concatenations, purgeable memory."""
    with iobmd.allocate(8192, wired=False, shared=True) as shared:
        with shared.map(iobmd.kIOMapUnique) as mapped:
            assert_type(mapped, IOMemoryMap)
            assert_type(mapped.getMemoryDescriptor(), IOMemoryDescriptor)
            assert_type(mapped.redirect(shared), IOReturn)
        with IOSubMemoryDescriptor.withSubRange(shared, 0, 100, iobmd.kIODirectionIn) as part:
            assert_type(part, IOSubMemoryDescriptor)
            with IOMultiMemoryDescriptor.withDescriptors([shared, part], iobmd.kIODirectionIn) as both:
                assert_type(both, IOMultiMemoryDescriptor)
        with iobmd.share(shared) as handle:
            assert_type(handle, iobmd.Handle)
            with iobmd.attach(handle) as attached:
                assert_type(attached, IOBufferMemoryDescriptor)
    with iobmd.allocate(PAGE_SIZE, wired=False, purgeable=True) as purgeable:
        assert_type(purgeable.setPurgeable(IOPurgeable.kIOMemoryPurgeableVolatile), IOPurgeable)
        with purgeable.nonvolatile() as intact:
            assert_type(intact, bool)
    load: Callable[[str], bytes] = str.encode
    with PurgeableCache(load) as cache, cache["key"] as item:
        assert_type(cache, PurgeableCache[str])
        assert_type(item, iobmd.CacheItem)
        assert_type(item.view, memoryview)


def devices(command: IODMACommand, buf: IOMemoryDescriptor) -> None:
    """DMA commands and mappers; not run, because they need privileges and devices."""
    assert_type(command.setMemoryDescriptor(buf), IOReturn)
    with command as entered:
        assert_type(entered, IODMACommand)
        assert_type(command.genIOVMSegments(), list[PhysicalSegment])
        assert_type(command.clearMemoryDescriptor(), IOReturn)
    assert_type(buf.segments(), list[PhysicalSegment])
    assert_type(buf.getPhysicalSegment(0), tuple[int, int])
    with iobmd.IOMapper("0000:00:03.0") as mapper:
        assert_type(mapper, iobmd.IOMapper)
        assert_type(mapper.prepare(buf).complete(), IOReturn)


def tasks() -> None:
    """Other tasks, errors and the policy."""
    task = iobmd.current_task()
    assert_type(task, Task)
    assert_type(task.read(task.pid, 0), bytes)
    assert_type(task.process.name(), str)
    assert_type(task.process.memory_info().rss, int)
    assert_type(Task(task.process), Task)
    with iobmd.policy(time_budget=1.5, memory_budget=1 << 20):
        pass
    try:
        iobmd.allocate(PAGE_SIZE, alignment=3)
    except iobmd.BadArgumentError as error:
        assert_type(error.code, IOReturn)
        assert_type(error.address, int | None)
        assert isinstance(error, (IOReturnError, ValueError))


if TYPE_CHECKING:
    iobmd.allocate(4096.5)  # type: ignore[arg-type]
    iobmd.allocate("4k")  # type: ignore[arg-type]
    iobmd.allocate(PAGE_SIZE, cache="writeback")  # type: ignore[arg-type]
    iobmd.allocate(PAGE_SIZE, direction="outin")  # type: ignore[arg-type]
    iobmd.allocate(PAGE_SIZE, wired="no")  # type: ignore[arg-type]
    iobmd.allocate(PAGE_SIZE, secret="concealed", protection="w")  # type: ignore[arg-type]
    iobmd.allocate(PAGE_SIZE, task="init")  # type: ignore[arg-type]
    iobmd.copy(1, 0, 1, wird=False)  # type: ignore[call-arg]
    iobmd.copy(1, 0, 1, unreadable="skip")  # type: ignore[arg-type]
    Task("init")  # type: ignore[arg-type]
    iobmd.share(b"bytes")  # type: ignore[arg-type]

if __name__ == "__main__":
    buffers()
    family()
    tasks()
