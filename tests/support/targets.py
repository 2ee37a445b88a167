"""Programs with which memory is shared while they work: starting, using and checking them."""

import atexit
import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest

import iobmd
from iobmd import (
    IOBufferMemoryDescriptor,
    IOMapOptions,
    IOReturn,
    IOReturnError,
    Task,
    kernel_task,
    kIOMemoryKernelUserShared,
)
from support import kernel, requirements
from support.child import die_with_parent
from support.kernel import frames
from support.requirements import MAY_BE_MISSING

SIZE = 64 << 10
ANYWHERE = int(IOMapOptions.kIOMapAnywhere)
_OURS = re.compile(r" /(memfd:iobmd|iobmd(:\d+)?-\d+)\b|p [0-9a-f]+ \S+ \d+ +/dev/zero$")  # shared or private
PATIENCE = 30.0  # seconds within which a program must respond
HERE = Path(__file__).parent


# --- requirements on the host


def lacking(reason: str) -> None:
    """Skip the test, or fail it if everything is required."""
    if os.environ.get("IOBMD_REQUIRE") == "all":
        pytest.fail(f"IOBMD_REQUIRE=all: {reason}", pytrace=False)
    pytest.skip(reason)


def need_program(name: str) -> str:
    """Return the path of a program that the test requires."""
    # Debian installs servers in directories that are not in the PATH of ordinary users.
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None and name in MAY_BE_MISSING:
        pytest.skip(f"needs {name}, which may be missing: {MAY_BE_MISSING[name]}")
    if path is None:
        lacking(f"needs {name}")
    assert path is not None
    return path


@cache
def _why_no_ptrace() -> str | None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        iobmd.allocate(1, task=child.pid, wired=False).free()
    except IOReturnError as error:
        return str(error)
    finally:
        child.kill()
        child.wait()
    return None


def need_ptrace() -> None:
    """Require that children may be traced; root must be able to do that."""
    if reason := _why_no_ptrace():
        if os.geteuid() == 0:
            pytest.fail(f"root cannot trace its own child: {reason}", pytrace=False)
        lacking(reason)


# --- programs of the tests


@cache
def _folder() -> Path:
    """Create a directory that every user can read, and that is removed when this process exits."""
    path = Path(tempfile.mkdtemp(prefix="targets-"))
    path.chmod(0o755)
    maker = os.getpid()

    def remove() -> None:
        if os.getpid() == maker:
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return path


@cache
def build(name: str, *options: str) -> Path:
    """Compile targets_NAME.c."""
    program = _folder() / "-".join((name, *(option.strip("-") for option in options)))
    source = HERE / f"targets_{name}.c"
    subprocess.run(
        ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", *options, "-o", program, source], check=True
    )
    return program


@cache
def build_from(compiler: str, text: str, suffix: str, *options: str) -> Path:
    """Compile a source text with another compiler."""
    source = _folder() / f"target{suffix}"
    source.write_text(text)
    program = source.with_suffix("")
    subprocess.run(
        [compiler, *options, "-o", str(program), str(source)], check=True, cwd=_folder(), capture_output=True
    )
    return program


# --- a running program


class Target:
    """A program that has printed "ready"; the end of the `with` block kills it.

    Parameters
    ----------
    command : sequence of str
        The command line.
    ready : str
        The line that it prints when it is ready; "" for none.
    before : callable
        Called in the child before the program is run.
    user : int
        The user to run it as.
    environment : dict of str
        Variables in addition to those of this process.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        ready: str = "ready",
        before: Callable[[], object] | None = None,
        user: int | None = None,
        **options: Any,
    ) -> None:
        def prepare() -> None:
            # Before the change of user, which clears it; the programs of the tests therefore set it again.
            die_with_parent()
            if before:
                before()
            if user is not None:
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
                die_with_parent()

        self.process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=prepare,  # noqa: PLW1509 (no thread of this process holds a lock that it needs)
            bufsize=0,
            **options,
        )
        self.pid = self.process.pid
        self._unread = b""
        try:
            if ready:
                line = self.line()
                assert line == ready, line
        except BaseException:
            self.__exit__()
            raise

    def line(self, patience: float = PATIENCE) -> str:
        """Return its next line of output."""
        assert self.process.stdout is not None
        end = time.monotonic() + patience
        while b"\n" not in self._unread:
            left = end - time.monotonic()
            assert left > 0, f"nothing more was printed within {patience} s; {self.state()}; so far {self._unread!r}"
            if not select.select([self.process.stdout], [], [], left)[0]:
                continue
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            assert data, f"it exited early, with {self.process.wait(PATIENCE)}, and printed {self._unread!r}"
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def tell(self, line: str = "") -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    def end(self, patience: float = PATIENCE) -> tuple[int, str]:
        """Wait until it has exited by itself; return its exit code and the rest of its output."""
        assert self.process.stdout is not None
        rest = self._unread
        end = time.monotonic() + patience
        while True:
            left = end - time.monotonic()
            assert left > 0, f"it did not exit within {patience} s; {self.state()}"
            if select.select([self.process.stdout], [], [], left)[0]:
                data = os.read(self.process.stdout.fileno(), 1 << 16)
                if not data:
                    break
                rest += data
        return self.process.wait(patience), rest.decode()

    def state(self) -> str:
        """Return its state according to the kernel, for messages."""
        try:
            name, call = (Path(f"/proc/{self.pid}/{file}").read_text() for file in ("stat", "syscall"))
        except OSError as error:
            return str(error)
        return f"state {name.rpartition(')')[2].split()[0]}, system call {call.strip()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def in_call(pid: int) -> str:
    """Return the number of the system call that a thread is in, or "running"."""
    try:
        return Path(f"/proc/{pid}/syscall").read_text().split()[0]
    except OSError:
        return ""


def until(condition: Callable[[], object], patience: float = PATIENCE) -> bool:
    """Wait for a condition, and return whether it was met."""
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.0005)
    return True


def children(pid: int) -> str:
    """Return the pids of the children of a process, including zombies."""
    return "".join(
        Path(f"/proc/{pid}/task/{tid.name}/children").read_text() for tid in Path(f"/proc/{pid}/task").iterdir()
    )


def until_blocked(pid: int) -> None:
    """Wait until a program of one thread sleeps in a system call."""
    sleeping = lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"  # noqa: E731
    assert until(sleeping)


def until_at_rest(pid: int) -> None:
    """Wait until all threads of a program sleep and have not run for a short time: its start is complete.

    The same applies to its children, because a parent may be waiting until a child has executed a program.
    """

    def looks() -> list[tuple[str, str]]:
        found = []
        for process in (pid, *children(pid).split()):
            for task in Path(f"/proc/{process}/task").iterdir():
                text = (task / "status").read_bytes().decode(errors="replace")  # with any name
                status = dict(re.findall(r"^(State|voluntary_ctxt_switches):\t(\w+)", text, re.MULTILINE))
                found.append((status["State"], status["voluntary_ctxt_switches"]))
        return found

    def rests() -> bool:
        before = looks()
        time.sleep(0.02)
        return before == looks() and {state for state, _switches in before} == {"S"}

    assert until(rests)


# --- its resources


class ProgramResources(NamedTuple):
    """A program's mappings and descriptors."""

    maps: tuple[str, ...]
    names: Counter[str]  # counts by name and permissions, for programs that map memory themselves
    descriptors: tuple[tuple[int, str], ...]

    @classmethod
    def of(cls, pid: int) -> "ProgramResources":
        maps = tuple(Path(f"/proc/{pid}/maps").read_text().splitlines())
        fields = [line.split(maxsplit=5) for line in maps]
        # Not anonymous mappings, the heap and the stack, which may grow at any time
        names = Counter(f"{field[1]} {field[5]}" for field in fields if len(field) > 5 and field[5][0] != "[")
        found = []
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it was closed
                link = str(entry.readlink())
                if not link.startswith("/proc/"):  # redis reads its own files there ten times a second
                    found.append((int(entry.name), link))
        return cls(maps, names, tuple(sorted(found)))

    def comparable(self, exact: bool) -> tuple[object, object]:
        """Return the comparable part of them."""
        return (self.maps if exact else self.names), self.descriptors


def check_unchanged(pid: int, before: ProgramResources, *, exact: bool = True, patience: float = PATIENCE) -> None:
    """Check that a program has its previous resources and none of iobmd; it may close files that it opened."""
    until(lambda: ProgramResources.of(pid).comparable(exact) == before.comparable(exact), patience)
    after = ProgramResources.of(pid)
    assert after.descriptors == before.descriptors
    assert not [line for line in after.maps if _OURS.search(line)]
    assert after.comparable(exact) == before.comparable(exact)


# --- operations on it


@cache
def _frames_shown() -> bool:
    return requirements.missing("frames") is None


def exercise(pid: int, times: int = 10, *, exact: bool = True, pause: float = 0) -> list[int]:
    """Perform all operations on the memory of a program, and check each step and its remains.

    Returns the duration of each stop in nanoseconds. `exact`: the program itself maps no memory during this time.
    """
    before = ProgramResources.of(pid)
    stopped: list[int] = []
    task = Task(pid)
    for number in range(times):
        stopped += _exercise_once(task, number)
        time.sleep(pause)
    check_unchanged(pid, before, exact=exact)
    return stopped


def _exercise_once(task: Task, number: int) -> list[int]:
    ours = bytes((number + 1 + k) & 0xFF for k in range(256)) * (SIZE // 256)
    theirs = ours[::-1]
    in_turns = bool(number % 2)
    with iobmd.allocate(SIZE, task=task, shared=in_turns) as there, iobmd.allocate(SIZE, shared=True) as shared:
        address = there.getBytesNoCopy()
        assert not any(task.read(address, SIZE))
        there.writeBytes(0, ours)
        assert task.read(address, SIZE) == ours
        task.write(address, theirs)
        assert there.readBytes(0, SIZE) == theirs
        if _frames_shown():
            _check_frames(there, address, task.pid)
        with shared.createMappingInTask(task, 0, ANYWHERE) as mapped:
            shared.writeBytes(0, ours)
            assert task.read(mapped.getAddress(), SIZE) == ours
            task.write(mapped.getAddress(), theirs)
            assert shared.readBytes(0, SIZE) == theirs
            if _frames_shown():
                there_frames = frames(mapped.getAddress(), SIZE, task.pid)
                assert there_frames == frames(shared.getBytesNoCopy(), SIZE)
                assert all(there_frames)
        copy = IOBufferMemoryDescriptor.withCopy
        with copy(task, 0, task, address, SIZE) as within, copy(kernel_task, 0, task, address, SIZE) as here:
            task.write(address, ours)  # copies are separate memory
            assert task.read(within.getBytesNoCopy(), SIZE) == theirs
            assert bytes(here) == theirs
            return [there.task_stopped_ns, within.task_stopped_ns]


def _check_frames(buffer: IOBufferMemoryDescriptor, address: int, pid: int) -> None:
    there = frames(address, SIZE, pid)
    assert all(there)
    with buffer.map() if buffer.getFlags() & kIOMemoryKernelUserShared else contextlib.nullcontext() as here:
        if here is not None:
            view = memoryview(here)
            view[0]
            assert [view[offset] for offset in range(0, SIZE, kernel.PAGE)]
            view.release()
            assert frames(here.getAddress(), SIZE) == there
    said = [
        (segment.address + offset) // kernel.PAGE
        for segment in buffer.segments()
        for offset in range(0, segment.length, kernel.PAGE)
    ]
    assert said == there


@contextlib.contextmanager
def on_processors(ours: int, theirs: int, pid: int) -> Iterator[None]:
    """Run this process on one processor, and a program on another, inside a `with` block."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(pid, {theirs})
    os.sched_setaffinity(0, {ours})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Stopping:
    """Stops a program repeatedly in a thread of this process, inside a `with` block; `count` is the number of stops.

    Parameters
    ----------
    pid : int
        The program.
    pause : float
        Seconds between two stops.
    """

    def __init__(self, pid: int, pause: float = 0) -> None:
        self.count = 0
        self.longest_ns = 0
        self._task = Task(pid)
        self._pause = pause
        self._over = threading.Event()
        self._error: IOReturnError | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                buffer = iobmd.allocate(kernel.PAGE, task=self._task, wired=False)
                try:
                    self.longest_ns = max(self.longest_ns, buffer.task_stopped_ns)
                finally:
                    self._free(buffer)
                self.count += 4  # each of the two creates a guest, and makes the task reap it
                self._over.wait(self._pause)
        except IOReturnError as error:
            # It may exit; the error for a task that is about to exit must be the same.
            if error.code != IOReturn.kIOReturnNotFound or not until(lambda: not self._task.alive):
                self._error = error

    def _free(self, buffer: IOBufferMemoryDescriptor) -> None:
        try:
            buffer.free()
        except IOReturnError as error:  # not even if the target exits at this moment
            self._error = error
            until(lambda: not self._task.alive)
            buffer.free()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error and not _error[0]:
            raise self._error


# --- servers and their load

_CLIENT = r"""
import json, select, socket, sys, time
kind, where = sys.argv[1:]
family = socket.AF_INET if where.isdigit() else socket.AF_UNIX
peer = socket.socket(family)
while peer.connect_ex(("127.0.0.1", int(where)) if where.isdigit() else where):
    time.sleep(0.01)  # the server has created its socket, but does not listen yet
peer.settimeout(60)
asked = {"http": b"GET /page HTTP/1.1\r\nHost: x\r\n\r\n", "redis": b"INCR n\r\nGET k\r\n"}[kind]
def answer(number):
    return b":%d\r\n$4\r\nkept\r\n" % number
def whole(data):
    if kind == "redis":
        return data.count(b"\r\n") == 3
    head, end, body = data.partition(b"\r\n\r\n")
    return end and len(body) >= 4096
def right(data, number):
    if kind == "redis":
        return data == answer(number)
    return data.startswith(b"HTTP/1.1 200 OK\r\n") and data.endswith(b"\r\n\r\n" + b"0123456789abcdef" * 256)
def ask(number):
    peer.sendall(asked)
    data = b""
    while not whole(data):
        more = peer.recv(1 << 16)
        if not more:
            raise ConnectionError("closed")
        data += more
    return right(data, number)
times, failed, number = [], 0, 1
if kind == "redis":
    peer.sendall(b"SET k kept\r\n")
    assert peer.recv(100) == b"+OK\r\n"
assert ask(number)  # the server has then opened its files
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    number += 1
    began = time.perf_counter()
    try:
        failed += not ask(number)
    except OSError as error:
        print(error, file=sys.stderr)
        failed += 1
        break
    times.append(time.perf_counter() - began)
times.sort()
print(json.dumps({"requests": number, "failed": failed, "median_ms": times[len(times) // 2] * 1e3,
                  "max_ms": times[-1] * 1e3}))
"""


class Load(NamedTuple):
    """The results of a server."""

    requests: int
    failed: int
    median_ms: float
    max_ms: float


class Client(Target):
    """A process that queries a server continuously ("http" or "redis"; a port or a Unix socket)."""

    def __init__(self, kind: str, where: str) -> None:
        super().__init__([sys.executable, "-I", "-S", "-c", _CLIENT, kind, where])

    def finish(self) -> Load:
        """End it."""
        self.tell()
        code, said = self.end()
        assert code == 0, said
        return Load(**json.loads(said))
