"""Message interrupts (MSI-X) of a device with several vectors: each is waited for, counted and masked separately.

The device is an NVMe controller, whose completion queues each have a vector: each completed command is an interrupt.
Before the next command of a queue, its interrupt is waited for, because a processor may combine two. Numbers are
those of the NVM Express Base Specification 1.4.
"""

import asyncio
import contextlib
import re
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import pci
from support.errors import code_of, refusal
from support.proof import PAGE

import iobmd
from iobmd import IOReturn
from iobmd.iommu import IOMapper

pytestmark = pytest.mark.needs("nvme", "iommu")
CONFIGURATION, STATUS, ADMIN_SIZES, ADMIN_COMMANDS, ADMIN_COMPLETIONS = 0x14, 0x1C, 0x24, 0x28, 0x30
DOORBELLS = 0x1000
ENABLE = 1 | 6 << 16 | 4 << 20  # with commands of 1 << 6 bytes, completions of 1 << 4
CREATE_COMMANDS, CREATE_COMPLETIONS, GET_FEATURES, FLUSH = 0x01, 0x05, 0x0A, 0x00
DEPTH = 16
QUEUES = (0, 1, 2)  # each with the vector of its number; 0: the queue of administrative commands


class Controller:
    """A controller whose queues are one buffer: for each queue a page of commands and one of completions."""

    def __init__(
        self,
        registers: iobmd.IOMemoryMap,
        memory: iobmd.IOMemoryDescriptor,
        address: int,
        administrative: iobmd.IOInterruptEventSource,
    ) -> None:
        self._registers, self._memory, self._administrative = registers, memory, administrative
        self._submitted, self._completed = Counter[int](), Counter[int]()
        self._enable(0)
        registers.write32(ADMIN_SIZES, (DEPTH - 1) * (1 | 1 << 16))
        registers.write64(ADMIN_COMMANDS, address)
        registers.write64(ADMIN_COMPLETIONS, address + PAGE)
        self._enable(ENABLE)
        size, contiguous, interrupts = DEPTH - 1 << 16, 1, 2
        for queue in QUEUES[1:]:
            place = address + 2 * queue * PAGE
            self._ask(CREATE_COMPLETIONS, place + PAGE, size | queue, contiguous | interrupts | queue << 16)
            self._ask(CREATE_COMMANDS, place, size | queue, contiguous | queue << 16)

    def _enable(self, value: int) -> None:
        self._registers.write32(CONFIGURATION, value)
        end = time.monotonic() + 20
        while self._registers.read32(STATUS) & 1 != value & 1:
            assert time.monotonic() < end

    def _ask(self, opcode: int, page: int, *dwords: int) -> None:
        self.submit(0, opcode, page, *dwords)
        assert self._administrative.wait(20) == 1
        assert self.status(0) == 0

    def submit(self, queue: int, opcode: int | None = None, page: int = 0, *dwords: int) -> None:
        """Submit a command; by default one that has no effect."""
        if opcode is None:
            opcode, dwords = (FLUSH, ()) if queue else (GET_FEATURES, (7,))  # the number of queues
        words = (*dwords, *[0] * (6 - len(dwords)))
        command = struct.pack("<BxHI16xQQ6I", opcode, 0, 0, page, 0, *words)
        place = self._submitted[queue] % DEPTH
        self._memory.writeBytes(2 * queue * PAGE + place * 64, command)
        self._submitted[queue] += 1
        self._registers.write32(DOORBELLS + 8 * queue, self._submitted[queue] % DEPTH)

    def status(self, queue: int) -> int:
        """Wait for the completion of a command, and return its status."""
        at = (2 * queue + 1) * PAGE + self._completed[queue] % DEPTH * 16 + 14
        phase = self._completed[queue] // DEPTH % 2 == 0
        end = time.monotonic() + 20
        while (found := int.from_bytes(self._memory.readBytes(at, 2), "little")) & 1 != phase:
            assert time.monotonic() < end
        self._completed[queue] += 1
        self._registers.write32(DOORBELLS + 8 * queue + 4, self._completed[queue] % DEPTH)
        return found >> 1

    def stop(self) -> None:
        self._enable(0)


@pytest.fixture(scope="module")
def name() -> str:
    return pci.bind(pci.find(0x1B36, 0x0010)[0], "vfio-pci")


@pytest.fixture
def vectors(mapper: IOMapper) -> Iterator[list[iobmd.IOInterruptEventSource]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(iobmd.IOInterruptEventSource.ofVFIO(mapper, vector)) for vector in QUEUES]


@pytest.fixture
def controller(mapper: IOMapper, vectors: list[iobmd.IOInterruptEventSource]) -> Iterator[Controller]:
    """The controller, whose queues were created by four commands."""
    pci.switch_on_through(mapper)
    with (
        iobmd.IODeviceMemory.ofVFIO(mapper, 0) as memory,
        memory.map() as registers,
        iobmd.allocate(2 * len(QUEUES) * PAGE) as queues,
        mapper.prepare(queues) as prepared,
    ):
        queues.writeBytes(0, bytes(len(queues)))
        one = Controller(registers, queues, prepared.address, vectors[0])
        yield one
        one.stop()


def handled(name: str) -> Counter[int]:
    """Return how many messages of each vector of a device the processors have handled."""
    row = re.compile(rf"^ *\d+:((?: +\d+)+) .* vfio-msix\[(\d+)\]\({re.escape(name)}\)$", re.MULTILINE)
    return Counter({int(vector): sum(map(int, counts.split())) for counts, vector in row.findall(interrupts())})


def interrupts() -> str:
    return Path("/proc/interrupts").read_text()


def test_each_vector_is_counted_as_the_kernel_counts_it(
    mapper: IOMapper, controller: Controller, vectors: list[iobmd.IOInterruptEventSource], record_property
) -> None:
    assert handled(mapper.name) == Counter({0: 4, 1: 0, 2: 0}), interrupts()
    for queue, times in ((1, 3), (0, 1), (2, 20), (1, 2)):
        for _ in range(times):
            controller.submit(queue)
            assert vectors[queue].wait(20) == 1
            controller.status(queue)
    assert [source.count for source in vectors] == [5, 5, 20]
    assert handled(mapper.name) == Counter({0: 5, 1: 5, 2: 20}), interrupts()
    assert [source.read() for source in vectors] == [0, 0, 0]
    assert [(source.getIntIndex(), source.getAutoDisable()) for source in vectors] == [(n, False) for n in QUEUES]
    record_property("MSI-X interrupts", 30)


def test_vectors_in_an_event_loop(controller: Controller, vectors: list[iobmd.IOInterruptEventSource]) -> None:
    order = [2, 0, 1, 1, 2, 0]

    async def serve() -> list[tuple[int, int]]:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        for vector, source in enumerate(vectors):
            loop.add_reader(source, lambda vector=vector, source=source: arrived.put_nowait((vector, source.read())))
        found = []
        for queue in order:
            controller.submit(queue)
            found.append(await asyncio.wait_for(arrived.get(), 20))
            controller.status(queue)
        for source in vectors:
            loop.remove_reader(source)
        return found

    assert asyncio.run(serve()) == [(queue, 1) for queue in order]


def test_one_vector_is_disabled(controller: Controller, vectors: list[iobmd.IOInterruptEventSource]) -> None:
    """Its commands are completed nevertheless, without an interrupt; the other vectors are not affected."""
    vectors[1].disable()
    for queue in (1, 2):
        controller.submit(queue)
        controller.status(queue)
    assert vectors[2].wait(20) == 1
    assert vectors[1].wait(0.3) == 0
    vectors[1].enable()
    vectors[1].wait(0.3)  # the message that it could not send then
    controller.submit(1)
    assert vectors[1].wait(20) == 1
    controller.status(1)
    assert vectors[2].read() == 0


def test_a_closed_vector_leaves_the_others(
    mapper: IOMapper, controller: Controller, vectors: list[iobmd.IOInterruptEventSource]
) -> None:
    of = iobmd.IOInterruptEventSource.ofVFIO
    assert code_of(lambda: of(mapper, 1)) == IOReturn.kIOReturnBusy
    vectors[1].close()
    assert set(handled(mapper.name)) == {0, 2}
    controller.submit(2)
    assert vectors[2].wait(20) == 1
    with of(mapper, 1) as again:
        controller.submit(1)
        assert again.wait(20) == 1
    for source in vectors:
        source.close()
    assert not handled(mapper.name)
    code, message = refusal(lambda: of(mapper, 4))
    assert (code, "msix 4" in message) == (IOReturn.kIOReturnBadArgument, True)
