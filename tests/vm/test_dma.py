"""Physical addresses, proved by devices: they read and write the bytes that the processor sees at virtual ones."""

import ctypes
import mmap
import os

import pytest
from support import contiguous_memory
from support.kernel import frames
from support.proof import PAGE, Proof

import iobmd
from iobmd.cli.demo.compaction import compact

pytestmark = pytest.mark.needs("edu")
MIB = 1 << 20
BELOW_4G = 0xFFFFFFFF


@pytest.mark.usefixtures("moving_memory")
@pytest.mark.parametrize(
    ("size", "keywords"),
    [
        (100, {}),
        (300_000, {}),
        (5 * MIB + 1, {}),
        (64 << 10, {"shared": True}),
        (4 * MIB, {"shared": True}),
        (2 * MIB, {"contiguous": True}),
        (16 * MIB, {"contiguous": True}),
        (32 * MIB, {"contiguous": True}),
        (4 * MIB, {"contiguous": True, "shared": True}),
        (64 << 10, {"alignment": 1 << 20}),
    ],
    ids=str,
)
def test_wired(proof: Proof, size: int, keywords: dict[str, object]) -> None:
    with contiguous_memory.allocated_beside_others(size, **keywords) as buffer:
        pieces = proof.holds(buffer)
        assert pieces >= min(len(buffer.segments()), 2)
        if keywords.get("contiguous"):
            assert len(buffer.segments()) == 1
        buffer.verify()


@pytest.mark.usefixtures("moving_memory")
def test_masked(proof: Proof) -> None:
    with contiguous_memory.allocated_beside_others(MIB, physical_mask=BELOW_4G) as buffer:
        assert all(address + length <= 1 << 32 for address, length in buffer.segments())
        proof.holds(buffer)


@pytest.mark.usefixtures("moving_memory")
@pytest.mark.parametrize("offset", [1, 4095, 12_345])
def test_from_odd_offsets(proof: Proof, offset: int) -> None:
    with iobmd.allocate(128 << 10) as buffer:
        proof.holds(buffer, offset, 70_001)


@pytest.mark.usefixtures("moving_memory")
@pytest.mark.parametrize("shared", [False, True])
def test_pageable_while_prepared(proof: Proof, shared: bool) -> None:
    """The memory is scattered first, so that it has a segment for nearly every page."""
    with iobmd.allocate(256 << 10, wired=False, shared=shared) as buffer:
        fragment(buffer)
        for _ in range(2):
            buffer.prepare()
            try:
                proof.holds(buffer)
                buffer.verify()
            finally:
                buffer.complete()


def fragment(buffer: iobmd.IOBufferMemoryDescriptor) -> None:
    """Touch its pages one by one, with other pages in between that are freed afterwards."""
    with mmap.mmap(-1, len(buffer), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as between:
        for offset in range(0, len(buffer), PAGE):
            between[offset] = 1
            buffer.writeBytes(offset, b"\1")


# --- controls, which must fail


def test_a_neighbouring_frame_does_not_deliver(proof: Proof) -> None:
    """Otherwise the comparison would prove nothing."""
    with iobmd.allocate(2 * MIB, contiguous=True) as buffer:
        buffer.writeBytes(0, os.urandom(2 * MIB))
        begin = buffer.getPhysicalAddress()
        right = [buffer.readBytes(offset, 4000) for offset in range(0, 64 << 10, PAGE)]
        off_by_one = proof.read([(begin + offset + PAGE, 4000) for offset in range(0, 64 << 10, PAGE)])
        assert not any(read == expected for read, expected in zip(off_by_one, right, strict=True))
        assert off_by_one[:-1] == right[1:]


def test_locked_memory_has_moved_after_compaction(proof: Proof) -> None:
    """mlock does not pin: after a compaction, devices find other bytes at old addresses, unlike in pinned memory."""
    size = 16 * MIB
    pages = range(PAGE, 2 * size, 2 * PAGE)
    scattered = []
    with iobmd.allocate(size) as pinned:
        for _ in range(5):  # a compaction may find enough contiguous memory, and do nothing
            scattered.append(area := mmap.mmap(-1, 2 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            area.madvise(mmap.MADV_NOHUGEPAGE)
            address = ctypes.addressof(ctypes.c_char.from_buffer(area))
            lock_every_second_page(area, address)
            before = frames(address, 2 * size)
            compact()
            after = frames(address, 2 * size)
            moved = [offset for offset in pages if before[offset // PAGE] != after[offset // PAGE]][:32]
            if moved:
                break
        assert moved, "nothing moved: the control proves nothing"
        for offset in moved:
            area[offset : offset + PAGE] = os.urandom(PAGE)
        stale = proof.read([(before[offset // PAGE] * PAGE, 4000) for offset in moved])
        there = [area[offset : offset + 4000] for offset in moved]
        assert sum(read != expected for read, expected in zip(stale, there, strict=True)) == len(moved)
        pinned.verify()
        proof.holds(pinned, 0, 64 << 10)


def lock_every_second_page(area: mmap.mmap, address: int) -> None:
    """Lock every second page and free those in between, so that a compaction has holes to fill."""
    libc = ctypes.CDLL(None, use_errno=True)
    for offset in range(0, len(area), PAGE):
        area[offset] = 1
    for offset in range(0, len(area), 2 * PAGE):
        area.madvise(mmap.MADV_DONTNEED, offset, PAGE)
    assert libc.mlock2(ctypes.c_void_p(address), ctypes.c_size_t(len(area)), 1) == 0, ctypes.get_errno()
