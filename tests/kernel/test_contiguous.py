"""Contiguous, aligned and masked memory: verified by an independent reader of pagemap, or refused without a leak."""

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import contiguous_memory, kernel
from support.child import NOBODY, forked, in_child
from support.kernel import check_given_back, frames, held
from support.targets import until

import iobmd
from iobmd import IOReturn, IOReturnError, Wiring
from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.memory import pinning
from iobmd.physical import zones
from iobmd.physical.policy import Budget
from iobmd.physical.thp import TransparentBlocks
from iobmd.units import PAGE_SIZE

MIB, GIB = 1 << 20, 1 << 30
Buffer = iobmd.IOBufferMemoryDescriptor
Setting = Callable[[str, object], None]
POOLS = Path("/sys/kernel/mm/hugepages")

pytestmark = pytest.mark.usefixtures("pools_as_before")


@pytest.fixture
def pools_as_before() -> Iterator[None]:
    """Fail the test if it changes the size of a hugetlb pool."""

    def pools() -> dict[str, str]:
        return {str(path): path.read_text() for path in POOLS.glob("*/nr_hugepages")}

    before = pools()
    yield
    assert until(lambda: pools() == before), (before, pools())  # another process may have enlarged one temporarily


def is_contiguous(address: int, size: int) -> bool:
    seen = frames(address, size)
    return seen[0] > 0 and seen == list(range(seen[0], seen[0] + len(seen)))


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("option", [iobmd.kIOMemoryPhysicallyContiguous, iobmd.kIOMemoryHostPhysicallyContiguous])
@pytest.mark.parametrize("size", [1, PAGE_SIZE, 4097, 65536, MIB, 2 * MIB, 2 * MIB + 1, 8 * MIB + 5000])
def test_contiguous(size: int, option: int) -> None:
    for _ in range(2):
        with Buffer.withOptions(option, size) as buffer:
            assert is_contiguous(buffer.getBytesNoCopy(), size)
            assert buffer.getPhysicalSegment(0) == (buffer.getPhysicalAddress(), size)
            assert [tuple(segment) for segment in buffer.segments()] == [(buffer.getPhysicalAddress(), size)]
            mapped = size if size <= 2048 else -(-size // PAGE_SIZE) * PAGE_SIZE  # a small buffer is a part of a page
            assert (buffer.layout().contiguous, buffer.layout().largest) == (True, mapped)
            assert buffer.wiring is Wiring.PINNED
            assert not any(memoryview(buffer)), "zero when allocated"
            for offset in range(0, size, PAGE_SIZE):
                buffer.writeBytes(offset, b"\xa5")


@pytest.mark.needs("root", "frames")
def test_the_rest_is_given_back() -> None:
    """If a buffer needs only a part of a huge page, the rest is freed while the buffer exists."""
    buffers = [iobmd.allocate(64 << 10, contiguous=True) for _ in range(200)]
    for buffer in buffers:
        assert is_contiguous(buffer.getBytesNoCopy(), 64 << 10)
    whole = [buffer for buffer in buffers if kernel.is_part_of_larger_page(buffer.getPhysicalAddress() // PAGE_SIZE)]
    for buffer in buffers:
        buffer.free()
    # A page to which another part of the kernel temporarily holds a reference cannot be split.
    assert len(whole) < 10, "a huge page that is not split is held completely"


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("alignment", [8192, 65536, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 32 * MIB])
@pytest.mark.parametrize("size", [1, 5000, 3 * MIB])
def test_alignment_above_a_page(size: int, alignment: int) -> None:
    with iobmd.allocate(size, alignment=alignment) as buffer:
        assert buffer.getBytesNoCopy() % alignment == 0
        assert buffer.getPhysicalAddress() % alignment == 0
        assert is_contiguous(buffer.getBytesNoCopy(), size)
        assert buffer.getCapacity() == size


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_contiguous_copy() -> None:
    data = os.urandom(5 * MIB + 3)
    with (
        Buffer.withBytes(data, 0) as source,
        iobmd.copy(iobmd.kernel_task, source.getBytesNoCopy(), len(data), contiguous=True) as copied,
    ):
        assert bytes(copied) == data
        assert is_contiguous(copied.getBytesNoCopy(), len(data))


@pytest.mark.needs("root", "frames", "big_memory")
@pytest.mark.usefixtures("nothing_left")
def test_sixty_four_megabytes_without_a_pool() -> None:
    with iobmd.policy(memory_budget=2 * GIB, time_budget=10):
        buffer = contiguous_memory.allocated(
            lambda: iobmd.allocate(64 * MIB, contiguous=True), lambda: contiguous_memory.is_found(64 * MIB, 2 * GIB)
        )
    if buffer is not None:
        with buffer:
            assert is_contiguous(buffer.getBytesNoCopy(), 64 * MIB)
            assert buffer.getBytesNoCopy() % (2 * MIB) == 0


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_budgets_bind() -> None:
    before = held()
    # The host has one or two places with this alignment. No more than the buffer's size is held, and only within its
    # time.
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    alignment = 1 << total.bit_length() - 1
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, which does not include pages of pools
    resident = kernel.status("VmRSS")
    with iobmd.policy(memory_budget=0), pytest.raises(IOReturnError, match="longest run was"):
        iobmd.allocate(256 * MIB, alignment=alignment)
    assert kernel.status("VmHWM") - resident < 288 * MIB
    with iobmd.policy(time_budget=0), pytest.raises(IOReturnError, match="longest run was") as caught:
        iobmd.allocate(256 * MIB, alignment=alignment)
    assert caught.value.code == IOReturn.kIOReturnNoResources
    for word in ("memory_budget", "reserve=True", "nr_hugepages"):
        assert word in str(caught.value)
    check_given_back(before, 32 * MIB)
    with pytest.raises(IOReturnError) as caught, iobmd.policy(memory_budget=-1):
        pass
    assert caught.value.code == IOReturn.kIOReturnBadArgument


def test_policy_is_of_its_context() -> None:
    seen = []
    with iobmd.policy(reserve=True):
        with iobmd.policy():
            assert not Budget().may_reserve
        assert Budget().may_reserve
        thread = threading.Thread(target=lambda: seen.append(Budget().may_reserve))
        thread.start()
        thread.join()
    assert seen == [False]
    assert not Budget().may_reserve


@pytest.mark.needs("frames")
def test_a_fork_while_it_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork between two faults on a huge page would share it, and the second fault would split it."""
    fill = mman.populate_downwards

    def beside_a_child(address: int, size: int, huge: int, page: int) -> tuple[int, int]:
        mman.advise(address + size - page, page, mman.MADV_POPULATE_WRITE)
        with forked(lambda: time.sleep(1)):
            return fill(address, size, huge, page)

    monkeypatch.setattr(mman, "populate_downwards", beside_a_child)
    for _ in range(4):  # a huge page may also be missing because none is free
        source = TransparentBlocks()
        try:
            if source.more(1, 2 * MIB):
                return
        finally:
            source.close()
    pytest.fail("no huge page in four attempts")


@pytest.mark.needs("frames")
def test_a_child_inherits_it() -> None:
    with iobmd.allocate(2 * MIB, contiguous=True) as buffer:
        buffer.writeBytes(0, b"here")
        address = buffer.getBytesNoCopy()
        assert in_child(lambda: ctypes.string_at(address, 4)) == b"here"


@pytest.mark.needs("root", "frames", "hugetlb", "big_memory")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("size", [256 * MIB, GIB])
def test_reserve(size: int, setting: Setting) -> None:
    """For a GiB the kernel makes room in the pool, as the check here does: a refusal is correct if that fails too."""
    with iobmd.policy(reserve=True, memory_budget=size):
        buffer = contiguous_memory.allocated(
            lambda: iobmd.allocate(size, contiguous=True), lambda: contiguous_memory.is_made(setting)
        )
    if buffer is not None:
        with buffer:
            assert is_contiguous(buffer.getBytesNoCopy(), size)
            assert buffer.wiring is Wiring.PINNED


@pytest.mark.needs("root", "frames", "hugetlb")
def test_a_reserve_that_found_nothing_is_not_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zones, "without_memory", lambda *_: "")  # as if the host had memory there
    with (
        iobmd.policy(reserve=True, time_budget=0),
        pytest.raises(IOReturnError) as caught,
    ):
        iobmd.allocate(4 * MIB, alignment=1 << 42)
    message = str(caught.value)
    assert caught.value.code is IOReturn.kIOReturnNoResources
    assert "reserve=True" not in message
    assert "nr_hugepages" not in message
    assert "compact_memory" not in message, "it was compacted already"
    assert "drop_caches" in message
    with iobmd.policy(time_budget=0, memory_budget=1 << 60), pytest.raises(IOReturnError) as caught:
        iobmd.allocate(4 * MIB, alignment=1 << 42)
    assert "memory_budget" not in str(caught.value), "no larger budget would be used"
    assert "reserve=True" in str(caught.value)


@pytest.mark.needs("root", "frames", "hugetlb")
def test_pools_are_taken_when_huge_pages_are_off(setting: Setting) -> None:
    setting(str(POOLS / "hugepages-2048kB" / "nr_hugepages"), 512)
    before = kernel.status("HugetlbPages")
    setting("/sys/kernel/mm/transparent_hugepage/enabled", "never")
    with iobmd.allocate(4 * MIB, contiguous=True) as buffer:
        assert is_contiguous(buffer.getBytesNoCopy(), 4 * MIB)
        assert kernel.smaps(buffer.getBytesNoCopy())["KernelPageSize"] == 2 * MIB
        assert kernel.status("HugetlbPages") == before + 4 * MIB, "pages that do not fit return to the pool"
    assert kernel.status("HugetlbPages") == before


@pytest.mark.needs("root", "hugetlb")
@pytest.mark.usefixtures("nothing_left")
def test_no_huge_page_at_all(setting: Setting) -> None:
    setting("/sys/kernel/mm/transparent_hugepage/enabled", "never")
    with pytest.raises(IOReturnError) as caught:
        iobmd.allocate(4 * MIB, contiguous=True)
    assert caught.value.code == IOReturn.kIOReturnNoResources


# --- with hidden frames


def test_one_huge_page_unprivileged() -> None:
    def look() -> tuple[int, str, list[IOReturn]]:
        refused = []
        with iobmd.allocate(2 * MIB, contiguous=True) as whole, iobmd.allocate(9000, alignment=65536) as part:
            address = whole.getBytesNoCopy()
            assert whole.wiring is part.wiring is Wiring.PINNED
            assert part.getBytesNoCopy() % 65536 == 0
            huge = kernel.smaps(address)["AnonHugePages"]
            for keywords in ({"size": 2 * MIB + 1}, {"size": 1, "alignment": 4 * MIB}, {"size": 1, "mask": 1}):
                with pytest.raises(IOReturnError) as caught:
                    iobmd.allocate(
                        keywords["size"],
                        contiguous=True,
                        alignment=keywords.get("alignment", 1),
                        physical_mask=0xFFFFFFFFFFFF if "mask" in keywords else 0,
                    )
                refused.append(caught.value.code)
            with pytest.raises(IOReturnError) as caught:
                whole.getPhysicalAddress()
            refused.append(caught.value.code)
            return huge, repr(whole), refused

    huge, shown, refused = in_child(look, uid=NOBODY - 3, memlock=8 * MIB)
    assert huge >= 2 * MIB
    assert "pinned, contiguous in one huge page, addresses hidden" in shown
    assert refused == [IOReturn.kIOReturnNotPrivileged] * 4


@pytest.mark.usefixtures("nothing_left")
def test_blocks_of_mappings_that_lie_behind_each_other() -> None:
    """A chosen range may extend from one batch of huge pages into another."""
    source = TransparentBlocks()
    try:
        for _ in range(64):
            source.more(1, 1)
            starts = {batch.address for batch in source._batches}
            if pair := [start for start in starts if start + 2 * MIB in starts]:
                break
        low, high = pair[0], pair[0] + 2 * MIB
        lay = frames(low, 4 * MIB)
        for batch in source._batches:
            batch.write(0, b"low" if batch.address == low else b"high")
        joined = source.assemble([low, high], 1)
    finally:
        source.close()
    assert (joined.read(0, 3), joined.read(2 * MIB, 4)) == (b"low", b"high")
    assert frames(joined.address, 4 * MIB) == lay
    joined.close()


# --- a fragmented host


@pytest.mark.needs("root", "frames", "big_memory")
def test_on_a_fragmented_host() -> None:
    """With a pinned page in each of 256 huge pages, small requests succeed, and a search frees all that it held."""

    def fragment() -> dict[int, str]:
        pins: list[pinning.Pin] = []
        outcome = {}
        holder = Mapping.anonymous(GIB // 2, 2 * MIB)
        mman.advise(holder.address, holder.size, mman.MADV_HUGEPAGE)
        mman.populate(holder.address, holder.size, 2 * MIB, PAGE_SIZE)
        for place in range(holder.address, holder.address + holder.size, 2 * MIB):
            mman.advise(place + PAGE_SIZE, 2 * MIB - PAGE_SIZE, mman.MADV_COLD)  # splits the huge page
            pins.append(pinning.Pin(place, PAGE_SIZE))
            mman.advise(place + PAGE_SIZE, 2 * MIB - PAGE_SIZE, mman.MADV_DONTNEED)
        before = held()
        for size in (64 << 10, MIB, 2 * MIB, 64 * MIB):
            budget = iobmd.policy(memory_budget=256 * MIB, time_budget=5, keep=0)
            try:
                with budget, iobmd.allocate(size, contiguous=True) as buffer:
                    assert is_contiguous(buffer.getBytesNoCopy(), size)
                    outcome[size] = "found"
            except IOReturnError as error:
                assert error.code == IOReturn.kIOReturnNoResources
                outcome[size] = "refused"
            check_given_back(before, 32 * MIB)
        return outcome

    outcome = in_child(fragment)
    print(outcome)
    assert outcome[64 << 10] == outcome[MIB] == outcome[2 * MIB] == "found"


def test_nothing_is_called_populated_that_is_not() -> None:
    """Before Linux 5.14 MADV_POPULATE_WRITE fails, so that all memory is populated in another way."""
    assert mman.populate_downwards(1 << 46, 4 * MIB, 2 * MIB, PAGE_SIZE) == (0, errno.ENOMEM)
