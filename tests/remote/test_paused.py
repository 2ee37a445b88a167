"""Tasks whose cgroup is frozen, as by `docker pause`, and tasks whose main thread has exited."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import kernel
from support.targets import ProgramResources, Target, build, check_unchanged, in_call, until

import iobmd
from iobmd import IOMapOptions, IOMemoryDescriptor, IOReturn, IOReturnError, Wiring, procfs
from iobmd._native import tracer as native
from iobmd.errors import TaskTimeoutError
from iobmd.remote import session
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
SIZE = 16 * MIB

pytestmark = [pytest.mark.needs("compiler", "root"), pytest.mark.usefixtures("nothing_left")]


class Freezer:
    """A cgroup of the freezer, of version 1 or 2, with one task."""

    def __init__(self, mount: Path, kind: str, pid: int) -> None:
        self._root, self._pid, self._v2 = mount, pid, kind == "cgroup2"
        self.group = mount / f"iobmd-test-{os.getpid()}"
        self.group.mkdir()
        (self.group / "cgroup.procs").write_text(str(pid))

    def freeze(self) -> None:
        (self.group / ("cgroup.freeze" if self._v2 else "freezer.state")).write_text("1" if self._v2 else "FROZEN")
        assert until(self.is_frozen)

    def is_frozen(self) -> bool:
        if self._v2:
            return "frozen 1" in (self.group / "cgroup.events").read_text()
        return (self.group / "freezer.state").read_text() == "FROZEN\n"

    def thaw(self) -> None:
        (self.group / ("cgroup.freeze" if self._v2 else "freezer.state")).write_text("0" if self._v2 else "THAWED")

    def end(self) -> None:
        self.thaw()
        (self._root / "cgroup.procs").write_text(str(self._pid))
        assert until(lambda: not (self.group / "cgroup.procs").read_text())
        self.group.rmdir()


@contextlib.contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """Mount the hierarchy of version 1's freezer ("cgroup"), or that of version 2 ("cgroup2")."""
    options = ["-o", "freezer"] if kind == "cgroup" else []
    done = subprocess.run(
        ["mount", "-t", kind, *options, "none", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"the kernel has no freezer of {kind}: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def target() -> Iterator[Target]:
    with Target([build("paused"), "counts"]) as program:
        yield program


@pytest.fixture(params=["cgroup", "cgroup2"])
def freezer(request: pytest.FixtureRequest, tmp_path: Path, target: Target) -> Iterator[Freezer]:
    with mounted(request.param, tmp_path) as mount:
        group = Freezer(mount, request.param, target.pid)
        try:
            yield group
        finally:
            group.end()


def switches(pid: int) -> dict[str, list[str]]:
    """Return the counters of a frozen task's threads; a thread counts as frozen shortly before it no longer runs."""
    threads = [int(thread.name) for thread in Path(f"/proc/{pid}/task").iterdir()]
    assert until(lambda: not any(in_call(thread) == "running" for thread in threads))
    return {
        thread.name: [line for line in (thread / "status").read_text().splitlines() if "ctxt_switches" in line]
        for thread in Path(f"/proc/{pid}/task").iterdir()
    }


def test_frozen_copy_of_a_paused_task(target: Target, freezer: Freezer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen task is already stopped: its memory is copied without a stop, and it remains paused."""
    address = int(target.line())
    freezer.freeze()
    before = switches(target.pid)
    with monkeypatch.context() as patch:
        patch.delattr(session, "Session")  # an attempt to stop it would take 2 s
        buffer = iobmd.copy(target.pid, address, SIZE, freeze=True, wired=False)
    with buffer:
        data = buffer.readBytes(0, SIZE)
        assert buffer.source_stopped_ns == 0
    assert freezer.is_frozen()
    assert switches(target.pid) == before, "it ran"
    assert data == iobmd.Task(target.pid).read(address, SIZE)
    freezer.thaw()
    assert until(lambda: iobmd.Task(target.pid).read(address, 8) != data[:8])
    with iobmd.copy(target.pid, address, SIZE, freeze=True, wired=False) as buffer:
        assert buffer.source_stopped_ns > 0, "it is no longer paused"


def test_thawed_during_the_copy(target: Target, freezer: Freezer) -> None:
    """A task that is thawed during the copy is stopped like any other, and the copy is still as of one moment."""
    address = int(target.line())
    thawed: list[int] = []

    def thaw(copied: int) -> None:
        thawed.append(copied)
        freezer.thaw()
        time.sleep(0.01)

    for _ in range(50):  # until this thread, which reports the progress, copies a part of it
        freezer.freeze()
        with iobmd.copy(target.pid, address, SIZE, freeze=True, wired=False, progress=thaw) as buffer:
            with memoryview(buffer) as view:
                counts = [int.from_bytes(view[at : at + 8], "little") for at in range(0, SIZE, kernel.PAGE)]
            assert bool(buffer.source_stopped_ns) == bool(thawed)
        if thawed:
            break
    assert thawed
    assert counts == sorted(counts, reverse=True)
    assert counts[0] - counts[-1] <= 1


def test_calls_in_a_paused_task(target: Target, freezer: Freezer) -> None:
    """No call can be made in the task: the error names the frozen cgroup, and the command that thaws it."""
    address = int(target.line())
    before = ProgramResources.of(target.pid)
    freezer.freeze()
    with IOMemoryDescriptor.withAddressRange(address, MIB, 3, target.pid) as memory:
        for call in (lambda: iobmd.allocate(PAGE_SIZE, task=target.pid, wired=False), memory.prepare):
            begin = time.monotonic()
            with pytest.raises(IOReturnError, match="thaw it") as caught:
                call()
            assert time.monotonic() - begin < 8
            assert caught.value.code == IOReturn.kIOReturnTimeout
            assert f"/{freezer.group.name} is frozen" in str(caught.value)
        freezer.thaw()
        memory.prepare()
        memory.complete()
    check_unchanged(target.pid, before)


def state(pid: int) -> str:
    """Return the state letter of a process in /proc."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def stopped_tracer(task: int) -> int:
    """Stop the tracer of a task while a thread of the task is stopped, and return the tracer's pid."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        tracer = int(Path(f"/proc/{task}/status").read_text().partition("\nTracerPid:\t")[2].split()[0])
        if not tracer:
            continue
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it has ended
            os.kill(tracer, signal.SIGSTOP)
            until(lambda stopped=tracer: state(stopped) in "TZ")
            if state(task) == "t":
                return tracer
            os.kill(tracer, signal.SIGCONT)
    pytest.fail("no stop was seen")


@pytest.mark.parametrize("freezer", ["cgroup"], indirect=True)
def test_paused_in_the_middle_of_a_stop(target: Target, freezer: Freezer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call fails in time, and the thread's registers and signal mask are restored once the task is thawed."""
    address = int(target.line())
    monkeypatch.setattr(native, "LIMIT", 3.0)
    task = iobmd.Task(target.pid)
    mask = procfs.status(target.pid)["SigBlk"]
    before = ProgramResources.of(target.pid)
    raised: list[IOReturnError] = []

    def make_guests() -> None:
        while not raised:
            try:
                session.with_guest(task, lambda _guest: None)
            except IOReturnError as error:
                raised.append(error)

    maker = threading.Thread(target=make_guests)
    maker.start()
    try:
        tracer = stopped_tracer(target.pid)
        freezer.freeze()
        os.kill(tracer, signal.SIGCONT)
        maker.join(20)
        assert raised, "it waits"
    finally:
        raised.append(TaskTimeoutError("over"))
        freezer.thaw()
        maker.join()
    # The second code, if the end of the previous session was paused: its tracer waits for the thaw.
    assert raised[0].code in (IOReturn.kIOReturnTimeout, IOReturn.kIOReturnNotPermitted)
    assert until(lambda: not Path(f"/proc/{tracer}").exists() or state(tracer) == "Z")
    assert procfs.status(target.pid)["SigBlk"] == mask
    count = task.read(address, 8)
    assert until(lambda: task.read(address, 8) != count)
    check_unchanged(target.pid, before)
    session.with_guest(task, lambda _guest: None)
    assert not Path(f"/proc/{tracer}").exists()


def test_a_task_whose_main_thread_has_exited() -> None:
    program = build("paused")
    with Target([program, "alone"]) as target:
        address = int(target.line())
        assert until(lambda: Path(f"/proc/{target.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        (thread,) = {path.name for path in Path(f"/proc/{target.pid}/task").iterdir()} - {str(target.pid)}
        before = Path(f"/proc/{thread}/maps").read_text(), os.listdir(f"/proc/{thread}/fd")  # noqa: PTH208
        with IOMemoryDescriptor.withAddressRange(address, MIB, 3, target.pid) as memory:
            memory.prepare()
            assert memory.wiring is Wiring.PINNED
            assert kernel.status("VmPin", thread) >= MIB
            memory.complete()
        for size in (PAGE_SIZE, SIZE):
            with iobmd.copy(target.pid, address, size, freeze=True, wired=False) as buffer:
                assert buffer.readBytes(0, size) == b"x" * size
        with iobmd.allocate(PAGE_SIZE, shared=True) as shared:
            shared.writeBytes(0, b"seen")
            try:
                mapped = shared.createMappingInTask(target.pid, 0, IOMapOptions.kIOMapAnywhere)
            except IOReturnError as error:
                assert error.code == IOReturn.kIOReturnUnsupported
                assert "6.9" in str(error)
            else:
                assert iobmd.Task(target.pid).read(mapped.getAddress(), 4) == b"seen"
                mapped.unmap()
        after = Path(f"/proc/{thread}/maps").read_text(), os.listdir(f"/proc/{thread}/fd")  # noqa: PTH208
        assert after == before
