"""The features of `iobmd` that this kernel supports, and in which way (docs/kernels.md)."""

import errno
import os
import signal
from collections.abc import Callable

import pytest
from support import kernel, requirements
from support.child import forked, in_child
from support.errors import code_of

import iobmd
from iobmd import IOReturn, Task, Wiring, host, pagemap
from iobmd._native import mman
from iobmd.cli import main
from iobmd.host.fact import Status
from iobmd.memory import pinning
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE

pytestmark = pytest.mark.needs("guest")
MIB = 1 << 20
CONTENT = bytes(range(256)) * (MIB // 256)


def wired() -> str:
    with iobmd.allocate(5 * MIB) as buffer:
        assert buffer.wiring is Wiring.PINNED
        buffer.verify()
        return "pinned, one ring per piece" if pinning._pins._no_tables else "pinned"


def prepared() -> None:
    with iobmd.allocate(MIB, wired=False) as buffer:
        buffer.prepare()
        assert sum(length for _, length in buffer.segments()) == MIB
        buffer.complete()
        assert buffer.wiring is Wiring.PAGEABLE


def contiguous() -> None:
    with iobmd.allocate(16 * MIB, contiguous=True) as buffer:
        assert len(buffer.segments()) == 1


def contiguous_and_shared() -> None:
    with iobmd.allocate(4 * MIB, contiguous=True, shared=True) as buffer:
        assert len(buffer.segments()) == 1


def masked() -> None:
    with (
        iobmd.policy(memory_budget=1 << 40, time_budget=300),
        iobmd.allocate(MIB, physical_mask=0xFFFFFFFF) as buffer,
    ):
        assert all(address + length <= 1 << 32 for address, length in buffer.segments())


def shared_in_huge_pages() -> str:
    with iobmd.allocate(4 * MIB, shared=True) as buffer:
        huge = buffer.layout().huge
        assert huge == kernel.smaps(buffer.getBytesNoCopy())["ShmemPmdMapped"]
        return "huge pages" if huge else "small pages"


def purgeable() -> None:
    with iobmd.allocate(MIB, wired=False, purgeable=True) as buffer:
        buffer.writeBytes(0, CONTENT)
        buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableVolatile)
        was = buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableNonVolatile)
        # The kernel may reclaim it at any time, but the loss must be reported.
        assert (was, buffer.readBytes(0, MIB)) in (
            (iobmd.IOPurgeable.kIOMemoryPurgeableVolatile, CONTENT),
            (iobmd.IOPurgeable.kIOMemoryPurgeableEmpty, bytes(MIB)),
        )
        buffer.writeBytes(0, CONTENT)
        buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableVolatile)
        mman.advise(buffer.getBytesNoCopy(), MIB, mman.MADV_PAGEOUT)  # discards lazily freed pages
        was = buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableNonVolatile)
        assert was == iobmd.IOPurgeable.kIOMemoryPurgeableEmpty
        assert buffer.readBytes(0, MIB) == bytes(MIB)


def purgeable_and_shared() -> None:
    with iobmd.allocate(MIB, wired=False, purgeable=True, shared=True) as buffer:
        buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableVolatile)
        iobmd.purge()
        buffer.setPurgeable(iobmd.IOPurgeable.kIOMemoryPurgeableNonVolatile)


def copied() -> None:
    with iobmd.allocate(MIB) as source:
        source.writeBytes(0, CONTENT)
        with iobmd.copy(iobmd.current_task(), source.getBytesNoCopy(), MIB) as buffer:
            assert buffer.readBytes(0, MIB) == CONTENT


def in_another_task() -> None:
    with forked(signal.pause) as pid, iobmd.allocate(MIB, task=pid) as buffer:
        buffer.writeBytes(0, CONTENT)
        assert Task(pid).read(buffer.getBytesNoCopy(), MIB) == CONTENT
        assert kernel.entries(buffer.getBytesNoCopy(), PAGE_SIZE, pid)[0] >> 63


def frozen_copy() -> None:
    with iobmd.allocate(MIB, wired=False) as source:
        source.writeBytes(0, CONTENT)
        with forked(signal.pause) as pid, iobmd.copy(pid, source.getBytesNoCopy(), MIB, freeze=True) as buffer:
            assert buffer.readBytes(0, MIB) == CONTENT


def mapped_twice() -> None:
    with iobmd.allocate(MIB, shared=True) as buffer, buffer.map(iobmd.IOMapOptions.kIOMapUnique) as mapping:
        buffer.writeBytes(0, CONTENT)
        assert bytes(memoryview(mapping)) == CONTENT


def read_page_positions() -> None:
    with iobmd.allocate(4 * MIB) as buffer:
        runs = list(pagemap.runs(buffer))
        assert sum(run.length for run in runs) == 4 * MIB
        assert pagemap.counts(iobmd.kernel_task, buffer.getBytesNoCopy(), 4 * MIB).present == 4 * MIB // PAGE_SIZE


def of_node_0() -> None:
    with iobmd.allocate(MIB, node=0) as buffer:
        assert mman.count_off_node(buffer.getBytesNoCopy(), MIB // PAGE_SIZE, PAGE_SIZE, 0) == 0


def refused_in_child() -> None:
    with iobmd.allocate(PAGE_SIZE) as buffer:
        assert in_child(lambda: code_of(lambda: buffer.readBytes(0, 1))) == IOReturn.kIOReturnNotOpen


CAPABILITIES: dict[str, Callable[[], str | None]] = {
    "wired memory": wired,
    "`prepare()` of pageable memory": prepared,
    "16 MiB contiguous": contiguous,
    "4 MiB contiguous and shared": contiguous_and_shared,
    "1 MiB below 4 GiB": masked,
    "4 MiB shared": shared_in_huge_pages,
    "memory of a NUMA node": of_node_0,
    "purgeable, private": purgeable,
    "purgeable, shared": purgeable_and_shared,
    "mapped at two places": mapped_twice,
    "`copy()`": copied,
    "`copy(freeze=True)`": frozen_copy,
    "memory in another task": in_another_task,
    "`iobmd.pagemap`": read_page_positions,
    "refusal of wired memory in a forked child": refused_in_child,
}
"""Features by name, each with a function that returns how this kernel supports it, or raises."""


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("name", CAPABILITIES)
def test_works(name: str, record_property) -> None:
    """Every feature works on every kernel of the guests, even if newer kernels support it in another way."""
    record_property(name, CAPABILITIES[name]() or "works")


def test_of_the_kernel(record_property) -> None:
    """The facts of `iobmd doctor`: if a feature is missing, there is a remedy."""
    found = {fact.name: fact for fact in host.facts()}
    for name in ("io_uring", "PAGEMAP_SCAN", "MADV_FREE", "huge tmpfs", "userfaultfd", "pidfd_getfd"):
        works = found[name].status is Status.YES
        # These two exist since Linux 6.7; the others are older than the oldest kernel of a guest.
        expected = name not in ("PAGEMAP_SCAN", "userfaultfd") or requirements.missing("pagemap_scan") is None
        assert works is expected
        assert works or found[name].remedy
        record_property(name, "works" if works else "no")


def test_doctor_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "advice", "counter"),
    [
        ("MADV_POPULATE_WRITE", mman.MADV_POPULATE_WRITE, "Rss"),
        ("MADV_COLLAPSE", mman.MADV_COLLAPSE, "AnonHugePages"),
    ],
)
def test_of_madvise(name: str, advice: int, counter: str, record_property) -> None:
    """The call has its documented effect, or the kernel does not support it."""
    with iobmd.allocate(2 * HUGE_PAGE_SIZE, wired=False) as buffer:
        address = -(-buffer.getBytesNoCopy() // HUGE_PAGE_SIZE) * HUGE_PAGE_SIZE
        mman.advise(address, HUGE_PAGE_SIZE, mman.MADV_NOHUGEPAGE if counter == "Rss" else mman.MADV_HUGEPAGE)
        buffer.writeBytes(address - buffer.getBytesNoCopy(), b"x")
        try:
            mman.advise(address, HUGE_PAGE_SIZE, advice)
        except OSError as error:
            assert error.errno == errno.EINVAL
            answer = f"no ({os.strerror(errno.EINVAL)})"
        else:
            assert kernel.smaps(address)[counter] >= HUGE_PAGE_SIZE
            answer = "works"
    record_property(name, answer)
