"""`iobmd bench`: every figure has its floor or peer, and the state of the host does not change."""

import json
import re
import shutil
from pathlib import Path

import pytest
from iobmd.tools import bench
from iobmd.tools.bench import contiguous, dpdk, host, mpi, purgeable, snapshot
from iobmd.tools.bench.result import Result
from support.namespaces import WITH_OWN_SHM

import iobmd
from iobmd.cli import main

Captured = pytest.CaptureFixture[str]
MIB = 1 << 20
PEERS = ("numastat", "smem", "smem")
"""The program to which each row of the host belongs that not every host has."""
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("copy", 22),
        pytest.param("wired", 7, marks=pytest.mark.needs("frames", "memlock", "big_memory")),
        pytest.param("allocator", 8, marks=pytest.mark.needs("frames", "memlock")),
        pytest.param("purgeable", 5, marks=pytest.mark.needs("memlock")),
        ("remote", 11 + 4 * bool(shutil.which("gcore")) + 2 * bool(shutil.which("redis-server"))),
        ("pagemap", 10),
        ("cachemode", 7),
        pytest.param("host", 6 + len(list(filter(shutil.which, PEERS))), marks=pytest.mark.needs("root")),
        ("maps", 4),
        pytest.param("mpi", 28, marks=pytest.mark.needs("memlock", "mpi4py", "mpich", "openmpi")),
        pytest.param("contiguous", 4, marks=pytest.mark.needs("frames", "memlock", "big_memory")),
    ],
)
def test_every_figure_has_its_floor(name: str, rows: int, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses less memory than for published figures: a sixteenth of the size, and searches for one size only."""
    monkeypatch.setattr(contiguous, "WARM", 64 * MIB)
    monkeypatch.setattr(snapshot, "MULTIPLES", (1,))
    monkeypatch.setattr(purgeable, "SIZE", 4 * MIB)
    monkeypatch.setattr(purgeable, "LIMIT", 64 * MIB)
    monkeypatch.setattr(host, "_files", lambda _rounds: ())
    monkeypatch.setattr(host, "PROCESSES", 2)
    monkeypatch.setattr(mpi, "SAMPLES", 1)
    monkeypatch.setattr(mpi, "BYTES", MIB)  # on a busy host ranks wait for each other in each call
    monkeypatch.setattr(purgeable, "WORKING_SET", 256 * MIB)
    monkeypatch.setattr(purgeable, "REQUESTS", 1000)
    with iobmd.policy(memory_budget=0):
        assert main(["bench", name, "--size", "2M", "--rounds", "1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["version"] == 1
    results = document["results"]
    # If there is a hugetlb pool, there is one more; and contiguous memory that is found has two rows instead of one.
    assert len([one for one in results if not re.search("hugetlb|contiguous .* repeated", one["what"])]) == rows
    assert all(result["against"] and result["goal"] for result in results)
    assert all(result["ratio"] > 0 for result in results if result["figure"] not in ("none", "not found"))
    bench.show("", [Result(**result) for result in results])
    assert max(map(len, capsys.readouterr().out.splitlines())) < 80


def test_table(capsys: Captured) -> None:
    assert main(["bench", "copy", "--size", "1M", "--rounds", "1"]) == 0
    assert "process_vm_readv" in capsys.readouterr().out


@pytest.mark.needs("mpi4py", "mpich", "root")
def test_ranks_that_fail_have_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of an ordinary user, whose limit of locked memory is smaller than the buffers."""
    launcher = mpi.launchers()["MPICH"]
    limited = ["prlimit", "--memlock=1048576", "setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
    launcher = launcher._replace(command=[*WITH_OWN_SHM, *limited, *launcher.command])
    monkeypatch.setattr(mpi, "launchers", lambda: {"MPICH": launcher})
    failed, absent = mpi.run(0, 1)
    assert (failed.figure, failed.met) == ("failed", False)
    assert "RLIMIT_MEMLOCK" in failed.against
    assert (absent.what, absent.figure) == ("Open MPI", "not installed")


def test_dpdk_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The benchmark prints how to install DPDK, and neither changes the pool nor measures iobmd."""
    monkeypatch.setenv("PATH", str(tmp_path))
    before = POOL.read_text()

    def measure(_size: int) -> float:
        raise AssertionError("nothing to compare with")

    (row,) = dpdk.compare(measure, 3)
    assert row.figure == "not installed"
    assert "apt-get install" in row.against
    assert POOL.read_text() == before


def test_what_dpdk_prints() -> None:
    lines = ("EAL: Detected CPU lcores: 2", "start 250000.5", "2 3 4.8 contiguous", "64 0 11898.8 contiguous")
    printed = "\n".join([*lines, "16 3 28.9 scattered", ""])
    found = dpdk.parse(printed)
    assert {size: one.found for size, one in found.items()} == {2: 3, 64: 0, 16: 0}
    assert (found[64].start, found[64].reserve) == (250000.5, 11898.8)


@pytest.mark.needs("root", "hugetlb")
def test_pool_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = POOL.read_text()
    seen: list[int] = []

    def measure(_size: int) -> float:
        seen.append(int(POOL.read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(dpdk, "_build", lambda _folder: Path("/bin/true"))
    monkeypatch.setattr(dpdk, "POOL", 8)
    with pytest.raises(KeyboardInterrupt):
        dpdk.compare(measure, 3)
    assert seen == [int(before) + 8]
    assert POOL.read_text() == before
