"""The state of the other task after a sudden end: of this program, of a call, or by a time limit."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from ptrace.debugger import PtraceDebugger
from support import kernel
from support.child import in_child, sleeping
from support.targets import Target, build, children, until, until_blocked
from support.threads import collects_without_waiting, running

import iobmd
from iobmd import IOMapOptions, IOReturn, IOReturnError
from iobmd.remote.guest import Call, Guest
from iobmd.remote.session import Session, guard_of
from iobmd.units import PAGE_SIZE

ANYWHERE = IOMapOptions.kIOMapAnywhere
MIB = 1 << 20


@pytest.fixture
def target() -> Iterator[subprocess.Popen[bytes]]:
    with sleeping() as program:
        yield program
        assert program.poll() is None


def maps_by_iobmd(pid: int) -> list[str]:
    """Return the mappings that a task has because of this process; private ones are of /dev/zero."""
    marks = "iobmd", "/dev/zero", " ---p "
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if any(map(line.__contains__, marks))]


def a_buffer(pid: int) -> object:
    return iobmd.allocate(8192, task=pid, wired=False)


def a_shared_buffer(pid: int) -> object:
    return iobmd.allocate(8192, task=pid, wired=False, shared=True)


def a_map(pid: int) -> object:
    return iobmd.allocate(8192, wired=False, shared=True).createMappingInTask(pid, 0, ANYWHERE)


def locked_memory(pid: int) -> object:
    """Read-only memory cannot be pinned in another task."""
    areas = Path(f"/proc/{pid}/maps").read_text().splitlines()
    start = next(line.partition("-")[0] for line in areas if " r--p " in line)
    memory = iobmd.IOMemoryDescriptor.withAddressRange(int(start, 16), PAGE_SIZE, iobmd.kIODirectionOut, pid)
    memory.prepare()
    assert memory.wiring is iobmd.Wiring.RESIDENT
    return memory


def held(pid: int) -> tuple[list[str], int]:
    """Return what a task has because of this process: mappings, and locked bytes."""
    return maps_by_iobmd(pid), kernel.status("VmLck", pid)


@pytest.mark.filterwarnings("ignore:.*never:ResourceWarning")
@pytest.mark.parametrize("make", [a_buffer, a_shared_buffer, a_map, locked_memory])
@pytest.mark.parametrize("in_thread", [False, True], ids=["itself", "another thread"])
def test_a_destructor_waits_for_no_stop(
    target: subprocess.Popen[bytes], make: Callable[[int], object], *, in_thread: bool
) -> None:
    """The collector runs it in a thread that stops the task, or while another one does."""
    before = held(target.pid)
    garbage = [make(target.pid)]
    assert held(target.pid) != before

    assert collects_without_waiting(guard_of(iobmd.Task(target.pid)), garbage, in_thread=in_thread)
    assert held(target.pid) == before


def registers(pid: int) -> dict[str, int]:
    """Read the registers of a thread in its call by python-ptrace, which shares no code with the tracer."""
    until_blocked(pid)  # released by a tracer, it must run until it has begun its call again
    debugger = PtraceDebugger()
    try:
        seen = debugger.addProcess(pid, is_attached=False).getregs()
        return {name: getattr(seen, name) for name, _type in seen._fields_}
    finally:
        debugger.quit()


def test_registers_are_as_before() -> None:
    with Target([sys.executable, "-c", "import signal; print('ready', flush=True); signal.pause()"]) as target:
        before = registers(target.pid)
        with iobmd.allocate(64 << 10, task=target.pid, wired=False) as buffer:
            assert buffer.task_stopped_ns
            assert registers(target.pid) == before
        assert registers(target.pid) == before


@pytest.mark.needs("compiler", "frames")
def test_a_stop_copies_no_page_of_the_stack() -> None:
    """A write to a page that is shared since a fork, also below the stack pointer, would copy it."""
    with Target([build("forked_stack", "-Wl,-z,now")]) as target:
        until_blocked(target.pid)
        pointer = int(Path(f"/proc/{target.pid}/syscall").read_text().split()[-2], 16)
        below = (pointer & -PAGE_SIZE) - 2 * PAGE_SIZE
        before = kernel.frames(below, 3 * PAGE_SIZE, target.pid)
        assert all(before)
        (child,) = children(target.pid).split()
        assert kernel.frames(below, 2 * PAGE_SIZE, int(child)) == before[:2], "the control: they are shared"
        iobmd.allocate(8192, task=target.pid, wired=False).free()
        assert kernel.frames(below, 3 * PAGE_SIZE, target.pid) == before


@pytest.mark.parametrize(
    "script",
    [
        "kept = iobmd.allocate(65536, task=pid, wired=False)",
        "kept = iobmd.allocate(65536, shared=True, wired=False).createMappingInTask(pid, 0, 1)",
        "def f():\n    kept = iobmd.allocate(65536, task=pid, wired=False)\n    raise RuntimeError('a bug')\nf()",
        "import threading, time\n"
        # A traceback of a daemon thread, printed while the interpreter ends, would be a fatal error of Python's.
        "def use():\n    try:\n        while True: iobmd.allocate(4096, task=pid, wired=False).free()\n"
        "    except iobmd.IOReturnError: pass\n"
        "threading.Thread(target=use, daemon=True).start(); time.sleep(0.3)",
    ],
    ids=["buffer", "map", "traceback", "daemon thread"],
)
def test_program_ends_with_memory_there(target: subprocess.Popen[bytes], script: str) -> None:
    before = maps_by_iobmd(target.pid)
    program = f"import iobmd\npid = {target.pid}\n{script}\n"
    done = subprocess.run([sys.executable, "-c", program], timeout=20, capture_output=True, check=False)
    assert done.returncode == ("raise" in script), done.stderr
    if "thread" not in script:  # an operation of a thread that the interpreter ends halfway is not undone
        assert maps_by_iobmd(target.pid) == before


def test_signals_to_the_whole_group(target: subprocess.Popen[bytes]) -> None:
    """timeout(1) and service managers send signals to all processes of a group; the tracer briefly belongs to it."""
    script = (
        "import select, signal, sys, iobmd\n"
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "while not select.select([0], [], [], 0)[0]:\n"
        f"    iobmd.allocate(4096, task={target.pid}, wired=False).free()\n"
        "    print(1, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as program:
        assert program.stdin
        assert program.stdout
        for number in range(200):
            if number % 4 == 0:  # it continues
                program.stdout.readline()
            time.sleep(number % 4 / 1000)
            os.killpg(program.pid, signal.SIGTERM)
        program.stdin.close()
        program.stdout.read()
        assert program.wait(20) == 0
    assert not [line for line in maps_by_iobmd(target.pid) if "iobmd" in line]


@pytest.mark.needs("root")  # otherwise Yama may require the tracer to be a thread of this process
def test_the_tracer_is_scheduled_like_this_process(target: subprocess.Popen[bytes]) -> None:
    """The processes of a new session form a group for the scheduler, which a busy machine may not run for seconds."""

    def tracers() -> list[int]:
        pids = children(os.getpid()).split()
        return [int(pid) for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "iobmd-tracer\n"]

    task = iobmd.Task(target.pid)
    with guard_of(task):
        session = Session(task)
        try:
            assert until(tracers)  # it has its name when it is ready
            assert [(os.getsid(pid), os.getpgid(pid)) for pid in tracers()] == [(os.getsid(0), tracers()[0])]
        finally:
            session.end(failed=False)


def test_free_while_it_is_read(target: subprocess.Popen[bytes]) -> None:
    """The task refuses the call, and the memory remains mapped there."""
    into = bytearray(256 * MIB)
    for _ in range(50):  # until the reader has begun, which may take long on a busy machine
        buffer = iobmd.allocate(256 * MIB, task=target.pid, wired=False, shared=True)
        address, begun = buffer.getBytesNoCopy(), threading.Event()

        def read(buffer: iobmd.IOBufferMemoryDescriptor = buffer, begun: threading.Event = begun) -> None:
            begun.set()
            with contextlib.suppress(iobmd.NotOpenError):  # it was freed before
                buffer.readBytesInto(0, into)

        with running(read):
            begun.wait()
            time.sleep(0.01)
            try:
                buffer.free()
            except iobmd.BusyError:
                assert f"{address:x}-" in Path(f"/proc/{target.pid}/maps").read_text()
                break
    else:
        raise AssertionError("it was never refused")
    buffer.free()
    assert f"{address:x}-" not in Path(f"/proc/{target.pid}/maps").read_text()


@pytest.mark.needs("frames")
@pytest.mark.parametrize("failing", range(1, 11))
def test_a_call_there_fails(target: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Whichever call fails, the results of the previous calls are undone."""
    before = Path(f"/proc/{target.pid}/maps").read_text(), os.listdir(f"/proc/{target.pid}/fd")  # noqa: PTH208
    stop, run = Session.stop, Session._run
    count = 0

    def before_failure(calls: Sequence[Call]) -> Sequence[Call] | None:
        nonlocal count
        for index, call in enumerate(calls):
            count += call.name not in ("munmap", "close")
            if count == failing and call.name not in ("munmap", "close"):
                return calls[:index]
        return None

    def fail_in_thread(self: Session, *calls: Call) -> list[int]:
        if before_failure(calls) is not None:
            raise OSError(errno.ENOMEM, "as if")
        return stop(self, *calls)

    def fail(self: Session, calls: Sequence[Call], deadline: float, may_wait: bool) -> list[int]:
        made = before_failure(calls)
        if made is None:
            return run(self, calls, deadline, may_wait)
        run(self, made, deadline, may_wait)
        raise OSError(errno.ENOMEM, "as if")

    with iobmd.allocate(4 * MIB, shared=True, contiguous=True) as buffer:
        backing = buffer._memory().backing
        assert backing is not None
        shared = backing.shared
        assert shared is not None
        whole, extent = shared.extents, type(shared.extents[0])
        start = whole[0].offset
        shared.extents = (extent(start, 2 * MIB), extent(start + 2 * MIB, whole[0].length - 2 * MIB), *whole[1:])
        monkeypatch.setattr(Session, "stop", fail_in_thread)
        monkeypatch.setattr(Session, "_run", fail)
        try:
            buffer.createMappingInTask(target.pid, 0, ANYWHERE).unmap()
        except IOReturnError as error:
            assert error.code == IOReturn.kIOReturnNoMemory
        else:
            assert failing > 9, "it has to fail"
        monkeypatch.undo()
    after = Path(f"/proc/{target.pid}/maps").read_text(), os.listdir(f"/proc/{target.pid}/fd")  # noqa: PTH208
    assert after == before


@pytest.mark.needs("root")
def test_a_frozen_task(target: subprocess.Popen[bytes], tmp_path: Path) -> None:
    """A task frozen as by docker pause makes no call: the request fails, and the task continues when thawed."""
    subprocess.run(["mount", "-t", "cgroup2", "none", tmp_path], check=True)
    group = tmp_path / f"iobmd-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(target.pid))
        (group / "cgroup.freeze").write_text("1")
        while "frozen 1" not in (group / "cgroup.events").read_text():
            time.sleep(0.01)
        begin = time.monotonic()
        with pytest.raises(IOReturnError, match="frozen") as caught:
            iobmd.allocate(PAGE_SIZE, task=target.pid, wired=False)
        assert caught.value.code == IOReturn.kIOReturnTimeout
        assert time.monotonic() - begin < 8
        (group / "cgroup.freeze").write_text("0")
        iobmd.allocate(PAGE_SIZE, task=target.pid, wired=False).free()
    finally:
        (group / "cgroup.freeze").write_text("0")
        (tmp_path / "cgroup.procs").write_text(str(target.pid))
        group.rmdir()
        subprocess.run(["umount", tmp_path], check=True)


def test_the_last_descriptors_go_while_a_guest_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killing a guest, and making the task reap it, requires descriptors: the tracer has its own."""
    taken: list[int] = []
    run = Guest.run

    def take_all(guest: Guest, *calls: Call, deadline: float | None = None) -> list[int]:
        results = run(guest, *calls, deadline=deadline)
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/", os.O_PATH))
        return results

    def limited() -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        with sleeping() as target:
            with pytest.raises(OSError) as caught:
                iobmd.allocate(8192, task=target.pid, wired=False)
            assert taken, "the control"
            for fd in taken:
                os.close(fd)
            assert not children(target.pid)
        return str(caught.value)

    monkeypatch.setattr(Guest, "run", take_all)
    print(in_child(limited))


@contextlib.contextmanager
def no_free_descriptor() -> Iterator[None]:
    """Use up the file descriptors of this process."""
    with contextlib.ExitStack() as taken:
        with contextlib.suppress(OSError):
            while True:
                taken.callback(os.close, os.open("/", os.O_PATH))
        yield


def test_memory_is_not_left_for_lack_of_a_descriptor() -> None:
    def limited() -> None:
        with sleeping() as target:
            buffer = iobmd.allocate(8192, task=target.pid, wired=False)
            mapped = maps_by_iobmd(target.pid)
            with no_free_descriptor(), pytest.raises(IOReturnError) as caught:
                buffer.free()
            assert caught.value.code == IOReturn.kIOReturnNoResources
            assert "ulimit -n" in str(caught.value)
            assert maps_by_iobmd(target.pid) == mapped
            buffer.free()
            assert not maps_by_iobmd(target.pid)

            buffer = iobmd.allocate(8192, task=target.pid, wired=False)
            with no_free_descriptor():
                del buffer
            assert maps_by_iobmd(target.pid), "the control"
            iobmd.allocate(8192, task=target.pid, wired=False).free()
            assert not maps_by_iobmd(target.pid)

    in_child(lambda: (resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)), limited())[1])
