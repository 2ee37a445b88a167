"""Core files: their contents, and what debuggers make of them."""

import json
import os
import re
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import pytest
from support import kernel
from support.core_file import Core
from support.snapshot_source import SIZE, Source
from support.targets import Target, build, children, need_program, until, until_at_rest

import iobmd
from iobmd import IOReturn, IOReturnError
from iobmd.cli import main

if TYPE_CHECKING:
    from typing_extensions import Buffer

pytestmark = pytest.mark.needs("compiler")
PRSTATUS, PRPSINFO, AUXV, FPREGSET, XSTATE, SIGINFO, FILES = 1, 3, 6, 2, 0x202, 0x53494749, 0x46494C45
THREADS = 3


@pytest.fixture
def source() -> Iterator[Source]:
    with Source(threads=THREADS) as program:
        yield program
        assert program.process.poll() is None, "it did not survive"
        assert until(lambda: not children(program.pid)), "a snapshot was left behind"


def test_contents(source: Source, tmp_path: Path) -> None:
    """Memory of one moment, all threads, no DONTDUMP memory; and as sparse as the memory."""
    path = tmp_path / "core"
    with iobmd.snapshot(source.pid) as snapshot:
        source.write(0, 64, 7)
        summary = snapshot.core(path)
    core = Core(path.read_bytes())
    assert core.read(source.own, SIZE)[:: kernel.PAGE] == b"\1" * (SIZE // kernel.PAGE)
    assert core.read(source.shared, 1 << 20)[:: kernel.PAGE] == b"\1" * ((1 << 20) // kernel.PAGE)
    assert core.read(source.closed, 1) == b"\1"
    for left_out in (source.hidden, source.wiped):
        assert core.area(left_out).size == 0
    with pytest.raises(ValueError, match="unpack"):
        core.area(source.kept)
    threads = {struct.unpack_from("=i", data, 32)[0] for kind, data in core.notes if kind == PRSTATUS}
    assert threads == {int(task.name) for task in Path(f"/proc/{source.pid}/task").iterdir()}
    assert summary.threads == len(threads) == 1 + THREADS
    notes = dict(core.notes)
    assert {PRPSINFO, AUXV, FPREGSET, SIGINFO, FILES} <= notes.keys()
    assert notes[AUXV] == Path(f"/proc/{source.pid}/auxv").read_bytes()
    assert b"snapshot" in notes[PRPSINFO]
    assert str(build("snapshot")).encode() in notes[FILES]
    found = path.stat()
    assert found.st_mode & 0o777 == 0o600
    assert found.st_size == summary.size
    assert found.st_blocks * 512 < summary.written + (1 << 20)
    assert summary.omitted >= 3 << 16


def test_a_file_with_contents(source: Source, tmp_path: Path) -> None:
    """Bytes that it had are in no hole of the core file."""
    paths = tmp_path / "fresh", tmp_path / "used"
    paths[1].write_bytes(b"head" + b"\xff" * (64 << 20))
    with iobmd.snapshot(source.pid) as snapshot:
        snapshot.core(paths[0])
        with paths[1].open("r+b") as file:
            file.seek(4)
            snapshot.core(file)
    used = paths[1].read_bytes()
    assert used[:4] == b"head"
    assert Core(used[4:]).read(source.own, SIZE) == Core(paths[0].read_bytes()).read(source.own, SIZE)
    assert used[4:].count(b"\xff" * 64) == paths[0].read_bytes().count(b"\xff" * 64)


def test_the_filter(source: Source, tmp_path: Path) -> None:
    """The filter of the process applies, unless another one is given."""
    Path(f"/proc/{source.pid}/coredump_filter").write_text("0x31\n")
    with iobmd.snapshot(source.pid) as snapshot:
        snapshot.core(tmp_path / "own")
        snapshot.core(tmp_path / "other", filter=2)
        with pytest.raises(IOReturnError) as caught:
            snapshot.core(tmp_path / "wrong", filter=1 << 9)
    assert caught.value.code == IOReturn.kIOReturnBadArgument
    own, other = (Core((tmp_path / name).read_bytes()) for name in ("own", "other"))
    assert own.read(source.own, SIZE)
    assert own.area(source.shared).size == 0
    assert (other.area(source.own).size, other.area(source.shared).size) == (0, 1 << 20)
    assert not (tmp_path / "wrong").exists()


def test_a_pipe(source: Source) -> None:
    reading, writing = os.pipe()
    received: list[bytes] = []

    def receive() -> None:
        with os.fdopen(reading, "rb") as pipe:
            received.append(pipe.read())

    reader = threading.Thread(target=receive)
    reader.start()
    with os.fdopen(writing, "wb") as pipe, iobmd.snapshot(source.pid) as snapshot:
        summary = snapshot.core(pipe)
    reader.join()
    assert len(received[0]) == summary.size
    assert Core(received[0]).read(source.own, SIZE)[:: kernel.PAGE] == b"\1" * (SIZE // kernel.PAGE)


class Upload:
    """A file in the manner of paramiko, whose `write` returns nothing."""

    def __init__(self) -> None:
        self.received = bytearray()

    def write(self, data: "Buffer") -> None:
        self.received += data
        assert len(self.received) < 1 << 30, "the same bytes are written repeatedly"

    def flush(self) -> None:
        pass


def test_a_file_whose_write_returns_nothing(source: Source) -> None:
    upload = Upload()
    with iobmd.snapshot(source.pid) as snapshot:
        summary = snapshot.core(cast("BinaryIO", upload))
    assert len(upload.received) == summary.size


def test_a_pipe_that_does_not_block(source: Source) -> None:
    """It gets no bytes twice, and is not polled without an end."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    with (
        os.fdopen(reading, "rb"),
        os.fdopen(writing, "wb", buffering=0) as pipe,
        iobmd.snapshot(source.pid) as snapshot,
        pytest.raises(BlockingIOError),
    ):
        snapshot.core(cast("BinaryIO", pipe))


def test_nothing_follows_a_core_file_on_standard_output(source: Source) -> None:
    command = [sys.executable, "-m", "iobmd", "core", str(source.pid), "--json", "-o", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True, timeout=30, check=True)
    assert len(done.stdout) == json.loads(done.stderr)["size"]
    assert main([*command[3:-1], ""]) == 2


def test_whole_or_not_at_all(source: Source, tmp_path: Path) -> None:
    """A file that cannot be completed leaves an existing one as it is, and no other file."""
    path = tmp_path / "core"
    path.write_text("before")

    def interrupt(_written: int, _total: int) -> None:
        raise KeyboardInterrupt

    with iobmd.snapshot(source.pid) as snapshot, pytest.raises(KeyboardInterrupt):
        snapshot.core(path, progress=interrupt)
    command = [sys.executable, "-m", "iobmd", "core", str(source.pid), "-o", str(path)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (1, f"iobmd core: {path}: File too large\n")
    assert main([*command[3:-1], "/dev/full"]) == 1
    killed = iobmd.snapshot(source.pid)
    os.kill(killed.pid, 9)
    assert until(lambda: not killed.is_open)
    with killed, pytest.raises(IOReturnError) as caught:
        killed.core(path)
    assert caught.value.code == IOReturn.kIOReturnNotFound
    assert [file.name for file in tmp_path.iterdir()] == ["core"]
    assert path.read_text() == "before"


def test_a_writer_that_is_killed_leaves_no_file(source: Source, tmp_path: Path) -> None:
    program = f"""
import iobmd, os
with iobmd.snapshot({source.pid}) as snapshot:
    snapshot.core({str(tmp_path / "core")!r}, progress=lambda written, total: os.kill(os.getpid(), 9))
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=30, check=False)
    assert done.returncode == -9
    assert not list(tmp_path.iterdir())


@pytest.mark.needs("root")  # for userfaultfd(2) that serves faults in the kernel
def test_pages_that_only_a_fault_handler_has(tmp_path: Path) -> None:
    """A core file has a segment without contents for them, which debuggers report as inaccessible, and no zeros."""
    with Target([build("userfault"), "poll", "read", "stall"]) as program:
        area, _plain = map(int, program.line().split())
        with iobmd.snapshot(program.pid) as snapshot:
            summary = snapshot.core(tmp_path / "core")
        present = [page.present for page in iobmd.pagemap.pages(program.pid, area, 1 << 20)]
        program.tell("serve")
    core = Core((tmp_path / "core").read_bytes())
    assert False in present
    for page, is_present in enumerate(present):
        assert (core.area(area + page * kernel.PAGE).size > 0) == is_present
    assert summary.omitted >= present.count(False) * kernel.PAGE


def backtraces(program: Path, core: Path) -> list[str]:
    """Return gdb's backtraces of all threads, and some variables."""
    command = ["gdb", "-nx", "-q", "-batch", "-ex", "thread apply all bt", "-ex", "info auxv", program, core]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = [line for line in done.stdout.splitlines() if re.match(r"#|Thread|\d", line)]
    assert len([line for line in lines if line.startswith("Thread")]) == 1 + THREADS, done.stdout + done.stderr
    return lines


@pytest.mark.parametrize("compiler", ["cc", "c++"])
def test_gdb_shows_the_same_as_of_gcore(compiler: str, tmp_path: Path) -> None:
    need_program("gdb")
    gcore = need_program("gcore")
    options = ["-g"] if compiler == "cc" else ["-g", "-xc++", "-fpermissive", "-w"]
    program = tmp_path / "program"
    text = Path(__file__).parents[1] / "support" / "targets_snapshot.c"
    subprocess.run([need_program(compiler), *options, "-pthread", "-o", program, text], check=True)
    with Source(threads=THREADS, program=program) as source:
        until_at_rest(source.pid)
        assert main(["core", str(source.pid), "-o", str(tmp_path / "ours")]) == 0
        subprocess.run(
            [gcore, "-o", tmp_path / "theirs", str(source.pid)], check=True, capture_output=True, timeout=60
        )
        shown = backtraces(program, tmp_path / "ours")
        assert shown == backtraces(program, tmp_path / f"theirs.{source.pid}")
    assert sum(" in main (" in line or " idle (" in line for line in shown) == 1 + THREADS
