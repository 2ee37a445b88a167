"""Devices with few address bits: memory below their limit is found and accessible, or the request is refused."""

import os

import pytest
from support.edu import Devices
from support.kernel import check_given_back, frames, held
from support.proof import Proof

import iobmd
from iobmd import IOReturn, IOReturnError
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
DEVICES_MASK = int(os.environ.get("IOBMD_EDU_MASK", "0xfffffff"), 0)
"""The addresses of the devices: the memory below 4 GiB (tools/vm/machine.py)."""


@pytest.fixture
def low_pages(devices: Devices):
    """Pages within reach of the devices, to copy to and from."""
    with searching(), iobmd.allocate(len(devices.devices) * PAGE_SIZE, physical_mask=DEVICES_MASK) as pages:
        yield pages


def searching():
    """Permit the search to hold all of the memory above."""
    return iobmd.policy(memory_budget=1 << 40, time_budget=300)


@pytest.mark.needs("edu", "narrow_edu")
@pytest.mark.parametrize("mask", sorted({DEVICES_MASK, 0xFFFFFFFF}), ids=hex)
@pytest.mark.parametrize(
    ("size", "keywords"),
    [(PAGE_SIZE, {}), (MIB, {}), (4 * MIB, {"contiguous": True}), (MIB, {"shared": True})],
    ids=str,
)
def test_met_and_reached(devices: Devices, low_pages, record_property, size: int, keywords: dict, mask: int) -> None:
    before = devices.transfers
    with searching(), iobmd.allocate(size, physical_mask=mask, **keywords) as buffer:
        assert not any(frame * PAGE_SIZE & ~mask for frame in frames(buffer.getBytesNoCopy(), size))
        assert Proof(devices, low_pages).holds(buffer) > 0
    record_property("DMA transfers", devices.transfers - before)


@pytest.mark.needs("edu", "narrow_edu")
def test_what_lies_above_is_not_reached(devices: Devices, low_pages, record_property) -> None:
    """The control: such a device truncates the address, and silently reads another frame."""
    before = devices.transfers
    with iobmd.allocate(16 * MIB) as buffer:
        high = [offset for offset in range(0, 16 * MIB, MIB) if buffer.getPhysicalSegment(offset)[0] & ~DEVICES_MASK]
        assert high, "all memory is below the limit"
        for offset in high:
            buffer.writeBytes(offset, os.urandom(4000))
        found = Proof(devices, low_pages).read([(buffer.getPhysicalSegment(offset)[0], 4000) for offset in high])
        assert not any(read == buffer.readBytes(at, 4000) for read, at in zip(found, high, strict=True))
    record_property("DMA transfers", devices.transfers - before)


@pytest.mark.needs("guest", "two_nodes")
@pytest.mark.usefixtures("nothing_left")
def test_refused_where_it_is_out_of_reach() -> None:
    before = held()
    with (
        iobmd.policy(memory_budget=64 * MIB),
        pytest.raises(IOReturnError, match="under the mask 0xfffffff") as caught,
    ):
        iobmd.allocate(MIB, physical_mask=DEVICES_MASK)
    assert caught.value.code == IOReturn.kIOReturnNoResources
    check_given_back(before, 128 * MIB)
