"""Memory regions of iobmd's memory on an RDMA device: what the kernel pins, and what transfers read and write.

Both ends of these transfers are in one guest.
"""

import gc
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import rxe
from support.child import CAP_IPC_LOCK, in_child, sleeping
from support.errors import code_of, refusal
from support.examples import EXAMPLES
from support.kernel import status

import iobmd
from iobmd import IOOptionBits, IOReturn, rdma
from iobmd.units import PAGE_SIZE

sys.path.insert(0, str(EXAMPLES))

pytestmark = [pytest.mark.needs("rdma"), pytest.mark.usefixtures("rdma_device")]
KIB, MIB = 1 << 10, 1 << 20
READ, WRITE, ATOMIC, LOCAL_WRITE = 4, 2, 8, 1  # IBV_ACCESS_REMOTE_READ, …
ALL = READ | WRITE | ATOMIC | LOCAL_WRITE
SHARED = int(IOOptionBits.kIOMemoryKernelUserShared | IOOptionBits.kIODirectionInOut)


@pytest.fixture
def pairs() -> Iterator[tuple]:
    """Two queue pairs that are connected to each other; the second permits accesses."""
    from far.queue_pair import QueuePair

    with QueuePair(rxe.DEVICE) as one, QueuePair(rxe.DEVICE, access=ALL) as other:
        one.connect(other.here)
        other.connect(one.here)
        yield one, other


@pytest.fixture
def domain(pairs):
    """A protection domain."""
    return pairs[1].domain


def write(pair, region, address: int, key: int) -> None:
    import pyverbs.enums as verbs

    pair.transfer(verbs.IBV_WR_RDMA_WRITE, region, address, key)


def existing(stack: ExitStack) -> iobmd.IOMemoryDescriptor:
    import ctypes

    memory = stack.enter_context(mmap.mmap(-1, 64 * KIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return iobmd.IOMemoryDescriptor.withAddressRange(address + 100, 50_001, 3, iobmd.current_task())


def in_another_task(stack: ExitStack) -> iobmd.IOMemoryDescriptor:
    target = stack.enter_context(sleeping())
    return iobmd.allocate(64 * KIB, task=target.pid, shared=True)


def concatenation(stack: ExitStack) -> iobmd.IOMemoryDescriptor:
    parts = [stack.enter_context(iobmd.allocate(64 * KIB, shared=True)) for _ in range(3)]
    return iobmd.IOMultiMemoryDescriptor.withDescriptors(parts, 3)


def part(stack: ExitStack) -> iobmd.IOMemoryDescriptor:
    whole = stack.enter_context(iobmd.allocate(64 * KIB))
    return iobmd.IOSubMemoryDescriptor.withSubRange(whole, 1001, 20_011, 3)


KINDS: dict[str, Callable[[ExitStack], iobmd.IOMemoryDescriptor]] = {
    "pinned": lambda _stack: iobmd.allocate(5 * MIB + 11),
    "small": lambda _stack: iobmd.allocate(100),
    "pageable": lambda _stack: iobmd.allocate(300_001, wired=False),
    "contiguous": lambda _stack: iobmd.allocate(4 * MIB, contiguous=True),
    "shared": lambda _stack: iobmd.allocate(300_001, shared=True),
    "in no task": lambda _stack: iobmd.IOBufferMemoryDescriptor.inTaskWithOptions(None, SHARED, 64 * KIB),
    "in another task": in_another_task,
    "part": part,
    "concatenation": concatenation,
    "existing": existing,
}


@pytest.mark.parametrize("kind", KINDS)
def test_transfers(kind: str, pairs, record_property) -> None:
    """Data that RDMA writes is what other means read, and the reverse."""
    one, other = pairs
    with ExitStack() as stack:
        target = stack.enter_context(KINDS[kind](stack))
        size = target.getLength()
        source = stack.enter_context(iobmd.allocate(size))
        here = stack.enter_context(rdma.register(source, one.domain, LOCAL_WRITE))
        there = stack.enter_context(rdma.register(target, other.domain, ALL))
        source.writeBytes(0, sent := os.urandom(size))
        write(one, here, there.address, there.rkey)
        assert target.readBytes(0, size) == sent
        target.writeBytes(0, returned := os.urandom(size))
        one.read(here, there.address, there.rkey)
        assert source.readBytes(0, size) == returned
    record_property(f"RDMA, {kind}", "works")


def test_atomics(pairs, record_property) -> None:
    import pyverbs.enums as verbs
    from pyverbs.wr import SGE, SendWR

    one, other = pairs
    with (
        iobmd.allocate(PAGE_SIZE) as result,
        iobmd.allocate(PAGE_SIZE, wired=False) as counters,
        rdma.register(result, one.domain, LOCAL_WRITE) as here,
        rdma.register(counters, other.domain, ALL) as there,
    ):

        def atomic(operation: int, offset: int, operand: int, swap: int = 0) -> int:
            request = SendWR(opcode=operation, num_sge=1, sg=[SGE(here.address, 8, here.lkey)])
            request.set_wr_atomic(there.rkey, there.address + offset, operand, swap)
            one._pair.post_send(request)
            one.wait()
            return int.from_bytes(result.readBytes(0, 8), sys.byteorder)

        counters.writeBytes(8, (41).to_bytes(8, sys.byteorder))
        assert atomic(verbs.IBV_WR_ATOMIC_FETCH_AND_ADD, 8, 1) == 41
        assert atomic(verbs.IBV_WR_ATOMIC_CMP_AND_SWP, 8, 7, swap=1) == 42  # another value: not swapped
        assert atomic(verbs.IBV_WR_ATOMIC_CMP_AND_SWP, 8, 42, swap=99) == 42
        assert counters.readBytes(0, 24) == bytes(8) + (99).to_bytes(8, sys.byteorder) + bytes(8)
    record_property("RDMA, atomics", "works")


# --- lifetime


def test_registered_memory_is_not_freed(domain) -> None:
    with iobmd.allocate(64 * KIB) as buffer, iobmd.allocate(64 * KIB, shared=True) as shared:
        one, two = (rdma.register(buffer, domain, access) for access in (READ, ALL))
        code, message = refusal(buffer.free)
        assert code == IOReturn.kIOReturnBusy
        assert "registered for RDMA (2 memory regions)" in message
        one.close()
        assert "(1 memory region)" in refusal(buffer.free)[1]
        with two:
            pass
        buffer.free()
        both = iobmd.IOMultiMemoryDescriptor.withDescriptors([shared, shared], 3)
        with both, rdma.register(both, domain, READ):
            for used in (both, shared):
                assert "registered for RDMA" in refusal(used.free)[1]
        shared.free()


def test_the_end_of_a_block_reports_a_region_that_is_open(domain) -> None:
    with pytest.raises(iobmd.BusyError, match="registered for RDMA"), iobmd.allocate(64 * KIB) as buffer:
        region = rdma.register(buffer, domain, READ)
    region.close()
    buffer.free()


def test_an_abandoned_buffer_lives_as_long_as_its_region(pairs) -> None:
    """The memory is neither freed nor used by another buffer while transfers reach it."""
    one, other = pairs
    with pytest.raises(ZeroDivisionError), iobmd.allocate(64 * KIB, wired=False) as buffer:
        there = rdma.register(buffer, other.domain, ALL)
        address = buffer.getBytesNoCopy()
        raise ZeroDivisionError
    del buffer
    with ExitStack() as stack:
        others = [stack.enter_context(iobmd.allocate(64 * KIB, wired=False)) for _ in range(16)]
        assert address not in [one.getBytesNoCopy() for one in others]
        source = stack.enter_context(iobmd.allocate(64 * KIB))
        here = stack.enter_context(rdma.register(source, one.domain, LOCAL_WRITE))
        source.writeBytes(0, os.urandom(64 * KIB))
        write(one, here, there.address, there.rkey)
        assert not any(any(one.readBytes(0, 64 * KIB)) for one in others)
    there.close()


def test_regions_end_with_their_domain(pairs) -> None:
    from pyverbs.device import Context
    from pyverbs.pd import PD

    with iobmd.allocate(MIB, wired=False) as buffer, Context(name=rxe.DEVICE) as context:
        before = status("VmPin")
        domain = PD(context)
        region = rdma.register(buffer, domain, READ)
        domain.close()
        assert status("VmPin") == before
        for member in ("address", "length", "lkey", "rkey"):
            assert code_of(lambda member=member: getattr(region, member)) == IOReturn.kIOReturnNotOpen
        assert "closed" in repr(region)
        region.close()
        assert code_of(lambda: rdma.register(buffer, domain, READ)) == IOReturn.kIOReturnNotOpen
        buffer.free()


def test_bytes_outside_of_a_region(domain) -> None:
    """pyverbs would copy them: from behind the memory and the data, and over other memory."""
    with (
        iobmd.allocate(2 * PAGE_SIZE) as buffer,
        iobmd.IOSubMemoryDescriptor.withSubRange(buffer, 0, PAGE_SIZE, iobmd.kIODirectionInOut) as part,
        rdma.register(part, domain, LOCAL_WRITE) as region,
    ):
        region.write("ab", 2, PAGE_SIZE - 2)
        assert region.read(2, PAGE_SIZE - 2) == part.readBytes(PAGE_SIZE - 2, 2) == b"ab"
        for access in (
            lambda: region.write(b"x" * PAGE_SIZE, PAGE_SIZE, 1),
            lambda: region.write(b"x", 1, -1),
            lambda: region.write(b"x", 2),
            lambda: region.read(PAGE_SIZE, 1),
            lambda: region.read(1, -1),
        ):
            assert code_of(access) == IOReturn.kIOReturnBadArgument
        assert buffer.readBytes(PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
    for access in (lambda: region.write(b"x", 1), lambda: region.read(1, 0)):
        assert code_of(access) == IOReturn.kIOReturnNotOpen


@pytest.mark.usefixtures("nothing_left")
def test_collected_regions_end(domain) -> None:
    before = status("VmPin")
    with iobmd.allocate(MIB, wired=False) as buffer:
        rdma.register(buffer, domain, READ)  # not assigned
        circle = [rdma.register(buffer, domain, READ)]
        circle[0].circle = circle
        del circle
        gc.collect()
        assert status("VmPin") == before
        buffer.free()


def test_a_forked_child_does_not_end_the_regions_of_its_parent(pairs) -> None:
    one, other = pairs
    with iobmd.allocate(64 * KIB, wired=False) as buffer, iobmd.allocate(64 * KIB) as target:
        there = [rdma.register(buffer, other.domain, ALL)]
        address, key = there[0].address, there[0].rkey

        def drop() -> IOReturn:
            code = code_of(lambda: there[0].rkey)
            there[0].close()
            there.clear()
            gc.collect()
            buffer.free()
            return code

        assert in_child(drop) == IOReturn.kIOReturnNotOpen
        buffer.writeBytes(0, sent := os.urandom(64 * KIB))
        with rdma.register(target, one.domain, LOCAL_WRITE) as here:
            one.read(here, address, key)
        assert target.readBytes(0, 64 * KIB) == sent
        there[0].close()


# --- limits


def test_pageable_memory_is_pinned_once_by_the_device(domain) -> None:
    with iobmd.allocate(4 * MIB, wired=False) as buffer:
        before = status("VmPin")
        with rdma.register(buffer, domain, READ):
            assert status("VmPin") == before + 4 * MIB
            assert status("VmLck") == 0
        assert status("VmPin") == before


def test_pinned_memory_counts_twice_and_the_error_names_both(record_property) -> None:
    """Of 8 MiB, iobmd's pin of 5 MiB leaves too little for the region; pageable memory fits."""

    def register_both() -> tuple[str, int, int, int]:
        from far.queue_pair import QueuePair

        with QueuePair(rxe.DEVICE) as pair:
            with iobmd.allocate(5 * MIB) as buffer:
                before = status("VmPin")
                message = refusal(lambda: rdma.register(buffer, pair.domain, READ))[1]
                after = status("VmPin")
                buffer.free()
            iobmd.trim()
            with iobmd.allocate(5 * MIB, wired=False) as buffer, rdma.register(buffer, pair.domain, READ):
                return message, before, after, status("VmPin")

    message, before, after, alone = in_child(register_both, memlock=8 * MIB, drop=CAP_IPC_LOCK)
    assert before == after >= 5 * MIB
    assert alone == 5 * MIB
    for part in ("kIOReturnCannotWire", "RLIMIT_MEMLOCK is 8388608 bytes", "iobmd's own pin", "wired=False"):
        assert part in message
    record_property("RDMA, RLIMIT_MEMLOCK", "counts a pinned buffer twice")


def test_kept_memory_makes_room_for_a_region() -> None:
    """Freed pinned memory that is kept for reuse does not count against the limit of a region."""

    def register_after_a_buffer() -> int:
        from far.queue_pair import QueuePair

        with QueuePair(rxe.DEVICE) as pair:
            iobmd.allocate(5 * MIB).free()
            with iobmd.allocate(5 * MIB, wired=False) as buffer, rdma.register(buffer, pair.domain, READ):
                return status("VmPin")

    assert in_child(register_after_a_buffer, memlock=8 * MIB, drop=CAP_IPC_LOCK) == 5 * MIB


# --- refusals


@pytest.mark.needs("rdma_answers")
def test_a_wrong_key_reaches_nothing(pairs) -> None:
    one, other = pairs
    with (
        iobmd.allocate(PAGE_SIZE) as source,
        iobmd.allocate(PAGE_SIZE) as target,
        rdma.register(source, one.domain, LOCAL_WRITE) as here,
        rdma.register(target, other.domain, ALL) as there,
    ):
        source.writeBytes(0, b"\1" * PAGE_SIZE)
        assert code_of(lambda: write(one, here, there.address, there.rkey ^ 1)) == IOReturn.kIOReturnNotPermitted
        assert target.readBytes(0, PAGE_SIZE) == bytes(PAGE_SIZE)


@pytest.mark.needs("rdma_answers")
def test_a_closed_region_is_not_reached(pairs) -> None:
    one, other = pairs
    with (
        iobmd.allocate(PAGE_SIZE) as source,
        iobmd.allocate(PAGE_SIZE) as target,
        rdma.register(source, one.domain, LOCAL_WRITE) as here,
    ):
        there = rdma.register(target, other.domain, ALL)
        address, key = there.address, there.rkey
        there.close()
        source.writeBytes(0, b"\1" * PAGE_SIZE)
        assert code_of(lambda: write(one, here, address, key)) == IOReturn.kIOReturnNotPermitted
        assert target.readBytes(0, PAGE_SIZE) == bytes(PAGE_SIZE)


@pytest.mark.parametrize(
    ("options", "access", "code", "why"),
    [
        ({"wired": False, "purgeable": True}, READ, IOReturn.kIOReturnUnsupported, "purgeable memory"),
        ({}, WRITE, IOReturn.kIOReturnBadArgument, "IBV_ACCESS_LOCAL_WRITE"),
    ],
    ids=["purgeable", "access"],
)
def test_refused(domain, options: dict[str, bool], access: int, code: IOReturn, why: str) -> None:
    with iobmd.allocate(64 * KIB, **options) as buffer:
        assert refusal(lambda: rdma.register(buffer, domain, access))[0] == code
        assert why in refusal(lambda: rdma.register(buffer, domain, access))[1]
        buffer.free()


def test_memory_for_no_device_is_refused(domain) -> None:
    options = int(IOOptionBits.kIOMemoryHostOnly | IOOptionBits.kIODirectionInOut)
    with iobmd.IOBufferMemoryDescriptor.withOptions(options, PAGE_SIZE) as buffer:
        assert code_of(lambda: rdma.register(buffer, domain, READ)) == IOReturn.kIOReturnNotPermitted


def test_memory_of_a_device_is_refused(domain) -> None:
    with iobmd.IODeviceMemory.ofPCI("0000:00:1f.2", 5) as registers:  # the SATA controller of every such machine
        code, message = refusal(lambda: rdma.register(registers, domain, READ))
    assert code == IOReturn.kIOReturnUnsupported
    assert "memory of a device" in message


def test_a_dma_buf_is_refused(domain) -> None:
    if not Path("/dev/dma_heap/system").exists():
        pytest.skip("this kernel has no dma-buf heap")
    with iobmd.dmabuf.allocate(64 * KIB) as memory:
        code, message = refusal(lambda: rdma.register(memory, domain, READ))
    assert code == IOReturn.kIOReturnUnsupported
    assert "DmaBufMR" in message


def test_memory_that_was_unmapped_is_refused(domain) -> None:
    import ctypes

    memory = mmap.mmap(-1, 64 * KIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    descriptor = iobmd.IOMemoryDescriptor.withAddressRange(address, 64 * KIB, 3, iobmd.current_task())
    memory.close()
    assert code_of(lambda: rdma.register(descriptor, domain, READ)) == IOReturn.kIOReturnVMError
    descriptor.free()
