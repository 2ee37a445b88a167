"""Lazy copies of memory of other tasks."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import lazy
from support.child import started
from support.errors import error_of
from support.lazy import MIB

import iobmd
from iobmd import IOBufferMemoryDescriptor, IOReturn
from iobmd.backing import lazy as lazy_backing

pytestmark = pytest.mark.needs("lazy_copies")
SIZE = 32 * MIB
PROGRAM = f"""
import ctypes, mmap, os, sys
memory = mmap.mmap(-1, {SIZE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(15)  # MADV_NOHUGEPAGE
memory[:] = bytes(range(251)) * ({SIZE} // 251) + bytes({SIZE} % 251)
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
for line in sys.stdin:
    memory[:] = line[:1].encode() * {SIZE}
    print("written", flush=True)
"""
CONTENTS = bytes(range(251)) * (SIZE // 251) + bytes(SIZE % 251)


class Program:
    """A program with memory that it changes on request."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        self.process = process
        self.address = int(process.stdout.readline())

    def copied(self) -> IOBufferMemoryDescriptor:
        return iobmd.copy(self.process.pid, self.address, SIZE, wired=False, lazy=True)

    def fill(self, byte: str) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{byte}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "written\n"

    @property
    def children(self) -> str:
        return Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()

    def is_alone(self) -> bool:
        """Return whether nothing of a session with it remains."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return not self.children and "TracerPid:\t0\n" in status and lazy.fetcher_thread() is None


@pytest.fixture
def program() -> Iterator[Program]:
    command = [sys.executable, "-c", PROGRAM]
    with started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Program(process)


def test_the_snapshot_is_scheduled_like_its_process(program: Program) -> None:
    """The processes of a new session form a group for the scheduler, which a busy machine may not run for seconds."""
    with program.copied():
        (pid,) = map(int, program.children.split())
        assert (os.getsid(pid), os.getpgid(pid)) == (os.getsid(program.process.pid), os.getpgid(program.process.pid))


def test_the_contents_are_those_of_the_call(program: Program) -> None:
    with program.copied() as copy:
        program.fill("a")
        assert copy.source_stopped_ns > 0
        assert memoryview(copy)[SIZE - MIB :] == CONTENTS[-MIB:]
        copy.fetch()
        assert copy.readBytes(0, SIZE) == CONTENTS
        assert not program.children
        assert lazy.is_soon(program.is_alone)  # a thread that was joined is listed until it has run once more
        assert iobmd.Task(program.process.pid).read(program.address, SIZE) == b"a" * SIZE


@pytest.mark.parametrize("end", ["fetch", "free"])
def test_the_snapshot_has_ended_also_if_all_was_fetched_before(
    program: Program, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread ends it then, which may not have run yet."""
    end_holder, may_run = lazy_backing._end_holder, threading.Event()
    late = lambda *arguments: may_run.wait(60) and end_holder(*arguments)  # noqa: E731
    monkeypatch.setattr(lazy_backing, "_end_holder", late)
    copy = program.copied()
    try:
        assert lazy.is_soon(lambda: not lazy.is_incomplete(copy))
        assert program.children, "the control"
        getattr(copy, end)()
        assert not program.children
    finally:
        may_run.set()
        copy.free()


def test_the_source_may_exit(program: Program) -> None:
    with program.copied() as copy:
        program.process.kill()
        program.process.wait()
        copy.fetch()
        assert copy.readBytes(0, SIZE) == CONTENTS


def test_the_thread_that_made_it_may_end(program: Program) -> None:
    made: list[IOBufferMemoryDescriptor] = []
    thread = threading.Thread(target=lambda: made.append(program.copied()))
    thread.start()
    thread.join()
    with made[0] as copy:
        program.fill("b")
        assert copy.readBytes(0, SIZE) == CONTENTS


def test_an_early_end_leaves_nothing(program: Program) -> None:
    for _ in range(3):
        program.copied().free()
        assert lazy.is_soon(program.is_alone)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(20):  # a copy may be complete before its end
            copy = program.copied()
            del copy
            assert lazy.is_soon(program.is_alone)
            if seen:
                break
    assert "never freed" in str(seen[0].message)
    program.fill("c")


def test_the_kernel_would_end_the_snapshot_before_the_task(program: Program) -> None:
    seen: list[str] = []
    for _ in range(20):  # a copy may be complete before the look
        with program.copied() as copy, contextlib.suppress(FileNotFoundError, ProcessLookupError):
            seen += [Path(f"/proc/{child}/oom_score_adj").read_text().strip() for child in program.children.split()]
            copy.fetch()
        if seen:
            break
    assert set(seen) == {"1000"}
    assert Path(f"/proc/{program.process.pid}/oom_score_adj").read_text().strip() != "1000"


def test_a_killed_snapshot(program: Program) -> None:
    for _ in range(20):
        with program.copied() as copy:
            for pid in program.children.split():
                with contextlib.suppress(ProcessLookupError):  # everything was fetched in the meantime
                    os.kill(int(pid), signal.SIGKILL)
            error = None
            if lazy.is_incomplete(copy):
                error = error_of(lambda: copy.readBytes(0, SIZE)) if _is_lost(copy) else None
            if error:
                assert error.code == IOReturn.kIOReturnVMError
                break
    else:
        raise AssertionError("each copy was fetched before its snapshot was killed")
    assert lazy.is_soon(program.is_alone)
    program.fill("d")


def _is_lost(copy: IOBufferMemoryDescriptor) -> bool:
    try:
        copy.fetch()
    except iobmd.IOReturnError:
        return True
    return False


def test_killing_this_process_leaves_nothing(program: Program) -> None:
    code = (
        "import iobmd, sys\n"
        f"copy = iobmd.copy({program.process.pid}, {program.address}, {SIZE}, wired=False, lazy=True)\n"
        "print('made', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code]
    with started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout
        assert maker.stdout.readline() == "made\n"
        maker.kill()
        maker.wait()
    assert lazy.is_soon(program.is_alone)
    program.fill("e")
