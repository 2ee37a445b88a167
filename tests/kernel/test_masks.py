"""Physical addresses within a mask, verified by an independent reader of pagemap, or a justified refusal."""

import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path

import pytest
from support import kernel
from support.child import NOBODY, in_child
from support.errors import refusal
from support.kernel import check_given_back, frames, held

import iobmd
from iobmd import IOReturn, IOReturnError, Wiring
from iobmd.pagemap.self import visible_runs
from iobmd.physical.policy import Budget
from iobmd.physical.search import PhysicalConstraints
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
Setting = Callable[[str, object], None]
Buffer = iobmd.IOBufferMemoryDescriptor
PR_SET_THP_DISABLE = 41
EVERY = (1 << 48) - 1
MAP_HUGETLB = 0x40000 | 21 << 26


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("bits", [34, 40, 64])
@pytest.mark.parametrize("size", [5000, 5 * MIB])
def test_mask_that_most_memory_fits(size: int, bits: int) -> None:
    if bits == 34 and max_address() >> 36:
        pytest.skip("most memory of this host is above 16 GiB")
    with Buffer.inTaskWithPhysicalMask(iobmd.kernel_task, 0, size, (1 << bits) - 1) as buffer:
        assert all(frame * PAGE_SIZE < 1 << bits for frame in frames(buffer.getBytesNoCopy(), size))
        assert buffer.wiring is Wiring.PINNED
        assert not any(memoryview(buffer))


def max_address() -> int:
    ranges = [line.split()[0].split("-")[1] for line in Path("/proc/iomem").read_text().splitlines() if "RAM" in line]
    return max(int(end, 16) for end in ranges)


@pytest.mark.needs("frames")
def test_alignment_comes_from_the_mask() -> None:
    """The lowest bit of the mask is the alignment, as in IOKit's initWithPhysicalMask."""
    every = (1 << 48) - 1
    with iobmd.allocate(100, physical_mask=every & ~0xFFFF) as buffer:
        assert buffer.getPhysicalAddress() % 65536 == 0
        assert buffer.getBytesNoCopy() % 65536 == 0
    with iobmd.allocate(3 * MIB, physical_mask=every & ~0xFFF) as buffer:
        assert buffer.getPhysicalAddress() % PAGE_SIZE == 0


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_mask_out_of_reach_is_refused_at_once() -> None:
    before = held()
    with iobmd.policy(memory_budget=64 * MIB), pytest.raises(IOReturnError) as caught:
        Buffer.inTaskWithPhysicalMask(iobmd.kernel_task, 0, 8 * MIB, (1 << 24) - 1)
    assert caught.value.code == IOReturn.kIOReturnNoResources
    message = str(caught.value)
    assert "under the mask 0xffffff: " in message
    assert "would have to be held to reach it" in message or "no free page of this host is there" in message
    check_given_back(before, 128 * MIB)


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("size", "hole"),
    [
        *((size, hole) for size in (5000, MIB) for hole in (0x1000, 0x2000, 0x40000)),
        (5000, 2 * MIB),
        *((32 * MIB, hole) for hole in (2 * MIB, 8 * MIB)),  # some of sixteen huge pages do not fit
    ],
)
def test_mask_with_a_hole(size: int, hole: int) -> None:
    """No huge page fits a hole below 2 MiB. Half of all pages fit, and others are held until enough are found."""
    with iobmd.allocate(size, physical_mask=EVERY & ~hole) as buffer:
        assert buffer.wiring is Wiring.PINNED
        assert not any(frame * PAGE_SIZE & hole for frame in frames(buffer.getBytesNoCopy(), size))
        assert not any(memoryview(buffer))


@pytest.mark.needs("frames")
def test_contiguous_under_a_mask_with_a_hole() -> None:
    """Memory shorter than the hole's bit is found; every longer piece has an address with that bit."""
    with iobmd.allocate(8192, contiguous=True, physical_mask=EVERY & ~0x4000) as buffer:
        first, second = frames(buffer.getBytesNoCopy(), 8192)
        assert second == first + 1
        assert not (first | second) * PAGE_SIZE & 0x4000
    with pytest.raises(IOReturnError, match="have the bit 0x4000") as caught:
        iobmd.allocate(65536, contiguous=True, physical_mask=EVERY & ~0x4000)
    assert caught.value.code == IOReturn.kIOReturnNoResources


@pytest.mark.parametrize(
    ("mask", "why"),
    [(0xFFF, "have the bit 0x1000"), (1 << 61, "has no memory there"), (1 << 42, "has no memory there")],
)
def test_no_privilege_satisfies_an_impossible_mask(mask: int, why: str) -> None:
    """A user who followed "run with CAP_SYS_ADMIN" would be refused again."""

    def ask() -> tuple[IOReturn, str]:
        return refusal(lambda: iobmd.allocate(MIB, contiguous=mask < MIB, physical_mask=mask))

    for code, message in (ask(), in_child(ask, uid=NOBODY - 8)):
        assert code is IOReturn.kIOReturnNoResources
        assert why in message
        assert "CAP_SYS_ADMIN" not in message


@pytest.mark.needs("frames")
def test_masks_need_no_huge_pages() -> None:
    def low() -> list[int]:
        assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
        with iobmd.allocate(MIB, physical_mask=(1 << 40) - 1) as buffer:
            return frames(buffer.getBytesNoCopy(), MIB)

    found = in_child(low)
    assert len(set(found)) == 256
    assert all(0 < frame < 1 << 28 for frame in found)


@pytest.mark.needs("root", "frames", "hugetlb")
def test_pools_are_searched_before_a_refusal(setting: Setting) -> None:
    """Memory below 4 GiB that a small budget cannot reach is taken from a pool."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    setting(str(pool), 64)
    free = int(pool.with_name("free_hugepages").read_text())
    with mmap.mmap(-1, free * 2 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB) as pages:
        for offset in range(0, len(pages), 2 * MIB):
            pages[offset] = 1
        anchor = ctypes.c_char.from_buffer(pages)
        has_low_page = min(frames(ctypes.addressof(anchor), len(pages))) < 1 << 20
        del anchor
    with iobmd.policy(memory_budget=64 * MIB):
        if has_low_page:
            with iobmd.allocate(PAGE_SIZE, physical_mask=0xFFFFFFFF) as buffer:
                assert frames(buffer.getBytesNoCopy(), PAGE_SIZE)[0] < 1 << 20
                assert kernel.smaps(buffer.getBytesNoCopy())["KernelPageSize"] == 2 * MIB
        else:
            code, message = refusal(lambda: iobmd.allocate(PAGE_SIZE, physical_mask=0xFFFFFFFF))
            assert code == IOReturn.kIOReturnNoResources
            assert "would have to be held" in message
    assert pool.read_text() == "64\n"


def test_a_mask_over_all_memory_is_in_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check also works while the kernel initializes memory, and zones count less free memory than meminfo."""
    from iobmd.physical import zones

    free = {**zones.procfs.meminfo(), "MemFree": 1 << 50}
    monkeypatch.setattr(zones.procfs, "meminfo", lambda: free)
    assert zones.out_of_reach((1 << 48) - 1, Budget()) == ""
    assert "would have to be held" in zones.out_of_reach(0xFFFFFF, Budget())


@pytest.mark.needs("frames")
@pytest.mark.usefixtures("nothing_left")
def test_what_moved_out_of_reach_before_it_was_pinned_is_not_taken() -> None:
    """Candidate pages are checked against the mask, with addresses on both sides of its limits."""
    with iobmd.allocate(MIB) as buffer:
        table = visible_runs(iobmd.kernel_task, buffer.getBytesNoCopy(), MIB)
        top = max(frames(buffer.getBytesNoCopy(), MIB)).bit_length() + 12
    assert table
    assert PhysicalConstraints(MIB, allowed=(1 << top) - 1).accepts(table)
    assert not PhysicalConstraints(MIB, allowed=(1 << top - 1) - 1).accepts(table)


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_a_mask_without_seeing_frames(shared: bool) -> None:
    """If no budget suffices, the error states the remedy immediately, before memory is populated."""

    def allocate_masked() -> tuple[IOReturn, str]:
        before = kernel.status("VmHWM")
        found = refusal(lambda: iobmd.allocate(6 * MIB, physical_mask=0xFFFFFFFF, shared=shared))
        assert kernel.status("VmHWM") < before + 4 * MIB
        return found

    code, message = in_child(allocate_masked, uid=NOBODY - 7, memlock=8 * MIB)
    assert code is IOReturn.kIOReturnNotPrivileged
    assert "CAP_SYS_ADMIN" in message
    assert "memory_budget" not in message


@pytest.mark.needs("frames")
def test_a_mask_where_no_memory_is() -> None:
    ranges = [line.split(" ")[0] for line in Path("/proc/iomem").read_text().splitlines() if ": System RAM" in line]
    end = max(int(text.split("-")[1], 16) for text in ranges)
    above = 1 << end.bit_length()  # and page 0 is never ordinary memory
    code, message = refusal(lambda: iobmd.allocate(PAGE_SIZE, physical_mask=above | 0xFFF))
    assert code is IOReturn.kIOReturnNoResources
    assert "this host has no memory there" in message
    assert "policy" not in message
    code, message = refusal(lambda: iobmd.allocate(128 * MIB, physical_mask=0xFFFFFF))
    assert code is IOReturn.kIOReturnNoResources
    assert "of memory there" in message
    assert "policy" not in message
