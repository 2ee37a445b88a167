"""Copies as of one moment: from a snapshot, and from a stopped task."""

import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import kernel
from support.child import sleeping
from support.targets import build, children, until

import iobmd
from iobmd import IOReturn, IOReturnError, procfs
from iobmd.remote import session
from iobmd.units import PAGE_SIZE

MIB = 1 << 20


@pytest.fixture(scope="module")
def counter() -> Path:
    return build("freeze")


class Source:
    """The running program."""

    def __init__(self, program: Path, size: int, kind: str) -> None:
        self.process = subprocess.Popen([program, str(size), kind], stdout=subprocess.PIPE)
        assert self.process.stdout
        self.address, self.size = int(self.process.stdout.readline()), size
        self.pid = self.process.pid

    def end(self) -> None:
        assert self.process.poll() is None, "it did not survive"
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(counter: Path) -> Iterator[object]:
    started: list[Source] = []

    def run(size: int, kind: str) -> Source:
        started.append(Source(counter, size, kind))
        return started[-1]

    yield run
    for one in started:
        one.end()


def is_of_one_moment(data: memoryview, size: int) -> bool:
    numbers = [struct.unpack_from("=Q", data, page)[0] for page in range(0, size, kernel.PAGE)]
    halves = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]
    return all(half == sorted(half, reverse=True) and half[0] - half[-1] <= 1 for half in halves)


@pytest.mark.needs("compiler")
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("kind", ["small", "huge", "shared", "dontfork", "wipeonfork"])
def test_of_one_moment(start, kind: str) -> None:  # type: ignore[no-untyped-def]
    size = 32 * MIB
    source = start(size, kind)
    torn = 0
    for attempt in range(50):
        with iobmd.copy(source.pid, source.address, size, freeze=True, wired=False) as buffer:
            with memoryview(buffer) as view:
                assert is_of_one_moment(view, size)
            assert 0 < buffer.source_stopped_ns < 5 * 10**9
        with iobmd.copy(source.pid, source.address, size, wired=False) as buffer, memoryview(buffer) as view:
            torn += not is_of_one_moment(view, size)  # on a busy machine, the program may not run during a copy
            assert buffer.source_stopped_ns == 0
        if torn and attempt >= 4:
            break
    assert torn, "the test proves nothing: a copy without freeze is of one moment too"
    assert not children(source.pid), "a snapshot was left behind"


@pytest.mark.needs("compiler", "root")  # /proc/PID/map_files
@pytest.mark.usefixtures("nothing_left")
def test_shared_memory_of_a_snapshot_of_one_moment(start) -> None:  # type: ignore[no-untyped-def]
    source = start(32 * MIB, "shared")
    torn = 0
    for attempt in range(50):
        with iobmd.snapshot(source.pid, freeze_shared=32 * MIB) as snapshot:
            frozen = bytearray(32 * MIB)
            snapshot.readinto(source.address, frozen)
            assert is_of_one_moment(memoryview(frozen), 32 * MIB)
            # On a busy machine, the program may not run during a read.
            torn += not is_of_one_moment(memoryview(iobmd.Task(source.pid).read(source.address, 32 * MIB)), 32 * MIB)
        if torn and attempt >= 4:
            return
    raise AssertionError("the test proves nothing: a plain read is of one moment too")


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("timeout", [None, 20.0])
def test_the_destination_may_have_huge_pages(start, timeout: float | None) -> None:  # type: ignore[no-untyped-def]
    """Otherwise faulting it in would prolong the stop, as it did with a time limit."""
    source = start(32 * MIB, "shared")
    with iobmd.copy(source.pid, source.address, 32 * MIB, freeze=True, wired=False, timeout=timeout) as buffer:
        first, end = buffer.getBytesNoCopy(), buffer.getBytesNoCopy() + 32 * MIB
        inside = [(area, flags) for area, flags in procfs.vm_flags() if first < area.end and area.start < end]
        permitted = sum(min(area.end, end) - max(area.start, first) for area, flags in inside if "hg" in flags)
        assert permitted >= 28 * MIB, inside
        with memoryview(buffer) as view:
            assert is_of_one_moment(view, 32 * MIB)


@pytest.mark.needs("compiler")
def test_how_it_is_done(start, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Private memory is copied from a snapshot, shared memory and memory that a child lacks from the stopped task."""
    made: list[int] = []
    make = session.Session.snapshot

    def count(self: session.Session, patience: float, **how: Any) -> int:
        made.append(make(self, patience, **how))
        return made[-1]

    monkeypatch.setattr(session.Session, "snapshot", count)
    for kind, snapshots in (("small", 1), ("shared", 0), ("dontfork", 0), ("wipeonfork", 0)):
        source = start(8 * MIB, kind)
        made.clear()
        iobmd.copy(source.pid, source.address, 8 * MIB, freeze=True, wired=False).free()
        assert len(made) == snapshots, kind
        assert not any(Path(f"/proc/{pid}").exists() for pid in made)
    made.clear()
    iobmd.copy(source.pid, source.address, PAGE_SIZE, freeze=True, wired=False).free()
    assert not made, "copying a page is faster than creating a snapshot"


@pytest.mark.needs("compiler")
def test_a_child_that_cannot_be_made(start, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """If there can be no child, the task is stopped during the copy."""

    def refuse(_self: session.Session, _patience: float, **_options: object) -> int:
        raise OSError(11, "no more processes")

    monkeypatch.setattr(session.Session, "snapshot", refuse)
    source = start(8 * MIB, "small")
    with (
        iobmd.copy(source.pid, source.address, 8 * MIB, freeze=True, wired=False) as buffer,
        memoryview(buffer) as view,
    ):
        assert is_of_one_moment(view, 8 * MIB)


def test_refused() -> None:
    with pytest.raises(IOReturnError, match="itself") as caught:
        iobmd.copy(os.getpid(), PAGE_SIZE, PAGE_SIZE, freeze=True, wired=False)
    assert caught.value.code == IOReturn.kIOReturnUnsupported
    with sleeping() as target:
        for address in (0, 1 << 46):
            with pytest.raises(IOReturnError) as caught:
                iobmd.copy(target.pid, address, 1 << 20, freeze=True, wired=False)
            assert caught.value.code == IOReturn.kIOReturnVMError
            assert caught.value.address == address
        assert target.poll() is None
        assert not children(target.pid)


@pytest.mark.needs("compiler")
def test_stopped_process_stays_stopped(start) -> None:  # type: ignore[no-untyped-def]
    source = start(8 * MIB, "small")
    stopped = lambda: "T (stopped)" in Path(f"/proc/{source.pid}/status").read_text()  # noqa: E731
    os.kill(source.pid, signal.SIGSTOP)
    assert until(stopped)
    with iobmd.copy(source.pid, source.address, 8 * MIB, freeze=True, wired=False) as buffer:
        assert buffer.readBytes(0, 8 * MIB) == iobmd.Task(source.pid).read(source.address, 8 * MIB)
    assert until(stopped), "released by the tracer, its threads must run until they stop again"
    time.sleep(0.05)
    assert stopped()
    os.kill(source.pid, signal.SIGCONT)


@pytest.mark.needs("compiler")
def test_no_memory_is_held_by_the_snapshot(start) -> None:  # type: ignore[no-untyped-def]
    """The snapshot holds no descriptors: a file that the task closes is closed, although a snapshot is being read."""
    source = start(8 * MIB, "small")
    before = len(list(Path(f"/proc/{source.pid}/fd").iterdir()))
    seen: list[int] = []

    def look(_copied: int) -> None:
        seen.append(len(children(source.pid).split()))

    iobmd.copy(source.pid, source.address, 8 * MIB, freeze=True, wired=False, progress=look).free()
    *during, _after = seen
    assert set(during) == {1}
    assert len(list(Path(f"/proc/{source.pid}/fd").iterdir())) == before
