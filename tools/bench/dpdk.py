"""DPDK, the peer in `iobmd bench contiguous`: rte_memzone_reserve with IOVA_CONTIG, in PA mode, on a hugetlb pool."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from iobmd import host
from iobmd.units import HUGE_PAGE_SIZE, format_size

from .result import Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZES = (2, 16, 64, 256)
"""In MiB."""
POOL = 600
"""Pages of 2 MiB in the pool."""
# Legacy memory allocates the whole pool at startup and sorts it by address. It found the most; the default mode found
# nothing.
_MODES = {"legacy memory": "--legacy-mem", "default mode": "--huge-unlink"}
_OPTIONS = "--iova-mode=pa --no-pci --no-telemetry -l 0 --log-level=lib.eal:error --file-prefix=iobmd"


class Peer(NamedTuple):
    """The results of DPDK for one size; times in microseconds."""

    found: int
    start: float
    """Time of its startup, which collects memory."""
    reserve: float
    """Median time of an attempt after startup, successful or not."""


def compare(ours: Callable[[int], float | None], tries: int) -> list[Result]:
    """Measure iobmd and DPDK with a pool of 600 pages, which is restored afterwards.

    Parameters
    ----------
    ours
        Allocates and frees this many bytes of contiguous memory by iobmd, and returns the seconds; None: not found.
    tries
        Number of attempts for each size.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            program = _build(Path(folder))
        except (OSError, subprocess.CalledProcessError):
            how = "apt-get install gcc pkg-config libdpdk-dev"
            return [Result("contiguous memory from DPDK", "not installed", how, 0.0, "reported", True)]
        with _pool():
            peers = {mode: _run(program, Path(folder), option, tries) for mode, option in _MODES.items()}
            return [_compare(size, [ours(size << 20) for _ in range(tries)], peers) for size in SIZES]


def _build(folder: Path) -> Path:
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "libdpdk"], capture_output=True, text=True, check=True
    ).stdout.split()
    program = folder / "memzone"
    source = str(Path(__file__).with_name("memzone.c"))
    subprocess.run(["cc", "-O2", "-o", str(program), source, *flags], capture_output=True, check=True)
    return program


def _run(program: Path, folder: Path, option: str, tries: int) -> dict[int, Peer]:
    """Run the program with a separate hugetlbfs, in a mount namespace that exists only as long as the program."""
    pages = folder / "pages"
    pages.mkdir(exist_ok=True)
    sizes = " ".join(map(str, SIZES))
    done = subprocess.run(
        [
            *("unshare", "--mount", "sh", "-ec"),
            f"mount -t hugetlbfs -o pagesize={HUGE_PAGE_SIZE} none {pages}; "
            f"exec {program} {tries} {sizes} -- {_OPTIONS} {option} --huge-dir {pages}",
        ],
        env={**os.environ, "RUNTIME_DIRECTORY": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    return parse(done.stdout)


def parse(output: str) -> dict[int, Peer]:
    """Parse the output of memzone.c; a memzone that is not actually contiguous does not count as found."""
    found = {}
    start = 0.0
    for line in output.splitlines():
        match line.split():
            case ["start", microseconds]:
                start = float(microseconds)
            case [size, count, median, "contiguous" | "scattered" as shape] if size.isdigit():
                found[int(size)] = Peer(int(count) if shape == "contiguous" else 0, start, float(median))
    return found


def _compare(size: int, samples: list[float | None], peers: dict[str, dict[int, Peer]]) -> Result:
    found = sorted(seconds for seconds in samples if seconds is not None)
    ours = found[len(found) // 2] if found else 0.0
    theirs = {mode: peer[size] for mode, peer in peers.items() if size in peer}
    against = [
        f"{mode}: {one.found} of {len(samples)}, {one.start / 1e3:.0f} ms at start and {one.reserve / 1e3:.2f} ms"
        for mode, one in theirs.items()
    ]
    what = f"contiguous {format_size(size << 20)}, pool of {POOL} pages: {len(found)} of {len(samples)}"
    # The time to the first buffer: DPDK collects its memory at startup, iobmd on request.
    fastest = min(((one.start + one.reserve) / 1e6 for one in theirs.values() if one.found), default=0.0)
    ratio = ours / fastest if fastest else 0.0
    summary = "DPDK " + ("; ".join(against) or "did not run")
    return Result(what, f"{ours * 1e3:.2f} ms", summary, ratio, "reported", True)


@contextlib.contextmanager
def _pool() -> Iterator[None]:
    pool = next(pool for pool in host.hugetlb_pools() if pool.size == HUGE_PAGE_SIZE)
    setting = Path(pool.directory) / "nr_hugepages"
    setting.write_text(str(pool.total + POOL))
    try:
        yield
    finally:
        setting.write_text(str(pool.total))
