"""`iobmd bench contiguous`: contiguous memory, compared with populating and pinning any pages, and with DPDK."""

from __future__ import annotations

import statistics

from iobmd import host, procfs
from iobmd._native import mman
from iobmd._native.mapping import Mapping
from iobmd.api import allocate
from iobmd.errors import IOReturnError
from iobmd.memory import pinning
from iobmd.physical.policy import policy
from iobmd.units import HUGE_PAGE_SIZE, format_size

from ..fragmentation import fragmented
from . import dpdk
from .result import Result, at_least, at_most, seconds

TRIES = 100
RESERVED_TRIES = 20
USED = 4 << 30
"""Bytes in which pages are pinned on a host in use; half as much is in files."""
WARM = 4 << 30
"""Size of the memory that is touched in advance, because on a virtual machine the first touch waits for the host."""


def run(_size: int, rounds: int) -> list[Result]:
    """Measure; the sizes are those of the goals. With fewer than 7 `rounds`, only this number of attempts is made."""
    _warm_up()
    tries = TRIES if rounds >= 7 else rounds
    results = [_found(size << 20, tries, limit) for size, limit in ((2, 1.5), (16, 1.5), (64, 4.0), (256, None))]
    if host.has_host_capability("CAP_SYS_ADMIN") and rounds >= 7:
        results += [_reserved(size << 20, RESERVED_TRIES) for size in (256, 1024)]
        results += _on_a_used_host()
        results += dpdk.compare(_ours, RESERVED_TRIES)
    return results


def _on_a_used_host() -> list[Result]:
    """Measure where page cache, slabs and pinned pages are scattered over the memory."""
    with fragmented(USED, "--block", "64M", "--files", str(USED // 2)):
        return [
            _successes(64 << 20, TRIES, 1.0, reserve=False),
            _successes(256 << 20, TRIES, 0.95, reserve=False),
            _successes(1 << 30, RESERVED_TRIES, 1.0, reserve=True),
        ]


def _successes(size: int, tries: int, share: float, *, reserve: bool) -> Result:
    with policy(reserve=reserve, keep=0):
        found = [ours for ours in (_ours(size) for _ in range(tries)) if ours is not None]
    slowest = f"at most {max(found, default=0.0):.2f} s"
    what = f"contiguous {format_size(size)} among page cache, slabs and pins{', reserve=True' * reserve}"
    figure = f"{len(found)} of {tries}, median {statistics.median(found or [0.0]) * 1e3:.0f} ms"
    return at_least(what, figure, slowest, len(found) / tries, share)


def _warm_up() -> None:
    size = min(WARM, host_available() // 2)
    mapping = Mapping.anonymous(size // HUGE_PAGE_SIZE * HUGE_PAGE_SIZE, HUGE_PAGE_SIZE)
    _populate(mapping)
    mapping.close()


def host_available() -> int:
    """Return MemAvailable in bytes."""
    return procfs.meminfo()["MemAvailable"]


def _populate(mapping: Mapping) -> None:
    mman.advise(mapping.address, mapping.size, mman.MADV_HUGEPAGE)
    mman.advise(mapping.address, mapping.size, mman.MADV_POPULATE_WRITE)


def populated(size: int) -> float:
    """Return the seconds for populating and pinning the same amount of arbitrary huge pages."""

    def fill() -> None:
        mapping = Mapping.anonymous(size, HUGE_PAGE_SIZE)
        _populate(mapping)
        pin = pinning.Pin(mapping.address, size)
        pin.release()
        mapping.close()

    return seconds(fill)


def _ours(size: int, *, reserve: bool = False) -> float | None:
    """Return the seconds for a search and the release of its result; None if nothing is found."""
    try:
        with policy(reserve=reserve, keep=0):
            return seconds(lambda: allocate(size, contiguous=True).free())
    except IOReturnError:
        return None


def _found(size: int, tries: int, limit: float | None) -> Result:
    samples = [(populated(size), _ours(size)) for _ in range(tries)]
    bare = statistics.median(any_ for any_, _ in samples)
    found = [ours for _, ours in samples if ours is not None]
    what = f"contiguous {format_size(size)}, no pool: {len(found)} of {tries}"
    against = f"populate and pin as much THP: {bare * 1e3:.2f} ms"
    if not found:
        return Result(what, "none", against, 0.0, "reported" if limit is None else f"≤ {limit:g}", limit is None)
    ours = statistics.median(found)
    if limit is None:
        return Result(what, f"{ours * 1e3:.2f} ms", against, ours / bare, "reported", True)
    result = at_most(what, f"{ours * 1e3:.2f} ms", against, ours / bare, limit)
    return result._replace(goal=f"{result.goal}, all found", met=result.met and len(found) == tries)


def _reserved(size: int, tries: int) -> Result:
    before = host.hugetlb_pools()
    samples = [(populated(size), _ours(size, reserve=True)) for _ in range(tries)]
    same = [pool.total for pool in host.hugetlb_pools()] == [pool.total for pool in before]
    bare = statistics.median(any_ for any_, _ in samples)
    found = [ours for _, ours in samples if ours is not None]
    what = f"contiguous {format_size(size)}, policy(reserve=True): {len(found)} of {tries}"
    ours = statistics.median(found) if found else 0.0
    against = f"populate and pin as much THP: {bare * 1e3:.1f} ms"
    goal = "all found, pools as before"
    return Result(what, f"{ours * 1e3:.1f} ms", against, ours / bare, goal, same and len(found) == tries)
