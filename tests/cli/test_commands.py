"""The commands as users run them: exit codes, streams, JSON, and one line on stderr for an error."""

import gc
import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import requirements
from support.child import CAP_IPC_LOCK, NOBODY, in_child
from support.kernel import Footprint
from support.moving import again_if_pages_move
from support.source_process import SourceProcess
from support.terminal import lines_on_terminal

import iobmd
from iobmd import Task
from iobmd.cli import main
from iobmd.cli.demo import command
from iobmd.cli.demo.client import Client

Start = Callable[..., SourceProcess]
Captured = pytest.CaptureFixture[str]


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text


# --- iobmd itself


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"iobmd {iobmd.__version__}\n"


def test_help(capsys: Captured) -> None:
    assert main(["--help"]) == 0
    assert "iobmd COMMAND --help" in capsys.readouterr().out
    for name in ("demo", "copy", "alloc", "doctor", "bench"):
        assert main([name, "--help"]) == 0
        assert f"usage: iobmd {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["copy"], ["copy", "x", "0"], ["bench", "nothing"], ["demo", "-z"]]
)
def test_usage(argv: list[str], capsys: Captured) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert "usage: iobmd" in captured.err
    assert not captured.out


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "iobmd", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"iobmd {iobmd.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"], ["doctor"], ["alloc", "64k"],
        pytest.param(["pagemap", "self", "--runs", "--name", "stack"], marks=pytest.mark.needs("frames")),
    ],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_lines_fit_the_terminal(arguments: list[str]) -> None:
    assert max(map(len, lines_on_terminal(80, *arguments))) <= 80


def test_errors_fit_the_terminal() -> None:
    lines = [line for line in lines_on_terminal(80, "alloc", "1000T", status=1) if line]
    assert max(map(len, lines)) <= 80
    assert "request less [kIOReturnNoMemory]" in " ".join(map(str.strip, lines))


@pytest.mark.needs("root", "frames")
@pytest.mark.parametrize("columns", [40, 80])
@again_if_pages_move
def test_frames_fit_the_terminal(columns: int, start_source: Start) -> None:
    """Above the rows of --flags are the flags of their frames; --frame finds the process again."""
    pid = str(start_source().pid)
    lines = lines_on_terminal(columns, "pagemap", pid, "--name", "stack", "--flags")
    assert max(map(len, lines)) <= columns
    rows = [number for number, line in enumerate(lines) if re.match(r" *[0-9a-f]{12} +[0-9a-f]+ +0x", line)]
    assert any("UPTODATE" in line for line in lines[: rows[0]])
    virtual, _physical, frame, *_ = lines[rows[0]].split()
    lines = lines_on_terminal(columns, "pagemap", "--frame", frame)
    shown = [line.rpartition("\r")[2] for line in lines]  # behind the progress
    assert max(map(len, shown)) <= columns
    assert any(line.split()[:1] == [pid] and virtual in line for line in shown)


def test_what_to_do_instead_of_wiring(capsys: Captured, start_source: Start) -> None:
    source = start_source(1 << 20)
    pid, (address, size) = str(source.pid), source["anonymous"]

    def ask() -> list[str]:
        errors = []
        for arguments in (["copy", pid, hex(address), str(size)], ["share", pid, "1M"], ["alloc", "1M"]):
            assert main(arguments) == 1
            errors.append(one_line(capsys.readouterr().err))
        return errors

    copied, shared, allocated = in_child(ask, drop=CAP_IPC_LOCK, memlock=64 << 10)
    assert "run with CAP_IPC_LOCK, or use --pageable [" in copied
    assert "run with CAP_IPC_LOCK, or use --pageable [" in shared
    assert "run with CAP_IPC_LOCK, or allocate less [" in allocated


def test_reader_that_goes_away() -> None:
    command = f"{sys.executable} -m iobmd doctor | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


# --- demo


def test_demo(capsys: Captured) -> None:
    gc.collect()  # remains of other tests
    before = Footprint.now()
    assert main(["demo", "--size", "2M", "--control", "64M", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["version"] == 1
    assert document["passed"] is True
    sources = [row["source"] for row in document["copies"]]
    assert {"anonymous", "THP", "memfd", "file", "read-only", "untouched"} <= set(sources)
    for row in document["copies"]:
        assert row["equal"] is True
        assert row["resident"] == row["size"]
        assert row["locked"] == (0 if row["wiring"] == "pageable" else row["size"])
    assert {"pageable", "pinned" if have_ring() else "resident"} <= {row["wiring"] for row in document["copies"]}
    assert "without read permission" in document["refusal"]
    purged = document["purgeable"]
    assert purged["size"] == purged["lazily_freed"] == 2 << 20
    assert purged["resident"] == 512
    assert purged["taken"] >= 1
    assert purged["intact"] is purged["lost"] is purged["zero"] is True
    remote = document["remote"]
    assert (remote["seen"], remote["frozen"]) == (True, 2 << 20)
    assert remote["same_frames"] in ([True] if os.geteuid() == 0 else [True, None])
    assert remote["stopped_us"] > 0 < remote["frozen_stopped_us"]
    core = document["core"]
    assert core["size"] > 2 << 20
    assert core["stopped_us"] > 0
    assert core["gdb"]["equal"] if shutil.which("gdb") else core["gdb"] is None
    gc.collect()
    assert Footprint.now().descriptors == before.descriptors
    assert not Path(f"/proc/{document['pid']}").exists()


@pytest.mark.needs("frames")
def test_search_of_the_demo_is_not_copy_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for contiguous memory precedes the copy, whose speed is shown."""

    def copy_after_search(
        task: Task, address: int, size: int, *, progress: Callable[[int], object], **rest: Any
    ) -> Any:
        time.sleep(0.5)
        # Without `progress`: on a busy machine, other threads may copy all chunks before its first call.
        buffer = iobmd.copy(task, address, size, **rest | {"wired": False, "contiguous": False})
        progress(size // 2)
        return buffer

    monkeypatch.setattr(command, "copy", copy_after_search)
    size = 16 << 20
    with Client(anonymous=size) as client:
        row = command._copy(Task(client.pid), client.pieces["anonymous"], command.CONTIGUOUS)
    assert row.equal
    assert row.search_seconds >= 0.5
    assert row.gigabytes_per_second > 2 * size / 0.5 / 1e9


def test_demo_for_people(capsys: Captured) -> None:
    assert main(["demo", "--size", "1M", "--control", "64M"]) == 0
    out = capsys.readouterr().out
    assert out.count("equal") >= 7
    assert "DIFFERENT" not in out
    assert "without read permission" in out
    assert "every byte is intact" in out
    assert "it is Empty, and every byte reads zero" in out
    shows_compaction = not (requirements.missing("root") or requirements.missing("frames")) and have_ring()
    assert ("After one compaction" in out) is shows_compaction
    assert ("Not shown: what compaction moves" in out) is not shows_compaction


def have_ring() -> bool:
    with iobmd.allocate(1) as buffer:
        return buffer.wiring is iobmd.Wiring.PINNED


@pytest.mark.needs("root", "frames")
def test_demo_shows_what_compaction_moves(capsys: Captured) -> None:
    assert main(["demo", "--size", "2M", "--control", "512M", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["contiguous"] == 2 << 20
    compaction = document["compaction"]
    # A page that a compaction is moving at that moment has no frame to compare. That others move, test_pinning shows.
    assert 65_000 <= compaction["mlocked_of"] <= 65_536
    assert (compaction["pinned"], compaction["pinned_of"]) == (0, 512)
    assert compaction["collapse_mlocked"] > 500
    assert compaction["collapse_pinned"] == 0


def demo_in_a_small_limit() -> int:
    return in_child(lambda: main(["demo", "--json"]), drop=CAP_IPC_LOCK, memlock=256 << 10)


def test_demo_fits_into_a_small_limit() -> None:
    assert demo_in_a_small_limit() == 0


@pytest.mark.needs("hugetlb")
@pytest.mark.usefixtures("hugetlb_pool")
def test_demo_leaves_out_a_huge_page_that_must_not_be_locked() -> None:
    assert demo_in_a_small_limit() == 0


# --- alloc


@pytest.mark.needs("frames")
def test_alloc(capsys: Captured) -> None:
    assert main(["alloc", "3M", "--contiguous", "--hold", "0.01", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "verified: no page has moved\n"
    document = json.loads(out)
    assert (document["version"], document["size"], document["wiring"]) == (1, 3 << 20, "pinned")
    assert document["layout"]["contiguous"] is True
    assert [segment["length"] for segment in document["segments"]] == [3 << 20]
    assert main(["alloc", "1M", "--align", "4M"]) == 0
    assert "contiguous; " in capsys.readouterr().out
    assert main(["alloc", "200k"]) == 0
    assert "200 KiB at 0x" in capsys.readouterr().out


def test_alloc_refuses(capsys: Captured) -> None:
    assert main(["alloc", "1", "--mask", "0xfff", "--budget", "1M"]) == 1
    assert "under the mask 0xfff" in one_line(capsys.readouterr().err)
    assert main(["alloc", "4096", "--align", "3k"]) == 1
    assert "not a power of two" in one_line(capsys.readouterr().err)
    assert main(["alloc", "0"]) == 2
    for seconds in ("-1", "nan", "inf", "1e300", "soon"):
        assert main(["alloc", "4096", "--hold", seconds]) == 2


@pytest.mark.needs("frames")
def test_alloc_names_its_own_options(capsys: Captured) -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) << 10
    alignment = 1 << total.bit_length() - 1  # that of one place of the host, or two
    assert main(["alloc", "2M", "--contiguous", "--align", str(alignment), "--seconds", "0"]) == 1
    printed = capsys.readouterr().err
    for option in ("(--seconds S)", "(--budget SIZE)", "(--reserve, as root)"):
        assert option in printed
    assert "iobmd.policy" not in printed


@pytest.mark.needs("frames")
def test_alloc_says_when_a_page_has_moved(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(_buffer: object) -> None:
        raise iobmd.IOReturnError(iobmd.IOReturn.kIOReturnVMError, "the page at 0x1000 was elsewhere", 0, 0x1000)

    monkeypatch.setattr(iobmd.IOMemoryDescriptor, "verify", moved)
    assert main(["alloc", "4096", "--hold", "0.01"]) == 1
    assert "was elsewhere" in one_line(capsys.readouterr().err)


def test_alloc_with_hidden_addresses(capfd: pytest.CaptureFixture[str]) -> None:
    assert in_child(lambda: main(["alloc", "64k"]), uid=NOBODY) == 0
    assert "hides physical addresses" in capfd.readouterr().out


# --- copy


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("form", ["hex", "decimal", "range", "maps", "kilobytes"])
def test_copy_to_a_file(start_source: Start, tmp_path: Path, capsys: Captured, form: str) -> None:
    source = start_source(1 << 20)
    address, size = source["memfd"]
    expected = source.dump("memfd", tmp_path / "dump")
    where = {
        "hex": [hex(address), hex(size)],
        "decimal": [str(address), str(size)],
        "range": [f"{address:#x}-{address + size:#x}"],
        "maps": [f"{address:08x}-{address + size:08x}"],
        "kilobytes": [hex(address), "1MiB"],
    }[form]
    out = tmp_path / "out"
    out.write_bytes(b"previous contents")
    assert main(["copy", str(source.pid), *where, "-o", str(out), "--json"]) == 0
    assert out.read_bytes() == expected
    assert out.stat().st_mode & 0o777 == 0o600
    document = json.loads(capsys.readouterr().out)
    assert (document["version"], document["pid"], document["address"], document["size"]) == (
        1,
        source.pid,
        address,
        size,
    )
    assert document["wiring"] in ("resident", "pinned")
    assert document["sha256"] == hashlib.sha256(expected).hexdigest()
    assert {path.name for path in tmp_path.iterdir()} == {"dump", "out"}


@pytest.mark.needs("compiler")
def test_copy_a_mapping_by_name(start_source: Start, capsys: Captured) -> None:
    source = start_source()
    for name in ("[stack]", "libc.so.6", "memfd:source (deleted)"):
        assert main(["copy", str(source.pid), name, "--pageable", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        areas = [line.split() for line in Path(f"/proc/{source.pid}/maps").read_text().splitlines() if name in line]
        assert document["address"] == int(areas[0][0].split("-")[0], 16)
        assert document["wiring"] == "pageable"
    assert main(["copy", str(source.pid), "[stack]", "100"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("100 bytes from 0x")
    assert "GB/s" not in said
    assert main(["copy", str(source.pid), "libc.so.6", "1M", "--pageable"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("1048576 bytes (1 MiB) from 0x")
    assert "GB/s" in said


@pytest.mark.needs("compiler")
def test_copy_to_a_pipe_that_has_a_name(start_source: Start, tmp_path: Path) -> None:
    source = start_source(1 << 20)
    address, size = source["anonymous"]
    expected = source.dump("anonymous", tmp_path / "dump")
    os.mkfifo(tmp_path / "pipe")
    read = tmp_path / "read"
    with read.open("wb") as file, subprocess.Popen(["timeout", "60", "cat", tmp_path / "pipe"], stdout=file):
        command = [sys.executable, "-m", "iobmd", "copy", str(source.pid), hex(address), str(size), "-o", "pipe"]
        subprocess.run(command, capture_output=True, check=False, cwd=tmp_path, timeout=60)
    assert read.read_bytes() == expected
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.needs("compiler")
@pytest.mark.parametrize("output", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_copy_to_standard_output(start_source: Start, tmp_path: Path, output: str) -> None:
    source = start_source(1 << 20)
    address, size = source["anonymous"]
    expected = source.dump("anonymous", tmp_path / "dump")
    command = [sys.executable, "-m", "iobmd", "copy", str(source.pid), hex(address), str(size), "-o", output]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == expected
    assert b"1048576 bytes" in done.stderr


@pytest.mark.needs("compiler")
def test_what_copy_refuses(start_source: Start, tmp_path: Path, capsys: Captured) -> None:
    source = start_source()
    address, size = source["no-access"]
    out = tmp_path / "out"
    out.write_bytes(b"as before")
    for arguments, why in (
        ([str(source.pid), hex(address), str(size), "-o", str(out)], "without read permission"),
        (["4194304", "0", "1"], "no process has the pid 4194304"),
        (["2", "0x1000", "1"], "kernel thread"),
        ([str(source.pid), "[nowhere]"], "no readable mapping '[nowhere]'"),
        ([str(source.pid), "0x1000"], "add SIZE or -END"),
        ([str(source.pid), "0x2000-0x1000"], "must be positive"),
        ([str(source.pid), "0x1000-0x2000", "2M"], "has only"),
        ([str(source.pid), "[stack]", "-o", str(tmp_path / "no" / "where")], "no/where: No such file or directory"),
    ):
        assert main(["copy", *arguments]) == 1, arguments
        captured = capsys.readouterr()
        assert why in one_line(captured.err)
        assert captured.err.startswith("iobmd copy: ")
        assert not captured.out
    assert out.read_bytes() == b"as before"
    for arguments in ([str(source.pid), "0x1000", "0"], [str(source.pid), "0x1000", "5q"], ["self", "0", "1"]):
        assert main(["copy", *arguments]) == 2
        capsys.readouterr()


@pytest.mark.needs("compiler")
def test_copy_with_holes(start_source: Start, tmp_path: Path, capsys: Captured) -> None:
    source = start_source()
    address, size = source["no-access"]
    out = tmp_path / "out"
    command = ["copy", str(source.pid), hex(address), str(size), "--pageable", "--unreadable", "zero", "-o", str(out)]
    assert main([*command, "--json", "--timeout", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["holes"] == [[0, size]]
    assert out.read_bytes() == bytes(size)
    assert main(command) == 0
    assert f"{size} bytes in 1 range could not be read" in capsys.readouterr().out
    assert main([*command, "--timeout", "soon"]) == 2
    assert "not a number of seconds" in capsys.readouterr().err


@pytest.mark.needs("root")
def test_copy_from_another_user(tmp_path: Path) -> None:
    def run() -> tuple[int, str]:
        import contextlib
        import io

        with contextlib.redirect_stderr(io.StringIO()) as err:
            return main(["copy", "1", "0x400000", "4096"]), err.getvalue()

    code, err = in_child(run, uid=NOBODY)
    assert code == 1
    assert f"belongs to uid 0, this process to uid {NOBODY}" in one_line(err)


@pytest.mark.needs("compiler")
def test_progress_only_on_a_terminal(start_source: Start) -> None:
    source = start_source(300 << 20, "only-anonymous")
    address, size = source["anonymous"]
    command = [sys.executable, "-m", "iobmd", "copy", str(source.pid), hex(address), str(size), "--pageable"]
    assert subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, check=True).stderr == b""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    seen = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the child has closed the terminal
            break
        seen += piece
    os.close(ours)
    assert child.wait() == 0
    assert b"MiB" in seen


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def interrupt(*_arguments: object, **_keywords: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("iobmd.cli.copy.Task", interrupt)
    assert main(["copy", "1", "0", "1"]) == 130
    assert one_line(capsys.readouterr().err) == "iobmd copy: interrupted\n"
