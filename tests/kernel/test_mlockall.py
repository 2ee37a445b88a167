"""Processes that have called mlockall(MCL_CURRENT | MCL_FUTURE), this one and others, and their RLIMIT_MEMLOCK."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest
from support import kernel
from support.child import NOBODY, in_child
from support.errors import refusal

import iobmd
from iobmd import IOMapOptions, IOReturn, Wiring, procfs
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
MCL_CURRENT, MCL_FUTURE = 1, 2
VOLATILE, NON_VOLATILE = iobmd.IOPurgeable.kIOMemoryPurgeableVolatile, iobmd.IOPurgeable.kIOMemoryPurgeableNonVolatile
Buffer = iobmd.IOBufferMemoryDescriptor
libc = ctypes.CDLL(None, use_errno=True)


def lock_all(flags: int = MCL_CURRENT | MCL_FUTURE) -> None:
    assert libc.mlockall(flags) == 0, os.strerror(ctypes.get_errno())


class Counters(NamedTuple):
    """Return a counter of smaps for a buffer, in bytes."""

    resident: int
    huge: int
    locked: int


def counters(buffer: Buffer) -> Counters:
    found = kernel.smaps(buffer.getBytesNoCopy())
    return Counters(found["Rss"], found["AnonHugePages"] + found["ShmemPmdMapped"], found["Locked"])


WIRED: dict[str, dict[str, object]] = {
    "plain": {"size": 4 * MIB},
    "large": {"size": 32 * MIB},
    "contiguous": {"size": 8 * MIB, "contiguous": True},
    "masked": {"size": 4 * MIB, "physical_mask": (1 << 48) - 1},
    "shared": {"size": 4 * MIB, "shared": True},
    "shared and contiguous": {"size": 8 * MIB, "shared": True, "contiguous": True},
}


@pytest.mark.needs("root", "frames", "memlock")
@pytest.mark.parametrize("kind", WIRED)
def test_wired_memory_of_a_process_that_locks_all(kind: str) -> None:
    """Huge pages and runs as without mlockall: mmap must not fault in small pages before madvise is called."""

    def allocate() -> tuple[Wiring, int, int]:
        lock_all()
        with iobmd.allocate(**WIRED[kind]) as buffer:  # type: ignore[arg-type]
            frames = [entry & kernel.FRAME for entry in kernel.entries(buffer.getBytesNoCopy(), len(buffer))]
            runs = 1 + sum(after != before + 1 for before, after in itertools.pairwise(frames))
            return buffer.wiring, counters(buffer).huge, runs

    wiring, huge, runs = in_child(allocate)
    assert wiring is Wiring.PINNED
    assert huge >= 2 * MIB
    if "contiguous" in kind:
        assert runs == 1


@pytest.mark.needs("memlock")
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_pageable_memory_of_a_process_that_locks_all(shared: bool) -> None:
    def allocate() -> list[Counters]:
        lock_all()
        found = []
        with iobmd.allocate(64 * MIB, wired=False, shared=shared) as buffer:
            found.append(counters(buffer))
            buffer.writeBytes(0, b"x")
            found.append(counters(buffer))
            buffer.prepare()
            buffer.complete()
            found.append(counters(buffer))
        return found

    fresh, touched, prepared = in_child(allocate)
    assert fresh == (0, 0, 0)
    assert 0 < touched.resident <= 2 * MIB
    assert prepared.resident == 64 * MIB
    assert touched.locked == prepared.locked == 0


@pytest.mark.needs("memlock")
def test_maps_of_a_process_that_locks_all() -> None:
    def change() -> tuple[int, int, bytes]:
        lock_all()
        with (
            iobmd.allocate(64 * MIB, wired=False, shared=True) as one,
            iobmd.allocate(64 * MIB, wired=False, shared=True) as other,
            one.map(IOMapOptions.kIOMapUnique) as view,
        ):
            resident = kernel.smaps(view.getAddress())["Rss"]
            other.writeBytes(0, b"other")
            view.redirect(other)
            locked = kernel.smaps(view.getAddress())["Locked"]
            return resident, locked, bytes(memoryview(view)[:5])

    assert in_child(change) == (0, 0, b"other")


@pytest.mark.needs("memlock")
def test_copies_of_a_process_that_locks_all_are_in_huge_pages() -> None:
    def copy() -> list[int]:
        with iobmd.allocate(16 * MIB) as source:
            source.writeBytes(0, b"s" * len(source))
            lock_all()
            huge: list[int] = []
            for wired in (False, True):
                with iobmd.copy(os.getpid(), source.getBytesNoCopy(), 16 * MIB, wired=wired) as copied:
                    assert copied.readBytes(8 * MIB, 2) == b"ss"
                    start = copied.getBytesNoCopy()
                    areas = [
                        (area, found) for area, found in procfs.smaps() if start <= area.start < start + 16 * MIB
                    ]
                    huge.append(sum(counters["AnonHugePages"] for _area, counters in areas))
        return huge

    assert in_child(copy) == [16 * MIB] * 2


@pytest.mark.needs("memlock")
def test_guard_pages_of_a_process_that_locks_all() -> None:
    def allocate() -> tuple[int, int]:
        lock_all()
        with Buffer.inTaskWithGuardPages(iobmd.kernel_task, 0, MIB) as buffer:
            start, end = buffer.getBytesNoCopy(), buffer.getBytesNoCopy() + MIB
            beside = [
                flags for area, flags in procfs.vm_flags() if start in (area.start, area.end) or area.start == end
            ]
            return sum("lo" in flags for flags in beside), len(beside)

    assert in_child(allocate) == (1, 3), "the guard pages do not count against the limit"


@pytest.mark.needs("memlock")
@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after its allocation"])
def test_purgeable_memory_of_a_process_that_locks_all(late: bool, shared: bool) -> None:
    def change() -> tuple[int, bytes, int]:
        if not late:
            lock_all()
        with iobmd.allocate(4 * MIB, wired=False, purgeable=True, shared=shared) as buffer:
            buffer.writeBytes(0, b"p" * len(buffer))
            if late:
                lock_all()
            buffer.setPurgeable(VOLATILE)
            old = buffer.setPurgeable(NON_VOLATILE)
            intact = buffer.readBytes(2 * MIB, 2)
            buffer.setPurgeable(VOLATILE)
            iobmd.purge()
            return old, intact, buffer.setPurgeable(NON_VOLATILE)

    assert in_child(change) == (VOLATILE, b"pp", iobmd.IOPurgeable.kIOMemoryPurgeableEmpty)


@pytest.mark.parametrize(
    "keywords",
    [{}, {"wired": False}, {"shared": True}, {"wired": False, "shared": True}, {"contiguous": True}],
    ids=str,
)
def test_limit_of_a_process_that_locks_all(keywords: dict[str, object]) -> None:
    """mmap itself fails with EAGAIN there."""

    def allocate() -> tuple[IOReturn, str]:
        lock_all(MCL_FUTURE)
        size = MIB if "contiguous" in keywords else 16 * MIB
        iobmd.allocate(PAGE_SIZE, wired=False).free()
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (MIB // 2, MIB // 2))
        return refusal(lambda: iobmd.allocate(size, **keywords))  # type: ignore[arg-type]

    code, message = in_child(allocate, uid=NOBODY - 5, memlock=8 * MIB)
    assert code is IOReturn.kIOReturnCannotWire
    assert f"RLIMIT_MEMLOCK is {MIB // 2} bytes" in message
    assert "mlockall" in message
    assert "ulimit -l" in message


LOCKER = """
import ctypes, os, resource, sys
if sys.argv[1] == "limited":
    os.setresuid(65534, 65534, 65534)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
assert ctypes.CDLL(None).mlockall({flags}) == 0
if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_MEMLOCK, ({limit}, {limit}))
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def locker(kind: str, flags: int, limit: int = 0) -> Iterator[int]:
    """A program that has called mlockall, perhaps as an ordinary user with a limit."""
    text = LOCKER.format(flags=flags, limit=limit)
    command = [sys.executable, "-c", text, kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout
        try:
            assert program.stdout.readline() == b"ready\n"
            yield program.pid
            assert program.poll() is None
        finally:
            program.kill()


@pytest.mark.needs("root", "memlock")
def test_memory_in_a_task_that_locks_all() -> None:
    """Memory in another task is pageable too: untouched pages do not increase that task's locked memory."""
    with locker("root", MCL_CURRENT | MCL_FUTURE) as pid:
        locked, resident = kernel.status("VmLck", pid), kernel.status("VmRSS", pid)
        with iobmd.allocate(64 * MIB, task=pid, wired=False) as buffer:
            found = kernel.smaps(buffer.getBytesNoCopy(), pid)
            assert found["Rss"] == found["Locked"] == 0
            assert kernel.status("VmLck", pid) == locked
            assert kernel.status("VmRSS", pid) < resident + MIB
            iobmd.Task(pid).write(buffer.getBytesNoCopy(), b"theirs")
            assert buffer.readBytes(0, 6) == b"theirs"
        with iobmd.allocate(4 * MIB, task=pid) as buffer:
            assert buffer.wiring is Wiring.PINNED
            assert kernel.smaps(buffer.getBytesNoCopy(), pid)["Rss"] == 4 * MIB


@pytest.mark.needs("root", "memlock")
def test_limit_of_a_task_that_locks_all() -> None:
    with locker("limited", MCL_FUTURE, limit=MIB) as pid:
        code, message = refusal(lambda: iobmd.allocate(16 * MIB, task=pid))
        assert code is IOReturn.kIOReturnCannotWire, message
        assert f"RLIMIT_MEMLOCK of task {pid} is {MIB} bytes" in message
        assert f"prlimit --pid {pid} --memlock=" in message
