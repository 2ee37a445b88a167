"""`iobmd pagemap --file`, on files whose parts in memory are known."""

import csv
import json
import mmap
import os
import re
import tempfile
from io import StringIO
from pathlib import Path

import pytest
from iobmd.tools.pagemap import files
from support.child import NOBODY, in_child
from support.commands import shown

from iobmd.cli import main

PAGE = mmap.PAGESIZE


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three files in memory, one of them with two names, and a link to another directory."""
    (tmp_path / "tree/deep/er").mkdir(parents=True)
    for name, pages in (("tree/large", 16), ("tree/deep/small", 1), ("tree/deep/er/empty", 0), ("outside", 4)):
        (tmp_path / name).write_bytes(b"x" * pages * PAGE)
    os.link(tmp_path / "tree/large", tmp_path / "tree/deep/same")
    (tmp_path / "tree/link").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "tree/fifo")
    return tmp_path / "tree"


def test_each_file_of_a_directory_counts_once(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(shown(capsys, "--file", str(tree), "--json"))
    found = {Path(one["path"]).name: one for one in document["files"]}
    assert document["version"] == 1
    assert len(found) == len(document["files"]) == document["summary"]["files"] == 3
    assert {"small", "empty"} < set(found) and set(found) & {"large", "same"}
    assert document["summary"]["cached_bytes"] == document["summary"]["size_bytes"] == 17 * PAGE
    assert found["small"]["cached_bytes"] == PAGE and "part_bytes" not in found["small"]
    rows = list(csv.DictReader(StringIO(shown(capsys, "--file", str(tree / "deep"), "--csv"))))
    assert sum(int(row["cached_bytes"]) for row in rows) == 17 * PAGE
    named = json.loads(shown(capsys, "--file", str(tree / "large"), "--json"))["files"]
    assert [sum(one["part_bytes"]) for one in named] == [16 * PAGE]


@pytest.mark.parametrize("columns", [40, 80, 300])
def test_the_table_fits_the_terminal(
    tree: Path, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "terminal_width", lambda: columns)
    lines = shown(capsys, "--file", str(tree)).splitlines()
    assert max(map(len, lines)) < columns
    assert " ".join(lines[:2]).startswith(f"{17 * PAGE >> 10} KiB of {17 * PAGE >> 10} KiB (100 %) of 3 files")
    drawn = re.findall(r"\[(.*)\]", "\n".join(lines))
    assert all(set(row) == {"█"} for row in drawn)
    assert len(drawn) == (0 if columns == 40 else 2)
    assert lines[-1] == "… 1 more file, 0 B (--csv lists all)"


def test_the_first_files_in_an_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, sizes, and cached parts order three files differently; the last file is not in memory at all."""
    for name, cached, pages in (("b", 8, 8), ("a", 4, 16), ("c", 0, 32)):
        (tmp_path / name).write_bytes(b"x" * cached * PAGE)
        os.truncate(tmp_path / name, pages * PAGE)
    for options, names in (
        ([], "ba"),
        (["--top", "1"], "b"),
        (["--sort", "cached"], "bac"),
        (["--sort", "name", "--top", "2"], "ab"),
        (["--sort", "size"], "cab"),
    ):
        text = shown(capsys, "--file", str(tmp_path), *options)
        assert re.findall(r"\]  .*(.)$", text, re.MULTILINE) == list(names)
        assert "of 3 files in memory" in text
        assert ("… " in text) == (len(names) < 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--openmetrics"], "--openmetrics cannot be combined with --file"),
        (["--columns", "cached"], "--columns cannot be combined with --file"),
        (["--json", "--sort", "name"], "--sort cannot be combined with --file --json"),
        (["--csv", "--top", "1"], "--top cannot be combined with --file --csv"),
        (["--sort", "rss"], "'rss' is no column of files: cached, size, name"),
    ],
)
def test_options_that_files_refuse(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pagemap", "--file", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_position_of_cached_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hole after the end of what was written has no pages in memory, on disks and in tmpfs."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8 * PAGE)
    os.truncate(path, 64 * PAGE)
    text = shown(capsys, "--file", str(path))
    (drawn,) = re.findall(r"\[(.*)\]", text)
    filled = len(drawn.rstrip())
    assert set(drawn[:filled]) <= set("░▒▓█") and filled == pytest.approx(len(drawn) / 8, abs=1.1)


def test_paths_that_fail(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was found is printed before the error on a path that was named."""
    assert main(["pagemap", "--file", str(tree / "none"), str(tree / "large")]) == 1
    output = capsys.readouterr()
    assert "large" in output.out
    assert "none: No such file or directory" in output.err
    assert main(["pagemap", "--file", str(tree / "none")]) == 1
    assert not capsys.readouterr().out


def test_small_files_count_as_whole_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 100)
    text = shown(capsys, "--file", str(tmp_path))
    assert f"{3 * PAGE >> 10} KiB of {3 * PAGE >> 10} KiB (100 %) of 3 files in memory" in text
    assert text.count(f"{PAGE >> 10} KiB     {PAGE >> 10} KiB  100") == 3


@pytest.mark.needs("root")
def test_files_that_may_not_be_opened_are_counted() -> None:
    def hidden() -> list[str]:
        walk = files.Walk([top])
        assert [Path(one.path).name for one in walk.files()] == ["open"]
        return [str(one) for one in walk.hidden()]

    with tempfile.TemporaryDirectory() as top:
        Path(top).chmod(0o755)
        # The kernel shows the cache only of files that one owns or may write to.
        for name, mode in (("open", 0o666), ("readable", 0o644), ("closed", 0)):
            Path(top, name).write_text("x")
            Path(top, name).chmod(mode)
        Path(top, "directory").mkdir(0)
        (text,) = in_child(hidden, uid=NOBODY)
    assert re.search(r"not shown: 3 files or directories \(such as: .*\); remedy: run as root", text)


def test_the_access_time_of_directories_remains(tree: Path) -> None:
    os.utime(tree, (1_000_000_000, 2_000_000_000))
    assert list(files.Walk([str(tree)]).files())
    assert tree.stat().st_atime == 1_000_000_000
