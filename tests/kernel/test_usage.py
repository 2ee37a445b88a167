"""`iobmd.statistics` compared with the kernel's counters, and the reports of the logger "iobmd"."""

import errno
import gc
import logging
import subprocess
import sys
from collections.abc import Callable

import pytest
from support import kernel, rawmemory
from support.child import in_child
from support.source_process import SourceProcess

import iobmd
from iobmd.host import pfns_visible
from iobmd.units import PAGE_SIZE

SIZE = 64 << 10


def messages(action: object, *, name: str = "iobmd") -> list[str]:
    """Return the messages that are logged at DEBUG while `action` runs."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        action()  # type: ignore[operator]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return found


def test_statistics_are_those_of_the_kernel() -> None:
    gc.collect()
    before, pins, locked = iobmd.statistics(), kernel.status("VmPin"), kernel.status("VmLck")
    with (
        iobmd.allocate(SIZE, wired=False) as pageable,
        iobmd.allocate(SIZE + 1, shared=True) as wired,
        wired.map(iobmd.kIOMapUnique),
        wired.map(),
    ):
        now = iobmd.statistics()
        assert now.maps - before.maps == 2
        assert now.prepared == before.prepared
        if wired.wiring is iobmd.Wiring.PINNED:
            assert now.pinned.size - before.pinned.size == kernel.status("VmPin") - pins == SIZE + PAGE_SIZE
            pageable.prepare()
            prepared = iobmd.statistics()
            assert prepared.prepared - before.prepared == 1
            assert prepared.pinned.buffers - before.pinned.buffers == 2
            assert prepared.pinned.size - before.pinned.size == kernel.status("VmPin") - pins
            pageable.complete()
        assert now.pageable.size - before.pageable.size == SIZE
        wired_bytes = now.pinned.size + now.resident.size - before.pinned.size - before.resident.size
        assert wired_bytes == kernel.status("VmLck") - locked
        view = memoryview(pageable)
    assert iobmd.statistics().pageable.buffers == before.pageable.buffers + 1  # the view holds its memory
    view.release()
    assert iobmd.statistics() == before


def test_maps_of_parts_and_concatenations_count_once() -> None:
    gc.collect()
    before = iobmd.statistics().maps
    with (
        iobmd.allocate(SIZE, shared=True) as one,
        iobmd.allocate(SIZE, shared=True) as other,
        iobmd.IOSubMemoryDescriptor.withSubRange(one, PAGE_SIZE, PAGE_SIZE, 3) as part,
        iobmd.IOMultiMemoryDescriptor.withDescriptors([one, other], 3) as both,
        part.map(),
        part.map(iobmd.kIOMapUnique),
        both.map(),
    ):
        assert iobmd.statistics().maps - before == 3
        with one.map(iobmd.kIOMapUnique) as redirected:
            redirected.redirect(other)
            assert iobmd.statistics().maps - before == 4
    assert iobmd.statistics().maps == before


def test_a_forked_child_has_no_wired_memory() -> None:
    with iobmd.allocate(SIZE), iobmd.allocate(SIZE, wired=False):
        statistics = in_child(iobmd.statistics)
    assert statistics.pinned == statistics.resident == (0, 0)
    assert statistics.pageable.buffers >= 1


@pytest.mark.parametrize("shared", [False, True])
def test_a_refused_pin_is_reported_with_the_reason(shared: bool) -> None:
    def allocate() -> tuple[list[str], str]:
        wiring = []

        def action() -> None:
            with iobmd.allocate(SIZE, shared=shared) as buffer:
                wiring.append(buffer.wiring.name)

        return messages(action), wiring[0]

    denied = {"io_uring_setup": errno.EPERM, "io_uring_register": errno.EPERM}
    reported, wiring = in_child(allocate, deny=denied)
    if wiring == "PINNED":
        assert "hugetlb" in reported[-1]
        return
    assert wiring == "RESIDENT"
    assert all(line.startswith("DEBUG ") for line in reported)
    assert "cannot pin 64 KiB" in reported[0]
    assert "io_uring" in reported[0]
    assert "resident (mlock), not pinned" in reported[-1]


def test_no_search_for_hugetlb_pages_is_reported_at_an_address() -> None:
    """They cannot be moved there, so that none is taken from a pool, however many are free."""

    def allocate() -> list[str]:
        free = rawmemory.map_memory(1 << 30)
        rawmemory.unmap(free, 1 << 30)  # others map its end first
        return messages(lambda: iobmd.allocate(SIZE, address=free).free())

    first, last = in_child(allocate, deny={"io_uring_setup": errno.EPERM, "io_uring_register": errno.EPERM})
    assert "cannot pin 64 KiB" in first
    assert "its address rules out hugetlb pages" in first
    assert last == "DEBUG memory of 64 KiB is resident (mlock), not pinned"


@pytest.mark.needs("root")
def test_a_snapshot_is_reported(start_source: Callable[..., SourceProcess]) -> None:
    source = start_source(32 << 20)
    region = source["anonymous"]
    reported = messages(lambda: iobmd.copy(source.pid, *region, freeze=True, wired=False).free())
    assert any(f"task {source.pid}" in line and "snapshot" in line for line in reported), reported
    [reported_once] = messages(lambda: iobmd.snapshot(source.pid).close())
    assert reported_once.startswith(f"DEBUG a snapshot of task {source.pid} was made, which stopped it for ")


def test_a_search_is_reported() -> None:
    if not pfns_visible():
        pytest.skip("frame numbers are hidden, and nothing is searched")
    reported = messages(lambda: iobmd.allocate(SIZE, contiguous=True).free())
    assert any("contiguous physical memory of 64 KiB" in line and "found in" in line for line in reported), reported


def test_the_purger_is_reported_once() -> None:
    program = """
import logging, sys, iobmd
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(name)s %(levelname)s %(message)s")
for _ in range(2):
    iobmd.allocate(4096, wired=False, shared=True, purgeable=True).free()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.count("iobmd DEBUG the thread that purges volatile shared memory is started") == 1


def test_without_logging_nothing_is_loaded_and_nothing_printed() -> None:
    program = "import sys, iobmd; iobmd.allocate(4096).free(); print('logging' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
