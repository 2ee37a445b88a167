"""A file of a target, on a file system whose server (FUSE) belongs to the target and does not answer."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.fuse import FILE_SYSTEM

import iobmd
from iobmd import IOReturn, dmabuf, pagemap, procfs
from iobmd._internal import pidns
from iobmd.errors import BadArgumentError, TaskTimeoutError, UnsupportedError, VMError
from iobmd.pagemap import file, frame
from iobmd.remote import areas, session
from iobmd.task import identity, job, obstacles
from iobmd.units import PAGE_SIZE

MIB = 1 << 20
PATIENCE = 20  # seconds

PROGRAM = (
    FILE_SYSTEM
    + """
import sys
server, fd = served_file(sys.argv[1])
LIBC.mmap.restype = ctypes.c_void_p
at = LIBC.mmap(None, ctypes.c_size_t(2 * SIZE), 3, 1, fd, 0)
os.close(fd)
ctypes.memset(at, 7, 1)
print(server, at, flush=True)
if sys.stdin.readline() == "execute\\n":
    os.execv("/bin/cat", ["cat"])  # until its standard input ends
# The page is written back first, under the lock of the address space: reading the maps waits for the server.
LIBC.mmap(ctypes.c_void_p(at), ctypes.c_size_t(SIZE), 3, 0x32, -1, 0)
sys.stdin.readline()
"""
)


class SilentTarget(NamedTuple):
    """A target that maps a file of 1 MiB, twice as far as it goes, at `at`; `server` serves it, and is stopped."""

    process: subprocess.Popen[str]
    at: int
    server: int

    @property
    def pid(self) -> int:
        return self.process.pid

    def execute(self) -> None:
        """Make it wait for its server while it executes a program, which releases its mappings."""
        self.send("execute\n")
        end = time.monotonic() + PATIENCE
        while not is_held(self.pid):
            assert time.monotonic() < end

    def send(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def hold_its_maps(self) -> None:
        """Make it wait for its server while it changes its mappings."""
        self.send("\n")
        end = time.monotonic() + PATIENCE
        while not Path(f"/proc/{self.pid}/syscall").read_text().startswith("9 "):
            assert time.monotonic() < end
            time.sleep(0.01)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[SilentTarget]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        server, at = map(int, process.stdout.readline().split())
        os.kill(server, signal.SIGSTOP)
        try:
            yield SilentTarget(process, at, server)
        finally:
            os.kill(server, signal.SIGKILL)


def within_patience(action: Callable[[], object]) -> object:
    """Return the result of a function, or raise its error; it is called by a thread that may be left waiting."""
    results: list[object] = []

    def act() -> None:
        try:
            results.append(action())
        except iobmd.IOReturnError as error:
            results.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert results, "it waits"
    if isinstance(results[0], iobmd.IOReturnError):
        raise results[0]
    return results[0]


@pytest.mark.needs("root")
def test_an_explanation_asks_no_server(target: SilentTarget) -> None:
    """The length of the file is the kernel's cached value, because stat(2) would call the server, and wait."""
    found = within_patience(lambda: obstacles.find(target.pid, target.at, target.at + 2 * MIB))
    assert isinstance(found, obstacles.Obstacle)
    assert (found.address, found.kind) == (target.at + MIB, VMError)
    assert f"past the end of its file, of {MIB} bytes" in found.why


@pytest.mark.needs("root")
def test_a_path_that_leads_to_the_server_is_given_up(target: SilentTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without permission to use map_files, the path is looked up, which calls the server of its directory."""
    area = next(procfs.areas(target.pid, target.at, target.at + 1))
    other = area._replace(start=area.start + PAGE_SIZE)  # map_files has no such entry
    begin = time.monotonic()
    monkeypatch.setattr(procfs, "areas", lambda *_args: iter([other]))
    assert within_patience(lambda: obstacles.find(target.pid, other.start, other.start + PAGE_SIZE)) is None
    assert time.monotonic() - begin < PATIENCE


@pytest.mark.needs("root")
def test_its_descriptor_is_no_dma_buf(target: SilentTarget) -> None:
    """`close(2)` of a duplicate would call the server, and wait."""
    os.kill(target.server, signal.SIGCONT)
    fd = os.open(f"/proc/{target.pid}/map_files/{target.at:x}-{target.at + 2 * MIB:x}", os.O_RDWR)
    os.kill(target.server, signal.SIGSTOP)
    try:
        with pytest.raises(BadArgumentError, match="does not belong to a dma-buf"):
            within_patience(lambda: dmabuf.attach(fd, "inout"))
    finally:
        os.kill(target.server, signal.SIGCONT)
        with contextlib.suppress(OSError):  # the server permits no writing
            os.close(fd)


@pytest.mark.needs("root")
def test_its_shared_memory_is_not_frozen(target: SilentTarget) -> None:
    """The server may be a thread of the target, which could not answer while it is stopped."""
    os.kill(target.server, signal.SIGCONT)
    with pytest.raises(UnsupportedError, match="another program serves its file"):
        within_patience(lambda: iobmd.snapshot(target.pid, freeze_shared=1 << 30))


@pytest.mark.needs("root")
def test_ctrl_c_ends_a_command_that_the_kernel_keeps_waiting(target: SilentTarget) -> None:
    """Only SIGKILL ends the wait for the lock of an address space: a child process waits for it."""
    target.hold_its_maps()
    interrupt("pagemap", str(target.pid))


SHORT = 0.3  # seconds
COMMANDS: dict[str, Callable[[iobmd.Task, int], object]] = {
    "read": lambda task, at: task.read(at, 16, timeout=SHORT),
    "read of much": lambda task, at: task.read(at - MIB, MIB, timeout=SHORT),
    "write": lambda task, at: task.write(at, b"changed", timeout=SHORT),
    "copy": lambda task, at: iobmd.copy(task, at, PAGE_SIZE, timeout=SHORT, wired=False),
    "copy without a limit": lambda task, at: iobmd.copy(task, at - MIB, MIB, wired=False),
    "copy of readable bytes": lambda task, at: iobmd.copy(task, at - MIB, MIB, timeout=SHORT, unreadable="zero"),
    "frozen copy": lambda task, at: iobmd.copy(task, at, PAGE_SIZE, timeout=SHORT, freeze=True, wired=False),
    "allocate": lambda task, _at: iobmd.allocate(PAGE_SIZE, task=task, wired=False),
    "prepare": lambda task, at: iobmd.IOMemoryDescriptor.withAddressRange(at, PAGE_SIZE, 3, task).prepare(),
    "pages": lambda task, at: list(pagemap.pages(task, at, PAGE_SIZE)),
    "areas": lambda task, _at: list(pagemap.areas(task, details=True)),
}


@pytest.mark.needs("root")
@pytest.mark.parametrize("command", COMMANDS)
def test_no_call_waits_for_long_while_a_task_holds_the_lock_of_its_memory(
    target: SilentTarget, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun has no effect afterwards: nothing is written, and no child process is left."""
    task = iobmd.Task(target.pid)
    place = next(area for area in procfs.maps(target.pid) if area.name == "[stack]").end - PAGE_SIZE
    before = task.read(place, PAGE_SIZE)
    for module, name in (session, "PATIENCE"), (job, "TIMEOUT"), (file, "TIMEOUT"), (areas, "TIMEOUT"):
        monkeypatch.setattr(module, name, SHORT)
    target.hold_its_maps()
    assert is_held(target.pid), "the control"
    processes = children(os.getpid())
    with pytest.raises(TaskTimeoutError) as raised:
        within_patience(lambda: COMMANDS[command](task, place))
    assert "has held the lock of its address space" in str(raised.value)
    assert children(os.getpid()) == processes
    os.kill(target.server, signal.SIGCONT)
    end = time.monotonic() + PATIENCE
    while is_held(target.pid):
        assert time.monotonic() < end
    monkeypatch.undo()
    assert task.read(place, PAGE_SIZE) == before


@pytest.mark.needs("root")
@pytest.mark.parametrize("command", ["read", "allocate", "prepare"])
def test_no_call_waits_for_long_while_a_task_executes_a_program(
    target: SilentTarget, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another lock is held then, for which also /proc/PID/stat, and each open of these files, waits."""
    task = iobmd.Task(target.pid)
    place = next(area for area in procfs.maps(target.pid) if area.name == "[stack]").end - PAGE_SIZE
    for module, name in (session, "PATIENCE"), (job, "TIMEOUT"), (file, "TIMEOUT"), (areas, "TIMEOUT"):
        monkeypatch.setattr(module, name, SHORT)
    monkeypatch.setattr(identity, "_PATIENCE", SHORT)
    target.execute()
    with pytest.raises(TaskTimeoutError):
        within_patience(lambda: COMMANDS[command](task, place))
    with pytest.raises(TaskTimeoutError):
        within_patience(lambda: iobmd.Task(target.pid))
    os.kill(target.server, signal.SIGCONT)
    end = time.monotonic() + PATIENCE
    while is_held(target.pid):
        assert time.monotonic() < end
    monkeypatch.undo()
    assert iobmd.Task(target.pid) == task


def is_held(pid: int) -> bool:
    """Return whether a reader of the page tables of a process has to wait, and not only for a processor."""
    with subprocess.Popen(["head", "-c", "8", f"/proc/{pid}/pagemap"], stdout=subprocess.DEVNULL) as reader:
        try:
            while True:
                before = procfs.status(reader.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    reader.wait(SHORT)
                    return False
                if procfs.status(reader.pid) == before and before["State"].startswith("D"):
                    return True
        finally:
            reader.kill()


@pytest.mark.needs("root")
def test_ctrl_c_ends_a_read_of_such_a_file(target: SilentTarget) -> None:
    """Ctrl-C ends the wait for a page that its server does not supply, long before the time limit."""
    where = [str(target.pid), hex(target.at + MIB // 2), "4096", "--pageable", "--timeout", "600"]
    interrupt("copy", *where)


def interrupt(*arguments: str) -> None:
    """Run a command, and send it SIGINT when a child process waits on its behalf: it must end."""
    program = [sys.executable, "-c", "import iobmd_command; raise SystemExit(iobmd_command.main())", *arguments]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        try:
            end = time.monotonic() + PATIENCE
            while not children(command.pid):
                assert time.monotonic() < end
                assert command.poll() is None
                time.sleep(0.01)
            command.send_signal(signal.SIGINT)
            command.communicate(timeout=PATIENCE)
            assert command.returncode == 130
        finally:
            command.kill()


def children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


@pytest.mark.needs("root", "frames")
def test_one_task_does_not_stall_the_search_of_all(target: SilentTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "_PATIENCE", 3.0)  # also for each step of the search of this process
    monkeypatch.setattr(pidns, "pids", lambda: [target.pid, os.getpid()])  # other processes take more time
    target.hold_its_maps()
    with iobmd.allocate(PAGE_SIZE) as buffer:
        physical = buffer.getPhysicalAddress()
        refused: dict[int, IOReturn] = {}

        def search() -> list[int]:
            found = frame.users(physical, PAGE_SIZE, refused=lambda pid, error: refused.update({pid: error.code}))
            return [use.pid for use in found]

        assert within_patience(search) == [os.getpid()]
    assert refused[target.pid] == IOReturn.kIOReturnTimeout
