"""`iobmd pagemap --host`, and the metrics of `--openmetrics`, read by the official parsers."""

import csv
import ctypes
import io
import json
import mmap
import os
import pwd
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from iobmd.tools.pagemap import host, openmetrics
from iobmd.tools.pagemap.arguments import parse
from support.child import NOBODY, in_child, sleeping
from support.commands import shown
from support.kernel import frames
from support.terminal import lines_on_terminal

from iobmd.cli import main
from iobmd.host import zoneinfo
from iobmd.pagemap.census import FrameRun, HostMemory, ZoneMemory
from iobmd.physical.policy import Budget
from iobmd.physical.search import PhysicalConstraints, Search
from iobmd.units import PAGE_SIZE

GIB = 1 << 30


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a part of memory only, which takes a busy host less time: the GiB with a page of the C library's file."""
    function = ctypes.CDLL(None).getpid
    assert function() == os.getpid()
    code = ctypes.cast(function, ctypes.c_void_p).value or 0
    (frame,) = frames(code // mmap.PAGESIZE * mmap.PAGESIZE, mmap.PAGESIZE)
    start = frame * mmap.PAGESIZE // GIB * GIB
    found = [(max(first, start), min(end, start + GIB)) for first, end in zoneinfo.ram()]
    monkeypatch.setattr(zoneinfo, "ram", lambda: [(first, end) for first, end in found if first < end])


@pytest.mark.needs("root")
@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("columns", [40, 60, 80, 300])
def test_the_picture_fits_the_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "terminal_width", lambda: columns)
    lines = shown(capsys, "--host", "64M").splitlines()
    assert max(map(len, lines)) < columns
    rows = [line for line in lines if re.match(r" +[0-9a-f]+  \S", line)]
    assert 3 <= len(rows) <= 24
    assert max(map(len, rows)) > columns - 12  # it uses the width
    text = "\n".join(lines)
    for word in ("free", "page cache", "Normal", "longest free run", "after compaction"):
        assert word in text
    assert re.search(r"64 MiB\s+are\s+(available|free)", text)


@pytest.mark.needs("root")
def test_on_a_terminal_cells_have_colors_and_shades(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = lines_on_terminal(80, "pagemap", "--host")
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if re.fullmatch(r" *[0-9a-f]+  [ ·░▒▓█]+", line)]
    assert 3 <= len(rows) <= 24
    assert len(set("".join(row[13:] for row in rows))) > 2


@pytest.mark.needs("root")
@pytest.mark.usefixtures("part")
def test_without_colors_there_are_letters(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--host")
    assert "\x1b" not in text and "█" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("F page cache")]
    assert float(line.split()[3]) > 0


@pytest.mark.needs("root")
@pytest.mark.usefixtures("part")
def test_json_and_csv_have_the_same_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(shown(capsys, "--host", "--json"))
    rows = list(csv.DictReader(StringIO(shown(capsys, "--host", "--csv"))))
    assert document["version"] == 1
    assert document["hidden"] == []
    kinds = document["frames"]["kinds"]
    assert list(kinds) == list(dict.fromkeys(row["kind"] for row in rows))
    assert sum(kinds.values()) == sum(int(row["bytes"]) for row in rows) > 0
    assert {row["zone"] for row in rows} == {zone["name"] for zone in document["frames"]["zones"]}


def test_without_privilege_it_shows_what_the_counters_report() -> None:
    def output() -> tuple[str, dict[str, object], str]:
        text, data, metrics = StringIO(), StringIO(), StringIO()
        for options, file in (([], text), (["--json"], data), (["--openmetrics"], metrics)):
            with redirect_stdout(file):
                assert main(["pagemap", "--host", *options]) == 0
        return text.getvalue(), json.loads(data.getvalue()), metrics.getvalue()

    text, document, metrics = in_child(output, uid=NOBODY if os.geteuid() == 0 else None)
    assert "not shown: " in text and "/proc/kpageflags requires root" in text and "run as root" in text
    blocks = re.search(r"^4 KiB +([\d,]+)", text, re.MULTILINE)
    assert blocks
    assert document["frames"] is None
    assert document["hidden"]
    assert document["counters"]["kinds"]["free"] > 0  # type: ignore[index]
    assert "iobmd_host_counted_bytes" in metrics and "iobmd_host_memory_bytes" not in metrics


def test_free_blocks_are_those_of_buddyinfo() -> None:
    found = zoneinfo.free_blocks()
    lines = [line.split() for line in Path("/proc/buddyinfo").read_text().splitlines()]
    assert set(found) == {(int(line[1].rstrip(",")), line[3]) for line in lines}
    assert {len(orders) for orders in found.values()} == {len(lines[0]) - 4}


@pytest.mark.needs("root")
@pytest.mark.parametrize("size", ["4k", "1M", "64M", "1G"])
def test_any_size_is_answered(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--host", size)
    asked = "2 MiB" if size in ("4k", "1M") else f"{size[:-1]} {size[-1]}iB"
    assert f"{asked} are available: " in text or asked in text.partition("after compaction")[2]


@pytest.mark.parametrize(
    ("free", "sentence"),
    [
        ({"Normal": 3}, "3 aligned windows of that size"),
        ({"DMA32": 1}, "1 aligned window of that size"),  # it has no other zone
        ({"DMA": 0, "DMA32": 0, "Normal": 3}, "3 aligned windows of that size"),
        (
            {"DMA": 0, "DMA32": 2, "Normal": 0},
            "2 aligned windows of that size, all in zone DMA32, from which the kernel allocates last",
        ),
        (
            {"DMA": 1, "DMA32": 2, "Normal": 1000},
            "1,003 aligned windows of that size, 3 of them in zones DMA and DMA32, from which the kernel "
            "allocates last",
        ),
    ],
)
def test_free_memory_of_low_zones_is_named(free: dict[str, int], sentence: str) -> None:
    zones = [ZoneMemory(0, name, {}, {}, {64 << 20: {"free": number}}, {}) for name, number in free.items()]
    nothing = FrameRun(0, 0, 0)
    memory = HostMemory(zones, 0, nothing, nothing, {}, [], 2 << 20, 0, [])
    assert host._where_free(memory, 64 << 20) == sentence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["1", "--host"], "omit the PID"),
        (["--host", "--map"], "--map cannot be combined with --host"),
        (["--host", "--csv", "--json"], "--csv cannot be combined with --host --json"),
        (["--host", "--name", "x"], "--name cannot be combined with --host"),
        (["--host", "many"], "'many' is not a size"),
        (["--host", "2G"], "windows of at most 1 GiB can be examined, not 2G"),
    ],
)
def test_options_without_effect_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pagemap", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_failed_search_refers_to_the_command() -> None:
    """The size in the message is one that the command accepts."""
    report = Search(PhysicalConstraints((3 << 30) - 1, contiguous=True), Budget()).report()
    (command,) = re.findall(r"`iobmd pagemap (--host \S+)`", report)
    assert command == "--host 1024M"
    assert "--host" not in Search(PhysicalConstraints(PAGE_SIZE, allowed=0xFFFFFFFF), Budget()).report()
    assert parse(command.split()).host == 1 << 30  # the largest size that it explains


def official(text: str) -> list[dict[str, dict[tuple[tuple[str, str], ...], float]]]:
    """Return the samples as the official parsers of both formats read them: name, labels, value."""
    from prometheus_client.openmetrics import parser as of_openmetrics
    from prometheus_client.parser import text_string_to_metric_families

    found = []
    for families in (
        list(of_openmetrics.text_string_to_metric_families(text)),
        list(text_string_to_metric_families(text)),
    ):
        assert all(family.type == "gauge" and family.documentation for family in families)
        found.append(
            {
                family.name: {
                    tuple(sorted(sample.labels.items())): sample.value
                    for sample in family.samples
                    if sample.timestamp is None
                }
                for family in families
            }
        )
    assert found[0] == found[1]
    return found


@pytest.mark.needs("root", "prometheus_client")
@pytest.mark.usefixtures("part")
def test_metrics_of_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    samples, _ = official(shown(capsys, "--host", "--openmetrics"))
    by_kind = samples["iobmd_host_memory_bytes"]
    assert sum(by_kind.values()) == sum(end - start for start, end in zoneinfo.ram())
    assert samples["iobmd_host_counted_bytes"][("kind", "free"),] > 0
    windows = samples["iobmd_host_windows"]
    assert {dict(labels)["state"] for labels in windows} == {"free", "movable", "huge", "one_short", "unmovable"}


def user_of_this_process() -> str:
    """The name of its user, or the UID if it has none."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


@pytest.mark.needs("prometheus_client")
def test_metrics_of_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    with sleeping() as process:
        samples, _ = official(shown(capsys, str(process.pid), "--openmetrics"))
        status = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    rss = re.search(r"^Rss: +(\d+) kB", status, re.MULTILINE)
    assert rss
    ((labels, value),) = samples["iobmd_process_resident_bytes"].items()
    assert value == int(rss[1]) << 10
    assert dict(labels)["pid"] == str(process.pid)
    assert dict(labels)["process"] == "sleep"
    assert dict(labels)["user"] == user_of_this_process()


@pytest.mark.needs("prometheus_client")
@pytest.mark.parametrize("by", [None, "cgroup", "name", "user"])
def test_metrics_of_many_processes(by: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """The values are those of the kernel for this process, or at least those in the sum of its group."""
    options = ["--by", by] if by else []
    samples, _ = official(shown(capsys, "--processes", "--openmetrics", *options))
    anonymous = int(re.findall(r"^RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[0]) << 10
    if by is None:
        ((labels, found),) = [
            (dict(labels), value)
            for labels, value in samples["iobmd_process_anonymous_bytes"].items()
            if dict(labels)["pid"] == str(os.getpid())
        ]
        assert found == pytest.approx(anonymous, rel=0.2)
        assert labels["process"] == Path("/proc/self/comm").read_text().strip()
        assert labels["user"] == user_of_this_process()
        group = Path("/proc/self/cgroup").read_text()
        assert f":{labels['cgroup']}\n" in group
        return
    assert max(samples["iobmd_group_anonymous_bytes"].values()) >= anonymous * 0.8
    assert sum(samples["iobmd_group_processes"].values()) >= 1
    assert {name for labels in samples["iobmd_group_processes"] for name, _ in labels} <= {by, "service"}


@pytest.mark.needs("prometheus_client")
def test_odd_names_are_escaped() -> None:
    odd = 'a"b\\c\nd\x1b}e='
    out = io.StringIO()
    with redirect_stdout(out):
        openmetrics.write([openmetrics.Gauge("iobmd_process_areas", "Areas.", [({"process": odd}, 1)])])
    samples, _ = official(out.getvalue())
    ((labels, value),) = samples["iobmd_process_areas"].items()
    assert value == 1
    assert dict(labels)["process"] == 'a"b\\c\\x0ad\\x1b}e='


@pytest.mark.parametrize(
    ("path", "service"),
    [
        ("/system.slice/postgresql@15-main.service", "postgresql@15-main.service"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/app-firefox.scope", "app-firefox.scope"),
        ("/system.slice/docker-0123.scope/nested", "docker-0123.scope"),
        (f"/system.slice/docker-{'0123456789abcdef' * 4}.scope", "0123456789ab"),
        ("/kubepods/burstable/pod1", ""),
        ("/", ""),
    ],
)
def test_the_service_of_a_cgroup(path: str, service: str) -> None:
    assert openmetrics.service_of(path) == service
