"""The first screen of `iobmd pagemap`, compared with smaps of the same process, at several widths of the terminal."""

import csv
import json
import mmap
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
from iobmd.tools.pagemap.columns import OF_AREAS, brief
from iobmd.tools.pagemap.summary import bar
from support import requirements
from support.child import NOBODY, in_child, sleeping, started
from support.commands import shown
from support.targets import until_at_rest
from support.terminal import lines_on_terminal

from iobmd import procfs
from iobmd.cli import main
from iobmd.units import PAGE_SIZE

PROGRAM = """
import mmap, os, sys, threading
private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
plain, advised = mmap.mmap(-1, 3 << 20, flags=private), mmap.mmap(-1, 16 << 20, flags=private)
shared = mmap.mmap(-1, 5 << 20)
pool = os.memfd_create("pool")
os.truncate(pool, 1 << 20)
shared_file = mmap.mmap(pool, 1 << 20)
plain.madvise(mmap.MADV_NOHUGEPAGE)
advised.madvise(mmap.MADV_HUGEPAGE)
for memory in (plain, advised, shared, shared_file):
    memory[:] = bytes(len(memory))
for _ in range(3):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
print(pool, flush=True)
sys.stdin.read()
"""


class Target(NamedTuple):
    """A process with threads, and with anonymous, shared and huge pages."""

    pid: int
    pool: str
    """The path of its memory file of 1 MiB."""


@pytest.fixture(scope="module")
def running() -> Iterator[Target]:
    command = [sys.executable, "-c", PROGRAM]
    with started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        pool = int(process.stdout.readline())
        until_at_rest(process.pid)  # until then, it touches pages of its heap
        yield Target(process.pid, f"/proc/{process.pid}/fd/{pool}")


@pytest.fixture
def target(running: Target) -> int:
    return running.pid


def rollup(pid: int, *names: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.partition(":")[0] in names)


def tabled(text: str) -> list[dict[str, str]]:
    """Return the rows of a table that has only words without spaces before the name."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.endswith("  mapping"))
    headings = lines[start].split()
    end = next((index for index, line in enumerate(lines) if line.startswith("not shown: ")), len(lines))
    rows = (re.split(r"\s+", line.strip(), maxsplit=len(headings) - 1) for line in lines[start + 1 : end])
    return [dict(zip(headings, row, strict=True)) for row in rows if len(row) == len(headings)]


@pytest.mark.parametrize("options", [[], ["--each"], ["--columns", "all"], ["--sharers"]], ids=" ".join)
@pytest.mark.parametrize("columns", [40, 80, 120, 300])
def test_the_screen_fits_the_terminal(target: int, columns: int, options: list[str]) -> None:
    """No line is wider, and with the first screen there are no more lines than the 20 of the terminal."""
    lines = lines_on_terminal(columns, "pagemap", str(target), *options, rows=20)
    assert max(map(len, lines)) <= columns
    heading = next(line.split() for line in lines if line.rstrip().endswith("  mapping"))
    assert "rss" in heading
    if options == ["--each"]:
        assert any("[stack]" in line for line in lines)
        return
    assert len(lines) < 20
    assert re.search(r"^RSS \S+  PSS \S+  USS \S+  swap \S+$", "\n".join(lines), re.M)
    if not options:
        assert "pss" in heading
        assert ("areas" in heading) is (columns >= 120)
        assert ({"shared", "eligible"} <= set(heading)) is (columns >= 200)
        assert ("mthp" in heading) is (columns >= 200 and requirements.missing("frames") is None)
        assert re.fullmatch(r"… \d+ more, \S+ of rss: --all", lines[-1])


def test_all_and_top(target: int) -> None:
    groups = json.loads(subprocess.check_output([sys.executable, "-m", "iobmd", "pagemap", str(target), "--json"]))
    number = len(groups["groups"])
    lines = lines_on_terminal(80, "pagemap", str(target), "--all")
    assert len(tabled("\n".join(lines))) == number
    assert not any("more" in line for line in lines)
    lines = lines_on_terminal(80, "pagemap", str(target), "--top", "3")
    assert lines[-1].startswith(f"… {number - 3} more, ")
    assert len(tabled("\n".join(lines))) == 3


@pytest.mark.parametrize("key", ["swap", "locked", "shmem"])
def test_the_column_that_sorts_is_shown(target: int, key: str) -> None:
    """At 60 columns others are left out."""
    for process in ([str(target)], ["--processes"]):
        lines = lines_on_terminal(60, "pagemap", *process, "--sort", key, "--top", "2")
        heading = next(line for line in lines if line.rstrip().endswith(("  mapping", "  name")))
        assert key in heading.split()
        assert max(map(len, lines)) <= 60


def test_sums_agree_with_the_kernel(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(shown(capsys, str(target), "--json", "--smaps"))
    groups, total = document["groups"], document["summary"]
    assert total["resident_bytes"] == rollup(target, "Rss")
    assert total["anonymous_bytes"] == rollup(target, "Anonymous")
    assert total["swapped_bytes"] == rollup(target, "Swap")
    assert total["huge_bytes"] == rollup(target, "AnonHugePages", "ShmemPmdMapped", "FilePmdMapped")
    assert total["locked_bytes"] == rollup(target, "Locked")
    assert document["process"]["threads"] == 4
    assert document["process"]["page_tables_bytes"] == procfs.status_bytes("VmPTE", target)
    names = ("resident", "anonymous", "file", "shmem", "uss", "pss", "shared", "swapped", "huge", "locked", "size")
    for name in (f"{name}_bytes" for name in names):
        assert sum(group[name] for group in groups) == total[name], name
    of_areas = Counter[str]()
    for area in procfs.maps(target):
        of_areas[area.name] += area.end - area.start
    for group in groups:
        if group["name"].startswith("/"):
            assert of_areas[group["name"]] == group["size_bytes"], group["name"]


def test_memory_of_two_processes_counts_half_in_each(running: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """The target and this process map its memory file; its other memory is mapped by nothing else."""
    with Path(running.pool).open("r+b") as file, mmap.mmap(file.fileno(), 1 << 20) as memory:
        memory[:] = bytes(len(memory))
        document = json.loads(shown(capsys, str(running.pid), "--json", "--smaps"))
    groups = {group["name"]: group for group in document["groups"]}
    pool, alone = groups["/memfd:pool (deleted)"], groups["[anon]"]
    assert (pool["resident_bytes"], pool["shared_bytes"], pool["pss_bytes"], pool["uss_bytes"]) == (
        1 << 20, 1 << 20, 512 << 10, 0,
    )  # fmt: skip
    assert alone["pss_bytes"] == alone["uss_bytes"] == alone["resident_bytes"] > 19 << 20
    total, process = document["summary"], document["process"]
    # Other processes that start or exit change the shares of libraries.
    pss = rollup(running.pid, "Pss")
    for found in (total["pss_bytes"], process["pss_bytes"]):
        assert abs(found - pss) <= total["file_bytes"] + (512 << 10)
        assert total["uss_bytes"] < found < total["resident_bytes"]


def test_memory_of_each_kind_is_in_its_group(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    groups = {group["name"]: group for group in json.loads(shown(capsys, str(target), "--json"))["groups"]}
    assert groups["[anon, shared]"]["shmem_bytes"] == groups["[anon, shared]"]["size_bytes"] == 5 << 20
    assert groups["[anon]"]["resident_bytes"] >= 19 << 20
    assert groups["[anon]"]["huge_bytes"] == rollup(target, "AnonHugePages")
    assert groups["[anon]"]["thp_eligible_bytes"] >= 16 << 20 or "never" in thp_setting()
    assert groups["[thread stacks]"]["vmas"] == 3
    (row,) = (
        row
        for row in tabled(shown(capsys, str(target), "--columns", "huge,huge%,eligible"))
        if row["mapping"] == "[anon]"
    )
    assert row["huge"] == brief(groups["[anon]"]["huge_bytes"])
    assert row["eligible"] == brief(groups["[anon]"]["thp_eligible_bytes"])


def thp_setting() -> str:
    return re.findall(r"\[(\w+)\]", Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())[0]


@pytest.mark.parametrize(
    ("key", "member"),
    [("pss", "pss_bytes"), ("swap", "swapped_bytes"), ("resident", "resident_bytes")],
)
def test_groups_by_size(target: int, key: str, member: str, capsys: pytest.CaptureFixture[str]) -> None:
    groups = json.loads(shown(capsys, str(target), "--json", "--sort", key))["groups"]
    values = [group[member] for group in groups]
    assert values == sorted(values, reverse=True)
    assert tabled(shown(capsys, str(target), "--sort", key))[0]["mapping"] == "[anon]", (
        "it has the most of everything"
    )


def test_groups_by_name_and_share(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    groups = json.loads(shown(capsys, str(target), "--json", "--sort", "name"))["groups"]
    assert [group["label"] for group in groups] == sorted(group["label"] for group in groups)
    rows = tabled(shown(capsys, str(target), "--sort", "name"))
    assert [row["mapping"] for row in rows] == [group["name"] for group in groups]
    shares = [float(row["huge%"].replace("-", "0")) for row in tabled(shown(capsys, str(target), "--sort", "huge%"))]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0 or thp_setting() == "never"


MAPPING = """
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)
print("ready", flush=True)
sys.stdin.read()
"""


def test_who_maps_the_same(running: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """A second process maps the memory file of the target and the same C library; nothing else maps the file."""

    def sharers() -> dict[str, set[int]]:
        groups = json.loads(shown(capsys, str(running.pid), "--json", "--sharers"))["groups"]
        return {group["label"]: {sharer["pid"] for sharer in group["sharers"]} for group in groups}

    assert sharers()["memfd:pool"] == set()
    command = [sys.executable, "-c", MAPPING, running.pool]
    with started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        found = sharers()
        assert found["memfd:pool"] == {process.pid}
        assert process.pid in found["libc.so.6"]
        assert found["[anon]"] == set()
        text = shown(capsys, str(running.pid), "--sharers")
        name = Path(f"/proc/{process.pid}/comm").read_text().strip()
        assert re.search(rf"  /memfd:pool \(deleted\)  1 process: {re.escape(name)} \({process.pid}\)$", text, re.M)
    assert sharers()["memfd:pool"] == set()


def test_unnamed_memory_is_found_by_its_label(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert {row["mapping"] for row in tabled(shown(capsys, str(target), "--name", "[anon]"))} == {"[anon]"}
    text = shown(capsys, str(target), "--name", "thread stacks", "--each")
    assert text.count("[thread stacks]") == 3
    assert "3 areas, " in text
    assert "page tables" not in text, "it is of the whole process"


def test_groups_as_csv(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader(StringIO(shown(capsys, str(target), "--csv", "--grouped"))))
    groups = json.loads(shown(capsys, str(target), "--json"))["groups"]
    assert [(row["label"], int(row["resident_bytes"])) for row in rows] == [
        (group["label"], group["resident_bytes"]) for group in groups
    ]


def test_a_pipe_has_every_row_column_and_path(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(target))
    assert "\x1b" not in text
    rows = tabled(text)
    assert [*rows[0]][:-1] == list(OF_AREAS)
    paths = {area.name for area in procfs.maps(target) if area.inode and area.name.endswith(".so")}
    assert paths <= {row["mapping"] for row in rows}


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_no_colors_if_they_are_declined(target: int, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in "\n".join(lines_on_terminal(80, "pagemap", str(target), raw=True))
    monkeypatch.setenv(variable, {"NO_COLOR": "1", "TERM": "dumb"}[variable])
    assert "\x1b" not in "\n".join(lines_on_terminal(80, "pagemap", str(target), raw=True))


@pytest.mark.needs("root")
def test_the_first_screen_needs_no_privilege_and_no_excuse() -> None:
    """For an ordinary user, hidden data is listed only with columns that lack it."""

    def shown_there() -> str:
        with sleeping() as process, redirect_stdout(StringIO()) as printed:
            assert main(["pagemap", str(process.pid)]) == 0
        return printed.getvalue()

    text = in_child(shown_there, uid=NOBODY)
    row = tabled(text)[0]
    assert row["runs"] == row["largest"] == row["mthp"] == "?"
    assert "?" not in (row["rss"], row["pss"], row["uss"], row["swap"], row["huge"])
    assert "not shown: frame numbers" in text


def test_pss_without_smaps(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    """It is known where nothing is shared, and unknown elsewhere, also in the sum."""
    text = shown(capsys, str(target), "--no-smaps")
    rows = {row["mapping"]: row for row in tabled(text)}
    assert rows["[anon]"]["pss"] == rows["[anon]"]["uss"] == rows["[anon]"]["rss"] != "-"
    assert next(row for name, row in rows.items() if "libc.so" in name)["pss"] == "?"
    assert "  PSS ?  " in text
    assert "not shown: PSS of shared memory" in text


@pytest.mark.parametrize(
    "arguments",
    [["--sort", "address"], ["--each", "--top", "3"], ["--all", "--top", "3"], ["--top", "0"], ["--columns", "x"],
     ["--csv", "--columns", "rss"], ["--json", "--each"], ["--grouped"], ["--each", "--sharers"],
     ["--csv", "--sharers"], ["--csv", "--grouped", "--runs"], ["--map", "--all"],
     ["--sort", "eligible", "--no-smaps"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pagemap", "self", *arguments]) == 2
    assert "usage: iobmd pagemap" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "?"), (0, "-"), (512, "512B"), (PAGE_SIZE, "4K"), (1023 << 10, "1023K"), ((1 << 20) - 512, "1M"),
     (1 << 20, "1M"), (1536 << 10, "1.5M"), ((100 << 20) - 1, "100M"), (1023 << 20, "1023M"), (52 << 40, "52T")],
    ids=str,
)  # fmt: skip
def test_brief_sizes(size: int | None, text: str) -> None:
    assert brief(size) == text
    assert len(text) <= 5


def test_a_bar_shows_any_part_and_never_more_than_the_whole() -> None:
    assert [bar(part, 100, 10).count("█") for part in (0, 1, 50, 100, 200)] == [0, 1, 5, 10, 10]
    assert all(len(bar(part, 100, 10)) == 10 for part in (0, 1, 50, 100, 200))
