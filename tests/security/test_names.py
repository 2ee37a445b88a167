"""Names that other users choose reach a terminal without control characters."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support import kernel
from support.child import sleeping, started
from support.errors import error_of
from support.targets import need_ptrace
from support.terminal import lines_on_terminal

import iobmd
from iobmd import host, procfs
from iobmd._internal import pidns
from iobmd.cli import main
from iobmd.errors import NotPermittedError
from iobmd.host import cgroup
from iobmd.remote import freezer
from iobmd.task import extents, obstacles
from iobmd.units import PAGE_SIZE

ESCAPE = "\x1b[2J"
LINE_ENDS = "\v\x1c\x85\u2028\r"
"""Characters at which str.splitlines() splits, and which the kernel prints unescaped."""


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup whose name would clear the screen, and end lines."""
    v1 = Path("/sys/fs/cgroup/memory/cgroup.procs").exists()
    folder = Path("/sys/fs/cgroup/memory" if v1 else "/sys/fs/cgroup") / f"iobmd{ESCAPE}{LINE_ENDS}{os.getpid()}"
    folder.mkdir()
    yield folder
    folder.rmdir()


@pytest.mark.needs("root", "memory_cgroup", "frames")
@pytest.mark.parametrize("form", ["--runs --flags", "--runs --flags --csv", "--frame"])
def test_cgroups(group: Path, form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\nx = b'x' * (1 << 20)\n"
        "print(id(x) + (1 << 19), flush=True)\ninput()"
    )
    with started([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as target:
        assert target.stdout is not None
        address = int(target.stdout.readline())
        monkeypatch.setattr(pidns, "pids", lambda: [target.pid])  # other processes take more time
        frame = kernel.entries(address // kernel.PAGE * kernel.PAGE, 1, target.pid)[0] & kernel.FRAME
        of = str(frame) if form == "--frame" else str(target.pid)
        assert main(["pagemap", *form.split(), of]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[2J" in shown, "the control: the cgroup is named"
    assert "\x1b" not in shown


@pytest.mark.needs("root", "memory_cgroup")
def test_doctor_in_such_a_group(group: Path) -> None:
    program = (
        f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\nimport iobmd_command\n"
        "raise SystemExit(iobmd_command.main())"
    )
    shown = subprocess.run([sys.executable, "-c", program, "doctor"], capture_output=True, text=True, check=False)
    assert "memory" in shown.stdout, "the control"
    assert "\x1b" not in shown.stdout + shown.stderr


@pytest.mark.needs("root", "memory_cgroup")
def test_groups_whose_names_have_ends_of_lines(group: Path) -> None:
    """/proc/PID/cgroup shows these names: they once made every check of a limit, and thus every allocation, fail."""
    with sleeping() as program:
        (group / "cgroup.procs").write_text(str(program.pid))
        assert str(group) in [found.directory for found in cgroup.around("memory", program.pid)]
        (group.parent / "cgroup.procs").write_text(str(program.pid))


MOUNTED = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None)
folder = os.fsencode(sys.argv[1]) + b"/first\\rsecond\\xff"
os.mkdir(folder)
assert libc.unshare(0x20000) == 0 and libc.mount(b"none", b"/", None, 0x44000, None) == 0
assert libc.mount(b"none", folder, b"tmpfs", 0, None) == 0
with open(os.fsencode(sys.argv[1]) + b"/file", "w+b") as file:
    file.truncate(4096)
    area = mmap.mmap(file.fileno(), 4096)
area[0] = 7
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
input()
"""


@pytest.mark.needs("root")
def test_mounts_whose_names_have_ends_of_lines(tmp_path: Path) -> None:
    """A target chooses such names, also not in UTF-8: they once raised IndexError and UnicodeDecodeError."""
    with started(
        [sys.executable, "-c", MOUNTED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as target:
        assert target.stdout is not None
        address = int(target.stdout.readline())
        text = Path(f"/proc/{target.pid}/mountinfo").read_bytes()
        assert b"first\rsecond\xff" in text, "the control"
        assert len(list(procfs.mounts(target.pid))) == text.count(b"\n")
        found = obstacles.find(target.pid, address, address + PAGE_SIZE, pin=True)
        assert found is None or "shared mapping of a file" in found.why  # the directory may be in memory
        with iobmd.copy(target.pid, address, PAGE_SIZE, freeze=True, wired=False) as copied:
            assert copied.readBytes(0, 1) == b"\7"
        area = next(procfs.areas(target.pid, address, address + 1))
        assert extents.Files(target.pid, 1.0, may_wait=False).find(area)


@pytest.mark.needs("root")
def test_a_tracer_whose_name_is_no_text() -> None:
    """The message about a task that cannot be stopped contains the name of another user's tracer."""
    program = (
        "import ctypes, os, sys\nlibc = ctypes.CDLL(None)\nlibc.prctl(15, b'\\xff\\x1b[2J', 0, 0, 0)\n"
        "print(libc.ptrace(0x4206, int(sys.argv[1]), None, None), flush=True)\ninput()"
    )
    with (
        sleeping() as task,
        started(
            [sys.executable, "-c", program, str(task.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as tracer,
    ):
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == "0\n"
        with pytest.raises(NotPermittedError, match=f"traced by process {tracer.pid} ") as caught:
            iobmd.allocate(PAGE_SIZE, task=task.pid, wired=False)
        assert str(caught.value).isprintable()


def test_doctor_gives_no_user_the_interpreter() -> None:
    """`setcap` on the system's own interpreter makes every user root."""
    commands = [line for line in host.capability_remedy().splitlines() if "setcap" in line]
    real = os.path.realpath(sys.executable)
    for command in commands:
        assert f"+ep {real}" not in command
        assert "-m 0750" in command


NAMED = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
folder = os.fsencode(sys.argv[1]) + b"/x<"
os.mkdir(folder)
name = b"/script><!--<script><b>\\x1b[2J\\x1b]0;owned\\x07\\n\\xff<b>]]>\\xe2\\x80\\xae"
file = os.open(folder + name, os.O_RDWR | os.O_CREAT)
os.ftruncate(file, 4096)
at = libc.mmap(None, ctypes.c_size_t(8192), 3, 1, file, 0)
ctypes.memset(at, 7, 1)
libc.prctl(15, b"\\x1b[2J\\n</b><b>&", 0, 0, 0)
print(at, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def named(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """A program and an address in it, at which a file of one page is mapped twice as far; the names are hostile."""
    program = [sys.executable, "-c", NAMED, str(tmp_path)]
    with started(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as target:
        assert target.stdout is not None
        address = int(target.stdout.readline())
        assert b"\x1b[2J" in Path(f"/proc/{target.pid}/maps").read_bytes(), "the control"
        yield target.pid, address


CALLS: dict[str, Callable[[int, int], object]] = {
    "read": lambda pid, at: iobmd.Task(pid).read(at, 8192),
    "write": lambda pid, at: iobmd.Task(pid).write(at + PAGE_SIZE, b"x"),
    "copy": lambda pid, at: iobmd.copy(pid, at, 8192, wired=False),
    "prepare": lambda pid, at: iobmd.IOMemoryDescriptor.withAddressRange(at, 8192, 3, pid).prepare(),
}


@pytest.mark.parametrize("call", CALLS)
def test_errors_about_files(named: tuple[int, int], call: str) -> None:
    """A traceback shows them on a terminal."""
    if call == "prepare":
        need_ptrace()
    error = error_of(lambda: CALLS[call](*named))
    assert "\\x1b[2J" in str(error), "the control: the file is named"
    assert str(error).isprintable()


def test_areas_as_text(named: tuple[int, int]) -> None:
    area = procfs.find_vma(*named)
    assert "<b>" in str(area), "the control"
    assert str(area).isprintable()


OUTPUTS = [
    "",
    "--each",
    "--sort name --all",
    pytest.param("--runs --flags", marks=pytest.mark.needs("frames")),
    "--csv",
    "--csv --grouped",
    "--json",
    "--map",
    "--openmetrics",
    "--watch 0.01 --count 2",
    "--heat 0.2 --count 2",
]


@pytest.mark.parametrize("options", OUTPUTS)
def test_every_output_about_a_process(
    named: tuple[int, int], options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["pagemap", str(named[0]), *options.split()])
    shown = capsys.readouterr()
    assert not set("\x1b\x07\r") & set(shown.out + shown.err)
    assert "1b[2J" in shown.out or ("--csv" in options and "owned" in shown.out), "the control: a name is shown"


@pytest.mark.parametrize("options", ["", "--watch 0.1 --count 2", "--heat 0.2 --count 2", "--map"])
def test_every_output_on_a_terminal(named: tuple[int, int], options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, colors and positions are control sequences, but not the name of a file, which would set a title."""
    monkeypatch.setenv("TERM", "xterm")
    command = ["pagemap", str(named[0]), "--name", "owned", *options.split()]
    shown = "\n".join(lines_on_terminal(200, *command, raw=True))
    assert "owned" in shown or "--map" in options or "--heat" in options, "the control: the file is named"
    assert "\x1b]0;" not in shown
    assert "\x1b[2J\x1b]" not in shown


def test_a_picture_contains_no_markup_of_others(named: tuple[int, int], tmp_path: Path) -> None:
    """A name of a file or program neither ends an element nor begins one."""
    path = tmp_path / "picture"
    assert main(["pagemap", str(named[0]), "--svg", str(path)]) == 0
    tree = ElementTree.parse(path).getroot()
    words = "".join(tree.itertext())
    assert "<b>" in words, "the control: the names are shown"
    assert not [element for element in tree.iter() if element.tag.rpartition("}")[2] in ("b", "script")]
    assert "\x1b" not in words


class Elements(HTMLParser):
    """Counts the elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002 (of the base class)
        self.tags[tag] += 1


def test_a_page_contains_no_markup_of_others(named: tuple[int, int], tmp_path: Path) -> None:
    """Nor do they end the script that contains them as data; the page permits no other script."""
    texts = []
    for pid in (named[0], os.getpid()):
        assert main(["pagemap", str(pid), "--html", str(tmp_path / "page")]) == 0
        texts.append((tmp_path / "page").read_text())
    assert "owned" in texts[0], "the control: the file is named"
    assert "\x1b" not in texts[0]
    found, usual = (Elements(text).tags for text in texts)
    assert found == usual
    assert "<!--" not in texts[0]


@pytest.mark.parametrize("unified", [False, True], ids=["version 1", "version 2"])
@pytest.mark.parametrize(
    "name", ["x; touch witness #", "$(touch witness)", "'; touch witness; '", "\x1b[2J`touch witness`"]
)
def test_the_command_that_thaws_a_cgroup(
    name: str, unified: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader of the message may execute it, and the owner of a delegated group has chosen its name."""
    folder = tmp_path / name
    folder.mkdir()
    texts = {
        "cgroup.freeze": "1",
        "cgroup.events": "frozen 1",
        "freezer.state": "FROZEN",
        "freezer.self_freezing": "1",
    }
    for file, text in texts.items():
        (folder / file).write_text(f"{text}\n")
    group = cgroup.Cgroup("/x", str(folder), unified)
    monkeypatch.setattr(cgroup, "around", lambda _controller, _pid: [group])
    why = freezer.why(os.getpid())
    assert why.isprintable()
    command = why.partition("thaw it (`")[2].rpartition("`, or unpause")[0]
    assert command.startswith("echo "), "the control"
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=False, capture_output=True)
    assert not (tmp_path / "witness").exists()
