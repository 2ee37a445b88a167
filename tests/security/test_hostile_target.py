"""A target that attacks operations in it, by a second thread and by another process of its user."""

import contextlib
import ctypes
import fcntl
import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.child import NOBODY, in_child, until_asleep
from support.errors import code_of
from support.guests import before_call, one_by_one, steal
from support.snapshot_source import Source
from support.targets import Target, children, until_at_rest

import iobmd
from iobmd import IOMapOptions, IOMemoryDescriptor, IOReturn, IOReturnError, Task, Wiring, procfs
from iobmd.errors import NotFoundError, NotPermittedError
from iobmd.remote import shared_memory, syscall_instruction
from iobmd.remote.guest import Call, Guest
from iobmd.remote.session import Session
from iobmd.task import attempt
from iobmd.units import PAGE_SIZE

pytestmark = pytest.mark.usefixtures("may_trace")
MIB = 1 << 20
ANYWHERE, READ_ONLY = int(IOMapOptions.kIOMapAnywhere), int(IOMapOptions.kIOMapReadOnly)
SYS_IO_URING_REGISTER, UNREGISTER_BUFFERS = 427, 1

PROGRAM = """
import ctypes, sys
memory = ctypes.create_string_buffer(b"x" * (256 << 10))
print("ready", ctypes.addressof(memory), sep="\\n", flush=True)
sys.stdin.readline()
"""


def prepare(pid: int, address: int) -> None:
    with IOMemoryDescriptor.withAddressRange(address, 64 << 10, 3, pid) as memory:
        memory.prepare()
        memory.complete()


def test_no_thread_finds_a_descriptor_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target never has additional descriptors; it once had both ends of a socket pair, memory and rings."""
    seen: list[tuple[str, list[str]]] = []

    def look(guest: Guest, one: Call) -> None:
        seen.append((one.name, descriptors(guest.task.pid)))

    with Target([sys.executable, "-c", PROGRAM]) as target, iobmd.allocate(8192, shared=True, wired=False) as shared:
        address = int(target.line())
        before = descriptors(target.pid)
        with one_by_one(monkeypatch, before=look, after=look):
            iobmd.allocate(8192, task=target.pid, wired=False).free()
            with shared.createMappingInTask(target.pid, 0, ANYWHERE) as mapped:
                mapped.redirect(shared)
            prepare(target.pid, address)
        assert {name for name, _ in seen} >= {"socketpair", "recvmsg", "mmap", "io_uring_register"}
        assert [entry for entry in seen if entry[1] != before] == []


def descriptors(pid: int) -> list[str]:
    return sorted(entry.name for entry in Path(f"/proc/{pid}/fd").iterdir())


def sleeping_victim() -> Target:
    """Start a program of another user; its memory would be lost if it had yet to execute sleep(1)."""
    target = Target(["sh", "-c", "echo ready; exec sleep 1000"], user=NOBODY)
    until_asleep(target.pid)
    return target


def attempts(fd: int, size: int) -> dict[str, bool]:
    """Try to change the memory of a stolen descriptor, and return the operations that succeed."""

    def reopen() -> None:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))

    def chmod() -> None:
        os.fchmod(fd, 0o777)

    def map_writable() -> None:
        mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    tries: dict[str, Callable[[], object]] = {
        "truncate": lambda: os.ftruncate(fd, 0), "reopen": reopen, "chmod": chmod, "map": map_writable,
        "write": lambda: os.pwrite(fd, b"stolen", 0),
    }  # fmt: skip
    done = {}
    for name, action in tries.items():
        try:
            action()
            done[name] = True
        except OSError:
            done[name] = False
    return done


def regular(pid: int) -> int:
    """Steal the first regular file of a process; a guest also has its socket pair."""
    import stat

    for fd in range(8):
        with contextlib.suppress(OSError):
            stolen = steal(pid, fd)
            if stat.S_ISREG(os.fstat(stolen).st_mode):
                return stolen
    raise AssertionError("nothing can be stolen: the control")


@pytest.mark.needs("root")
@pytest.mark.parametrize("read_only", [False, True], ids=["writable", "read-only"])
def test_a_stolen_descriptor_is_of_little_use(read_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process of the target's user copies the descriptor from the guest, which cannot be prevented."""
    done: list[dict[str, bool]] = []

    def attack(guest: Guest) -> None:
        arguments = guest.pid
        with contextlib.suppress(AssertionError):
            done.append(in_child(lambda: attempts(regular(arguments), 8192), uid=NOBODY))

    with sleeping_victim() as target, iobmd.allocate(8192, shared=True, wired=False) as buffer:
        options = ANYWHERE | (READ_ONLY if read_only else 0)
        with before_call("mmap", attack, monkeypatch):
            mapped = buffer.createMappingInTask(target.pid, 0, options)
        with mapped:
            assert done, "the control: it was stolen"
            allowed = {name for name, succeeded in done[-1].items() if succeeded}
            assert allowed <= (set() if read_only else {"reopen", "map", "write"})
            assert buffer.readBytes(0, 6) == (bytes(6) if read_only else b"stolen"), "the control"
            permissions = next(
                line.split()[1]
                for line in Path(f"/proc/{target.pid}/maps").read_text().splitlines()
                if line.startswith(f"{mapped.getAddress():x}-")
            )
            assert permissions == ("r--s" if read_only else "rw-s")


@pytest.mark.needs("root")
@pytest.mark.parametrize("size", [4 * MIB, 64 << 10], ids=["huge pages", "small"])
def test_memory_in_a_task_of_another_user_cannot_be_truncated(size: int) -> None:
    with sleeping_victim() as target:
        with iobmd.allocate(size, task=target.pid, wired=False, shared=True) as buffer:
            backing: Any = buffer._memory().backing
            with backing.shared.fd.use() as number:
                assert code_of_truncation(number) == "PermissionError"
        with iobmd.allocate(size, shared=True, wired=False) as here:
            shared: Any = here._memory().backing
            with shared.shared.fd.use() as number:
                unsealed = not code_of_truncation(number, size)
            if unsealed:
                mapping = lambda: here.createMappingInTask(target.pid, 0, ANYWHERE)  # noqa: E731
                assert code_of(mapping) == IOReturn.kIOReturnNotPermitted
            with here.createMappingInTask(target.pid, 0, ANYWHERE | READ_ONLY) as mapped:
                assert Task(target.pid).read(mapped.getAddress(), PAGE_SIZE) == bytes(PAGE_SIZE)


def code_of_truncation(fd: int, size: int = 0) -> str:
    """Return how truncation fails, "" if it does not; truncation to `size` has no effect."""
    if size and not fcntl.fcntl(fd, 1034) & 2:  # F_GET_SEALS, F_SEAL_SHRINK
        return ""
    try:
        os.ftruncate(fd, 0)
    except OSError as error:
        return type(error).__name__
    return ""


@pytest.mark.needs("frames")
def test_what_a_stolen_ring_unregisters_is_not_called_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    with Target([sys.executable, "-c", PROGRAM]) as target:
        address = int(target.line())
        stolen: list[int] = []
        real = Guest.fetch

        def fetch(self: Guest, fd: int) -> int:
            stolen.append(steal(self.pid, fd))
            return real(self, fd)

        monkeypatch.setattr(Guest, "fetch", fetch)
        with IOMemoryDescriptor.withAddressRange(address, 64 << 10, 3, target.pid) as memory:
            memory.prepare()
            assert memory.wiring is Wiring.PINNED
            assert memory.segments()
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.syscall(SYS_IO_URING_REGISTER, stolen[-1], UNREGISTER_BUFFERS, None, 0) == 0
            for fd in stolen:
                os.close(fd)
            assert memory.wiring is Wiring.PAGEABLE
            assert code_of(memory.segments) == IOReturn.kIOReturnNotReady
            assert code_of(memory.verify) == IOReturn.kIOReturnNotReady
            memory.complete()
        target.tell()


def test_a_pin_of_other_memory_than_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of the target changes the address to be pinned before the call that reads it."""
    with Target([sys.executable, "-c", PROGRAM]) as target:
        address = int(target.line())

        def change(guest: Guest, one: Call) -> None:
            if one.name == "io_uring_register":
                vector = one.arguments[2]
                assert guest.task.write(vector, (address + PAGE_SIZE).to_bytes(8, "little"))

        with (
            one_by_one(monkeypatch, before=change, after=lambda _guest, _one: None),
            IOMemoryDescriptor.withAddressRange(address, 64 << 10, 3, target.pid) as memory,
        ):
            assert code_of(memory.prepare) == IOReturn.kIOReturnCannotWire
            assert memory.wiring is Wiring.PAGEABLE
        target.tell()


EXEC = """
import os, sys, threading
def wait():
    sys.stdin.readline()
    os.execvp("sleep", ["sleep", "1000"])
for _ in range(int(sys.argv[1])):
    threading.Thread(target=threading.Event().wait).start()
threading.Thread(target=wait).start()
print("ready", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("others", [0, 100])
def test_another_thread_runs_another_program(others: int) -> None:
    """At any moment: the new program takes over the id of the thread that makes the call, which ends the wait.

    With many threads the program briefly has none that can reap, and afterwards its code differs.
    """
    for number in range(15):
        with Target([sys.executable, "-c", EXEC, str(others)]) as target:
            until_at_rest(target.pid)
            name, begin = Path(f"/proc/{target.pid}/comm"), time.monotonic()
            threading.Timer(number * 0.001, target.tell).start()
            while name.read_text() != "sleep\n" or time.monotonic() < begin + 0.05:
                # A user other than root may also be refused for the moment in which the guest ends.
                with contextlib.suppress(NotFoundError, *([NotPermittedError] if os.getuid() else [])):
                    iobmd.allocate(8192, task=target.pid, wired=False).free()
            # Without priority, the tracer rarely searches for 5 s for a guest that may not have been created.
            assert time.monotonic() - begin < (15 if os.geteuid() else 5)
            assert "TracerPid:\t0\n" in Path(f"/proc/{target.pid}/status").read_text()
            assert not children(target.pid)


OTHER_CALL = {
    "x86_64": b"\xb8\x5f\0\0\0" + b"\xbf\x15\0\0\0" + b"\x0f\x05",
    "aarch64": b"\xc8\x14\x80\xd2" + b"\xa0\x02\x80\xd2" + b"\x01\0\0\xd4",
}[os.uname().machine]
"""umask(025), instead of the intended call, stands for a call that a filter of the task could forbid."""


@contextlib.contextmanager
def other_code(pid: int, address: int) -> Iterator[None]:
    """Replace the code at an address of a program, as one of its threads may at any time."""
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(address)
        before = memory.read(len(OTHER_CALL))
        memory.seek(address)
        memory.write(OTHER_CALL)
        try:
            yield
        finally:
            memory.seek(address)
            memory.write(before)


@pytest.mark.parametrize("name", ["close_range", "mmap"])
def test_code_that_is_changed_makes_no_other_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread overwrites the instruction after it was checked, while the task's seccomp filters are suspended."""
    real = Session._run

    def run(self: Session, calls: Sequence[Call], deadline: float, may_wait: bool) -> list[int]:
        if all(one.name != name for one in calls):
            return real(self, calls, deadline, may_wait)
        with other_code(self.task.pid, syscall_instruction.find(self.task)):
            return real(self, calls, deadline, may_wait)

    with Target([sys.executable, "-c", PROGRAM]) as target:
        umask = procfs.status(target.pid)["Umask"]
        with monkeypatch.context() as patch:
            patch.setattr(Session, "_run", run)
            code = code_of(lambda: iobmd.allocate(8192, task=target.pid, wired=False))
        assert procfs.status(target.pid)["Umask"] == umask != "0025"
        assert code == IOReturn.kIOReturnError
        iobmd.allocate(8192, task=target.pid, wired=False).free()
        target.tell()


def test_a_task_that_can_have_no_more_processes() -> None:
    def limited() -> tuple[IOReturn, str]:
        with Target(["sh", "-c", "echo ready; exec sleep 1000"]) as target:
            until_asleep(target.pid)
            resource.prlimit(target.pid, resource.RLIMIT_NPROC, (0, 0))
            try:
                iobmd.allocate(PAGE_SIZE, task=target.pid, wired=False).free()
            except IOReturnError as error:
                return error.code, str(error)
        raise AssertionError("it is not refused")

    code, message = in_child(limited, uid=NOBODY)
    assert code == IOReturn.kIOReturnNoResources
    assert "RLIMIT_NPROC" in message


def test_no_file_is_opened_but_the_one_that_is_mapped(tmp_path: Path) -> None:
    """A path of the task is redirected between two calls: opening a device there would have effects."""
    wanted, other, path = tmp_path / "wanted", tmp_path / "other", tmp_path / "path"
    for file in (wanted, other):
        file.write_bytes(b"x")
    path.symlink_to(wanted)
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode(other), 0x20) > 0  # IN_OPEN
    over = threading.Event()

    def exchange() -> None:
        for number in range(1 << 20):
            if over.is_set():
                return
            (tmp_path / "next").symlink_to(other if number % 2 else wanted)
            (tmp_path / "next").replace(path)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        found = [attempt.find([str(path)], wanted.stat().st_ino, 0, 5.0) for _ in range(500)]
    finally:
        over.set()
        thread.join()
    assert any(found), "the control"
    with pytest.raises(BlockingIOError):
        os.read(watch, 4096)
    os.close(watch)


@pytest.mark.needs("root", "compiler")
@pytest.mark.parametrize("make", [Path.touch, os.mkfifo], ids=["file", "pipe"])
def test_no_other_file_is_opened_as_shared_memory(
    make: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of an object leads to another file when the tracer opens it. A pipe would make it wait."""
    other = tmp_path / "other"
    make(other)
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(watch, os.fsencode(other), 0x20) > 0  # IN_OPEN
    found = shared_memory._object
    redirected = lambda *arguments: found(*arguments)._replace(path=os.fsencode(other))  # noqa: E731
    monkeypatch.setattr(shared_memory, "_object", redirected)
    with Source() as source, pytest.raises(iobmd.UnsupportedError, match="cannot copy the shared memory"):
        iobmd.snapshot(source.pid, freeze_shared=1 << 30)
    with pytest.raises(BlockingIOError):
        os.read(watch, 4096)
    os.close(watch)
