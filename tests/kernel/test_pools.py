"""Large wired memory: progress, interrupts, huge pages without compaction, refusals before the OOM killer."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import kernel
from support.child import in_child
from support.threads import on_one_processor

import iobmd
from iobmd import IOReturn, IOReturnError, Wiring
from iobmd.host import zoneinfo
from iobmd.memory import populate
from iobmd.units import HUGE_PAGE_SIZE

MIB = 1 << 20
SIZE = 96 * MIB  # above `populate.LARGE`, in several chunks

pytestmark = [pytest.mark.needs("memlock"), pytest.mark.usefixtures("nothing_left")]


@pytest.mark.parametrize("keywords", [{}, {"shared": True}, {"wired": False}, {"contiguous": True}], ids=str)
def test_progress_ends_with_the_size(keywords: dict[str, bool]) -> None:
    size = 2 * MIB - 5 if keywords else SIZE - 5
    seen: list[tuple[int, int]] = []
    with iobmd.allocate(size, progress=lambda done: seen.append((done, threading.get_ident())), **keywords):
        pass
    done = [bytes_ for bytes_, _thread in seen]
    assert {thread for _bytes, thread in seen} == {threading.get_ident()}
    assert done[-1] == size
    assert done[:-1] == sorted(done[:-1])


def test_progress_of_each_chunk() -> None:
    """On one processor no other thread populates a chunk, however busy the machine is."""
    done: list[int] = []
    with on_one_processor():
        iobmd.allocate(SIZE, progress=done.append).free()
    assert len(done) >= 4
    assert done == sorted(done)


def test_small_memory_reports_its_end() -> None:
    seen: list[int] = []
    iobmd.allocate(100, progress=seen.append).free()
    assert seen == [100]


@pytest.mark.parametrize("kind", [LookupError, PermissionError])
@pytest.mark.parametrize("shared", [False, True])
def test_an_exception_of_the_callback_ends_it(shared: bool, kind: type[Exception]) -> None:
    """It is raised as it is, although an OSError may be one of the kernel's."""

    def stop(_done: int) -> None:
        raise kind(1, "of the caller")

    with pytest.raises(kind, match="of the caller"):
        iobmd.allocate(SIZE, progress=stop, shared=shared)


def test_an_interrupt_ends_it() -> None:
    seen: list[int] = []

    def interrupt(done: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)

    def allocate() -> tuple[str, int]:
        try:
            iobmd.allocate(SIZE, progress=interrupt)
        except KeyboardInterrupt:
            return "interrupted", kernel.status("VmLck")
        return "allocated", 0

    signal_of_python = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with on_one_processor():  # this thread populates several chunks
            assert allocate() == ("interrupted", kernel.status("VmLck"))
    finally:
        signal.signal(signal.SIGINT, signal_of_python)
    assert seen[-1] < SIZE


def test_all_processors_populate() -> None:
    threads = set()

    def look(_done: int) -> None:
        threads.update(Path("/proc/self/task").iterdir())

    before = set(Path("/proc/self/task").iterdir())
    deadline = time.monotonic() + 30
    wanted = len(os.sched_getaffinity(0)) - 1
    while len(threads - before) < wanted and time.monotonic() < deadline:  # one thread may do all of the work
        iobmd.allocate(SIZE, progress=look).free()
    assert len(threads - before) >= wanted


@pytest.mark.parametrize("free_mib", [0, 32])
def test_small_pages_where_no_huge_pages_are_free(monkeypatch: pytest.MonkeyPatch, free_mib: int) -> None:
    """The kernel would otherwise compact memory in each page fault. All of it is one area afterwards."""
    counts = [2 * free_mib * MIB + populate._FreeHugePages._watermark()]  # half of the free memory is relied on
    monkeypatch.setattr(zoneinfo, "free_in_blocks", lambda _size, _node: counts.pop() if counts else 0)
    with iobmd.allocate(SIZE) as buffer:
        area = kernel.smaps(buffer.getBytesNoCopy())
        assert area["Rss"] == area["Size"] == area["Locked"] == SIZE
        assert area["AnonHugePages"] <= free_mib * MIB + HUGE_PAGE_SIZE  # the first is populated in advance
        assert buffer.wiring in (Wiring.PINNED, Wiring.RESIDENT)
        assert not any(memoryview(buffer)[:: HUGE_PAGE_SIZE // 8])


@pytest.mark.needs("memory_cgroup")
def test_refused_while_another_takes_the_rest(memory_cgroup: Callable[[int], Path]) -> None:
    """The free memory is checked again while a pool is populated: the kernel would kill a process of the cgroup."""
    procs = memory_cgroup(512 * MIB)

    def allocate() -> tuple[IOReturn, str, int]:
        procs.write_text(str(os.getpid()))
        taken: list[bytearray] = []

        def fill(_done: int) -> None:
            if not taken:
                taken.append(bytearray(b"x") * (256 * MIB))
            time.sleep(0.02)

        try:
            with on_one_processor():  # `fill` is called after the first chunk
                iobmd.allocate(384 * MIB, progress=fill)
        except IOReturnError as error:
            return error.code, str(error), kernel.status("VmLck")
        raise AssertionError("384 MiB and 256 MiB were allocated within 512 MiB")

    code, message, locked = in_child(allocate)
    assert code is IOReturn.kIOReturnNoMemory
    assert "512 MiB" in message
    assert locked == 0


def test_a_node_without_room_is_refused_at_once() -> None:
    total = sum(zone.present for zone in zoneinfo.zones() if zone.node == 0)
    before = kernel.status("VmHWM")
    with pytest.raises(IOReturnError) as caught:
        iobmd.allocate(total, node=0)
    assert caught.value.code in (IOReturn.kIOReturnNoResources, IOReturn.kIOReturnNoMemory)
    assert kernel.status("VmHWM") < before + 64 * MIB
