"""Offsets and lengths of integer types whose sums wrap around: bytes and limits are those of Python's integers."""

from collections.abc import Callable

import pytest
from support import kernel
from support.errors import code_of

import iobmd
from iobmd import (
    IODMACommand,
    IOInterleavedMemoryDescriptor,
    IOMapOptions,
    IOMemoryDescriptor,
    IOReturn,
    IOSubMemoryDescriptor,
    kernel_task,
    kIOMemoryIncoherentIOStore,
)

PAGE = kernel.PAGE
INOUT = iobmd.kIODirectionInOut
UNIQUE = IOMapOptions.kIOMapAnywhere | IOMapOptions.kIOMapUnique
DATA = bytes(index % 251 for index in range(2 * PAGE))
pytestmark = pytest.mark.usefixtures("nothing_left")


class Narrow(int):
    """An integer of 8 bits whose sums wrap around, like NumPy's."""

    def __add__(self, other: int) -> "Narrow":
        return Narrow(int(self) + other & 0xFF)

    __radd__ = __add__

    def __sub__(self, other: int) -> "Narrow":
        return Narrow(int(self) - other & 0xFF)

    def __rsub__(self, other: int) -> "Narrow":
        return Narrow(other - int(self) & 0xFF)


AT, SIZE = Narrow(200), Narrow(100)


def sub(buffer: IOMemoryDescriptor) -> IOMemoryDescriptor:
    return IOSubMemoryDescriptor.withSubRange(buffer, AT, SIZE, INOUT)


def interleaved(buffer: IOMemoryDescriptor) -> IOMemoryDescriptor:
    made = IOInterleavedMemoryDescriptor.withCapacity(1, INOUT)
    made.setMemoryDescriptor(buffer, AT, SIZE)
    return made


def test_sizes() -> None:
    for made in (
        iobmd.allocate(Narrow(250), secret=True, alignment=Narrow(128)),
        iobmd.IOBufferMemoryDescriptor.inTaskWithGuardPages(kernel_task, INOUT, Narrow(250)),
        iobmd.allocate(Narrow(250), wired=False, purgeable=True),
    ):
        with made:
            assert len(made) == made.getCapacity() >= 250
            made.writeBytes(Narrow(0), b"#" * 250)
            assert made.readBytes(Narrow(200), Narrow(50)) == b"#" * 50


@pytest.mark.parametrize("make", [sub, interleaved])
def test_parts(make: Callable[[IOMemoryDescriptor], IOMemoryDescriptor]) -> None:
    with iobmd.allocate(2 * PAGE) as buffer:
        buffer.writeBytes(0, DATA)
        with make(buffer) as part:
            assert part.readBytes(Narrow(0), SIZE) == DATA[200:300]
            part.writeBytes(Narrow(60), b"#" * 40)
        assert bytes(buffer) == DATA[:260] + b"#" * 40 + DATA[300:]


def test_maps() -> None:
    with iobmd.allocate(2 * PAGE, shared=True) as buffer:
        buffer.writeBytes(0, DATA)
        with buffer.createMappingInTask(kernel_task, Narrow(0), UNIQUE, AT, SIZE) as mapped:
            assert bytes(mapped) == DATA[200:300]
            assert mapped.read8(Narrow(99)) == DATA[299]
            mapped.redirect(buffer, 0, Narrow(200))
            mapped.write8(Narrow(98), Narrow(7))
        assert buffer.readBytes(298, 1) == b"\x07"
        assert buffer.getBytesNoCopy(AT, SIZE) == buffer.getBytesNoCopy() + 200


def test_ranges_past_the_end() -> None:
    with iobmd.allocate(2 * PAGE, shared=True) as buffer:
        buffer.writeBytes(0, DATA)
        buffer.setLength(210)
        for use in (
            lambda: buffer.readBytes(AT, SIZE),
            lambda: buffer.writeBytes(AT, bytes(100)),
            lambda: buffer.readBytesInto(AT, bytearray(100)),
            lambda: buffer.segments(AT, SIZE),
            lambda: buffer.performOperation(kIOMemoryIncoherentIOStore, AT, SIZE),
            lambda: sub(buffer),
            lambda: interleaved(buffer),
            lambda: buffer.createMappingInTask(kernel_task, 0, UNIQUE, AT, SIZE),
            lambda: command(buffer),
        ):
            assert code_of(use) == IOReturn.kIOReturnBadArgument
        buffer.setLength(2 * PAGE)
        assert bytes(buffer) == DATA


def command(buffer: IOMemoryDescriptor) -> IODMACommand:
    """Prepare a range whose first byte the device cannot address: all of it is bounced."""
    made = IODMACommand.withSpecification(Narrow(64), alignment=512)
    made.setMemoryDescriptor(buffer, autoPrepare=False)
    made.prepare(AT, SIZE)
    return made


@pytest.mark.needs("frames")
def test_transfers() -> None:
    with iobmd.allocate(2 * PAGE) as buffer:
        buffer.writeBytes(0, DATA)
        with command(buffer) as made:
            assert made.readBytes(Narrow(0), SIZE) == DATA[200:300]
            made.writeBytes(Narrow(60), b"#" * 40)
            (segment,) = made.genIOVMSegments(Narrow(0), Narrow(9))
            assert segment.length == 100
        assert bytes(buffer) == DATA[:260] + b"#" * 40 + DATA[300:]
        (segment,) = buffer.segments(AT, SIZE)
        assert tuple(segment) == (buffer.getPhysicalAddress() + 200, 100)
        cursor = iobmd.IOMemoryCursor.withSpecification(Narrow(128))
        assert cursor.getPhysicalSegments(buffer, AT, Narrow(9), SIZE) == [segment]
