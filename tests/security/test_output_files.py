"""Links and pipes that another user plants where root writes a file, in a world-writable directory."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from iobmd.tools.pagemap import snapshots
from support.child import NOBODY, forked, in_child, started
from support.targets import until

from iobmd._internal import atomic_file
from iobmd._internal.atomic_file import replacing
from iobmd.cli import main

pytestmark = pytest.mark.needs("root")


@pytest.fixture
def shared(tmp_path: Path, setting: Callable[[str, object], None]) -> Path:
    """A directory such as /tmp, on a host that does not itself protect links and pipes."""
    setting("/proc/sys/fs/protected_symlinks", 0)
    setting("/proc/sys/fs/protected_fifos", 0)
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o011)
    return folder


WRITES = {
    "copy -o": lambda path: ["copy", str(os.getpid()), "[stack]", "4096", "--pageable", "-o", str(path)],
    "pagemap --save": lambda path: ["pagemap", "self", "--save", str(path)],
    "pagemap --svg": lambda path: ["pagemap", "self", "--svg", str(path)],
    "pagemap --html": lambda path: ["pagemap", "self", "--html", str(path)],
}


@pytest.mark.parametrize("command", WRITES)
def test_a_planted_link_is_refused(
    shared: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("root's")
    link = shared / "out"
    in_child(lambda: link.symlink_to(precious), uid=NOBODY)
    assert main(WRITES[command](link)) == 1
    assert "symbolic link of another user" in capsys.readouterr().err
    assert precious.read_text() == "root's"
    assert link.is_symlink()
    assert [path.name for path in shared.iterdir()] == ["out"]


def test_a_planted_link_to_standard_output_is_refused(shared: Path) -> None:
    link = shared / "out"
    in_child(lambda: link.symlink_to("/proc/self/fd/1"), uid=NOBODY)
    with pytest.raises(PermissionError), replacing(link, 0o600):
        pass


def test_a_link_that_is_planted_after_the_look(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to a descriptor of this process, planted after the check found a file, is replaced."""
    out, (reading, writing) = shared / "out", os.pipe()
    in_child(out.touch, uid=NOBODY)
    real = atomic_file._descriptor

    def plant(*arguments: Any) -> int | None:
        in_child(lambda: (out.unlink(), out.symlink_to(f"/proc/self/fd/{writing}")), uid=NOBODY)
        return real(*arguments)

    monkeypatch.setattr(atomic_file, "_descriptor", plant)
    with replacing(out, 0o600) as file:
        file.write(b"root's")
    os.close(writing)
    assert os.read(reading, 100) == b""
    os.close(reading)
    assert not out.is_symlink()
    assert out.read_bytes() == b"root's"


def test_a_planted_draft(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each file has a name from the start (no O_TMPFILE), a link at that name is not followed."""

    def refuse(*_arguments: object) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    precious = tmp_path / "precious"
    precious.write_text("root's")
    monkeypatch.setattr(atomic_file._Draft, "_without_name", refuse)
    with replacing(shared / "out", 0o600) as file:
        (draft,) = shared.iterdir()
        file.write(b"new")
    assert (shared / "out").read_bytes() == b"new", "the control"
    monkeypatch.setattr(os, "urandom", lambda _size: bytes.fromhex(draft.name.rpartition(".")[2]))
    in_child(lambda: draft.symlink_to(precious), uid=NOBODY)
    with pytest.raises(FileExistsError), replacing(shared / "out", 0o600) as file:
        file.write(b"newer")
    assert precious.read_text() == "root's"
    assert (shared / "out").read_bytes() == b"new"


@pytest.mark.parametrize(("kind", "after"), [("link", "_descriptor"), ("pipe", "_open_existing")])
def test_an_own_file_that_is_replaced_after_the_look(
    shared: Path, kind: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a directory is not sticky, another user may replace a link or a pipe after the check of its owner."""
    shared.chmod(0o777)
    out, (reading, writing) = shared / "out", os.pipe()
    make: dict[str, Callable[[], object]] = {
        "link": lambda: out.symlink_to(f"/proc/self/fd/{writing}"),
        "pipe": lambda: os.mkfifo(out, 0o666),
    }
    make[kind]()
    with contextlib.ExitStack() as opened:
        opened.callback(os.close, reading)
        opened.callback(os.close, writing)
        real = getattr(atomic_file, after)

        def plant(*arguments: Any) -> object:
            in_child(lambda: (out.rename(shared / "old"), make[kind]()), uid=NOBODY)
            if kind == "pipe":
                opened.callback(os.close, os.open(out, os.O_RDWR))  # a reader: opening it for writing does not wait
            return real(*arguments)

        monkeypatch.setattr(atomic_file, after, plant)
        with pytest.raises(PermissionError, match="replaced by another file"), replacing(out, 0o600) as file:
            file.write(b"root's")
        assert out.lstat().st_uid == NOBODY


@pytest.mark.parametrize("command", WRITES)
def test_a_planted_pipe_is_refused(shared: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = shared / "out"
    in_child(lambda: os.mkfifo(pipe, 0o666), uid=NOBODY)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert main(WRITES[command](pipe)) == 1
        assert "pipe of another user" in capsys.readouterr().err
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)


def test_own_links_are_replaced_and_own_pipes_written_to(shared: Path, tmp_path: Path) -> None:
    link, pipe, target = shared / "link", shared / "pipe", tmp_path / "target"
    target.write_text("old")
    link.symlink_to(target)
    with replacing(link, 0o600) as file:
        file.write(b"new")
    assert (link.read_bytes(), link.is_symlink(), target.read_text()) == (b"new", False, "old")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(pipe, 0o600) as file:
        file.write(b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)


@pytest.mark.parametrize(
    "command", [["demo", "--size", "2M", "--control", "64M"], ["bench", "copy", "--size", "16M", "--rounds", "1"]]
)
def test_nothing_is_loaded_from_the_current_directory(tmp_path: Path, command: list[str]) -> None:
    """`python -m` and `-c` search the current directory first, which may belong to any user."""
    witness = tmp_path / "witness"
    planted = f"open({str(witness)!r}, 'a').write(__name__)\nraise SystemExit(7)\n"
    for name in ("hashlib", "json", "psutil", "mmap"):
        (tmp_path / f"{name}.py").write_text(planted)
    (tmp_path / "iobmd").mkdir()
    (tmp_path / "iobmd" / "__init__.py").write_text(planted)
    launcher = Path(sys.executable).with_name("iobmd")
    done = subprocess.run(
        [launcher, *command], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
    )
    assert not witness.exists(), witness.read_text()
    assert done.returncode in (0, 1), done.stderr


@pytest.mark.parametrize("option", ["--diff", "--watch"])
def test_a_temporary_directory_of_another_user(
    shared: Path, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The owner of TMPDIR renames the directory that is created there, and plants one with links instead."""
    precious = tmp_path / "precious"
    precious.write_text("root's")
    os.chown(shared, NOBODY, NOBODY)
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    save = snapshots.save
    found: list[str] = []

    def attack() -> list[str]:
        names = os.listdir(shared)  # noqa: PTH208
        for name in names:
            (shared / name).rename(shared / f"stolen-{name}")
            (shared / name).mkdir()
            for file in ("now", "0", "1"):
                (shared / name / file).symlink_to(precious)
        return names

    def attacked(*arguments: Any) -> Any:
        found.extend(in_child(attack, uid=NOBODY))
        return save(*arguments)

    saved = tmp_path / "saved"
    assert main(["pagemap", "self", "--save", str(saved)]) == 0
    monkeypatch.setattr(snapshots, "save", attacked)
    how = [option, str(saved)] if option == "--diff" else [option, "0.01", "--count", "2"]
    assert main(["pagemap", "self", *how]) == 0, capsys.readouterr().err
    assert not found, "nothing there has a name"
    assert precious.read_text() == "root's"


@pytest.mark.parametrize("mode", [0o1777, 0o777], ids=["sticky", "not sticky"])
def test_pipes_in_any_world_writable_directory(shared: Path, mode: int) -> None:
    """The kernel's fs.protected_fifos protects sticky directories only."""
    shared.chmod(mode)
    pipe = shared / "out"
    in_child(lambda: os.mkfifo(pipe, 0o666), uid=NOBODY)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(PermissionError, match="pipe of another user"), replacing(pipe, 0o600) as file:
        file.write(b"root's")
    assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.parametrize("command", WRITES)
def test_a_planted_file_that_another_user_keeps_open(shared: Path, command: str) -> None:
    """The output has its name, but is another file, which that user cannot open."""
    out = shared / "out"
    reading, writing = os.pipe()
    waiting, wake = os.pipe()

    def try_to_read() -> tuple[bytes, bool]:
        with out.open("w+b") as opened:
            out.chmod(0o666)
            os.write(writing, b".")
            os.read(waiting, 1)
            try:
                out.open("rb").close()
            except PermissionError:
                return opened.read(), False
            return opened.read(), True

    with ThreadPoolExecutor() as pool:
        found = pool.submit(in_child, try_to_read, uid=NOBODY)
        os.read(reading, 1)
        try:
            assert main(WRITES[command](out)) == 0
        finally:
            os.write(wake, b".")
        assert found.result() == (b"", False)
    assert out.stat().st_size
    assert (out.stat().st_uid, out.stat().st_mode & 0o777) == (os.geteuid(), 0o600)
    for end in (reading, writing, waiting, wake):
        os.close(end)


@pytest.mark.parametrize("named", [False, True])
def test_output_that_is_not_complete_is_nobody_elses(
    shared: Path, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with a umask of 0, by its temporary name, or after a kill in the middle of writing."""
    if named:  # as on a file system without unnamed files
        monkeypatch.setattr(os, "O_TMPFILE", 0)
    out = shared / "out"
    out.write_bytes(b"old")
    reading, writing = os.pipe()

    def victim() -> None:
        os.umask(0)
        with replacing(out, 0o600) as file:
            file.write(b"secret")
            file.flush()
            os.write(writing, b".")
            signal.pause()

    with forked(victim):
        os.read(reading, 1)
        drafts = [path for path in shared.iterdir() if path != out]
        assert len(drafts) == named
        for draft in drafts:
            assert draft.read_bytes() == b"secret", "the control"
            with pytest.raises(PermissionError):
                in_child(draft.read_bytes, uid=NOBODY)
    for draft in drafts:
        with pytest.raises(PermissionError):
            in_child(draft.read_bytes, uid=NOBODY)
    assert out.read_bytes() == b"old"
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("command", WRITES)
def test_a_limit_on_the_size_of_files(shared: Path, command: str) -> None:
    """A caller of sudo may set RLIMIT_FSIZE: nothing remains of the output, and the previous file is complete."""
    out = shared / "out"
    out.write_bytes(b"old" * 1000)

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        return main([*WRITES[command](out)])

    assert in_child(limited) == 1
    assert out.read_bytes() == b"old" * 1000
    assert list(shared.iterdir()) == [out]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_standard_streams_that_the_caller_has_closed(closed: str) -> None:
    """Their numbers go to no other file: messages would be written to it, and `--save -` would overwrite it."""
    launcher = Path(sys.executable).with_name("iobmd")
    program = ["sh", "-c", f'exec "$@" {closed}', "sh", launcher, "pagemap", "self", "--watch", "0.1"]
    null = subprocess.DEVNULL
    with started(program, stdin=null, stdout=null, stderr=null) as command:
        assert until(lambda: any(link.endswith("/maps") for link in links(command.pid))), "the control: it works"
        found = [os.readlink(f"/proc/{command.pid}/fd/{number}") for number in range(3)]  # noqa: PTH115
    assert found == [os.devnull] * 3


def links(pid: int) -> list[str]:
    """Return the files that a process has open."""
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{number}"))  # noqa: PTH115
    return found
