"""Snapshots of a whole task: contents, cost, and what the task can notice of them."""

import errno
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import kernel
from support.child import NOBODY, SYSCALLS, in_child
from support.core_file import Core
from support.kernel import Footprint
from support.snapshot_source import SIZE, Source
from support.targets import PATIENCE, Target, build, children, until

import iobmd
from iobmd import IOReturn, IOReturnError, pagemap
from iobmd.remote.shared_memory import SharedMemory
from iobmd.task.job import Outcome, Transfer
from iobmd.units import PAGE_SIZE

pytestmark = pytest.mark.needs("compiler")
WALL = 0x40000000


@pytest.fixture
def source() -> Iterator[Source]:
    with Source() as program:
        yield program
        assert program.process.poll() is None, "it did not survive"
        assert until(lambda: not children(program.pid)), "a snapshot was left behind"


def test_the_memory_of_one_moment(source: Source) -> None:
    with iobmd.snapshot(source.pid) as snapshot:
        source.write(0, 512, 7)
        assert iobmd.Task(source.pid).read(source.own, 1) == b"\7"
        assert snapshot.read(source.own, 1) == b"\1"
        data = bytearray(SIZE)
        assert snapshot.readinto(source.own, data) == SIZE
        assert data[:: kernel.PAGE] == bytes([1]) * (SIZE // kernel.PAGE)
        for freeze in (False, True):
            with iobmd.copy(snapshot, source.own, SIZE, wired=False, freeze=freeze) as copied:
                assert copied.readBytes(0, SIZE) == data
        copied = iobmd.IOBufferMemoryDescriptor.withCopy(
            iobmd.kernel_task, iobmd.kIODirectionInOut, snapshot, source.own, SIZE
        )
        with copied:
            assert copied.readBytes(0, SIZE) == data
        assert 0 < snapshot.stopped_ns < 5 * 10**9
        assert snapshot.task == iobmd.Task(source.pid)
        assert [area.start for area in snapshot.areas() if area.start == source.own]
        (area,) = (one for one in pagemap.areas(snapshot, source.own, SIZE))
        assert area.resident == SIZE


def test_memory_that_it_lacks(source: Source) -> None:
    with iobmd.snapshot(source.pid) as snapshot:
        lacking = {one.start: one.why for one in snapshot.missing}
        assert lacking == {source.kept: "dontfork", source.wiped: "wipeonfork"}
        assert [area.start for area in snapshot.shared if not area.perms.startswith("r-")] == [source.shared]
        source.write(0, 1, 9, "shared")
        assert snapshot.read(source.shared, 1) == b"\x09"
        for address in (source.kept, source.wiped):
            with pytest.raises(IOReturnError) as caught:
                snapshot.read(address, 1)
            assert caught.value.code == IOReturn.kIOReturnVMError
            assert caught.value.address == address


@pytest.mark.needs("root")  # /proc/PID/map_files
def test_shared_memory_frozen_on_request(source: Source, tmp_path: Path) -> None:
    size = 1 << 20  # of `shared`
    with iobmd.snapshot(source.pid, freeze_shared=size) as snapshot:
        source.write(0, 256, 9, "shared")
        assert iobmd.Task(source.pid).read(source.shared, 1) == b"\x09"
        assert snapshot.shared == []
        assert snapshot.read(source.shared, size)[:: kernel.PAGE] == b"\1" * 256
        assert snapshot.read(source.shared + size - 2, 2) == b"\0\0"
        with iobmd.copy(snapshot, source.shared, size, wired=False) as copied:
            assert copied.readBytes(0, size)[:: kernel.PAGE] == b"\1" * 256
        snapshot.core(tmp_path / "core")
        assert in_child(lambda: snapshot.read(source.shared, 1)) == b"\1"
    with pytest.raises(IOReturnError) as closed:
        snapshot.read(source.shared, 1)
    assert closed.value.code == IOReturn.kIOReturnNotOpen
    assert Core((tmp_path / "core").read_bytes()).read(source.shared, size)[:: kernel.PAGE] == b"\1" * 256
    with pytest.raises(IOReturnError, match="1 MiB of shared memory, more than the 1020 KiB") as caught:
        iobmd.snapshot(source.pid, freeze_shared=size - kernel.PAGE)
    assert caught.value.code == IOReturn.kIOReturnNoMemory
    with pytest.raises(IOReturnError, match="must not be negative"):
        iobmd.snapshot(source.pid, freeze_shared=-1)


@pytest.mark.needs("root")  # to freeze shared memory
def test_attempts_that_fail_leave_no_descriptors(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the task changed its mappings of shared memory before each stop."""
    monkeypatch.setattr(SharedMemory, "covers", lambda *_: False)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(IOReturnError, match="changed its mappings"):
        iobmd.snapshot(source.pid, freeze_shared=1 << 30)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_shared_memory_that_only_root_can_freeze() -> None:
    """Memory without a descriptor is found through map_files: without it, the snapshot is refused before the stop."""
    build("snapshot")

    def refused() -> tuple[IOReturn, int, str, str, bool]:
        with Source() as program:
            iobmd.snapshot(program.pid).close()  # opens what the library keeps
            before = Footprint.settled().descriptors
            with pytest.raises(IOReturnError) as caught:
                iobmd.snapshot(program.pid, freeze_shared=1 << 30)
            error = caught.value
            refusal = error.code, error.address - program.shared, str(error), children(program.pid)
            del caught, error  # its traceback refers to the task
            return *refusal, Footprint.settled().descriptors == before

    code, offset, message, left, is_closed = in_child(refused, uid=NOBODY)
    assert (code, offset, left) == (IOReturn.kIOReturnUnsupported, 0, "")
    assert "cannot open its file, for which CAP_CHECKPOINT_RESTORE is required" in message
    assert is_closed


def test_user_other_than_root() -> None:
    """Each use of a snapshot of one's own program works without privileges, except `pagemap.changes`."""
    build("snapshot")

    def use() -> tuple[list[bytes], int, IOReturn, str]:
        with Source() as program, iobmd.snapshot(program.pid) as snapshot:
            program.write(0, SIZE // PAGE_SIZE, 7)
            read = [snapshot.read(program.own, 1)]
            for source in (snapshot, program.pid):
                for how in ({}, {"freeze": True}, {"lazy": True}):
                    with iobmd.copy(source, program.own, SIZE, wired=False, **how) as copied:
                        read.append(copied.readBytes(SIZE - PAGE_SIZE, 1))
            with tempfile.TemporaryDirectory() as folder:
                snapshot.core(Path(folder, "core"))
                core = Core(Path(folder, "core").read_bytes())
                read.append(core.read(program.own, 1))
            (area,) = pagemap.areas(snapshot, program.own, SIZE)
            with iobmd.snapshot(program.pid, limit=SIZE) as later, pytest.raises(IOReturnError) as caught:
                pagemap.changes(snapshot, later)
            return read, area.resident, caught.value.code, str(caught.value)

    read, resident, code, message = in_child(use, uid=NOBODY)
    assert (read, resident) == ([b"\1"] * 4 + [b"\7"] * 3 + [b"\1"], SIZE)
    assert code == IOReturn.kIOReturnNotPrivileged
    assert "run as root" in message


BY_USERFAULTFD = """
import ctypes, fcntl, mmap, os, struct, sys
SIZE = 1 << 20
file = os.memfd_create("shared")
os.ftruncate(file, SIZE)
memory = mmap.mmap(file, SIZE)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
faults = ctypes.CDLL(None).syscall(int(sys.argv[1]), os.O_CLOEXEC)
fcntl.ioctl(faults, 0xC018AA3F, struct.pack("3Q", 0xAA, 0, 0))  # UFFDIO_API
fcntl.ioctl(faults, 0xC020AA00, struct.pack("4Q", start, SIZE, 1, 0))  # UFFDIO_REGISTER
print("ready", start, sep="\\n", flush=True)
sys.stdin.readline()
"""


@pytest.mark.needs("root")
def test_shared_memory_of_a_userfaultfd_is_refused() -> None:
    """It is refused before the stop: a stopped thread of the program may supply its pages."""
    with Target([sys.executable, "-c", BY_USERFAULTFD, str(SYSCALLS["userfaultfd"])]) as program:
        address = int(program.line())
        before = children(program.pid)
        with pytest.raises(IOReturnError, match="a userfaultfd supplies its pages") as caught:
            iobmd.snapshot(program.pid, freeze_shared=1 << 30)
        assert (caught.value.code, caught.value.address) == (IOReturn.kIOReturnUnsupported, address)
        assert children(program.pid) == before
        with iobmd.snapshot(program.pid) as snapshot:  # the control: without that memory
            assert snapshot.stopped_ns > 0
        program.tell()
        assert program.end()[0] == 0


BETWEEN = """
import ctypes, mmap, os, sys
half, file = int(sys.argv[2]), os.open(sys.argv[1], os.O_RDWR)
private = mmap.mmap(-1, 4 * half, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
private[half - 1], private[3 * half] = b"<>"
start = ctypes.addressof(ctypes.c_char.from_buffer(private))
call, fixed = ctypes.CDLL(None).mmap, 0x10
call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
for at, offset in (half, half), (2 * half, 0):
    call(start + at, half, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | fixed, file, offset)
print("ready", start, sep="\\n", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("kind", ["tmpfs", "disk"])
def test_frozen_shared_files_between_private_memory(kind: str, tmp_path: Path) -> None:
    """Holes remain holes, the end of a file is respected, and ranges of several areas are whole."""
    on_disk = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    descriptor = os.memfd_create("iobmd-test") if kind == "tmpfs" else on_disk
    half, end = 64 << 20, 100 << 20
    os.ftruncate(descriptor, 2 * half)
    with Target([sys.executable, "-c", BETWEEN, f"/proc/{os.getpid()}/fd/{descriptor}", str(half)]) as program:
        start = int(program.line())
        os.ftruncate(descriptor, end + 5)
        written = (0, b"first"), (half + kernel.PAGE, b"later"), (end + 2, b"end")
        for at, data in written:
            os.pwrite(descriptor, data, at)
        before = kernel.status("VmRSS"), os.fstat(descriptor).st_blocks
        with iobmd.snapshot(program.pid, freeze_shared=2 * half) as snapshot:
            if kind == "tmpfs":
                assert kernel.status("VmRSS") - before[0] < 8 << 20
                assert os.fstat(descriptor).st_blocks == before[1]
            for at, _data in written:
                os.pwrite(descriptor, b"wrong", at - 2 if at > end else at)
            assert snapshot.read(start + half - 1, 2 * kernel.PAGE)[kernel.PAGE :: kernel.PAGE] == b"\0"
            assert snapshot.read(start + end, 8) == b"\0\0end\0\0\0"
            assert snapshot.read(start + 3 * half - 2, 3) == b"\0\0>"
            with iobmd.copy(snapshot, start, 4 * half, wired=False) as copied:
                assert copied.readBytes(half - 1, 2) == b"<\0"
                assert copied.readBytes(half + kernel.PAGE, 6) == b"later\0"
                assert copied.readBytes(2 * half, 6) == b"first\0"
                assert copied.readBytes(3 * half - 1, 2) == b"\0>"
    for opened in {descriptor, on_disk}:
        os.close(opened)


def test_reading_it_copies_nothing(source: Source, tmp_path: Path) -> None:
    """The kernel copies a shared page before it pins it for process_vm_readv(2)."""
    with iobmd.snapshot(source.pid) as snapshot:
        before = snapshot.copied_bytes
        snapshot.read(source.own, SIZE)
        iobmd.copy(snapshot, source.own, SIZE, wired=False).free()
        for page in range(0, SIZE, 16 * kernel.PAGE):
            snapshot.read(source.own + page, 1)
        snapshot.core(tmp_path / "core")
        assert snapshot.copied_bytes - before < 16 * kernel.PAGE


def test_copied_bytes_and_their_limit(source: Source) -> None:
    with iobmd.snapshot(source.pid) as snapshot:
        before = snapshot.copied_bytes
        source.write(0, 256, 2)
        copied = snapshot.copied_bytes - before
        assert 256 * kernel.PAGE <= copied < 320 * kernel.PAGE
    with iobmd.snapshot(source.pid, limit=256 * kernel.PAGE) as snapshot:
        source.write(0, 512, 3)
        assert until(lambda: not snapshot.is_open)
        with pytest.raises(IOReturnError, match="limit of 1 MiB") as caught:
            snapshot.read(source.own, 1)
        assert caught.value.code == IOReturn.kIOReturnNoMemory
        assert until(lambda: not children(source.pid))
    assert source.request("wait") == [0, errno.ECHILD]


def test_the_inspector_and_a_closed_snapshot(source: Source, tmp_path: Path) -> None:
    with iobmd.snapshot(source.pid) as still_open:
        closed = iobmd.snapshot(source.pid)
        closed.close()
        for look in (
            lambda: list(pagemap.changes(closed, still_open)),
            lambda: list(pagemap.changes(still_open, closed)),
            lambda: list(pagemap.spans(closed)),
            lambda: pagemap.counts(closed, source.own, SIZE),
            lambda: list(pagemap.areas(closed)),
            lambda: pagemap.save(closed, tmp_path / "saved"),
        ):
            with pytest.raises(iobmd.NotOpenError, match="closed"):
                look()
        assert not list(tmp_path.iterdir())


def test_memory_that_several_snapshots_share(source: Source) -> None:
    """It counts for each of them, and for their limits."""
    with iobmd.snapshot(source.pid) as first, iobmd.snapshot(source.pid) as second:
        before = first.copied_bytes, second.copied_bytes
        source.write(0, 256, 2)
        for one, start in zip((first, second), before, strict=True):
            assert 200 * kernel.PAGE <= one.copied_bytes - start < 320 * kernel.PAGE
        with iobmd.snapshot(source.pid, limit=256 * kernel.PAGE) as third, iobmd.snapshot(source.pid):
            source.write(0, 512, 3)
            assert until(lambda: not third.is_open)
        assert first.is_open
        assert second.is_open


def test_the_task_does_not_notice_it(source: Source) -> None:
    """It receives no signal, its waits do not see the snapshot, and files that it closes are closed."""
    reading, writing = os.pipe()
    with Target(["cat"], ready="", pass_fds=[writing]) as holder:
        os.close(writing)
        with iobmd.snapshot(holder.pid) as snapshot:
            assert not list(Path(f"/proc/{snapshot.pid}/fd").iterdir())
            assert holder.process.stdin
            holder.process.stdin.close()
            assert os.read(reading, 1) == b"", "the snapshot holds the pipe open"
            os.close(reading)
            assert holder.process.wait(PATIENCE) == 0
    with iobmd.snapshot(source.pid):
        assert children(source.pid)
        assert source.request("wait") == [0, errno.ECHILD]
    assert source.request("wait") == [0, errno.ECHILD]


def test_a_task_that_executes_a_program_or_exits(source: Source) -> None:
    with iobmd.snapshot(source.pid) as snapshot:
        was = source.own
        source.tell("exec 0 0 0")
        assert source.line() == "ready"
        source.line()
        assert snapshot.read(was, 1) == b"\1"
    assert until(lambda: not children(source.pid))
    with Source() as other:
        snapshot = iobmd.snapshot(other.pid)
        other.process.kill()
        other.process.wait()
        assert snapshot.read(other.own + kernel.PAGE, 1) == b"\1"
        holder = snapshot.pid
        snapshot.close()
        assert until(lambda: not Path(f"/proc/{holder}").exists())


def test_the_end_of_its_maker(source: Source) -> None:
    """It lasts longer than the thread that made it, ends with its process, and not with a forked child of that."""
    made: list[iobmd.Snapshot] = []
    thread = threading.Thread(target=lambda: made.append(iobmd.snapshot(source.pid)))
    thread.start()
    thread.join()
    (snapshot,) = made
    assert in_child(lambda: (snapshot.read(source.own, 1), snapshot.close())[0]) == b"\1"
    time.sleep(0.1)
    assert snapshot.read(source.own, 1) == b"\1"
    snapshot.close()
    with pytest.raises(IOReturnError) as caught:
        snapshot.read(source.own, 1)
    assert caught.value.code == IOReturn.kIOReturnNotOpen
    assert not children(source.pid)
    program = f"import iobmd, time; held = iobmd.snapshot({source.pid}); print('ready', flush=True); time.sleep(60)"
    with Target([sys.executable, "-c", program]):
        assert children(source.pid)
    assert until(lambda: not children(source.pid))
    assert source.request("wait") == [0, errno.ECHILD]


def test_a_snapshot_that_is_killed(source: Source) -> None:
    with iobmd.snapshot(source.pid) as snapshot:
        os.kill(snapshot.pid, signal.SIGKILL)
        assert until(lambda: not snapshot.is_open)
        for look in (lambda: snapshot.read(source.own, 1), snapshot.areas, lambda: snapshot.copied_bytes):
            with pytest.raises(IOReturnError) as caught:
                look()
            assert caught.value.code == IOReturn.kIOReturnNotFound
    assert source.request("wait") == [0, errno.ECHILD]


def _without_swap(procs: Path) -> Path:
    """Apply the limit of a cgroup to swap space too, which another test may have enabled."""
    group = procs.parent
    if (total := group / "memory.memsw.limit_in_bytes").exists():
        total.write_text((group / "memory.limit_in_bytes").read_text())
    elif (swap := group / "memory.swap.max").exists():
        swap.write_text("0")
    return procs


def test_a_snapshot_that_is_closed_while_it_is_read(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by another thread. Its process loses its memory a moment before it has exited."""
    read = iobmd.Task._moved

    def close_and_read(task: iobmd.Task, job: Transfer) -> Outcome:
        snapshot.close()
        monkeypatch.setattr(iobmd.Task, "alive", True)
        return read(task, job)

    with iobmd.snapshot(source.pid) as snapshot:
        monkeypatch.setattr(iobmd.Task, "_moved", close_and_read)
        with pytest.raises(iobmd.NotOpenError, match="is closed"):
            snapshot.read(source.own, SIZE)


@pytest.mark.needs("memory_cgroup")
def test_memory_that_runs_out(memory_cgroup: Callable[[int], Path]) -> None:
    """The kernel ends the snapshot, and not the task, whose writes exceed the limit of its cgroup."""
    size = 48 << 20
    with Source(size, procs=_without_swap(memory_cgroup(88 << 20))) as source, iobmd.snapshot(source.pid) as snapshot:
        source.write(0, size // kernel.PAGE, 2)
        assert until(lambda: not snapshot.is_open)
        with pytest.raises(IOReturnError) as caught:
            snapshot.read(source.own, 1)
        assert caught.value.code in (IOReturn.kIOReturnNotFound, IOReturn.kIOReturnNoMemory)
        assert iobmd.Task(source.pid).read(source.own, 1) == b"\2"
        assert source.process.poll() is None
    with Source(size, procs=_without_swap(memory_cgroup(60 << 20))) as source:
        with pytest.raises(IOReturnError, match="of its limit of 60 MiB") as caught:
            iobmd.snapshot(source.pid)
        assert caught.value.code == IOReturn.kIOReturnNoMemory


@pytest.mark.needs("frames")
def test_pages_written_between_two(source: Source) -> None:
    with iobmd.snapshot(source.pid) as before:
        source.write(10, 20, 5)
        with iobmd.snapshot(source.pid) as after:
            source.write(100, 20, 5)
            written = [one for one in pagemap.changes(before, after) if one.kind is pagemap.Kind.WRITTEN]
            inside = [one for one in written if source.own <= one.virtual < source.own + SIZE]
            assert inside[0].virtual == source.own + 10 * kernel.PAGE
            assert sum(one.length for one in inside) == 20 * kernel.PAGE
            assert sum(one.length for one in written) < 100 * kernel.PAGE
        for other in (iobmd.Task(source.pid), iobmd.kernel_task):
            with pytest.raises(IOReturnError, match="not snapshots of the same task"):
                list(pagemap.changes(before, other))


@pytest.mark.needs("frames")
def test_changes_of_snapshots_that_end(source: Source) -> None:
    """The error is that of a snapshot, also if it ends after the iterator was created."""
    with iobmd.snapshot(source.pid) as before:
        with iobmd.snapshot(source.pid) as after:
            found = [pagemap.changes(before, after, joined=joined) for joined in (False, True)]
        for changes in found:
            with pytest.raises(iobmd.NotOpenError, match="closed"):
                next(changes)
        with iobmd.snapshot(source.pid) as after:
            os.kill(after.pid, signal.SIGKILL)
            assert until(lambda: not after.is_open)
            with pytest.raises(iobmd.NotFoundError, match="was ended"):
                next(pagemap.changes(before, after, joined=False))


def test_what_a_snapshot_is_not_for(source: Source) -> None:
    with iobmd.snapshot(source.pid) as snapshot:
        for refused in (
            lambda: snapshot.write(source.own, b"x"),
            lambda: iobmd.allocate(PAGE_SIZE, task=snapshot, wired=False),
            lambda: iobmd.snapshot(snapshot),
            lambda: iobmd.snapshot(iobmd.current_task()),
        ):
            with pytest.raises(IOReturnError) as caught:
                refused()
            assert caught.value.code == IOReturn.kIOReturnUnsupported
    with pytest.warns(ResourceWarning, match="never closed"):
        iobmd.snapshot(source.pid)
    with pytest.raises(IOReturnError, match="must be positive"):
        iobmd.snapshot(source.pid, limit=0)
    for wrong in ({"limit": 1.5}, {"limit": float("nan")}, {"freeze_shared": "1M"}):
        with pytest.raises(TypeError, match=r"(limit|freeze_shared) must be an integer"):
            iobmd.snapshot(source.pid, **wrong)  # type: ignore[arg-type]
