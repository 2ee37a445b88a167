"""`iobmd pagemap`, compared with an independent reader and smaps of the same process."""

import csv
import ctypes
import errno
import json
import mmap
import os
import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from iobmd.tools.pagemap import frame as frame_command
from iobmd.tools.pagemap import look
from iobmd.tools.pagemap.arguments import parse
from support import kernel
from support.child import CAP_SYS_ADMIN, NOBODY, in_child, sleeping, started
from support.commands import shown
from support.moving import again_if_pages_move
from support.page_states import quiet

from iobmd import IOReturn, IOReturnError, pagemap, procfs
from iobmd.cli import main
from iobmd.pagemap import frame
from iobmd.units import PAGE_SIZE, format_size


@pytest.fixture
def target() -> Iterator[int]:
    """An idle process."""
    with started(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"x")
        process.stdin.flush()
        process.stdout.read(1)
        yield process.pid


def rollup(pid: int, *names: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.partition(":")[0] in names)


def test_json_has_every_area_and_its_resident_memory(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    # Programs that start or exit change which pages are shared.
    (resident, shared), document = quiet(
        lambda: (rollup(target, "Rss"), rollup(target, "Shared_Clean", "Shared_Dirty")),
        lambda: json.loads(shown(capsys, str(target), "--json")),
    )
    maps = [
        line.split()[0] for line in Path(f"/proc/{target}/maps").read_text().splitlines() if "vsyscall" not in line
    ]
    assert document["version"] == 1
    assert [f"{vma['start']:x}-{vma['end']:x}" for vma in document["vmas"]] == maps
    assert document["summary"]["resident_bytes"] == resident
    assert sum(vma["resident_bytes"] for vma in document["vmas"]) == resident
    assert sum(vma["shared_bytes"] for vma in document["vmas"]) == shared > 0


@pytest.mark.needs("frames")
@again_if_pages_move
def test_runs_are_broken_at_every_page_that_is_absent_or_elsewhere(
    target: int, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(shown(capsys, str(target), "--json", "--runs"))
    wanted: list[list[int]] = []
    for vma in document["vmas"]:
        for index, entry in enumerate(kernel.entries(vma["start"], vma["end"] - vma["start"], target)):
            virtual, physical = vma["start"] + index * PAGE_SIZE, (entry & kernel.FRAME) * PAGE_SIZE
            if not entry >> 63:
                continue
            if wanted and wanted[-1][0] + wanted[-1][2] == virtual and wanted[-1][1] + wanted[-1][2] == physical:
                wanted[-1][2] += PAGE_SIZE
            else:
                wanted.append([virtual, physical, PAGE_SIZE])
    assert [[run["virtual"], run["physical"], run["length"]] for run in document["runs"]] == wanted
    rows = list(csv.reader(StringIO(shown(capsys, str(target), "--csv", "--runs"))))
    assert [[int(cell) for cell in row] for row in rows[1:]] == wanted
    text = shown(capsys, str(target), "--max-segment", "4096")
    assert f"{sum(length for _virtual, _physical, length in wanted) // PAGE_SIZE:,} segments" in text
    cut = [[run[1] + at, PAGE_SIZE] for run in wanted for at in range(0, run[2], PAGE_SIZE)]
    document = json.loads(shown(capsys, str(target), "--json", "--max-segment", "4096"))
    assert [[segment["physical"], segment["length"]] for segment in document["segments"]] == cut
    assert "runs" not in document
    rows = list(csv.reader(StringIO(shown(capsys, str(target), "--csv", "--max-segment", "4096"))))
    assert [[int(cell) for cell in row] for row in rows[1:]] == cut


@pytest.mark.parametrize(
    "form", ["table", "--csv", pytest.param("--json", marks=pytest.mark.needs("frames")), "--sort"]
)
def test_what_was_begun_is_ended_when_the_process_dies(
    form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with sleeping() as process:

        def dying(*asked: object, **named: object) -> Iterator[pagemap.Area]:
            for number, area in enumerate(pagemap.areas(*asked, **named)):
                if number == 3:
                    process.kill()
                    process.wait()
                yield area

        monkeypatch.setattr(look, "areas", dying)
        options = {"table": [], "--sort": ["--sort", "size"], "--json": ["--json", "--boundary", "4k"]}
        assert main(["pagemap", str(process.pid), *options.get(form, [form])]) == 1
    printed = capsys.readouterr()
    assert "kIOReturnNotFound" in printed.err
    if form == "--json":
        document = json.loads(printed.out)
        assert document["changed_while_read"]["ended"] is True
        assert document["summary"]["vmas"] == len(document["vmas"]) >= 3
    else:
        assert "it exited while it was read" in (printed.err if form == "--csv" else printed.out)


def test_figures_that_smaps_lacks_for_a_part(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads(shown(capsys, str(target), "--json"))
    area = next(vma for vma in whole["vmas"] if vma["name"] == "[stack]")
    for end, is_cut in ((area["end"], False), (area["end"] - PAGE_SIZE, True)):
        document = json.loads(shown(capsys, str(target), "--json", "--range", f"{area['start']:#x}-{end:#x}"))
        assert any("that the range cuts" in hidden["what"] for hidden in document["hidden"]) is is_cut
        assert (document["vmas"][0]["lazy_free_bytes"] is None) is is_cut


def test_a_row_for_each_area_and_a_summary(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(target))
    assert "[stack]" in text
    assert "cat (" in text
    named = shown(capsys, str(target), "--name", "[stack]", "--only", "resident")
    assert "1 area," in named
    sizes = [
        int(row["size_bytes"])
        for row in csv.DictReader(StringIO(shown(capsys, str(target), "--csv", "--sort", "size")))
    ]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.needs("root")
def test_an_ordinary_user_is_told_what_is_hidden() -> None:
    def shown_there() -> str:
        with sleeping() as process, redirect_stdout(StringIO()) as printed:
            assert main(["pagemap", str(process.pid), "--json"]) == 0
        return printed.getvalue()

    document = json.loads(in_child(shown_there, uid=NOBODY))
    assert document["capabilities"]["frames"] is False
    assert document["hidden"]
    assert document["summary"]["run_count"] is document["summary"]["folio_bytes"] is None
    assert document["summary"]["resident_bytes"] > 1 << 20


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    "options",
    [["--runs"], ["--flags"], ["--max-segment", "4k"], ["--runs", "--json"], ["--flags", "--csv"], ["--frame", "1"],
     ["--physical", "4k"]],
    ids=" ".join,
)  # fmt: skip
def test_an_ordinary_user_is_refused_frame_numbers(options: list[str]) -> None:
    """All options fail alike, with the remedy, and without any output that could be mistaken for a result."""

    def refused_there() -> tuple[int, str, str]:
        target = [] if {"--frame", "--physical"} & {*options} else ["self"]
        with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()) as errors:
            code = main(["pagemap", *target, *options])
        return code, printed.getvalue(), errors.getvalue()

    code, output, error = in_child(refused_there, uid=NOBODY)
    assert (code, output) == (1, "")
    assert re.fullmatch(
        r"iobmd pagemap: frame numbers are hidden from this process: .*kIOReturnNotPrivileged.*\n", error
    )


@pytest.mark.needs("frames")
@again_if_pages_move
def test_who_maps_a_frame(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    stack = next(line for line in Path(f"/proc/{target}/maps").read_text().splitlines() if "[stack]" in line)
    start, end = (int(part, 16) for part in stack.split()[0].split("-"))
    entries = kernel.entries(start, end - start, target)
    index, entry = next((index, entry) for index, entry in enumerate(entries) if entry >> 63)
    frame = entry & kernel.FRAME
    document = json.loads(shown(capsys, "--frame", hex(frame), "--json"))
    assert [(use["pid"], use["virtual"]) for use in document["users"]] == [(target, start + index * PAGE_SIZE)]
    assert "ANON" in document["frames"]["flags"]
    assert document["changed_while_read"] is False


@pytest.mark.needs("frames")
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_a_frame_that_is_given_up_while_its_users_are_looked_for(
    form: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = os.memfd_create("kept")  # which keeps the frame from another use
    os.ftruncate(kept, PAGE_SIZE)
    memory = mmap.mmap(kept, PAGE_SIZE)
    memory[0] = 1
    (number,) = kernel.frames(ctypes.addressof(ctypes.c_char.from_buffer(memory)), PAGE_SIZE)

    def users(*asked: object, **named: object) -> Iterator[object]:
        yield from frame.users(*asked, **named)
        memory.close()

    monkeypatch.setattr(frame_command, "users", users)
    text = shown(capsys, "--frame", hex(number), *form)
    os.close(kept)
    is_reported = json.loads(text)["changed_while_read"] if form else "mapped or unmapped during" in text
    assert is_reported is True


@pytest.mark.needs("frames", "root")
def test_processes_that_may_not_be_looked_at_are_counted(capfd: pytest.CaptureFixture[str]) -> None:
    """Run as a user that sees frames (CAP_SYS_ADMIN) and may not trace other processes (no CAP_SYS_PTRACE)."""
    with sleeping(NOBODY) as process:
        code = next(area for area in procfs.maps(process.pid) if "x" in area.perms)
        physical = next(pagemap.runs(process.pid, code.start, PAGE_SIZE)).physical

        def look() -> tuple[set[int], list[int], int, str]:
            refused: list[int] = []
            users = pagemap.users(physical, PAGE_SIZE, refused=lambda pid, _error: refused.append(pid))
            found = {use.pid for use in users}
            with redirect_stdout(StringIO()) as printed:
                ended = main(["pagemap", "--frame", hex(physical // PAGE_SIZE)])
                ended |= main(["pagemap", "--frame", hex(physical // PAGE_SIZE), "--json"])
            return found, refused, ended, printed.getvalue()

        found, refused, ended, text = in_child(look, drop=0xFFFFFFFF & ~CAP_SYS_ADMIN)
        assert process.pid in {use.pid for use in pagemap.users(physical, PAGE_SIZE)}
    assert process.pid not in found
    assert process.pid in refused
    assert ended == 0
    assert re.search(r"not shown: mappings of [0-9,]+ other process(es)? \(such as: no access to", text)
    (hidden,) = json.loads("{" + text.partition("{")[2])["hidden"]
    assert hidden["what"].startswith("mappings of ")


@pytest.mark.needs("frames")
def test_who_maps_a_frame_is_no_guess_without_descriptors() -> None:
    def look() -> None:
        fd = os.open("/dev/null", os.O_RDONLY)  # the lowest frame, which is the only one
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1, fd + 1))
        os.close(fd)
        list(pagemap.users(PAGE_SIZE, PAGE_SIZE))

    with pytest.raises(IOReturnError) as caught:
        in_child(look)
    assert caught.value.code == IOReturn.kIOReturnNoResources


@pytest.mark.parametrize(
    ("physical", "length"), [(-PAGE_SIZE, PAGE_SIZE), (PAGE_SIZE, -PAGE_SIZE), (1 << 64, PAGE_SIZE)]
)
def test_no_such_frames(physical: int, length: int) -> None:
    with pytest.raises(IOReturnError) as caught:
        next(pagemap.users(physical, length))
    assert caught.value.code == IOReturn.kIOReturnBadArgument


@pytest.mark.needs("frames")
@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]], ids=["text", "json", "csv"])
def test_flags_that_are_hidden(
    target: int, form: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run as a user with CAP_SYS_ADMIN other than root: frames are visible, but /proc/kpageflags belongs to root."""

    def denied(path: str, *arguments: int) -> int:
        if path == "/proc/kpageflags":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return opened(path, *arguments)

    opened = os.open
    monkeypatch.setattr(frame.os, "open", denied)
    monkeypatch.setattr(look.os, "access", lambda *_asked: False)
    assert main(["pagemap", str(target), "--flags", *form]) == 1
    output, error = capsys.readouterr()
    assert output == ""
    assert "/proc/kpageflags: Permission denied; run as root" in error
    assert main(["pagemap", str(target), "--runs", *form]) == 0


@pytest.mark.needs("frames")
@again_if_pages_move
def test_frames_and_physical_addresses(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Both are accepted and printed, of all processes and of the runs of one."""
    whole = json.loads(shown(capsys, str(target), "--json", "--runs", "--name", "[stack]"))["runs"]
    run = whole[-1]
    frame, physical = run["physical"] // PAGE_SIZE, run["physical"]
    assert run["frame"] == frame
    for text in (f"{physical:#x}", f"{physical + PAGE_SIZE - 1:#x}", f"{physical:#x}-{physical + PAGE_SIZE:#x}"):
        assert parse(["--physical", text]).frame == parse(["--frame", hex(frame)]).frame == (physical, PAGE_SIZE)
    found = json.loads(shown(capsys, "--physical", hex(physical), "--json"))
    assert (found["physical"], found["length"], found["frame"]) == (physical, PAGE_SIZE, frame)
    assert (target, run["virtual"]) in {(use["pid"], use["virtual"]) for use in found["users"]}
    assert found["beyond_memory"] is False
    text = shown(capsys, "--frame", hex(frame))
    end, size = physical + PAGE_SIZE, format_size(PAGE_SIZE)
    assert text.startswith(f"frame {frame:#x}, physical {physical:#x}-{end:#x}, {size}\n")
    assert f" {physical:11x} {frame:#9x} " in text
    for option, text in (("--frame", f"{frame:#x}"), ("--physical", f"{physical:#x}")):
        rows = json.loads(shown(capsys, str(target), "--json", "--runs", option, text))["runs"]
        assert rows == [run]
        line = f"{run['virtual']:12x} {physical:11x} {frame:#9x} "
        assert any(row.startswith(line) for row in shown(capsys, str(target), "--runs", option, text).splitlines())


@pytest.mark.needs("frames")
def test_a_frame_beyond_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    ranges = re.findall(r"^ *[0-9a-f]+-([0-9a-f]+) : System RAM$", Path("/proc/iomem").read_text(), re.M)
    end = (max(int(last, 16) for last in ranges) + 1) // PAGE_SIZE
    text = shown(capsys, "--frame", f"{end:#x}")
    assert f"beyond the memory of this host, whose last frame is {end - 1:#x}" in text
    document = json.loads(shown(capsys, "--frame", f"{end - 1:#x}", "--json"))
    assert document["beyond_memory"] is False
    assert document["memory_end"] == end * PAGE_SIZE


@pytest.mark.needs("frames")
def test_segments_as_csv(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader(StringIO(shown(capsys, str(target), "--csv", "--max-segment", "4k"))))
    assert {row["length"] for row in rows} == {"4096"}
    assert set(rows[0]) == {"physical", "length"}


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("140725797761024-140725797896192", 140725797761024),  # as in the output of --json
        ("94123456789012-94123456793108", 94123456789012),
        ("00400000-00401000", 0x400000),
        ("7f0000000000-7f0000200000", 0x7F0000000000),
        ("0x1000-8192", PAGE_SIZE),
    ],
)
def test_addresses_as_people_paste_them(text: str, start: int) -> None:
    assert parse(["1", "--range", text]).range[0] == start


@pytest.mark.parametrize(("text", "number"), [("159bf2000", "0x159bf2000"), ("1a000-1afff", "0x1a000-0x1afff")])
def test_a_frame_without_0x(text: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pagemap", "--frame", text]) == 2
    error = capsys.readouterr().err
    assert f"write {number} if it is a frame number, --physical {number} if it is a physical address" in error


@pytest.mark.parametrize("form", [[], ["--runs"]], ids=["table", "runs"])
def test_no_area_matches(target: int, form: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if form and not kernel.entries(id(form), 1)[0] & kernel.FRAME:
        pytest.skip("frame numbers are hidden (no CAP_SYS_ADMIN)")
    assert main(["pagemap", str(target), "--name", "no such", *form]) == 0
    assert capsys.readouterr().err == "iobmd pagemap: no area matches --name no such\n"
    assert main(["pagemap", str(target), "--name", "stack", *form]) == 0
    assert not capsys.readouterr().err


def test_diff_names_areas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, "self", "--save", str(tmp_path / "file"))
    file = os.memfd_create("iobmd-named")
    os.ftruncate(file, 1 << 20)
    with mmap.mmap(file, 1 << 20) as memory:
        os.close(file)
        memory[:8192] = bytes(8192)
        text = shown(capsys, "self", "--diff", str(tmp_path / "file"))
        document = json.loads(shown(capsys, "self", "--diff", str(tmp_path / "file"), "--json"))
        shown(capsys, "self", "--save", str(tmp_path / "later"))
    gone = shown(capsys, "self", "--diff", str(tmp_path / "later"))
    name = "/memfd:iobmd-named (deleted)"
    for amount, change in (("1 MiB", "mapped"), ("8 KiB", "newly resident")):
        assert re.search(rf" {amount} {change} +{re.escape(name)}$", text, re.M), text
    sizes = {(one["kind"], one["end"] - one["start"]) for one in document["changes"] if one["name"] == name}
    assert sizes == {("mapped", 1 << 20), ("newly resident", 8192)}
    for amount, change in (("1 MiB", "unmapped"), ("8 KiB", "released")):
        assert re.search(rf" {amount} {change} +{re.escape(name)}$", gone, re.M), gone


def test_unnamed_areas_in_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They have the names of their mappings, in whichever snapshot they are; JSON has their own, which is empty."""
    reserved = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)
    shown(capsys, "self", "--save", str(tmp_path / "file"))
    with mmap.mmap(-1, 3 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ), reserved:
        reserved.close()
        text = shown(capsys, "self", "--diff", str(tmp_path / "file"))
        document = json.loads(shown(capsys, "self", "--diff", str(tmp_path / "file"), "--json"))
    assert re.search(r" 3 MiB mapped +\[anon, read-only\]$", text, re.M), text
    assert re.search(r" 1 MiB unmapped +\[anon, reserved\]$", text, re.M), text
    assert {one["name"] for one in document["changes"] if one["end"] - one["start"] == 3 << 20} == {""}


@again_if_pages_move
def test_save_and_diff(target: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown(capsys, str(target), "--save", str(tmp_path / "file"))
    assert "nothing changed" in shown(capsys, str(target), "--diff", str(tmp_path / "file"))
    document = json.loads(shown(capsys, str(target), "--diff", str(tmp_path / "file"), "--json"))
    assert document["before"]["pid"] == document["after"]["pid"] == target
    assert document["changes"] == []
    frames = kernel.entries(id(document), 1)[0] & kernel.FRAME
    # Others are hidden on a host with swap.
    assert any(hidden["what"].startswith("moved pages") for hidden in document["hidden"]) is not bool(frames)


@pytest.mark.needs("swap")
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
def test_diff_says_what_it_takes_for_released(
    target: int, form: list[str], tmp_path: Path, swap: None, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(capsys, str(target), "--save", str(tmp_path / "file"))
    assert "shared memory in swap" in shown(capsys, str(target), "--diff", str(tmp_path / "file"), *form)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["x"],
        ["1", "--json", "--csv"],
        ["1", "--frame", "1"],
        ["1", "--physical", "4k", "--map"],
        ["--physical", "0x2000-0x1000"],
        ["--physical", "x"],
        ["--physical", "4k", "--frame", "1"],
        ["1", "--range", "5"],
        ["1", "--boundary", "3"],
        ["1", "--diff", "file", "--csv"],
        ["1", "--diff", "file", "--json", "--watch", "1"],
        ["1", "--flags", "--max-segment", "4k"],
        ["1", "--runs", "--sort", "size"],
        ["1", "--map", "--boundary", "4k"],
        ["1", "--map", "--svg", "file"],
        ["1", "--map", "--json"],
        ["1", "--map", "--sort", "size"],
        ["1", "--save", "file", "--name", "x"],
        ["--frame", "1", "--only", "huge"],
        ["1", "--csv", "--runs", "--max-segment", "4k"],
        ["1", "--range", "700000000000-700000001000"],
        ["1", "--range", "917606400-918274048"],
        ["--frame", "0x10-"],
        ["--frame", "1_0"],
        ["1", "--map", "--smaps"],
        ["1", "--runs", "--no-smaps"],
        ["1", "--save", "file", "--smaps"],
        ["--frame", "1", "--no-smaps"],
        ["1", "--only", "locked", "--no-smaps"],
        ["1", "--sort", "locked", "--no-smaps"],
        ["1", "--watch", "0"],
        ["1", "--watch", "x"],
        ["1", "--watch", "1", "--count", "0"],
        ["1", "--count", "3"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pagemap", *arguments]) == 2
    assert "usage: iobmd pagemap" in capsys.readouterr().err


def test_a_process_that_is_gone_or_has_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert main(["pagemap", str(process.pid)]) == 1
    assert "kIOReturnNotFound" in capsys.readouterr().err
    assert main(["pagemap", "2"]) == 1
    assert "Traceback" not in capsys.readouterr().err
