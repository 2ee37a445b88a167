"""Memory of the requested NUMA node, verified by the spans of the zones and by the kernel's answer."""

import re
import time
from pathlib import Path

import pytest
from support.kernel import check_given_back, frames, held

import iobmd
from iobmd import IOReturn, IOReturnError
from iobmd._native import mman
from iobmd.units import PAGE_SIZE

pytestmark = pytest.mark.needs("frames", "two_nodes")
MIB = 1 << 20


def spans(node: int) -> list[range]:
    """Return the frames of a node (/proc/zoneinfo)."""
    found = []
    for text in re.split(r"^Node ", Path("/proc/zoneinfo").read_text(), flags=re.MULTILINE)[1:]:
        spanned, start = (re.search(rf"^ +{name}:? +(\d+)", text, re.MULTILINE) for name in ("spanned", "start_pfn"))
        if text.startswith(f"{node},") and spanned and start and int(spanned[1]):
            found.append(range(int(start[1]), int(start[1]) + int(spanned[1])))
    return found


@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize(
    ("size", "keywords"),
    [
        (100, {}),
        (5 * MIB, {}),
        (8 * MIB, {"contiguous": True}),
        (MIB, {"shared": True}),
        (5 * MIB, {"shared": True}),
        (4 * MIB, {"shared": True, "contiguous": True}),
        (MIB, {"alignment": MIB}),
    ],
    ids=str,
)
def test_wired_memory_is_the_nodes(size: int, keywords: dict[str, object], node: int) -> None:
    with iobmd.policy(time_budget=300), iobmd.allocate(size, node=node, **keywords) as buffer:
        mine, others = spans(node), spans(1 - node)
        seen = frames(buffer.getBytesNoCopy(), size)
        assert all(any(frame in span for span in mine) for frame in seen)
        assert not any(frame in span for frame in seen for span in others)
        assert mman.count_off_node(buffer.getBytesNoCopy(), len(seen), PAGE_SIZE, node) == 0
        assert mman.count_off_node(buffer.getBytesNoCopy(), len(seen), PAGE_SIZE, 1 - node) == len(seen)


@pytest.mark.parametrize("node", [0, 1])
def test_pageable_memory_comes_from_there_as_it_is_touched(node: int) -> None:
    with iobmd.allocate(MIB, wired=False, node=node) as buffer:
        buffer.writeBytes(0, b"x" * MIB)
        assert mman.count_off_node(buffer.getBytesNoCopy(), MIB // PAGE_SIZE, PAGE_SIZE, node) == 0


def test_purgeable_memory_stays_while_nodes_are_balanced() -> None:
    """The kernel makes pages inaccessible to detect which node uses them; they still exist."""
    content = bytes(range(256)) * (4 * MIB // 256)
    with iobmd.allocate(4 * MIB, wired=False, purgeable=True) as buffer:
        mman.advise(buffer.getBytesNoCopy(), 4 * MIB, mman.MADV_HUGEPAGE)
        buffer.writeBytes(0, content)
        buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableVolatile)
        before, end = made_inaccessible(), time.monotonic() + 6
        while made_inaccessible() == before and time.monotonic() < end:
            pass  # the kernel does this only in programs that use the processor
        for state in (
            iobmd.IOPurgeable.kIOMemoryPurgeableKeepCurrent,
            iobmd.IOPurgeable.kIOMemoryPurgeableNonVolatile,
        ):
            assert buffer.setPurgeable(state) == iobmd.IOPurgeable.kIOMemoryPurgeableVolatile
        assert buffer.readBytes(0, 4 * MIB) == content


def made_inaccessible() -> int:
    """Return how many huge pages NUMA balancing has made inaccessible."""
    return int(Path("/proc/vmstat").read_text().split("numa_huge_pte_updates ")[1].split()[0])


def test_a_node_that_has_not_as_much_is_refused_and_nothing_kept() -> None:
    total = sum(len(span) for span in spans(1)) * PAGE_SIZE
    before = held()
    with pytest.raises(IOReturnError) as caught:
        iobmd.allocate(total + 16 * MIB, node=1)
    assert caught.value.code in (IOReturn.kIOReturnNoResources, IOReturn.kIOReturnNoMemory)
    check_given_back(before, 64 * MIB)


def test_no_such_node() -> None:
    with pytest.raises(IOReturnError, match="node 7 has no memory; nodes with memory: 0, 1") as caught:
        iobmd.allocate(1, node=7)
    assert caught.value.code == IOReturn.kIOReturnBadArgument
