"""`iobmd pagemap --processes`, compared with smaps_rollup and status of processes that the tests start."""

import contextlib
import csv
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from iobmd.tools.pagemap import usage
from iobmd.tools.pagemap.usage import container_of, memory_cgroup
from support.child import NOBODY, in_child, sleeping, started, until_asleep
from support.commands import shown
from support.targets import until_at_rest
from support.terminal import lines_on_terminal

from iobmd.cli import main
from iobmd.host import cgroup

SIZE = 8 << 20
PROGRAM = """
import ctypes, mmap, os, sys
ctypes.CDLL(None).prctl(15, sys.argv[2].encode(), 0, 0, 0)
file = os.open(sys.argv[1], os.O_RDWR)
shared, private = mmap.mmap(file, 8 << 20), mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for memory in (shared, private):
    memory[:] = bytes(len(memory))
print("ready", flush=True)
sys.stdin.read()
"""
NAME = f"row{os.getpid():07}"  # of no other run of the suite


@pytest.fixture(scope="module")
def pool() -> Iterator[int]:
    """A memory file of 8 MiB."""
    file = os.memfd_create("iobmd-pair")
    os.ftruncate(file, SIZE)
    yield file
    os.close(file)


@pytest.fixture(scope="module")
def pair(pool: int) -> Iterator[list[int]]:
    """Two processes named `NAME` that map the memory file, and 4 MiB each."""
    with contextlib.ExitStack() as running:
        command = [sys.executable, "-c", PROGRAM, f"/dev/fd/{pool}", NAME]
        pids = []
        for _ in range(2):
            process = running.enter_context(
                started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[pool])
            )
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            until_at_rest(process.pid)  # until then, it touches pages of its heap
            pids.append(process.pid)
        yield pids


def rollup(pid: int, *names: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.partition(":")[0] in names)


def test_rows_and_their_sum_agree_with_the_kernel(pair: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(shown(capsys, "--processes", "--name", NAME, "--json"))
    rows, total = {row["pid"]: row for row in document["processes"]}, document["summary"]
    assert sorted(rows) == sorted(pair)
    for pid, row in rows.items():
        assert row["resident_bytes"] == rollup(pid, "Rss")
        assert row["anonymous_bytes"] == rollup(pid, "Anonymous")
        assert row["huge_bytes"] == rollup(pid, "AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")
        assert abs(row["shmem_bytes"] - SIZE) < 1 << 20, "the kernel counts it for each processor"
        # Only other programs that start or exit change it, by their part of the files.
        assert abs(row["pss_bytes"] - rollup(pid, "Pss")) <= row["file_bytes"]
        assert abs(row["uss_bytes"] - row["anonymous_bytes"]) <= row["file_bytes"]
    assert total["processes"] == 2
    for name in (name for name in total if name.endswith("_bytes")):
        assert total[name] == sum(row[name] for row in rows.values()), name
    shares = total["pss_bytes"] - total["anonymous_bytes"]
    assert SIZE <= shares <= SIZE + total["file_bytes"], "the shared memory counts once, in RSS twice"
    assert total["shared_bytes"] >= 2 * SIZE


def test_the_table_and_csv_have_the_same_rows(pair: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, "--processes", "--name", NAME).splitlines()
    assert lines[0].startswith("2 processes: PSS is ")
    assert sum(line.endswith(f"  {NAME}") for line in lines) == 2
    assert {str(pid) for pid in pair} <= {line.split()[0] for line in lines}
    assert any(line.endswith("  total") for line in lines)
    rows = list(csv.DictReader(StringIO(shown(capsys, "--processes", "--name", NAME, "--csv"))))
    assert {int(row["pid"]) for row in rows} == {*pair}
    assert {row["name"] for row in rows} == {NAME}


@pytest.mark.parametrize("key", ["name", "user", "cgroup", "container"])
def test_groups_of_processes(pair: list[int], key: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(shown(capsys, "--processes", "--name", NAME, "--by", key, "--json"))
    (row,) = document["processes"]
    assert row["processes"] == len(pair)
    assert row["resident_bytes"] == document["summary"]["resident_bytes"]
    text = shown(capsys, "--processes", "--name", NAME, "--by", key)
    assert re.search(rf"^ +2 .*  {re.escape(row[key])}$", text, re.M), text


def test_a_name_of_which_the_kernel_keeps_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "iobmd-program-with-a-long-name"
    program.symlink_to(shutil.which("sleep") or "")
    with started(["sleep", "600"], executable=program) as process:
        until_asleep(process.pid)
        for text in ("d-program", program.name[:-1], program.name):
            (row,) = json.loads(shown(capsys, "--processes", "--name", text, "--json"))["processes"]
            assert (row["pid"], row["name"]) == (process.pid, program.name[:15])
    assert main(["pagemap", program.name]) == 2
    assert "--processes --name TEXT shows PIDs" in capsys.readouterr().err
    assert main(["pagemap", "--processes", "--name", f"another-{program.name}"]) == 0
    assert "no process matches" in capsys.readouterr().err


@pytest.mark.needs("root")
def test_processes_of_a_user_and_of_a_cgroup(pair: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    with sleeping(NOBODY) as process:
        rows = json.loads(shown(capsys, "--processes", "--user", "nobody", "--json"))["processes"]
        assert process.pid in {row["pid"] for row in rows}
        assert {row["user"] for row in rows} == {"nobody"}
        by_number = json.loads(shown(capsys, "--processes", "--user", str(NOBODY), "--json"))["processes"]
        assert process.pid in {row["pid"] for row in by_number}
        assert {row["user"] for row in by_number} == {"nobody"}
    assert main(["pagemap", "--processes", "--user", "no such user"]) == 2
    assert "no user has the name 'no such user'" in capsys.readouterr().err
    path = memory_cgroup(cgroup.membership())
    rows = json.loads(shown(capsys, "--processes", "--cgroup", path, "--name", NAME, "--json"))["processes"]
    assert {row["pid"] for row in rows} == {*pair}
    assert main(["pagemap", "--processes", "--cgroup", "/no/such/group"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "iobmd pagemap: no process matches\n")


@pytest.mark.needs("root")
def test_processes_that_are_not_visible_are_counted(pair: list[int]) -> None:
    def shown_there() -> str:
        with sleeping() as process, redirect_stdout(StringIO()) as printed:
            assert main(["pagemap", "--processes", "--json"]) == 0
            print(process.pid)
            assert main(["pagemap", "--processes"]) == 0
        return printed.getvalue()

    text = in_child(shown_there, uid=NOBODY)
    document, end = json.JSONDecoder().raw_decode(text)
    pid, _, table = text[end:].lstrip().partition("\n")
    pids = {row["pid"] for row in document["processes"]}
    assert int(pid) in pids
    assert not pids & {*pair}
    assert document["not_visible"] >= 2
    assert document["not_visible_bytes"] >= sum(rollup(pid, "Rss") for pid in pair)
    assert re.search(r"^not shown: [\d,]+ processes with \S+ of RSS \(no permission to trace them\)", table, re.M)


@pytest.mark.parametrize("options", [[], ["--by", "name"], ["--columns", "all"]], ids=" ".join)
@pytest.mark.parametrize("columns", [40, 80, 300])
def test_it_fits_the_terminal(pair: list[int], columns: int, options: list[str]) -> None:
    lines = lines_on_terminal(columns, "pagemap", "--processes", *options, rows=24)
    assert max(map(len, lines)) <= columns
    assert len(lines) < 24
    assert any(line.endswith("  total") for line in lines)
    if options[:1] == ["--by"] and columns >= 80:
        assert any(line.lstrip().startswith("procs ") for line in lines)


def test_a_process_that_makes_the_kernel_wait_is_left_out(
    pair: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with one that maps a file of a server that does not answer; the others are shown."""
    answered = threading.Event()

    def waiting(pid: int) -> dict[str, int]:
        if pid == pair[0]:
            answered.wait(60)
        return read(pid)

    read = usage.rollup
    monkeypatch.setattr(usage, "rollup", waiting)
    monkeypatch.setattr(usage, "_PATIENCE", 5)  # on a busy machine, the other processes take longer too
    try:
        document = json.loads(shown(capsys, "--processes", "--name", NAME, "--json"))
    finally:
        answered.set()
    assert [row["pid"] for row in document["processes"]] == [pair[1]]
    assert [hidden["what"] for hidden in document["hidden"]] == [f"process {pair[0]}"]


def test_a_large_process_is_not_blocked(
    pair: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its PSS is unknown without smaps; the sum counts its USS."""
    monkeypatch.setattr(usage.Processes, "_is_bearable", lambda *_asked: False)
    monkeypatch.setattr(usage, "rollup", None)
    document = json.loads(shown(capsys, "--processes", "--name", NAME, "--json"))
    for row in document["processes"]:
        assert row["pss_bytes"] is None
        assert row["resident_bytes"] == rollup(row["pid"], "Rss")
        assert row["anonymous_bytes"] == rollup(row["pid"], "Anonymous")
        assert row["shmem_bytes"] == SIZE
    assert document["summary"]["pss_bytes"] == document["summary"]["uss_bytes"] >= 2 * (4 << 20)
    assert "PSS of 2 processes" in document["hidden"][0]["what"]


@pytest.mark.parametrize(
    ("path", "container"),
    [
        (f"/docker/{'5a' * 32}", "5a5a5a5a5a5a"),
        (f"/system.slice/docker-{'5a' * 32}.scope", "5a5a5a5a5a5a"),
        (f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{'c0' * 32}.scope", "c0c0c0c0c0c0"),
        (f"/kubepods/burstable/pod7/{'c0' * 32}/nested", "c0c0c0c0c0c0"),
        (f"/machine.slice/libpod-{'1f' * 32}.scope/container", "1f1f1f1f1f1f"),
        ("/lxc.payload.web", "web"),
        ("/machine.slice/machine-box.scope", "box"),
        ("/system.slice/sshd.service", ""),
        (f"/user/{'5a' * 31}", ""),
        ("/", ""),
        ("", ""),
    ],
)
def test_containers_by_their_groups(path: str, container: str) -> None:
    assert container_of(path) == container


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("0::/a", "/a"),
        ("5:memory:/b:c\n0::/a", "/b:c"),
        ("4:cpu,memory:/b\n3:pids:/x", "/b"),
        ("3:pids:/x", ""),
        ("", ""),
    ],
)
def test_the_group_that_accounts_memory(text: str, path: str) -> None:
    assert memory_cgroup(text) == path


@pytest.mark.parametrize(
    "arguments",
    [["1", "--processes"], ["--processes", "--only", "huge"], ["--processes", "--runs"], ["--processes", "--map"],
     ["--processes", "--columns", "runs"], ["--processes", "--sort", "address"], ["self", "--user", "root"],
     ["--processes", "--json", "--csv"], ["--processes", "--each"], ["--processes", "--json", "--top", "3"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pagemap", *arguments]) == 2
    assert "usage: iobmd pagemap" in capsys.readouterr().err


def test_shares_of_shared_memory(pair: list[int], pool: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A third mapping, in this process, leaves each of the pair a third of the shared memory."""
    arguments = ("--processes", "--name", NAME, "--json")
    before = {row["pid"]: row for row in json.loads(shown(capsys, *arguments))["processes"]}
    with mmap.mmap(pool, SIZE) as memory:
        memory[:] = bytes(SIZE)
        rows = json.loads(shown(capsys, *arguments))["processes"]
    assert {row["pid"] for row in rows} == {*pair}
    for row in rows:
        lost = before[row["pid"]]["pss_bytes"] - row["pss_bytes"]
        assert abs(lost - SIZE // 6) < SIZE // 12, "other programs change the shares of files by less"
