"""`iobmd pagemap` of unusual processes: names with control characters, many areas, and exits at any time."""

import contextlib
import csv
import json
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support import kernel
from support.child import started
from support.commands import shown
from support.moving import again_if_pages_move
from support.source_process import SourceProcess
from support.targets import until_at_rest
from support.terminal import lines_on_terminal

from iobmd import Task
from iobmd.cli import main
from iobmd.pagemap.reader import Reader
from iobmd.task import diagnosis
from iobmd.units import PAGE_SIZE

PROGRAM = """
import ctypes, mmap, os, sys
held = []
for name in os.listdir(os.fsencode(sys.argv[1])):
    file = os.open(os.path.join(os.fsencode(sys.argv[1]), name), os.O_RDWR)
    held.append(mmap.mmap(file, 4096, prot=mmap.PROT_READ))
    held[-1][0]
ctypes.CDLL(None).prctl(15, b"c\\x1b[31m\\xff\\rX", 0, 0, 0)
print("ready", flush=True)
sys.stdin.read()
"""
NAMES = (
    b"a\rb", b"q\r700000000000-700000001000 rwxp 00000000 00:00 0 FORGED", b"file 4 kB", b"x\ny",
    b"esc\x1b[31mred\x1b]0;t\x07", b"not utf-8 \xff\xfe", "\u202egpj.exe".encode(), b"<b>&\"'",
    b"c1 \xc2\x9b31m", b"Rss: 4 kB",
)  # fmt: skip
AREAS = """
import mmap, sys
held = []
for number in range(20000):
    held.append(mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=3 if number % 2 else 1))
    if number % 2:
        held[-1][0] = 1
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def running(*arguments: str) -> "Iterator[subprocess.Popen[bytes]]":
    """A program in Python that has printed that it is ready."""
    command = [sys.executable, "-c", *arguments]
    with started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        yield process


@pytest.fixture(scope="module")
def odd() -> Iterator[int]:
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            Path(folder, os.fsdecode(name)).write_bytes(b"x" * PAGE_SIZE)
        with running(PROGRAM, folder) as process:
            until_at_rest(process.pid)  # until then, it touches pages of its heap
            yield process.pid


TEXT = (
    [], ["--sort", "name"], ["--csv"], ["--map"], ["--watch", "0.05", "--count", "2"], ["--runs"],
    ["--svg", "-"], ["--html", "-"],
)  # fmt: skip


@pytest.mark.parametrize("options", TEXT, ids=lambda options: " ".join(options) or "table")
def test_names_neither_break_nor_steer_what_is_shown(odd: int, options: list[str]) -> None:
    if options == ["--runs"] and not kernel.entries(id(odd), 1)[0] & kernel.FRAME:
        pytest.skip("frame numbers are hidden (no CAP_SYS_ADMIN)")
    command = [sys.executable, "-m", "iobmd", "pagemap", str(odd), *options]
    done = subprocess.run(command, capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    for output in (done.stdout, done.stderr):
        text = output.decode()  # which must be UTF-8
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)
        assert not re.search(r"^ *700000000000", text, re.M), "an area that does not exist"
    if options == ["--svg", "-"]:
        ElementTree.fromstring(done.stdout)


@pytest.mark.parametrize("path", ["-", "/dev/fd/1"])
@pytest.mark.parametrize("option", ["--svg", "--save"])
def test_standard_output_in_a_file_is_written_to_where_it_is(option: str, path: str, tmp_path: Path) -> None:
    """As root, the file once replaced /dev/stdout for the whole host; a link in a directory is tested first."""
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to("/proc/self/fd/1")
    file.write_text("before\n")
    for name in (str(link), path):
        command = [sys.executable, "-m", "iobmd", "pagemap", "self", option, name]
        with file.open("a") as output:
            subprocess.run(command, stdout=output, stderr=subprocess.PIPE, check=True)
        assert link.readlink() == Path("/proc/self/fd/1")
    text = file.read_text()
    assert text.startswith("before\n")
    assert text.count("<svg" if option == "--svg" else '"kernel"') == 2
    assert sorted(tmp_path.iterdir()) == [file, link]


@pytest.mark.needs("compiler")
def test_a_process_whose_main_thread_has_exited(
    start_source: Callable[..., SourceProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    source = start_source()
    source.command("leader-exit")
    while kernel.status("VmRSS", source.pid):
        pass
    document = json.loads(shown(capsys, str(source.pid), "--json"))
    resident = {row["start"]: row["resident_bytes"] for row in document["vmas"]}
    assert resident[source["memfd"].address] == source["memfd"].size
    changed = document["changed_while_read"] or {"ended": False, "areas": False}  # its threads may fault in pages
    assert not changed["ended"]
    assert not changed["areas"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link, file = tmp_path / "link", tmp_path / "file"
    file.write_text("old")
    link.symlink_to("file")
    shown(capsys, "self", "--svg", str(link))
    assert "<svg" in link.read_text()
    assert not link.is_symlink()
    assert link.stat().st_mode & 0o777 == 0o600, "it shows addresses"
    assert file.read_text() == "old"


def test_odd_paths_to_write_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Circular links are replaced; a path in /proc/self/fd that is not a descriptor cannot be created."""
    circle = tmp_path / "circle"
    circle.symlink_to("circle")
    shown(capsys, "self", "--svg", str(circle))
    assert "<svg" in circle.read_text()
    for path in ("/proc/self/fd/name", "/proc/self/fd/99999", str(tmp_path / "missing" / "file")):
        assert main(["pagemap", "self", "--svg", path]) == 1
        assert f"{path}: " in capsys.readouterr().err


def test_every_name_comes_whole(odd: int, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(shown(capsys, str(odd), "--json", "--smaps"))
    assert document["name"] == "c\x1b[31m\udcff\rX"
    # The kernel itself writes a newline as \012, so that a name with a literal \012 looks the same.
    names = {os.fsencode(vma["name"]).rpartition(b"/")[2] for vma in document["vmas"]}
    assert names >= set(NAMES)
    text = shown(capsys, str(odd))
    for name in (r"a\x0db", "file 4 kB", r"esc\x1b[31mred\x1b]0;t\x07", r"not utf-8 \xff\xfe", r"\u202egpj.exe"):
        assert name in text
    rows = list(csv.DictReader(StringIO(shown(capsys, str(odd), "--csv"))))
    assert len(rows) == len(document["vmas"])


@again_if_pages_move
def test_a_snapshot_of_odd_names(odd: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, str(odd), "--save", str(tmp_path / "file"))
    assert "nothing changed" in shown(capsys, str(odd), "--diff", str(tmp_path / "file"))


@pytest.fixture(scope="module")
def many() -> Iterator[int]:
    with running(AREAS) as process:
        yield process.pid


PEAK = """
import sys
import iobmd.tools
from iobmd import procfs
from iobmd.cli import main
code = main(sys.argv[1:])
print(procfs.status_bytes("VmHWM"), file=sys.stderr)
sys.exit(code)
"""
LIMIT = 32 << 20


@pytest.mark.parametrize(
    "options",
    [[], ["--json"], ["--csv"], ["--sort", "size"], ["--map"], ["--svg", "/dev/null"], ["--png", "/dev/null"],
     ["--html", "/dev/null"], ["--save", "/dev/null"],
     ["--watch", "0.01", "--count", "2"]],
    ids=" ".join,
)  # fmt: skip
def test_twenty_thousand_areas_in_little_memory(many: int, options: list[str]) -> None:
    command = [sys.executable, "-c", PEAK, "pagemap", str(many), *options]
    done = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert int(done.stderr.splitlines()[-1]) <= LIMIT


NAMED = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
libc.mmap.restype, libc.mmap.argtypes = pointer, [pointer, size, number, number, number, ctypes.c_long]
for number in range(9000):
    file = os.memfd_create(f"{number}-{'x' * 150}")
    os.truncate(file, 4096)
    libc.mmap(None, 4096, 3, 1, file, 0)
    os.close(file)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def named() -> Iterator[int]:
    """A process with 9,000 areas of different names."""
    with running(NAMED) as process:
        yield process.pid


@pytest.mark.parametrize("options", [[], ["--json"], ["--csv", "--grouped"]], ids=" ".join)
def test_nine_thousand_names_in_little_memory(named: int, options: list[str]) -> None:
    command = [sys.executable, "-c", PEAK, "pagemap", str(named), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stderr.splitlines()[-1]) <= LIMIT
    assert "[other mappings]" in done.stdout


def test_rows_in_order(many: int, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(shown(capsys, str(many), "--json", "--sort", "resident"))
    sizes = [vma["resident_bytes"] for vma in document["vmas"]]
    assert len(sizes) > 20000
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == document["summary"]["resident_bytes"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_watch_that_is_ended_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "iobmd", "pagemap", str(os.getpid()), "--watch", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"TMPDIR": str(tmp_path)}) as watching:
        assert watching.stdout
        while b"resident" not in watching.stdout.readline():
            pass
        descriptors = Path(f"/proc/{watching.pid}/fd").iterdir()
        assert any(str(tmp_path) in str(path.readlink()) for path in descriptors), "snapshots are stored elsewhere"
        watching.send_signal(number)
        watching.stdout.read()
    assert watching.returncode == 0
    assert not list(tmp_path.iterdir())


def test_a_watch_goes_on_under_nohup() -> None:
    command = ["nohup", sys.executable, "-m", "iobmd", "pagemap", str(os.getpid()), "--watch", "0.05"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout
        for number in (signal.SIGHUP, signal.SIGTERM):
            for _look in range(3):
                assert "resident" in next(line for line in watching.stdout if "resident" in line)
            watching.send_signal(number)
        watching.stdout.read()
    assert watching.returncode == 0


def test_a_process_that_changes_while_it_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    busy = "import mmap\nprint('ready', flush=True)\nwhile True:\n m = mmap.mmap(-1, 1 << 20); m[0] = 1; m.close()"
    with running(busy) as process:
        for options, wanted in (
            ([], r"^  it changed while it was read: .*page faults$"),
            (["--csv"], r"^iobmd pagemap: .*: it changed while it was read: .*page faults$"),
            (["--json"], r'^"changed_while_read": {.*"page_faults": [1-9]'),
        ):
            for _attempt in range(50):  # it must be scheduled during the read
                assert main(["pagemap", str(process.pid), *options]) == 0
                output, error = capsys.readouterr()
                if found := re.search(wanted, error if options == ["--csv"] else output, re.M):
                    break
            assert found, options


def test_a_process_that_stands_still(odd: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(shown(capsys, str(odd), "--json"))["changed_while_read"] is None
    assert "changed while" not in shown(capsys, str(odd))
    assert main(["pagemap", str(odd), "--csv"]) == 0
    assert all(line.startswith("not shown: frame numbers") for line in capsys.readouterr().err.splitlines())


def test_a_process_that_ends_while_it_is_read() -> None:
    from iobmd.tools.pagemap.steady import Steady

    with started(["sleep", "60"]) as process:
        steady = Steady(Task(process.pid))
        process.kill()
        process.wait()
    assert "exited" in str(steady.restless())


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], "areas, "), (["--map"], "a cell: "), (["--csv"], "start,end,"), (["--svg", "FILE"], "</svg>"),
        pytest.param(["--runs"], " runs, ", marks=pytest.mark.needs("frames")),
        pytest.param(["--csv", "--runs"], "virtual,physical,", marks=pytest.mark.needs("frames")),
    ],
    ids=str,
)  # fmt: skip
def test_what_was_found_of_a_process_that_ends_is_shown(
    odd: int,
    options: list[str],
    found: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ended(_reader: object) -> None:
        raise diagnosis.gone("it ended")

    monkeypatch.setattr(Reader, "require_task", ended)
    file = tmp_path / "file"
    assert main(["pagemap", str(odd), *(str(file) if option == "FILE" else option for option in options)]) == 1
    output, error = capsys.readouterr()
    assert found in (file.read_text() if file.exists() else output)
    assert "it ended" in error


def test_what_was_released_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = "import mmap,sys\nm = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
    program += "m[:] = bytes(4 << 20)\nprint('ready', flush=True)\nsys.stdin.readline()\n"
    program += "m.madvise(mmap.MADV_DONTNEED, 0, 1 << 20)\nprint('ready', flush=True)\nsys.stdin.read()"
    with running(program) as process:
        assert process.stdin
        assert process.stdout
        shown(capsys, str(process.pid), "--save", str(tmp_path / "file"))
        process.stdin.write(b"\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"ready\n"
        assert re.search(
            r"^ *[0-9a-f]+-[0-9a-f]+ +1 MiB released +\[anon\]$",
            shown(capsys, str(process.pid), "--diff", str(tmp_path / "file")),
            re.M,
        )


@again_if_pages_move
def test_a_snapshot_keeps_its_range(odd: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack = next(
        line for line in Path(f"/proc/{odd}/maps").read_text(errors="replace").split("\n") if "[stack]" in line
    )
    part = stack.split()[0]
    shown(capsys, str(odd), "--save", str(tmp_path / "part"), "--range", part)
    assert "nothing changed" in shown(capsys, str(odd), "--diff", str(tmp_path / "part"))
    shown(capsys, str(odd), "--save", str(tmp_path / "whole"))
    assert main(["pagemap", str(odd), "--diff", str(tmp_path / "whole"), "--range", part]) == 1
    assert "different ranges" in capsys.readouterr().err


Damage = Callable[[list[str]], list[str]]


def header(**fields: object) -> Damage:
    def change(lines: list[str]) -> list[str]:
        first = json.loads(lines[0])
        first["iobmd pagemap"] |= fields
        return [json.dumps(first), *lines[1:]]

    return change


def with_line(*added: str) -> Damage:
    """Insert lines after the first."""
    return lambda lines: [lines[0], *added, *lines[1:]]


@pytest.mark.parametrize(
    "damage",
    [
        header(time=1e30), header(time="x"), header(page_bytes=65536), header(pid=None), header(start=-1),
        lambda lines: [line.replace('"spans": [[', '"spans": [[1, ') for line in lines],
        lambda lines: [line.replace('"area": [', '"area": [1, ') for line in lines],
        lambda lines: [lines[0], *(line[: len(line) // 2] for line in lines[1:])],
        with_line("x"),
        *(with_line(f'{{"spans": {spans}}}') for spans in (
            "[]", "5", '[["a", 0, 4096, 1]]', "[[4096, null, null, null]]", "[[4096, 0, 4096, 1.5]]",
            "[[1.5, 0, 4096, 1]]", "[[4096, 0, 0, 1]]", "[[4096, 0, -4096, 1]]",
            "[[4096, 0, 8192, 1], [8192, 0, 4096, 1]]",
            "[[4096, 0, 4096, 128]]", "[[4096, 0, 4096]]", f"[[{'9' * 5000}, 0, 4096, 1]]", "[" * 200_000,
        )),
        with_line('{"spans": [[4096, 0, 4096, 1]]}', '{"spans": [[4096, 0, 4096, 1]]}'),
        *(with_line(f'{{"area": {area}}}') for area in (
            "5", '["a", "b", "r", 0, 0, "", ""]', '[null, null, "r", 0, 0, "", ""]',
            '[8192, 4096, "r", 0, 0, "", ""]', '[4096, 281474976710656, "r", 0, 0, "", ""]',
        )),
    ],
)  # fmt: skip
def test_a_damaged_snapshot_is_refused(
    odd: int, damage: Damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    shown(capsys, str(odd), "--save", str(file))
    *lines, last = file.read_text().splitlines()
    file.write_text("\n".join([*damage(lines), last, ""]))
    assert main(["pagemap", str(odd), "--diff", str(file)]) == 1
    error = capsys.readouterr().err
    assert re.search("snapshot|different page sizes", error)
    assert "end is missing" not in error


def test_a_snapshot_that_was_cut_off_is_refused(odd: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    shown(capsys, str(odd), "--save", str(file))
    lines = file.read_text().splitlines(keepends=True)
    for many in (1, len(lines) // 2, len(lines) - 1):
        file.write_text("".join(lines[:many]))
        assert main(["pagemap", str(odd), "--diff", str(file)]) == 1
        output, error = capsys.readouterr()
        assert "end is missing" in error
        assert not output


def test_others_may_not_read_a_snapshot(odd: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, str(odd), "--save", str(tmp_path / "file"))
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


@pytest.mark.parametrize("option", ["--svg", "--save", "--diff", "--png", "--html"])
def test_no_name_of_a_file(odd: int, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pagemap", str(odd), option, ""]) == 1
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("columns", [1, 19, 20, 28, 79, 300])
def test_a_map_fits_any_width(
    odd: int, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "30")
    text = shown(capsys, str(odd), "--map")
    below = text.splitlines()[1 + text.count("not shown:", 0, text.index("areas with")) :]
    assert re.search(r"^( *[0-9a-f]{9,} )?[AF]", text, re.M)
    assert max(map(len, below)) <= max(columns, 20)
    assert text.count("\n") <= 30


@pytest.mark.parametrize(
    "options", ["{}", "{} --each", "{} --map", "{} --watch 0.1 --count 2", "{} --heat 0.3 --count 3", "--file /etc"]
)
def test_a_terminal_that_lacks_the_signs(odd: int, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("TERM", "xterm")
    lines = lines_on_terminal(60, "pagemap", *options.format(odd).split())
    assert len(lines) > 3
    assert all(line.isascii() for line in lines)


def test_output_that_is_closed(odd: int) -> None:
    command = f"exec {sys.executable} -m iobmd pagemap {odd} >&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_interrupted_at_any_time(odd: int) -> None:
    for delay in range(0, 300, 30):
        command = [sys.executable, "-m", "iobmd", "pagemap", str(odd), "--watch", "0.05"]
        with started(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as watching:
            time.sleep(delay / 1000)
            for _ in range(100):  # the interpreter may lose a signal while it starts
                watching.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    watching.wait(1)
                    break
            watching.kill()
            assert watching.stderr
            error = watching.stderr.read()
        # Before the first line of iobmd, the interpreter itself is interrupted.
        assert watching.returncode in (0, 130, -signal.SIGINT, 1)
        assert "tools/pagemap" not in error, error


def test_decimal_and_hexadecimal_ranges(odd: int, capsys: pytest.CaptureFixture[str]) -> None:
    listing = Path(f"/proc/{odd}/maps").read_text(errors="replace")
    ranges = [line.split()[0].split("-") for line in listing.split("\n") if line]
    # One in seventy addresses has only decimal digits, and is refused because it could be decimal or hexadecimal.
    start, end = next(both for both in ranges if all(set("abcdef") & set(address) for address in both))
    for text in (f"{start}-{end}", f"0x{start}-0x{end}", f"{int(start, 16)}k-{int(end, 16)}k"):
        document = json.loads(shown(capsys, str(odd), "--json", "--range", text))
        assert len(document["vmas"]) == (0 if text.endswith("k") else 1)


@pytest.mark.parametrize("pid", ["1_0", "\u0663", "-1", "0x1"])
def test_what_is_no_pid(pid: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pagemap", pid]) == 2
    assert "usage" in capsys.readouterr().err
