"""Pinned pages keep their frames under everything that moves pages, whereas an mlocked control moves."""

import contextlib
import errno
import functools
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import kernel
from support.child import NOBODY, in_child
from support.errors import code_of
from support.kernel import frames, frames_of
from support.threads import run_all

import iobmd
from iobmd import IOReturn, IOReturnError, Wiring
from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.cli.demo.compaction import ScatteredPages, collapse, compact
from iobmd.memory import pinning
from iobmd.memory.populate import populate
from iobmd.pagemap.self import own_runs
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
Buffer = iobmd.IOBufferMemoryDescriptor
Setting = Callable[[str, object], None]


ENOUGH = 500
"""Number of pages of the control that compaction must have moved."""


@functools.cache
def pins_are_counted() -> bool:
    """Return whether VmPin counts pins: Linux 7.3 does not count io_uring's for a process with CAP_IPC_LOCK."""

    def while_pinned() -> int:
        with iobmd.allocate(kernel.PAGE):
            return kernel.status("VmPin")

    return in_child(while_pinned) > 0


# --- the nature of pins


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_wired_is_pinned_and_says_where() -> None:
    for size in (1, PAGE_SIZE, 300_000, 5 * MIB + 1):
        with iobmd.allocate(size) as buffer:
            assert buffer.wiring is Wiring.PINNED
            assert kernel.status("VmPin") >= size or not pins_are_counted()
            seen = [
                segment.address // PAGE_SIZE + page
                for segment in buffer.segments()
                for page in range(-(-segment.length // PAGE_SIZE))
            ]
            assert seen == frames_of(buffer)
            assert buffer.getPhysicalAddress() == frames_of(buffer)[0] * PAGE_SIZE
            buffer.verify()
        iobmd.trim()
        assert kernel.nothing_is_pinned()


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_prepare_and_complete() -> None:
    with iobmd.allocate(64 << 10, wired=False) as buffer:
        assert buffer.wiring is Wiring.PAGEABLE
        for ask in (buffer.getPhysicalAddress, buffer.segments, buffer.verify, buffer.layout):
            assert code_of(ask) == IOReturn.kIOReturnNotReady
        buffer.prepare()
        buffer.prepare(iobmd.kIODirectionIn)
        assert buffer.wiring is Wiring.PINNED
        assert not pins_are_counted() or kernel.pinned(64 << 10) == 64 << 10
        assert [segment.address for segment in buffer.segments()][:1] == [frames_of(buffer)[0] * PAGE_SIZE]
        assert code_of(buffer.free) == IOReturn.kIOReturnBusy
        buffer.complete()
        assert buffer.wiring is Wiring.PINNED
        buffer.complete()
        assert buffer.wiring is Wiring.PAGEABLE
        assert kernel.nothing_is_pinned()
        assert code_of(buffer.complete) == IOReturn.kIOReturnNotReady
        assert code_of(buffer.getPhysicalAddress) == IOReturn.kIOReturnNotReady
        assert code_of(lambda: buffer.prepare(1 << 9)) == IOReturn.kIOReturnBadArgument
    with iobmd.allocate(PAGE_SIZE) as wired:
        wired.prepare()
        assert code_of(wired.free) == IOReturn.kIOReturnBusy
        wired.complete()
        assert wired.wiring is Wiring.PINNED


def test_prepare_flags() -> None:
    with iobmd.allocate(64 << 10, wired=False) as buffer:
        assert code_of(lambda: buffer.prepare(iobmd.kIODirectionPrepareNoFault)) == IOReturn.kIOReturnCannotWire
        assert buffer.getPageCounts() == (0, 0)
        buffer.writeBytes(0, b"x" * len(buffer))
        buffer.prepare(iobmd.kIODirectionPrepareNoFault)
        buffer.complete()


@pytest.mark.needs("frames")
def test_prepare_to_32_bits() -> None:
    with iobmd.allocate(64 << 10, wired=False) as buffer:
        buffer.writeBytes(0, b"x" * len(buffer))
        if max(frames_of(buffer)) < 1 << 20:
            pytest.skip("the memory is below 4 GiB")
        assert code_of(lambda: buffer.prepare(iobmd.kIODirectionPrepareToPhys32)) == IOReturn.kIOReturnNoResources
        assert buffer.wiring is Wiring.PAGEABLE
        assert kernel.nothing_is_pinned()


@pytest.mark.usefixtures("nothing_left")
def test_prepare_in_many_threads() -> None:
    buffer = iobmd.allocate(64 << 10, wired=False)

    def work() -> None:
        for _ in range(300):
            buffer.prepare()
            assert buffer.wiring is Wiring.PINNED
            buffer.complete()

    run_all(*[work] * 4)
    assert buffer.wiring is Wiring.PAGEABLE
    assert kernel.nothing_is_pinned()
    buffer.free()


@pytest.mark.needs("frames")
def test_verify_finds_a_page_that_moved() -> None:
    with iobmd.allocate(64 << 10) as buffer:
        buffer.verify()
        backing = buffer._memory().backing
        assert backing is not None
        recorded = backing.runs
        # Without the descriptor's knowledge: the pin remains on the old page, and a new page is mapped at the
        # address.
        mman.unlock(buffer.getBytesNoCopy(), len(buffer))
        mman.advise(buffer.getBytesNoCopy() + PAGE_SIZE, PAGE_SIZE, mman.MADV_DONTNEED)
        buffer.writeBytes(PAGE_SIZE, b"x")
        with pytest.raises(IOReturnError, match="do not use") as caught:
            buffer.verify()
        assert caught.value.code == IOReturn.kIOReturnVMError
        assert caught.value.address == buffer.getBytesNoCopy() + PAGE_SIZE
        assert backing.runs is recorded


# --- operations that move pages


@pytest.mark.needs("root", "frames", "collapse")
def test_collapse_moves_what_is_mlocked_and_not_what_is_pinned() -> None:
    assert collapse(pin=False) > 500
    assert collapse(pin=True) == 0


@contextlib.contextmanager
def filler(size: int) -> Iterator[None]:
    """Hold `size` bytes in small pages."""
    if not size:
        yield
        return
    held = Mapping.anonymous(size, PAGE_SIZE)
    mman.advise(held.address, size, mman.MADV_NOHUGEPAGE)
    populate(held.address, size)
    try:
        yield
    finally:
        held.close()


@pytest.mark.needs("root", "frames", "big_memory")
def test_nothing_moves_a_pinned_page(setting: Setting) -> None:
    with (
        iobmd.allocate(16 * MIB) as large,
        iobmd.allocate(MIB + 5) as small,
        iobmd.allocate(4 * MIB, contiguous=True) as contiguous,
        iobmd.allocate(8 * MIB, wired=False) as prepared,
        Buffer.withCopy(iobmd.kernel_task, 0, iobmd.kernel_task, small.getBytesNoCopy(), MIB) as copied,
    ):
        prepared.writeBytes(0, b"y" * len(prepared))
        prepared.prepare()
        many = [iobmd.allocate(PAGE_SIZE) for _ in range(500)]
        pinned = [large, small, contiguous, prepared, copied, *many]
        before = [frames_of(buffer) for buffer in pinned]

        def unmoved() -> None:
            assert [frames_of(buffer) for buffer in pinned] == before
            for buffer in pinned[:5]:
                buffer.verify()

        moved = turns = 0
        while moved < ENOUGH and turns < 40:
            # A new control each time: the positions of free memory determine how many pages compaction moves (0 to 76
            # %), and pages that it has moved once are not moved again. The kernel allocates from gaps first, where
            # compaction moves nothing on a host that it has already compacted: the filler takes those.
            with filler((0, 256, 512, 1024, 2048)[turns % 5] * MIB):
                control = ScatteredPages(256 * MIB)
            assert compact()
            unmoved()
            moved += control.moved()[0]
            control.close()
            turns += 1
        assert moved >= ENOUGH, f"the control must move, or this proves nothing: {moved} pages in {turns} compactions"
        for buffer in (large, contiguous):
            try:
                mman.advise(buffer.getBytesNoCopy(), 2 * MIB, mman.MADV_COLLAPSE)
            except OSError as error:
                assert error.errno in (errno.EAGAIN, errno.EINVAL, errno.EBUSY, errno.ENOMEM)
        unmoved()

        in_child(lambda: None)
        for buffer in pinned:
            buffer.writeBytes(0, b"z" * min(len(buffer), 9 * PAGE_SIZE))
        unmoved()

        setting("/sys/kernel/mm/transparent_hugepage/enabled", "always")
        setting("/sys/kernel/mm/transparent_hugepage/khugepaged/scan_sleep_millisecs", 10)
        setting("/sys/kernel/mm/transparent_hugepage/khugepaged/pages_to_scan", 100_000)
        setting("/sys/kernel/mm/ksm/sleep_millisecs", 1)
        setting("/sys/kernel/mm/ksm/pages_to_scan", 10_000)
        setting("/sys/kernel/mm/ksm/run", 1)
        for buffer in (small, prepared, *many):
            mman.advise(buffer.getBytesNoCopy(), -(-len(buffer) // PAGE_SIZE) * PAGE_SIZE, 12)  # MADV_MERGEABLE
        threading.Event().wait(1.0)
        unmoved()
        setting("/sys/kernel/mm/ksm/run", 2)

        for pool in Path("/sys/kernel/mm/hugepages").iterdir():  # for pages of 1 GiB the kernel makes room
            before_it = int((pool / "nr_hugepages").read_text())
            # Half of the available memory, because other processes need memory too.
            size = int(pool.name.removeprefix("hugepages-").removesuffix("kB")) << 10
            setting(str(pool / "nr_hugepages"), before_it + kernel.available() // 2 // size)
            unmoved()
            setting(str(pool / "nr_hugepages"), before_it)
        prepared.complete()
        for buffer in many:
            buffer.free()
    assert (kernel.nothing_is_pinned(), kernel.status("VmLck")) == (True, 0)


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_fork_moves_nothing_and_the_child_unpins_nothing() -> None:
    with iobmd.allocate(MIB) as wired, iobmd.allocate(MIB, wired=False) as prepared:
        prepared.writeBytes(0, b"a" * MIB)
        prepared.prepare()
        before = frames_of(wired), frames_of(prepared)

        def child() -> list[IOReturn]:
            refused = [code_of(wired.getPhysicalAddress), code_of(prepared.segments), code_of(wired.verify)]
            with iobmd.allocate(PAGE_SIZE) as own:  # the child has its own ring
                assert own.wiring is Wiring.PINNED
            wired.free()
            return refused

        assert in_child(child) == [IOReturn.kIOReturnNotOpen] * 3
        for buffer in (wired, prepared):
            buffer.writeBytes(0, b"b" * MIB)
        assert (frames_of(wired), frames_of(prepared)) == before
        assert not pins_are_counted() or kernel.pinned(2 * MIB) == 2 * MIB
        prepared.complete()


@pytest.mark.usefixtures("nothing_left")
def test_ring_does_not_leak_into_programs() -> None:
    with iobmd.allocate(PAGE_SIZE):
        assert kernel.rings()
        done = subprocess.run(["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, check=True)
        assert b"pipe" in done.stdout
        assert b"io_uring" not in done.stdout


# --- limits


def test_hidden_addresses_unprivileged() -> None:
    def look() -> tuple[Wiring, list[IOReturn]]:
        with iobmd.allocate(64 << 10) as buffer:
            asks = (buffer.getPhysicalAddress, buffer.segments, buffer.verify, buffer.layout)
            return buffer.wiring, [code_of(ask) for ask in asks]

    wiring, codes = in_child(look, uid=NOBODY)
    assert wiring is Wiring.PINNED
    assert codes == [IOReturn.kIOReturnNotPrivileged] * 4


@pytest.mark.usefixtures("nothing_left")
def test_limit_on_pins() -> None:
    """mlock and pins are charged separately, pins to the user: memory that cannot be pinned counts as resident."""

    def pin() -> tuple[list[Wiring], str, list[Wiring]]:
        limit = 8 * MIB
        with iobmd.allocate(5 * MIB) as first, iobmd.allocate(MIB, wired=False) as later:
            later.prepare()
            with iobmd.allocate(2 * MIB + PAGE_SIZE) as second:
                with pytest.raises(IOReturnError) as caught:
                    second.prepare()
                assert caught.value.code == IOReturn.kIOReturnCannotWire
                with pytest.raises(iobmd.NotReadyError, match=r"RLIMIT_MEMLOCK \(8 MiB for all pins of this user\)"):
                    second.segments()
                wirings = [first.wiring, second.wiring]
            later.complete()
            with iobmd.allocate(limit - 6 * MIB) as third:
                return wirings, str(caught.value), [third.wiring]

    wirings, message, after = in_child(pin, uid=NOBODY - 1, memlock=8 * MIB)
    assert wirings == [Wiring.PINNED, Wiring.RESIDENT]
    assert "RLIMIT_MEMLOCK (8 MiB" in message
    assert after == [Wiring.PINNED]


def unpinnable() -> tuple[Wiring, str, IOReturn]:
    with iobmd.allocate(8192) as buffer, iobmd.allocate(8192, wired=False) as pageable:
        with pytest.raises(IOReturnError) as caught:
            pageable.prepare()
        assert caught.value.code == IOReturn.kIOReturnCannotWire
        refused = code_of(lambda: iobmd.allocate(8192, contiguous=True))
        return buffer.wiring, str(caught.value), refused


@pytest.mark.needs("root")
@pytest.mark.usefixtures("empty_pools", "nothing_left")
def test_io_uring_disabled_by_sysctl(setting: Setting) -> None:
    if not Path("/proc/sys/kernel/io_uring_disabled").exists():
        pytest.skip("this kernel has no kernel.io_uring_disabled")
    setting("/proc/sys/kernel/io_uring_disabled", 2)
    wiring, message, refused = in_child(unpinnable)
    assert wiring is Wiring.RESIDENT
    assert "kernel.io_uring_disabled is 2" in message
    assert "sysctl kernel.io_uring_disabled=0" in message
    assert refused == IOReturn.kIOReturnCannotWire


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
@pytest.mark.usefixtures("empty_pools", "nothing_left")
def test_io_uring_denied_by_seccomp(number: int) -> None:
    wiring, message, refused = in_child(unpinnable, deny={"io_uring_setup": number, "io_uring_register": number})
    assert wiring is Wiring.RESIDENT
    assert "seccomp" in message
    assert refused == IOReturn.kIOReturnCannotWire


@pytest.mark.needs("hugetlb")
@pytest.mark.usefixtures("hugetlb_pool")
def test_hugetlb_is_the_next_choice() -> None:
    def wire() -> tuple[Wiring, bool, int]:
        with iobmd.allocate(3 * MIB) as buffer:
            buffer.writeBytes(2 * MIB, b"kept")
            assert buffer.readBytes(2 * MIB, 4) == b"kept"
            runs = [segment.address for segment in buffer.segments()]
            mapped = kernel.smaps(buffer.getBytesNoCopy())
            return (
                buffer.wiring,
                runs[0] == frames_of(buffer)[0] * PAGE_SIZE,
                mapped["Shared_Hugetlb"] + mapped["Private_Hugetlb"] > 0,
            )

    deny = {"io_uring_setup": errno.EPERM}
    assert in_child(wire, deny=deny) == (Wiring.PINNED, True, True)


@pytest.mark.needs("memlock")
@pytest.mark.usefixtures("nothing_left")
def test_more_buffers_than_one_table_holds() -> None:
    def many() -> tuple[int, int]:
        buffers = [iobmd.allocate(PAGE_SIZE) for _ in range(pinning.SLOTS + 100)]
        wirings = {buffer.wiring for buffer in buffers}
        assert wirings == {Wiring.PINNED}
        pinned = kernel.status("VmPin")
        for buffer in buffers:
            buffer.free()
        iobmd.trim()
        return pinned // PAGE_SIZE, kernel.pinned()

    assert in_child(many) == (pinning.SLOTS + 100, 0)


@pytest.mark.needs("big_memory", "frames")
@pytest.mark.usefixtures("nothing_left")
def test_more_than_one_slot_holds() -> None:
    """Pieces of 1 GiB: a whole one and a part."""
    size = (1 << 30) + (64 << 20)
    with iobmd.allocate(size) as buffer:
        assert buffer.wiring is Wiring.PINNED
        assert kernel.pinned(size) == size
        assert sum(segment.length for segment in buffer.segments()) == size
        for offset in (0, (1 << 30) - PAGE_SIZE, 1 << 30, size - PAGE_SIZE):
            address, length = buffer.getPhysicalSegment(offset)
            assert address == frames(buffer.getBytesNoCopy() + offset, PAGE_SIZE)[0] * PAGE_SIZE
            assert length >= PAGE_SIZE


def test_kernels_without_sparse_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.19 each piece needs its own ring; the test refuses the table as such a kernel does."""

    table = pinning.uring.Table

    def no_tables(slots: int) -> pinning.uring.Table:
        if slots > 1:
            raise OSError(errno.EINVAL, "io_uring_register: Invalid argument")
        return table(slots)

    def pin() -> tuple[int, int]:
        monkeypatch.setattr(pinning.uring, "Table", no_tables)
        buffers = [iobmd.allocate(PAGE_SIZE) for _ in range(20)]
        assert {buffer.wiring for buffer in buffers} == {Wiring.PINNED}
        held = kernel.rings()
        for buffer in buffers:
            buffer.free()
        iobmd.trim()
        return held, kernel.rings()

    assert in_child(pin) == (20, 0)


@pytest.mark.needs("frames")
def test_pinned_pages_out_of_the_page_table_are_not_left_out() -> None:
    """Pages may be temporarily unmapped until the kernel detects that it cannot move them."""
    size = 64 << 10
    with iobmd.allocate(size, wired=False, shared=True) as buffer:
        buffer.writeBytes(0, b"x" * size)
        buffer.prepare()
        before = buffer.segments()
        mman.advise(buffer.getBytesNoCopy(), size, mman.MADV_DONTNEED)
        assert kernel.present(buffer.getBytesNoCopy(), size) == 0
        buffer.verify()
        assert kernel.present(buffer.getBytesNoCopy(), size) == size // PAGE_SIZE
        mman.advise(buffer.getBytesNoCopy(), size, mman.MADV_DONTNEED)
        assert own_runs(buffer.getBytesNoCopy(), size, pinned=True).pages == size // PAGE_SIZE
        assert buffer.segments() == before
        buffer.complete()
