"""The programs in docs/examples and docs/migration, as a user runs them."""

import contextlib
import mmap
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.child import sleeping
from support.core_file import Core
from support.examples import EXAMPLES, run
from support.targets import Target, build, until_at_rest

import iobmd

MIGRATION = EXAMPLES.parent / "migration"
SHARING = EXAMPLES / "sharing"
MIB = 1 << 20
CONNECT = """
import os, socket, sys
if sys.argv[1:]:
    os.seteuid(int(sys.argv[1]))  # the server sees the user of connect(2)
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect("socket")
    connection.recv(1)
"""
"""A client that reads one byte of the message, as the user in its argument."""


def test_tiles() -> None:
    done = run("tiles.py", "--tiles", "64", "--shows", "300")
    assert (done.returncode, done.stderr) == (0, "")
    assert "300 tiles correct" in done.stdout


@pytest.mark.needs("memory_cgroup")
def test_tiles_under_a_limit_that_would_kill(memory_cgroup: Callable[[int], Path]) -> None:
    """128 tiles of 1 MiB in 64 MiB: reclaimed tiles are decoded again. With a dict, the program is killed."""
    shown = ("--tiles", "128", "--shows", "500")
    done = run("tiles.py", *shown, procs=memory_cgroup(64 * MIB))
    assert (done.returncode, done.stderr) == (0, "")
    assert "500 tiles correct" in done.stdout
    assert " 0 again" not in done.stdout
    assert run("tiles.py", "--plain", *shown, procs=memory_cgroup(64 * MIB)).returncode == -signal.SIGKILL


def test_gpu_copies_are_measured_or_the_reason_is_printed() -> None:
    done = run("gpu_copies.py", "--size", "16", "--rounds", "2")
    assert (done.returncode, done.stderr) == (0, "")
    # Without a GPU: a library that is missing, or the error of one without a device.
    assert re.match(r"not measured: .*(cuda|CUDA).*; .*(hip|ROCm)|(CUDA|ROCm), 16 MiB", done.stdout), done.stdout


def test_a_device_whose_registers_cannot_be_mapped_is_disabled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are ordinary: no device has them, so that the registers cannot be described."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from pci_device import BUS_MASTER, Device

    (tmp_path / "class").write_text("0x020000\n")
    (tmp_path / "enable").write_text("0")
    (tmp_path / "config").write_bytes(bytes(64))
    with pytest.raises(iobmd.BadArgumentError, match="not a PCI address"):
        Device(str(tmp_path), 0x020000)
    assert (tmp_path / "enable").read_text() == "0"
    assert not (tmp_path / "config").read_bytes()[4] & BUS_MASTER


@contextlib.contextmanager
def sharing_server(folder: Path) -> Iterator[Callable[[], str]]:
    """Run the server of docs/examples/sharing, and yield a function that returns its next line."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", SHARING / "server.py", "socket"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline
        finally:
            server.terminate()
            _output, errors = server.communicate(timeout=20)
        assert (server.returncode, errors) == (0, "")
    assert not (folder / "socket").exists()


def test_sharing_with_unrelated_processes(tmp_path: Path) -> None:
    """Clients that answer, and one that does not."""
    with sharing_server(tmp_path) as line:
        assert re.fullmatch(r"1024 KiB, (pinned|resident|pageable)\n", line())
        assert not stat.S_IMODE((tmp_path / "socket").stat().st_mode) & 0o077
        for _each in range(2):
            client = run(str(SHARING / "client.py"), "socket", folder=tmp_path)
            assert (client.returncode, client.stderr) == (0, "")
            assert client.stdout.endswith(": your PID?\n")
            number, answer = re.fullmatch(rf"user {os.geteuid()}, process (\d+): process (\d+)\n", line()).groups()
            assert number == answer
        assert run("-c", CONNECT, folder=tmp_path).returncode == 0
        assert line().startswith(f"user {os.geteuid()}, process ")


@pytest.mark.needs("root")
def test_sharing_is_refused_to_other_users(tmp_path: Path) -> None:
    """Of two barriers, the mode of the socket and the peer's credentials, the second is tested without the first."""
    tmp_path.chmod(0o711)
    with sharing_server(tmp_path) as line:
        line()
        refused = run("-c", CONNECT, "1", folder=tmp_path)
        assert "PermissionError" in refused.stderr
        (tmp_path / "socket").chmod(0o666)
        assert run("-c", CONNECT, "1", folder=tmp_path).returncode == 0
        assert re.fullmatch(r"user 1, process \d+: refused\n", line())


def port(name: str, *arguments: str) -> str:
    """Return the output of a program of docs/migration."""
    done = run(f"{name}.py", *arguments, folder=MIGRATION)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("mlock_pagemap", "256 pages in [0-9]+ segments, pinned", marks=pytest.mark.needs("frames")),
        pytest.param("hugetlbfs", "4 MiB at 0x[0-9a-f]+, without a pool", marks=pytest.mark.needs("frames")),
        pytest.param("shared_memory", r"\[1, 2\]"),
        pytest.param("u_dma_buf", "1024 KiB at 0x[0-9a-f]+", marks=pytest.mark.needs("frames")),
        pytest.param("dpdk", "2 MiB at 0x[0-9a-f]+ of node 0", marks=pytest.mark.needs("frames")),
        pytest.param("pynq_buffer", "523776 at 0x[0-9a-f]+", marks=pytest.mark.needs("frames", "numpy")),
    ],
)
def test_ports_of_drivers(name: str, expected: str) -> None:
    assert re.fullmatch(expected, port(name).strip())


def in_kib(pid: int, *fields: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.partition(":")[0] in fields)


def unchanged(name: str, pid: int, *fields: tuple[str, ...]) -> tuple[str, list[int]]:
    """Return the output of a port, and fields of smaps_rollup that were the same before and after it.

    Other processes map pages of the same files and exit, and the kernel may reclaim pages of files.
    """
    for _attempt in range(20):
        before = [in_kib(pid, *names) for names in fields]
        output = port(name, str(pid))
        if before == [in_kib(pid, *names) for names in fields]:
            return output, before
    pytest.fail(f"the memory of a sleeping process changed 20 times: {before}")


@pytest.mark.needs("compiler")
def test_port_of_smem(tmp_path: Path) -> None:
    """A copy of a static program: pages of other files are not private while another process maps them too."""
    program = shutil.copy(build("busy", "-static"), tmp_path / "sleep")
    with Target([program, "wait"]) as target:
        until_at_rest(target.pid)
        output, sizes = unchanged("smem", target.pid, ("Private_Clean", "Private_Dirty"), ("Rss",))
        row = output.splitlines()[1].split()
        assert [int(row[1]), int(row[3])] == sizes
        assert row[-1] == "sleep"


def test_port_of_pmap() -> None:
    with sleeping() as target:
        until_at_rest(target.pid)
        output, sizes = unchanged("pmap", target.pid, ("Rss",))
        _titles, *rows, total = output.splitlines()
        shown = [(row.split()[0], row.split()[3]) for row in rows]
        maps = [line.split()[:2] for line in Path(f"/proc/{target.pid}/maps").read_text().splitlines()]
        areas = [(f"{int(addresses.partition('-')[0], 16):016x}", perms) for addresses, perms in maps]
        assert shown == [area for area in areas if not area[0].startswith("ff")]  # without [vsyscall]
        assert [int(total.split()[2])] == sizes


def test_port_of_vmtouch(tmp_path: Path) -> None:
    """A file that is locked in memory, and one without pages, because nothing was written to it or read from it."""
    size, locked = 16 * mmap.PAGESIZE, mmap.MAP_SHARED | 0x2000  # MAP_LOCKED, which mmap does not define
    cached, sparse = tmp_path / "cached", tmp_path / "sparse"
    cached.write_bytes(bytes(size))
    sparse.touch()
    os.truncate(sparse, size)
    with cached.open("r+b") as opened, mmap.mmap(opened.fileno(), size, locked):
        first, second = port("vmtouch", str(cached), str(sparse)).splitlines()
    assert first == f"{size >> 10:8} KiB  100%  [{'O' * 16}]  {cached}"
    assert second == f"{0:8} KiB    0%  [{' ' * 16}]  {sparse}"


@pytest.mark.needs("frames")
@pytest.mark.parametrize("name", ["numastat", "page_types"])
def test_ports_account_for_all_memory(name: str) -> None:
    with sleeping() as target:
        output, [resident] = unchanged(name, target.pid, ("Rss",))
        assert sum(int(size) for size in re.findall(r"(\d+) KiB", output)) == resident > 0


@pytest.mark.needs("root")
def test_port_of_gcore(tmp_path: Path) -> None:
    """The file holds the private memory of the target, and only its owner may read it."""
    path = tmp_path / "core"
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # the kernel writes the processor's number to its memory (rseq(2))
    with sleeping() as target:
        os.sched_setaffinity(0, allowed)
        until_at_rest(target.pid)  # its start changes memory
        assert re.fullmatch(
            r"\d+ bytes, stopped for \d+\.\d\d ms; threads: 1\n", port("gcore", str(target.pid), str(path))
        )
        core = Core(path.read_bytes())
        lines = Path(f"/proc/{target.pid}/maps").read_text().splitlines()
        with Path(f"/proc/{target.pid}/mem").open("rb") as memory:
            for line in lines:
                if "[stack]" in line:
                    start, end = (int(number, 16) for number in line.split()[0].split("-"))
                    memory.seek(start)
                    pairs = zip(core.read(start, end - start), memory.read(end - start), strict=True)
                    # Each stop stores the remaining time (clock_nanosleep(2)): also the last one, after the snapshot.
                    assert sum(before != after for before, after in pairs) <= 16
    assert path.stat().st_mode & 0o777 == 0o600
