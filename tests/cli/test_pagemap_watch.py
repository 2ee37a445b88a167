"""`iobmd pagemap --watch`: the output shows what another process did between two readings."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

import pytest
from iobmd.tools.pagemap import snapshots as snapshots_command
from iobmd.tools.pagemap import watch as watch_command
from iobmd.tools.pagemap.arguments import parse
from iobmd.tools.pagemap.look import Look
from iobmd.tools.pagemap.ticks import ticks
from support import kernel

from iobmd import pagemap
from iobmd.cli import main
from iobmd.task import diagnosis
from iobmd.units import PAGE_SIZE

PROGRAM = """
import ctypes, mmap, sys, time
libc = ctypes.CDLL(None)
libc.sbrk.restype = ctypes.c_void_p
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
thp = libc.mmap(0x200000000000, 2 << 20, 3, 0x100022, -1, 0)
ctypes.memset(thp, 1, 2 << 20)
def grow(steps):
    for _step in range(steps):
        ctypes.memset(libc.sbrk(65536), 1, 65536)
        time.sleep(0.02)
kept = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
kept.madvise(mmap.MADV_NOHUGEPAGE)
for line in sys.stdin:
    if line == "fill\\n":
        kept[:4 << 20] = b"x" * (4 << 20)
    elif line == "drop\\n":
        kept.madvise(mmap.MADV_DONTNEED, 0, 4 << 20)
    elif line == "grow\\n":
        grow(30)
    elif line == "drop-all\\n":
        libc.munmap(thp, 2 << 20)
    elif line == "cut\\n":
        libc.munmap(thp + (1 << 20), 4096)
        libc.madvise(thp, 2 << 20, 4)
    elif line == "map\\n":
        more = mmap.mmap(-1, 1 << 20)
    elif line == "unmap\\n":
        more.close()
    print("done", flush=True)
"""


class Target:
    """A process that executes the commands of its input."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.tell("nothing")

    def tell(self, what: str) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def target() -> Iterator[Target]:
    made = Target()
    with made.process:
        yield made
        made.process.kill()


def watch(target: Target, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "iobmd", "pagemap", str(target.process.pid), "--watch", "0.2", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_ticks_until(lines: IO[str], wanted: dict[str, int]) -> None:
    """Read ticks, one JSON document each, until at least the expected numbers of bytes have changed."""
    sums: dict[str, int] = {}
    for line in lines:
        for change in json.loads(line)["changes"]:
            sums[change["kind"]] = sums.get(change["kind"], 0) + change["length"]
        if all(sums.get(kind, 0) >= size for kind, size in wanted.items()):
            break
    # Small changes occur in any process; the interpreter touches a page or two.
    assert all(size <= sums[kind] <= size + (256 << 10) for kind, size in wanted.items()), sums


def test_what_happened_between_two_looks(target: Target) -> None:
    with watch(target, "--json") as watching:
        assert watching.stdout
        first = json.loads(watching.stdout.readline())
        assert first["changes"] == []
        frames = kernel.entries(id(first), 1)[0] & kernel.FRAME
        assert [hidden["what"].startswith("frame numbers") for hidden in first["hidden"]] == (
            [] if frames else [True]
        )
        for order, wanted in (
            ("fill", {"newly resident": 4 << 20}),
            ("drop", {"released": 4 << 20}),
            ("map", {"mapped": 1 << 20}),
            ("unmap", {"unmapped": 1 << 20}),
        ):
            target.tell(order)
            read_ticks_until(watching.stdout, wanted)
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 0
        assert watching.stderr
        assert watching.stderr.read() == ""


@pytest.fixture
def watched(
    target: Target, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """Return a function that shows what an order changed: the lines of two ticks, between which it is executed.

    A process that watches on its own may read the memory while the order is executed, and thus half of its changes.
    """

    def look(order: str, *options: str) -> list[str]:
        monkeypatch.setattr(watch_command, "ticks", partial(ticks, wait=lambda _seconds: target.tell(order)))
        assert main(["pagemap", str(target.process.pid), "--watch", "1", "--count", "2", *options]) == 0
        return capsys.readouterr().out.splitlines()

    return look


def test_lines_name_unnamed_areas(watched: Callable[..., list[str]]) -> None:
    """A line of an area begins with its addresses, that of a tick with the time."""
    of_areas = [line for line in watched("fill") if line.startswith(" ")]
    (filled,) = (line for line in of_areas if " 4 MiB newly resident" in line)
    assert filled.endswith("  [anon]")


def test_a_heap_that_grows_all_the_time(target: Target) -> None:
    """The bounds of an area change after its pages were read and before the areas are."""
    with watch(target, "--json") as watching:
        assert watching.stdout
        watching.stdout.readline()
        target.tell("grow")
        read_ticks_until(watching.stdout, {"newly resident": 30 * 65536})
        watching.send_signal(signal.SIGINT)


def test_an_area_that_falls_apart(watched: Callable[..., list[str]]) -> None:
    """A change of contiguous pages is attributed to both parts of a split area, and the unmapped page to neither."""
    start, half = 0x200000000000, 1 << 20
    first, second = watched("cut", "--json", "--range", f"{start:#x}-{start + (2 << 20):#x}")
    assert json.loads(first)["changes"] == []
    assert {(one["start"], one["kind"], one["length"]) for one in json.loads(second)["changes"]} == {
        (start, "released", half + PAGE_SIZE), (start, "unmapped", PAGE_SIZE),
        (start + half + PAGE_SIZE, "released", half - PAGE_SIZE),
    }  # fmt: skip


def test_a_range_that_cuts_areas(
    target: Target, watched: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither --diff nor --watch reports changes outside the range."""
    start, pid = 0x200000000000 - (1 << 20), str(target.process.pid)
    part = f"{start + (1 << 20):#x}-{start + (1 << 20) + 65536:#x}"
    assert main(["pagemap", pid, "--save", str(tmp_path / "file"), "--range", part]) == 0
    _first, second = watched("drop-all", "--json", "--range", part)
    changes = json.loads(second)["changes"]
    assert main(["pagemap", pid, "--diff", str(tmp_path / "file"), "--json"]) == 0
    left = json.loads(capsys.readouterr().out)["changes"]
    assert {(one["kind"], one["length"]) for one in changes} == {("unmapped", 65536), ("released", 65536)}
    assert {(one["kind"], one["end"] - one["start"]) for one in left} == {("unmapped", 65536), ("released", 65536)}


def test_areas_that_were_not_chosen(watched: Callable[..., list[str]]) -> None:
    assert [json.loads(line)["changes"] for line in watched("fill", "--json", "--only", "huge")] == [[], []]


def test_a_process_that_runs_another_program_has_not_ended(
    target: Target, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = [1, 3]
    calls: list[int] = []

    def save(*arguments: object) -> object:
        calls.append(len(calls))
        if calls[-1] in failures:  # as during an exec
            raise diagnosis.gone("no memory")
        return pagemap.save(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(snapshots_command, "save", save)
    look = Look(parse([str(target.process.pid)]))
    with tempfile.TemporaryFile() as even, tempfile.TemporaryFile() as odd:
        looks = list(ticks(look, (even, odd), 0.01, 3))
    assert (len(looks), len(calls)) == (3, 5)
    assert capsys.readouterr().err == ""

    def areas() -> Iterator[None]:
        raise diagnosis.gone("no memory")
        yield

    assert not list(look.until_gone(areas()))
    assert look.restless() == (False, True, 0)


def test_a_process_that_ends(target: Target) -> None:
    with watch(target) as watching:
        assert watching.stdout
        while ", resident" not in watching.stdout.readline():
            pass
        target.process.kill()
        target.process.wait()
        _out, error = watching.communicate(timeout=20)
    assert watching.returncode == 0
    assert "has exited" in error


def test_as_many_looks_as_asked_for(target: Target) -> None:
    with watch(target, "--count", "3", "--name", "[stack]") as watching:
        out, error = watching.communicate(timeout=20)
    assert (watching.returncode, error) == (0, "")
    looks = [line for line in out.splitlines() if ", resident" in line]
    assert [": " in line.partition("resident")[2] for line in looks] == [False, True, True]
    assert all(" 1 area" in line for line in looks)


def test_a_process_that_is_not_there() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    command = [sys.executable, "-m", "iobmd", "pagemap", str(process.pid), "--watch", "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "kIOReturnNotFound" in done.stderr
