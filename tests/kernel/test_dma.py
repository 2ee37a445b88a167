"""IODMACommand: bounce buffers in each direction, pairs of prepare and complete; errors change nothing."""

import ctypes
import gc
import mmap
import os
from collections.abc import Iterator

import pytest
from support.child import in_child
from support.kernel import frames
from support.scattered import ScatteredDescriptor

import iobmd
from iobmd import (
    IODMACommand,
    IOReturn,
    IOReturnError,
    Wiring,
    kIODirectionIn,
    kIODirectionInOut,
    kIODirectionNone,
    kIODirectionOut,
    kIOMemoryIncoherentIOFlush,
    kIOMemoryIncoherentIOStore,
)
from iobmd.backing.mapped import MappedBacking

PAGE = mmap.PAGESIZE
MIB = 1 << 20
ABOVE = 1 << 48  # of the memory that a command with 48 address bits reaches
PIECES = [(PAGE + 100, 50), (ABOVE - 10, 2 * PAGE), (9 * PAGE, PAGE), (ABOVE + 7 * PAGE - 3, 6)]
DIRECTIONS = [kIODirectionNone, kIODirectionIn, kIODirectionOut, kIODirectionInOut]
pytestmark = [pytest.mark.needs("frames"), pytest.mark.usefixtures("nothing_left")]


@pytest.fixture
def command() -> Iterator[IODMACommand]:
    """A device with 48 address bits: it reaches all memory of this host, but not addresses from `ABOVE` on."""
    with IODMACommand.withSpecification(48) as made:
        yield made


def bounced(memory: ScatteredDescriptor) -> list[bool]:
    """Return for each byte whether it is out of the device's reach."""
    return [address + index >= ABOVE for address, size in memory.pieces for index in range(size)]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_bytes_go_out_and_come_in_as_the_direction_says(command: IODMACommand, direction: int) -> None:
    """The device inverts every byte; memory out of its reach is changed only if the direction permits it."""
    memory = ScatteredDescriptor(PIECES, direction)
    before, beyond = bytes(memory.bytes), bounced(memory)
    out = direction != kIODirectionIn
    command.setMemoryDescriptor(memory)
    seen = command.readBytes(0, len(before))
    assert seen == bytes(byte if out or not far else 0 for byte, far in zip(before, beyond, strict=True))
    command.writeBytes(0, bytes(byte ^ 0xFF for byte in before))
    now = bytes(byte if far else byte ^ 0xFF for byte, far in zip(before, beyond, strict=True))
    assert memory.bytes == now, "memory within reach is used directly, the rest is bounced"
    command.complete()
    inverted = bytes(byte ^ 0xFF for byte in before)
    assert memory.bytes == (now if direction == kIODirectionOut else inverted)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_synchronize_nothing_is_copied(command: IODMACommand, direction: int) -> None:
    memory = ScatteredDescriptor([(ABOVE, 100)], direction)
    before = bytes(memory.bytes)
    command.setMemoryDescriptor(memory, autoPrepare=False)
    command.prepare(synchronize=False)
    assert command.readBytes(0, 100) == bytes(100), "zeros, never the previous contents of that memory"
    command.writeBytes(0, b"d" * 100)
    command.complete(synchronize=False)
    assert memory.bytes == before


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_synchronize_copies_whatever_the_direction(command: IODMACommand, direction: int) -> None:
    memory = ScatteredDescriptor([(ABOVE, 100)], direction)
    command.setMemoryDescriptor(memory)
    memory.bytes[:] = b"m" * 100
    command.synchronize(kIODirectionOut)
    assert command.readBytes(0, 100) == b"m" * 100
    command.writeBytes(10, b"device")
    assert memory.bytes == b"m" * 100
    command.synchronize(kIODirectionIn)
    assert memory.bytes == b"m" * 10 + b"device" + b"m" * 84
    command.synchronize(0)
    command.complete(synchronize=False)


@pytest.mark.parametrize("direction", [3, 4, -1, 1 | 8])
def test_synchronize_in_no_direction(command: IODMACommand, direction: int) -> None:
    command.setMemoryDescriptor(ScatteredDescriptor([(ABOVE, 100)]))
    with pytest.raises(IOReturnError) as caught:
        command.synchronize(direction)
    assert caught.value.code == IOReturn.kIOReturnBadArgument


@pytest.mark.parametrize("by_bit", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_forced_double_buffer(direction: int, by_bit: bool) -> None:
    """The whole range is moved to other pages, as pagemap shows; the device sees the same bytes in any direction."""
    options = int(direction)
    with (
        iobmd.IOBufferMemoryDescriptor.withOptions(options, 3 * PAGE) as memory,
        IODMACommand.withSpecification() as command,
    ):
        memory.writeBytes(0, b"memory" * 2048)
        command.setMemoryDescriptor(memory, autoPrepare=False)
        command.prepare(10, 2 * PAGE)
        own = set(frames(memory.getBytesNoCopy(), 3 * PAGE))
        assert {address // PAGE for address, _ in command.genIOVMSegments()} <= own
        command.writeBytes(2 * PAGE - 7, b"earlier")
        if by_bit:
            command.synchronize(IODMACommand.kForceDoubleBuffer)
        else:
            command.synchronize(0, forceDoubleBuffer=True)
        bounce = command.getIOMemoryDescriptor()
        assert bounce is not memory
        segments = command.genIOVMSegments()
        assert segments[0].address % PAGE == 0
        assert sum(segment.length for segment in segments) == 2 * PAGE
        assert not {address // PAGE for address, _ in segments} & own
        assert {address // PAGE for address, _ in segments} <= set(frames(bounce.getBytesNoCopy(), 2 * PAGE))
        assert command.readBytes(0, 12) == (b"memory" * 4)[10:22]
        assert command.readBytes(2 * PAGE - 7, 7) == b"earlier"
        command.writeBytes(0, b"device")
        assert memory.readBytes(10, 6) == (b"memory" * 4)[10:16]
        command.synchronize(0, forceDoubleBuffer=True)
        assert command.getIOMemoryDescriptor() is bounce
        command.complete()
        comes_in = direction != kIODirectionOut
        assert memory.readBytes(10, 6) == (b"device" if comes_in else (b"memory" * 4)[10:16])
        assert memory.readBytes(2 * PAGE + 3, 7) == b"earlier", "written before the bounce buffer existed"
        assert memory.readBytes(0, 10) == b"memorymemo"
        assert command.getIOMemoryDescriptor() is memory
        with pytest.raises(IOReturnError):
            bounce.getLength()  # it was freed


@pytest.mark.parametrize("bits", [30, 31, 32, 33, 34])
def test_real_memory_out_of_reach(bits: int) -> None:
    """Pages above the mask are replaced by pages below it (pagemap), or the request is refused without changes.

    Where no page of the buffer is above it, the mask is the widest that leaves one out of reach.
    """
    size = 4 * MIB
    with iobmd.allocate(size) as memory, iobmd.policy(memory_budget=512 * MIB, time_budget=2):
        highest = max(frames(memory.getBytesNoCopy(), size)) * PAGE
        bits = min(bits, highest.bit_length() - 1)
        with IODMACommand.withSpecification(bits) as command:
            memory.writeBytes(0, os.urandom(size))
            before = memory.readBytes(0, size)
            try:
                command.setMemoryDescriptor(memory)
            except IOReturnError as error:
                assert error.code == IOReturn.kIOReturnNoResources
                assert command.getMemoryDescriptor() is None
                assert memory.readBytes(0, size) == before
                return
            segments = command.genIOVMSegments()
            assert all(address + length <= 1 << bits for address, length in segments)
            transfer = command._transfer
            assert transfer is not None
            assert transfer.bounce is not None
            there = set(frames(transfer.bounce.getBytesNoCopy(), transfer.bounce.getCapacity()))
            assert max(there) * PAGE < 1 << bits
            here = set(frames(memory.getBytesNoCopy(), size))
            assert {address // PAGE for address, _ in segments} <= there | here
            assert command.readBytes(0, size) == before
            command.writeBytes(0, before[::-1])
            command.complete()
            assert memory.readBytes(0, size) == before[::-1]


@pytest.mark.parametrize("alignment", [512, PAGE, 1 << 16])
def test_a_piece_that_the_device_cannot_start_at(alignment: int) -> None:
    """The whole range is bounced through an aligned buffer; bytes before and after the range remain unchanged."""
    with (
        iobmd.allocate(5 * PAGE) as memory,
        IODMACommand.withSpecification(maxSegmentSize=3 << 16, alignment=alignment) as command,
    ):
        memory.writeBytes(0, b"m" * 5 * PAGE)
        command.setMemoryDescriptor(memory, autoPrepare=False)
        command.prepare(101, 2 * PAGE)
        segments = command.genIOVMSegments()
        assert all(segment.address % alignment == 0 for segment in segments)
        command.writeBytes(0, b"d" * 2 * PAGE)
        command.complete()
        assert memory.readBytes(0, 5 * PAGE) == b"m" * 101 + b"d" * 2 * PAGE + b"m" * (3 * PAGE - 101)


@pytest.mark.parametrize("options", [0, IODMACommand.kNonCoherent])
def test_a_device_that_does_not_see_the_caches(options: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that the device reads are written back first; lines that it wrote are dropped at the end."""
    memory = ScatteredDescriptor([(PAGE, 100), (ABOVE, 50), (3 * PAGE, 7)])
    with IODMACommand.withSpecification(48, mappingOptions=options) as command:
        command.setMemoryDescriptor(memory, autoPrepare=False)
        command.prepare(10, 145)
        pieces = [(10, 90), (150, 5)] if options else []
        assert memory.operations == [(kIOMemoryIncoherentIOStore, *piece) for piece in pieces]
        done: list[tuple[int, int]] = []

        def flush(_bounce: MappedBacking, offset: int, length: int, *, drop: bool) -> None:
            assert drop
            done.append((offset, length))

        monkeypatch.setattr(MappedBacking, "write_back", flush)
        command.complete()
        assert memory.operations[len(pieces) :] == [(kIOMemoryIncoherentIOFlush, *piece) for piece in pieces]
        assert done == ([(0, 50)] if options else [])
        memory.operations.clear()
        command.prepare(flushCache=False)
        command.complete(invalidateCache=False)
        assert not memory.operations


def test_bounce_pages_keep_the_place_in_the_page(command: IODMACommand) -> None:
    command.setMemoryDescriptor(
        ScatteredDescriptor([(ABOVE + 100, 50), (ABOVE + 9 * PAGE - 3, 6), (PAGE, 10), (ABOVE + 512, 512)])
    )
    segments = command.genIOVMSegments()
    assert [at % PAGE for at, _ in segments if at % PAGE] == [100, PAGE - 3, 512]


def test_pairs(command: IODMACommand) -> None:
    """Calls are counted, only the same range can be prepared again, and the last complete() copies back."""
    memory = ScatteredDescriptor([(ABOVE, 100)])
    command.setMemoryDescriptor(memory)
    command.prepare()
    command.prepare(0, 100)
    with pytest.raises(IOReturnError) as caught:
        command.prepare(1)
    assert caught.value.code == IOReturn.kIOReturnNotReady
    command.writeBytes(0, b"device")
    for _ in range(2):
        command.complete()
        assert bytes(memory.bytes[:6]) != b"device"
        assert memory.prepared == 2
    command.complete()
    assert bytes(memory.bytes[:6]) == b"device"
    assert memory.prepared == 1
    with pytest.raises(IOReturnError) as caught:
        command.complete()
    assert caught.value.code == IOReturn.kIOReturnNotReady


def test_not_prepared_is_not_ready(command: IODMACommand) -> None:
    command.setMemoryDescriptor(ScatteredDescriptor([(PAGE, 100)]), autoPrepare=False)
    for use in (
        command.complete,
        command.genIOVMSegments,
        command.getPreparedOffsetAndLength,
        lambda: command.synchronize(kIODirectionIn),
        lambda: command.readBytes(0, 1),
        lambda: command.writeBytes(0, b"1"),
    ):
        with pytest.raises(IOReturnError) as caught:
            use()
        assert caught.value.code == IOReturn.kIOReturnNotReady


def test_no_memory_is_not_ready(command: IODMACommand) -> None:
    with pytest.raises(IOReturnError, match="setMemoryDescriptor") as caught:
        command.prepare()
    assert caught.value.code == IOReturn.kIOReturnNotReady


def test_memory_that_is_not_prepared(command: IODMACommand) -> None:
    """The memory's own prepare() must come first, as in IOKit; the command neither pins nor retains the memory."""
    with iobmd.allocate(PAGE, wired=False) as memory:
        with pytest.raises(IOReturnError, match=r"prepare\(\) first") as caught:
            command.setMemoryDescriptor(memory)
        assert caught.value.code == IOReturn.kIOReturnNotReady
        assert command.getMemoryDescriptor() is None
        assert memory.wiring is Wiring.PAGEABLE
        memory.prepare()
        command.setMemoryDescriptor(memory)
        memory.complete()
        assert memory.wiring is Wiring.PINNED, "the command holds it"
        assert command.genIOVMSegments()[0].address == frames(memory.getBytesNoCopy(), PAGE)[0] * PAGE
        command.complete()
        assert memory.wiring is Wiring.PAGEABLE


def test_active_memory_is_not_released(command: IODMACommand) -> None:
    memory = iobmd.allocate(PAGE)
    command.setMemoryDescriptor(memory)
    with pytest.raises(IOReturnError) as caught:
        memory.free()
    assert caught.value.code == IOReturn.kIOReturnBusy
    with pytest.raises(IOReturnError) as caught:
        command.clearMemoryDescriptor(autoComplete=False)
    assert caught.value.code == IOReturn.kIOReturnNotReady
    with pytest.raises(IOReturnError) as caught:
        command.free()
    assert caught.value.code == IOReturn.kIOReturnBusy
    with iobmd.allocate(PAGE) as other, pytest.raises(IOReturnError) as caught:
        command.setMemoryDescriptor(other)
    assert caught.value.code == IOReturn.kIOReturnBusy
    assert command.getMemoryDescriptor() is memory
    command.clearMemoryDescriptor()
    memory.free()
    command.free()
    command.free()


@pytest.mark.parametrize("wired", [True, False])
def test_only_the_command_completes_what_it_has_prepared(command: IODMACommand, wired: bool) -> None:
    """Otherwise the memory could be freed, and its frames reused, while the device still writes to them."""
    memory = iobmd.allocate(4 * PAGE, wired=wired)
    memory.prepare()
    command.setMemoryDescriptor(memory)
    memory.complete()
    where = frames(memory.getBytesNoCopy(), 4 * PAGE)
    with pytest.raises(IOReturnError, match="DMA commands") as caught:
        memory.complete()
    assert caught.value.code == IOReturn.kIOReturnNotReady
    with pytest.raises(IOReturnError) as caught:
        memory.free()
    assert caught.value.code == IOReturn.kIOReturnBusy
    found = [
        segment.address // PAGE + page
        for segment in command.genIOVMSegments()
        for page in range(segment.length // PAGE)
    ]
    assert found == list(where) == list(frames(memory.getBytesNoCopy(), 4 * PAGE))
    assert memory.wiring is Wiring.PINNED
    command.clearMemoryDescriptor()
    assert memory.wiring is (Wiring.PINNED if wired else Wiring.PAGEABLE)
    memory.free()


def test_a_forked_child_completes_nothing_of_its_parent(command: IODMACommand) -> None:
    """What the parent has prepared does not count for the memory that the descriptor describes in the child."""
    kind = int(iobmd.IOMemoryTypes.kIOMemoryTypeVirtual | kIODirectionInOut)
    with mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE) as first, mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE) as second:
        at = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in (first, second)]
        described = iobmd.IOMemoryDescriptor.withAddressRange(at[0], PAGE, kIODirectionInOut, iobmd.kernel_task)
        described.prepare()

        def child() -> tuple[int, Wiring]:
            described.initWithOptions([(at[1], PAGE)], 1, 0, iobmd.kernel_task, kind)
            described.prepare()
            command.setMemoryDescriptor(described)
            described.complete()
            with pytest.raises(IOReturnError) as caught:
                described.complete()
            return caught.value.code, described.wiring

        assert in_child(child) == (IOReturn.kIOReturnNotReady, Wiring.PINNED)
        described.complete()
        described.free()
        gc.collect()


def test_a_released_buffer_receives_what_the_device_wrote(command: IODMACommand) -> None:
    """Its direction is that of the transfer, whatever happens to the handle: views may still use the memory."""
    memory = iobmd.allocate(2 * PAGE, direction="in")
    with pytest.raises(ZeroDivisionError), memory:
        view = memoryview(memory)
        command.setMemoryDescriptor(memory)
        memory.setDirection(kIODirectionOut)
        command.synchronize(0, forceDoubleBuffer=True)
        command.writeBytes(PAGE, b"device")
        raise ZeroDivisionError
    command.complete()
    assert view[PAGE : PAGE + 6] == b"device"
    view.release()


def test_a_descriptor_that_describes_other_memory(command: IODMACommand) -> None:
    """The descriptor was released while the command was prepared, and initialized again: its new memory is not."""
    with iobmd.allocate(PAGE) as first, iobmd.allocate(PAGE) as second:
        part = iobmd.IOSubMemoryDescriptor.withSubRange(first, 0, PAGE, kIODirectionInOut)
        with pytest.raises(ZeroDivisionError), part:
            command.setMemoryDescriptor(part)
            raise ZeroDivisionError
        part.initSubRange(second, 0, PAGE, kIODirectionInOut)
        for use in (lambda: command.setMemoryDescriptor(part), command.prepare):
            with pytest.raises(IOReturnError, match="other memory") as caught:
                use()
            assert caught.value.code == IOReturn.kIOReturnBusy
        command.complete()
        command.setMemoryDescriptor(part)
        command.writeBytes(0, b"device")
        assert (first.readBytes(0, 6), second.readBytes(0, 6)) == (bytes(6), b"device")
        command.clearMemoryDescriptor()
        part.free()


def test_a_part_completes_what_it_has_prepared() -> None:
    with iobmd.allocate(4 * PAGE, wired=False) as memory:
        with iobmd.IOSubMemoryDescriptor.withSubRange(memory, PAGE, PAGE, iobmd.kIODirectionInOut) as part:
            part.prepare()
            with pytest.raises(IOReturnError) as caught:
                memory.complete()
            assert caught.value.code == IOReturn.kIOReturnNotReady
            assert memory.wiring is Wiring.PINNED
            part.complete()
        assert memory.wiring is Wiring.PAGEABLE


def test_memory_that_was_freed(command: IODMACommand) -> None:
    memory = iobmd.allocate(PAGE)
    command.setMemoryDescriptor(memory, autoPrepare=False)
    memory.free()
    for use in (command.prepare, lambda: IODMACommand.withSpecification().setMemoryDescriptor(memory)):
        with pytest.raises(IOReturnError) as caught:
            use()
        assert caught.value.code == IOReturn.kIOReturnNotOpen


def test_one_command_serves_many_transfers(command: IODMACommand) -> None:
    """A command may be reused; setting the same memory without autoPrepare completes the command."""
    for size in (1, PAGE, 3 * PAGE):
        with iobmd.allocate(size) as memory:
            command.setMemoryDescriptor(memory)
            command.setMemoryDescriptor(memory)
            assert sum(segment.length for segment in command.genIOVMSegments()) == size
            command.setMemoryDescriptor(memory, autoPrepare=False)
            with pytest.raises(IOReturnError):
                command.genIOVMSegments()
            command.setMemoryDescriptor(memory)
            assert command.genIOVMSegments()
            command.complete()
            command.setMemoryDescriptor(None)
            assert command.getMemoryDescriptor() is None


@pytest.mark.parametrize(("offset", "length"), [(-1, 0), (0, 101), (101, 0), (50, 51), (0, -1)])
def test_ranges_past_the_end(command: IODMACommand, offset: int, length: int) -> None:
    memory = ScatteredDescriptor([(PAGE, 100)])
    command.setMemoryDescriptor(memory, autoPrepare=False)
    with pytest.raises(IOReturnError) as caught:
        command.prepare(offset, length)
    assert caught.value.code == IOReturn.kIOReturnBadArgument
    assert memory.prepared == 1
    command.prepare(10, 50)
    for use in (
        lambda: command.readBytes(0, 51),
        lambda: command.writeBytes(50, b"1"),
        lambda: command.readBytes(-1, 1),
    ):
        with pytest.raises(IOReturnError) as caught:
            use()
        assert caught.value.code == IOReturn.kIOReturnBadArgument


def test_more_than_a_transfer_takes() -> None:
    with IODMACommand.withSpecification(maxTransferSize=64) as command:
        command.setMemoryDescriptor(ScatteredDescriptor([(PAGE, 100)]), autoPrepare=False)
        with pytest.raises(IOReturnError) as caught:
            command.prepare()
        assert caught.value.code == IOReturn.kIOReturnNoSpace
        command.prepare(36, 64)


def test_no_low_memory_for_bounce_buffers() -> None:
    """An exhausted pool is refused immediately, and the memory remains prepared as often as before."""
    memory = ScatteredDescriptor([(1 << 24, PAGE)])
    with IODMACommand.withSpecification(24) as command, iobmd.policy(memory_budget=64 * MIB):
        command.setMemoryDescriptor(memory, autoPrepare=False)
        with pytest.raises(IOReturnError, match=r"needs a bounce buffer .* under the mask 0xffffff") as caught:
            command.prepare()
        assert caught.value.code == IOReturn.kIOReturnNoResources
        assert memory.prepared == 1
        memory.pieces = [(PAGE, PAGE)]
        command.prepare()
        with pytest.raises(IOReturnError) as caught:
            command.synchronize(0, forceDoubleBuffer=True)
        assert caught.value.code == IOReturn.kIOReturnNoResources
        assert command.genIOVMSegments() == [iobmd.PhysicalSegment(PAGE, PAGE)]
        assert memory.prepared == 2


class Failing(ScatteredDescriptor):
    """Memory of a task that exits: from then on nothing can be copied."""

    fails = False

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self._copy()
        return super().read_into(offset, buffer)

    def write(self, offset: int, data: memoryview) -> int:
        self._copy()
        return super().write(offset, data)

    def _copy(self) -> None:
        if self.fails:
            raise IOReturnError(IOReturn.kIOReturnNotFound, "the task has exited")


def test_a_copy_that_fails(command: IODMACommand) -> None:
    """A failed start prepares nothing, a failed end still ends the transfer, a failed forced copy has no effect."""
    memory = Failing([(ABOVE, 100)])
    memory.fails = True
    for use in (lambda: command.setMemoryDescriptor(memory),):
        with pytest.raises(ProcessLookupError):
            use()
        assert memory.prepared == 1
        assert command.getMemoryDescriptor() is None
    memory = Failing([(PAGE, 100)])
    command.setMemoryDescriptor(memory)
    segments = command.genIOVMSegments()
    memory.fails = True
    with pytest.raises(ProcessLookupError):
        command.synchronize(0, forceDoubleBuffer=True)
    assert command.genIOVMSegments() == segments
    assert memory.prepared == 2
    memory.fails = False
    command.synchronize(0, forceDoubleBuffer=True)
    memory.fails = True
    with pytest.raises(ProcessLookupError):
        command.complete()
    assert memory.prepared == 1
    with pytest.raises(IOReturnError) as caught:
        command.complete()
    assert caught.value.code == IOReturn.kIOReturnNotReady


def test_memory_that_does_not_know_where_it_lies(command: IODMACommand) -> None:
    memory = ScatteredDescriptor([(PAGE, 100)])
    memory.pieces = [(PAGE, 60)]
    with pytest.raises(IOReturnError) as caught:
        command.setMemoryDescriptor(memory)
    assert caught.value.code == IOReturn.kIOReturnUnderrun
    assert memory.prepared == 1


def test_hidden_addresses() -> None:
    def unprivileged() -> tuple[IOReturn, Wiring]:
        with iobmd.allocate(PAGE) as memory, IODMACommand.withSpecification() as command:
            try:
                command.setMemoryDescriptor(memory)
            except PermissionError as error:
                memory.free()  # no longer prepared
                return error.code
            return None

    assert in_child(unprivileged, uid=65534, memlock=MIB) == IOReturn.kIOReturnNotPrivileged


def test_in_a_forked_child_it_refuses() -> None:
    with iobmd.allocate(PAGE) as memory, IODMACommand.withSpecification() as command:
        command.setMemoryDescriptor(memory)

        def child() -> list[IOReturn]:
            codes = []
            for use in (lambda: command.readBytes(0, 1), lambda: command.synchronize(0, forceDoubleBuffer=True)):
                try:
                    use()
                except IOReturnError as error:
                    codes.append(error.code)
            return codes

        assert in_child(child) == [IOReturn.kIOReturnNotOpen] * 2
        assert command.readBytes(0, 1) == b"\0"


def test_collected_while_prepared() -> None:
    """A command that was never completed warns, and its memory can be freed."""
    memory = iobmd.allocate(PAGE)
    command = IODMACommand.withSpecification()
    command.setMemoryDescriptor(memory)
    command.synchronize(0, forceDoubleBuffer=True)
    with pytest.warns(ResourceWarning, match="never completed"):
        del command
    memory.free()


def test_repr(command: IODMACommand) -> None:
    assert repr(command) == "<IODMACommand for 48 address bits, not prepared>"
    command.setMemoryDescriptor(ScatteredDescriptor([(ABOVE - 1, 3)]))
    assert repr(command) == "<IODMACommand for 48 address bits, prepare count 1, 2 bytes bounced>"


@pytest.mark.parametrize("coherent", [True, False], ids=["coherent", "incoherent"])
def test_a_length_that_is_set_during_a_transfer(coherent: bool) -> None:
    """A driver sets the number of received bytes before complete(): the bytes arrive, also those beyond it."""
    mapping = 0 if coherent else IODMACommand.kNonCoherent
    with iobmd.allocate(3 * PAGE) as buffer, IODMACommand.withSpecification(64, mappingOptions=mapping) as command:
        command.setMemoryDescriptor(buffer)
        command.synchronize(0, forceDoubleBuffer=True)
        command.writeBytes(0, b"received")
        buffer.setLength(8)
        command.writeBytes(PAGE, b"beyond")
        assert command.readBytes(PAGE, 6) == b"beyond"
        command.complete()
        assert buffer.readBytes(0, 8) == b"received"
        buffer.setLength(3 * PAGE)
        assert buffer.readBytes(PAGE, 6) == b"beyond"
