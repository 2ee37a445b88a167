"""The NVMe driver of docs/examples: a disk is written, read back and compared, and compared again on the host."""

import sys
from collections.abc import Iterator

import pytest
from iobmd.tools.vm import disk
from support import pci
from support.examples import EXAMPLES
from support.kernel import nothing_is_pinned

import iobmd
from iobmd.units import PAGE_SIZE

sys.path.insert(0, str(EXAMPLES))

pytestmark = pytest.mark.needs("nvme")
PIECE = 8 * disk.MIB


def name() -> str:
    return pci.find(0x1B36, 0x0010)[0].name


@pytest.fixture
def controller() -> Iterator[object]:
    from nvme import Controller

    with Controller(name()) as one:
        yield one


def test_identify(controller) -> None:
    assert controller.identity.serial == "iobmd"
    assert controller.identity.model == "QEMU NVMe Ctrl"
    assert controller.identity.blocks * controller.identity.block_size % disk.MIB == 0


def test_all_of_the_disk_is_written_and_read_back(controller, record_property) -> None:
    """Data is written from wired memory and read into prepared pageable memory, which need not be contiguous."""
    size = controller.identity.block_size
    total = controller.identity.blocks * size
    with iobmd.allocate(PIECE, direction="out") as source, iobmd.allocate(PIECE, wired=False) as target:
        for start in range(0, total, PIECE):
            wanted = b"".join(disk.pattern((start + offset) // disk.MIB) for offset in range(0, PIECE, disk.MIB))
            source.writeBytes(0, wanted)
            controller.write(start // size, source)
            controller.flush()
            controller.read(start // size, target)
            assert target.readBytes(0, PIECE) == wanted
            record_property("NVMe MiB written and read", PIECE // disk.MIB)


@pytest.mark.parametrize("size", [PAGE_SIZE, 8192, 12288, 513 * PAGE_SIZE])
def test_transfers_of_every_form_of_entries(controller, size: int) -> None:
    """One page, two pages, a page list, and more than one command."""
    before = [disk.pattern(index)[: 1 << 20] for index in range(3)]
    whole = b"".join(before)
    with iobmd.allocate(size, wired=False) as buffer:
        controller.read(8, buffer)
        assert buffer.readBytes(0, size) == whole[8 * controller.identity.block_size :][:size]


def test_errors_of_the_controller(controller) -> None:
    from nvme.queues import CommandError

    with iobmd.allocate(PAGE_SIZE) as buffer:
        with pytest.raises(ValueError, match="within the disk"):
            controller.read(controller.identity.blocks, buffer)
        with pytest.raises(CommandError, match="status code 0x80"):  # LBA out of range
            controller._io.submit(2, 1, [buffer.getPhysicalAddress()], (controller.identity.blocks, 0, 7))
            controller._io.complete()
        controller.read(0, buffer)
        assert buffer.readBytes(0, PAGE_SIZE) == disk.pattern(0)[:PAGE_SIZE]


@pytest.fixture
def interrupting() -> Iterator[str]:
    """The disk, bound to a driver that passes its interrupts on."""
    folder = pci.find(0x1B36, 0x0010)[0]
    yield pci.bind(folder, "uio_pci_generic")
    pci.unbind(folder)


def test_it_waits_by_interrupts(interrupting: str, record_property) -> None:
    from nvme import Controller

    with Controller(interrupting) as controller, iobmd.allocate(PIECE, wired=False) as buffer:
        source = controller._device.interrupts
        source.enable()
        before = source.count
        controller.read(0, buffer)
        assert buffer.readBytes(0, disk.MIB) == disk.pattern(0)
        source.wait(1)  # a completion that has arrived before the driver waited has caused an interrupt as well
        assert source.count > before
        record_property("NVMe interrupts", source.count)


@pytest.mark.usefixtures("nothing_left")
def test_memory_is_given_back() -> None:
    from nvme import Controller

    for _ in range(2):
        with Controller(name()):
            pass
    assert nothing_is_pinned()
