"""Small wired buffers share pinned pages: their contents, their physical addresses, forks, threads, and their end."""

import gc
import itertools
import random
import signal
from collections.abc import Callable
from typing import Any

import pytest
from support import kernel
from support.child import CAP_IPC_LOCK, NOBODY, in_child
from support.errors import code_of, error_of
from support.owners_model import check_owners
from support.targets import until
from support.threads import run_all

import iobmd
from iobmd import IOReturn, Wiring
from iobmd.memory import pinning
from iobmd.units import PAGE_SIZE

SIZES = (1, 64, 65, 200, 256, 1000, 2048)
LINE = 64
Buffer = iobmd.IOBufferMemoryDescriptor


@pytest.fixture(autouse=True)
def trimmed() -> None:
    iobmd.trim()


def locked() -> int:
    return kernel.status("VmLck")


def all_freed(buffers: list[Buffer]) -> None:
    for buffer in buffers:
        buffer.free()
    buffers.clear()


@pytest.mark.needs("frames")
def test_physical_addresses_are_those_of_the_kernel() -> None:
    buffers = [iobmd.allocate(size) for size in SIZES * 40]
    for buffer in buffers:
        address = buffer.getBytesNoCopy()
        (frame,) = kernel.frames(address, 1)
        assert list(map(tuple, buffer.segments())) == [(frame * kernel.PAGE + address % kernel.PAGE, len(buffer))]
        assert buffer.getDMAMapLength() == (kernel.PAGE, address % kernel.PAGE)
        buffer.verify()
    all_freed(buffers)


def test_no_cache_line_has_two_owners() -> None:
    buffers = [iobmd.allocate(size) for size in SIZES * 40]
    lines = [
        range(buffer.getBytesNoCopy() // LINE, (buffer.getBytesNoCopy() + len(buffer) - 1) // LINE + 1)
        for buffer in buffers
    ]
    everything = list(itertools.chain.from_iterable(lines))
    assert len(set(everything)) == len(everything)
    pages = {buffer.getBytesNoCopy() // kernel.PAGE for buffer in buffers}
    assert len(pages) < len(buffers) / 2
    all_freed(buffers)


@pytest.mark.parametrize("size", [64, 256, 2048])
def test_many_need_little_more_than_their_bytes(size: int) -> None:
    before = locked()
    buffers = [iobmd.allocate(size) for _ in range(1000)]
    assert locked() - before <= 1.3 * 1000 * size
    for buffer in buffers[::100]:
        assert kernel.smaps(buffer.getBytesNoCopy())["Locked"]
    counted = iobmd.statistics()
    assert counted.resident.buffers + counted.pinned.buffers == 1000
    assert counted.resident.size + counted.pinned.size == 1000 * size
    all_freed(buffers)
    kept = locked() - before
    assert kept <= 64 << 10  # one empty slab
    assert iobmd.statistics().kept == kept
    assert iobmd.trim() == kept
    assert locked() == before


def test_memory_is_cleared_before_its_next_owner_gets_it() -> None:
    for size in SIZES:
        first = [iobmd.allocate(size) for _ in range(100)]
        for buffer in first:
            buffer.writeBytes(0, b"\xff" * size)
        used = {buffer.getBytesNoCopy() for buffer in first}
        all_freed(first)
        second = [iobmd.allocate(size) for _ in range(100)]
        assert used & {buffer.getBytesNoCopy() for buffer in second}
        assert not any(any(buffer.readBytes(0, size)) for buffer in second)
        all_freed(second)


def test_buffers_that_need_separate_pages() -> None:
    """What a shared page cannot offer: alignment, sharing, tags, guard pages, paging."""
    with iobmd.allocate(256) as small:
        page = small.getBytesNoCopy() // kernel.PAGE
    makers: list[Callable[[], Buffer]] = [
        lambda: iobmd.allocate(256, alignment=512),
        lambda: iobmd.allocate(256, shared=True),
        lambda: iobmd.allocate(256, wired=False),
        lambda: iobmd.allocate(2049),
        lambda: Buffer.inTaskWithOptions(iobmd.kernel_task, 3, 256, 1, 7),
        lambda: Buffer.inTaskWithGuardPages(iobmd.kernel_task, 3, 256),
        lambda: Buffer.withCopy(iobmd.kernel_task, 3, iobmd.kernel_task, page * kernel.PAGE, 256),
    ]
    with iobmd.allocate(256) as beside:
        for make in makers:
            with make() as buffer:
                address = buffer.getBytesNoCopy()
                assert address % kernel.PAGE == 0
                assert address != beside.getBytesNoCopy() // kernel.PAGE * kernel.PAGE
    for alignment in (1, 64, 128, 256):
        with iobmd.allocate(256, alignment=alignment) as buffer:
            assert buffer.getBytesNoCopy() % 256 == 0


def test_a_view_keeps_the_memory() -> None:
    with iobmd.allocate(256) as buffer:
        buffer.writeBytes(0, b"kept")
        address, view = buffer.getBytesNoCopy(), memoryview(buffer)
        assert code_of(buffer.free) == IOReturn.kIOReturnBusy
    others = [iobmd.allocate(256) for _ in range(200)]
    assert address not in {other.getBytesNoCopy() for other in others}
    for other in others:
        other.writeBytes(0, b"\xee" * 256)
    assert bytes(view[:4]) == b"kept"
    view.release()
    more = [iobmd.allocate(256) for _ in range(200)]
    assert address in {one.getBytesNoCopy() for one in more}
    all_freed(others + more)


def test_descriptors_of_its_addresses_keep_the_memory() -> None:
    for used_before in (False, True):
        buffer = iobmd.allocate(256)
        address = buffer.getBytesNoCopy()
        if used_before:
            buffer.writeBytes(0, b"x")
        part = iobmd.IOMemoryDescriptor.withAddressRange(address + 8, 100, 3, iobmd.kernel_task)
        buffer.writeBytes(8, b"kept")
        buffer.free()
        others = [iobmd.allocate(256) for _ in range(200)]
        assert address not in {other.getBytesNoCopy() for other in others}
        assert part.readBytes(0, 4) == b"kept"
        part.free()
        more = [iobmd.allocate(256) for _ in range(200)]
        assert address in {one.getBytesNoCopy() for one in more}
        all_freed(others + more)


def test_garbage_is_cleared_and_reused() -> None:
    buffer = iobmd.allocate(256)
    address = buffer.getBytesNoCopy()
    buffer.writeBytes(0, b"\xff" * 256)
    with pytest.warns(ResourceWarning, match="never freed"):
        del buffer
    untouched = iobmd.allocate(256)
    with pytest.warns(ResourceWarning, match="never freed"):
        del untouched
        gc.collect()
    buffers = [iobmd.allocate(256) for _ in range(20)]
    assert address in {one.getBytesNoCopy() for one in buffers}
    assert not any(any(one.readBytes(0, 256)) for one in buffers)
    all_freed(buffers)


@pytest.mark.parametrize("used", [True, False])
def test_a_forked_child_has_none_of_it(used: bool) -> None:
    buffer = iobmd.allocate(256)
    if used:
        buffer.writeBytes(0, b"parent")

    def child() -> tuple[object, int, bool, bool]:
        refused = code_of(lambda: buffer.readBytes(0, 1))
        own = [iobmd.allocate(256) for _ in range(20)]
        for one in own:
            one.writeBytes(0, b"child!")
        first = own[0].getBytesNoCopy() // kernel.PAGE
        wired = own[0].wiring is Wiring.PINNED or own[0].wiring is Wiring.RESIDENT
        fresh = first != buffer_page
        buffer.free()
        all_freed(own)
        return refused, iobmd.statistics().pinned.buffers, wired, fresh

    buffer_page = buffer.getBytesNoCopy() // kernel.PAGE
    assert in_child(child) == (IOReturn.kIOReturnNotOpen, 0, True, True)
    assert buffer.readBytes(0, 6) == (b"parent" if used else bytes(6))
    buffer.free()


def test_allocation_in_a_signal_handler() -> None:
    """A handler runs between any two bytecodes of the allocation that it interrupts."""
    made: list[Buffer] = []
    before = signal.signal(signal.SIGALRM, lambda *_: made.append(iobmd.allocate(100)))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    buffers: list[Buffer] = []
    try:
        for turn in range(20_000):
            buffers.append(iobmd.allocate(100))
            if turn % 3:
                buffers.pop(random.randrange(len(buffers))).free()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert made
    everything = buffers + made
    assert len({buffer.getBytesNoCopy() for buffer in everything}) == len(everything)
    all_freed(everything)


@pytest.mark.parametrize("seed", range(2))
def test_random_threads_against_a_model(seed: int) -> None:
    check_owners(seed, lambda chance: iobmd.allocate(chance.choice(SIZES)), turns=6000, most=200)
    assert iobmd.statistics().pinned.buffers == 0


def test_free_beside_use() -> None:
    """A thread that reads while another frees sees the buffer's bytes, or an error."""
    wrong: list[bytes] = []
    box: list[Buffer | None] = [None]
    done = [False]

    def reader() -> None:
        while not done[0]:
            buffer = box[0]
            if buffer is None:
                continue
            try:
                if (found := buffer.readBytes(0, 8)) not in (b"mine!!!!", bytes(8)):
                    wrong.append(found)
            except iobmd.IOReturnError:
                pass

    def freer() -> None:
        for _ in range(5000):
            buffer = iobmd.allocate(64)
            buffer.writeBytes(0, b"mine!!!!")
            box[0] = buffer
            buffer.free()
        done[0] = True

    run_all(reader, freer)
    assert not wrong


def test_the_limit_of_locked_memory() -> None:
    def child() -> tuple[object, int]:
        buffers = []
        try:
            for _ in range(10_000):
                buffers.append(iobmd.allocate(2048))
        except iobmd.IOReturnError as error:
            return error.code, len(buffers)
        return None, len(buffers)

    code, count = in_child(child, uid=65534, memlock=256 << 10)
    assert code == IOReturn.kIOReturnCannotWire
    assert count >= 32  # a quarter of what the limit permits: a pin counts separately


@pytest.mark.parametrize("size", [256, PAGE_SIZE])
def test_a_subclass_with_another_destructor_returns_its_piece(size: int) -> None:
    """In a cycle the collector clears attributes in C before it deallocates the buffer."""

    class Silent(Buffer):
        def __del__(self) -> None:
            pass

    before = iobmd.statistics().pinned
    buffer = Silent.withOptions(3, size)
    address = buffer.getBytesNoCopy()
    del buffer
    buffer = Silent.withOptions(3, size)
    buffer.itself = buffer  # type: ignore[attr-defined]
    del buffer
    gc.collect()
    assert iobmd.statistics().pinned == before
    part = iobmd.IOMemoryDescriptor.withAddressRange(address, 8, 3, iobmd.kernel_task)  # no buffer's any more
    assert part.readBytes(0, 8) == bytes(8)
    part.free()


MIB = 1 << 20


@pytest.mark.parametrize(
    "wanted",
    [{"size": 2048}, {"size": 64 << 10}, {"size": 896 << 10}, {"size": 896 << 10, "wired": False}],
    ids=["pieces", "whole pages", "large", "pageable"],
)
def test_kept_pages_are_freed_before_a_limit_refuses_others(wanted: dict[str, Any]) -> None:
    """Pages that are kept pinned count against RLIMIT_MEMLOCK, and fill almost all that other buffers leave of it."""

    def nothing_else_is_pinned() -> bool:
        with iobmd.allocate(4 * MIB) as buffer:
            return buffer.wiring is Wiring.PINNED

    def work() -> tuple[int, set[Wiring]]:
        until(nothing_else_is_pinned)  # pins of a process of this user that has just ended
        iobmd.trim()
        held = [iobmd.allocate(MIB) for _ in range(3)]
        before = locked()
        for size in range(kernel.PAGE, 8 * kernel.PAGE + 1, kernel.PAGE):
            all_freed([iobmd.allocate(size) for _ in range((128 << 10) // size)])
        kept = locked() - before
        others = [iobmd.allocate(**wanted) for _ in range(max(1, (256 << 10) // wanted["size"]))]
        for buffer in others:
            buffer.prepare()
        wirings = {buffer.wiring for buffer in others}
        for buffer in others:
            buffer.complete()
        all_freed(held + others)
        return kept, wirings

    kept, wirings = in_child(work, uid=NOBODY - 6, drop=CAP_IPC_LOCK, memlock=4 * MIB + (128 << 10))
    assert kept > MIB * 3 // 4
    assert wirings == {Wiring.PINNED}


def test_a_failed_prepare_leaves_a_small_buffer_pageable() -> None:
    def work() -> tuple[list[IOReturn], Wiring]:
        iobmd.trim()
        with iobmd.allocate(8192, wired=False) as buffer:
            codes = [error_of(buffer.prepare).code, code_of(buffer.complete)]
            return codes, buffer.wiring

    codes, wiring = in_child(work, uid=NOBODY - 6, drop=CAP_IPC_LOCK, memlock=kernel.PAGE)
    assert codes == [IOReturn.kIOReturnCannotWire, IOReturn.kIOReturnNotReady]
    assert wiring is Wiring.PAGEABLE


@pytest.mark.usefixtures("empty_pools")
def test_a_piece_remains_pinned_while_another_of_its_slab_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slab is only locked, because it could not be pinned: later each prepared piece pins it."""

    def refuse(_address: int, _size: int) -> None:
        raise iobmd.CannotWireError("refused by the test")

    with monkeypatch.context() as patched:
        patched.setattr(pinning, "Pin", refuse)
        first, second = iobmd.allocate(256), iobmd.allocate(256)
    assert (first.wiring, second.wiring) == (Wiring.RESIDENT, Wiring.RESIDENT)
    first.prepare()
    second.prepare()
    first.complete()
    assert second.wiring is Wiring.PINNED
    assert kernel.pinned(kernel.PAGE) == kernel.PAGE
    second.complete()
    assert (first.wiring, second.wiring) == (Wiring.RESIDENT, Wiring.RESIDENT)
    assert kernel.pinned() == 0
    all_freed([first, second])
