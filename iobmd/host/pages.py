"""Probes of the host's pages: base pages, huge pages, hugetlb pools, swap."""

import os
from typing import NamedTuple

from iobmd import procfs
from iobmd._native import mman
from iobmd.host.fact import JSON, Fact, Status, lines, own_status, read_int, read_text, scratch
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size

_THP = "/sys/kernel/mm/transparent_hugepage"
_POOLS = "/sys/kernel/mm/hugepages"
# With 64 KiB base pages a huge page is 512 MiB: too much to fault in for a probe.
_LARGEST_TRIED = 32 << 20
# Huge pages above this size are rare, and few buffers fill one: smaller ones are useful too.
_LARGE = 2 << 20
# The size that the command in a remedy reserves; at least one page.
_SUGGESTED_POOL = 128 << 20


class HugePool(NamedTuple):
    """The hugetlb pool of one page size (Documentation/admin-guide/mm/hugetlbpage.rst).

    `size` is in bytes, all other fields in pages. `free` includes reserved pages: `free - reserved` are available.
    """

    size: int
    """The page size."""
    total: int
    """Pages of the pool (nr_hugepages)."""
    free: int
    """Pages that are not allocated."""
    reserved: int
    """Free pages that are promised to mappings."""
    surplus: int
    """Pages above the configured number."""
    overcommit: int
    """Maximum number of surplus pages."""

    @property
    def directory(self) -> str:
        """The pool's directory in sysfs."""
        return _pool_directory(self.size)

    @property
    def available(self) -> int:
        """Pages available to a new mapping without enlarging the pool."""
        return max(self.free - self.reserved, 0)


def hugetlb_pools() -> list[HugePool]:
    """Return the hugetlb pools by ascending page size; empty if the kernel has none (/sys/kernel/mm/hugepages)."""
    counters = ("nr", "free", "resv", "surplus", "nr_overcommit")
    pools = []
    for size in hugetlb_sizes():
        directory = _pool_directory(size)
        pools.append(HugePool(size, *(read_int(f"{directory}/{name}_hugepages") or 0 for name in counters)))
    return pools


def hugetlb_sizes() -> list[int]:
    """Return the page sizes of the hugetlb pools, ascending."""
    try:
        names = os.listdir(_POOLS)
    except OSError:
        return []
    pools = (name.removeprefix("hugepages-").removesuffix("kB") for name in names if name.startswith("hugepages-"))
    return sorted(int(size) << 10 for size in pools)


def _pool_directory(size: int) -> str:
    return f"{_POOLS}/hugepages-{size >> 10}kB"


def pool_remedy(pool: HugePool, pages: int) -> str:
    """Return the commands that enlarge `pool` by `pages` pages, one alternative per line."""
    total = pool.total + pages
    comment = f"as root: {pages} more of {format_size(pool.size)}"
    remedy = f"echo {total} > {pool.directory}/nr_hugepages  # {comment}"
    if pool.size == _default_pool_size():
        remedy += f"\nsysctl vm.nr_hugepages={total}  # the same"
    return f"{remedy}\nboot parameter: hugepagesz={boot_size(pool.size)} hugepages={total}  # before memory fragments"


def boot_size(size: int) -> str:
    """Return a size as the kernel reads it in a parameter (memparse in lib/cmdline.c): "64K", "2M", "1G"."""
    exponent, unit = next(
        (exponent, unit) for exponent, unit in ((30, "G"), (20, "M"), (10, "K")) if not size % (1 << exponent)
    )
    return f"{size >> exponent}{unit}"


def _default_pool_size() -> int | None:
    try:
        return procfs.meminfo().get("Hugepagesize")
    except OSError:
        return None


def _selected(path: str) -> str | None:
    # "always [madvise] never" -> "madvise"
    return (read_text(path) or "").partition("[")[2].partition("]")[0] or None


def folio_sizes() -> list[int]:
    """Return the page sizes of private memory, ascending: base pages, enabled intermediate sizes, huge pages.

    The intermediate sizes are "multi-size THP" (Linux 6.8, Documentation/admin-guide/mm/transhuge.rst), which are off
    by default.
    """
    return [
        PAGE_SIZE,
        *(size for size in _intermediate_sizes() if _setting(size) in ("always", "madvise")),
        HUGE_PAGE_SIZE,
    ]


def _intermediate_sizes() -> list[int]:
    """Return the sizes between base pages and huge pages that the kernel supports, ascending."""
    try:
        names = os.listdir(_THP)
    except OSError:
        return []
    sizes = (int(name[10:-2]) << 10 for name in names if name.startswith("hugepages-"))
    return sorted(size for size in sizes if size < HUGE_PAGE_SIZE)


def _own_setting(size: int) -> str:
    return f"{_THP}/hugepages-{size >> 10}kB/enabled"


def _setting(size: int) -> str | None:
    own = _selected(_own_setting(size))
    return _selected(f"{_THP}/enabled") if own in (None, "inherit") else own


def huge_pages_setting() -> str | None:
    """Return the setting of transparent huge pages: "always", "madvise" or "never"; None if it is not visible.

    The setting for the huge page size (hugepages-SIZEkB/enabled, Linux 6.8) overrides the general one
    (Documentation/admin-guide/mm/transhuge.rst).
    """
    return _setting(HUGE_PAGE_SIZE)


def huge_pages_enabled() -> bool:
    """Return whether this process may request transparent huge pages with MADV_HUGEPAGE (madvise(2))."""
    # THP_enabled (Linux 5.0) is 0 after prctl(PR_SET_THP_DISABLE), and in a kernel built without huge pages.
    return huge_pages_setting() != "never" and own_status().get("THP_enabled") != "0"


def _obtains_huge_page(size: int) -> bool:
    try:
        with scratch(size) as area:
            mman.advise(area.address, size, mman.MADV_HUGEPAGE)
            area.write(0, b"\1")
            # One byte was written: if more is resident, it belongs to a huge page.
            return all(entry & 1 for entry in mman.incore(area.address, size // PAGE_SIZE, PAGE_SIZE))
    except OSError:
        return False


def huge_pages() -> Fact:
    """Probe transparent huge pages: request one, and check whether writing one byte makes all of it resident."""
    size, setting = HUGE_PAGE_SIZE, huge_pages_setting()
    obtained = _obtains_huge_page(size) if size <= _LARGEST_TRIED else None
    settings: dict[str, JSON] = {name: _selected(f"{_THP}/{name}") for name in ("enabled", "defrag", "shmem_enabled")}
    value = {**settings, "size": size, "setting": setting, "obtained": obtained}
    report = f"{format_size(size)}: {setting}, defrag {settings['defrag']}, shmem {settings['shmem_enabled']}"
    if setting is None:
        report = f"{format_size(size)}, settings not visible"
    status, why, remedy = _judge_huge_pages(obtained)
    if size > _LARGE and status is Status.YES and (smaller := _intermediate_sizes()):
        value["smaller"] = enabled = [size for size in smaller if _setting(size) in ("always", "madvise")]
        report += f"; smaller sizes: {', '.join(map(format_size, enabled)) or 'none enabled'}"
        if not enabled:
            status, remedy = Status.LIMITED, _intermediate_remedy(smaller)
    return Fact("THP", status, value, report + why, "populate and copy large buffers several times as fast", remedy)


def _intermediate_remedy(sizes: list[int]) -> str:
    """Return the command that enables the size nearest to 2 MiB, that of huge pages on hosts with 4 KiB pages."""
    best = min(sizes, key=lambda size: abs(size - _LARGE))
    purpose = f"as root: for contiguous memory of up to {format_size(best)}"
    return f"echo madvise > {_own_setting(best)}  # {purpose}"


def _judge_huge_pages(obtained: bool | None) -> tuple[Status, str, str]:
    if obtained or (obtained is None and huge_pages_enabled()):
        return Status.YES, "", ""
    if read_text(f"{_THP}/enabled") is None:
        return Status.NO, "; not in this kernel", "a kernel with CONFIG_TRANSPARENT_HUGEPAGE"
    if own_status().get("THP_enabled") == "0":
        return Status.NO, "; disabled in this process", "start without prctl(PR_SET_THP_DISABLE), which is inherited"
    if not huge_pages_enabled():
        own = _own_setting(HUGE_PAGE_SIZE)
        commands = [f"echo madvise > {_THP}/enabled  # as root"]
        if _selected(own) == "never":
            commands = [f"echo inherit > {own}  # as root", *commands]
        return Status.NO, "", "\n".join(commands)
    remedy = "echo 1 > /proc/sys/vm/compact_memory  # as root: memory is short or fragmented"
    return Status.LIMITED, "; none available now", remedy


def hugetlb() -> list[Fact]:
    """Report the hugetlb pools, one fact for each page size."""
    purpose = "long contiguous buffers, never moved by compaction"
    pools = hugetlb_pools()
    if not pools:
        remedy = "a kernel with CONFIG_HUGETLBFS; container: mount /sys"
        return [Fact("hugetlb", Status.NO, None, "no pools", purpose, remedy)]
    return [_pool(pool, purpose) for pool in pools]


def _pool(pool: HugePool, purpose: str) -> Fact:
    status = Status.YES if pool.available else Status.LIMITED if pool.overcommit > pool.surplus else Status.NO
    summary = f"{pool.total} total, {pool.free} free, {pool.reserved} reserved, {pool.surplus} surplus"
    remedy = "" if status is Status.YES else pool_remedy(pool, max(_SUGGESTED_POOL // pool.size, 1))
    value = {**pool._asdict(), "available": pool.available}
    return Fact(f"hugepages-{pool.size >> 10}kB", status, value, summary, purpose, remedy)


def page_size() -> Fact:
    """Report the base page size in bytes (sysconf(3))."""
    return Fact("page size", Status.INFO, PAGE_SIZE, format_size(PAGE_SIZE), "unit of wiring and of addresses")


def kernel() -> Fact:
    """Report the kernel's release and machine (uname(2)), on which no decision depends."""
    system = os.uname()
    value = {"release": system.release, "machine": system.machine}
    return Fact("kernel", Status.INFO, value, f"{system.release} {system.machine}", "for bug reports")


class SwapArea(NamedTuple):
    """A line of /proc/swaps (proc_swaps(5)), sizes in bytes."""

    name: str
    """The path of the file or device."""
    type: str
    """``partition`` or ``file``."""
    size: int
    """Its size."""
    used: int
    """The part in use."""
    priority: int
    """Areas of higher priority are used first."""


def swap_areas() -> list[SwapArea]:
    """Return the swap areas in use."""
    found = [line.rsplit(maxsplit=4) for line in lines(read_text("/proc/swaps"))[1:]]
    return [
        SwapArea(name, kind, int(size) << 10, int(used) << 10, int(priority))
        for name, kind, size, used, priority in found
    ]


def has_swap() -> bool:
    """Return whether pages may be in swap; True if /proc/swaps is hidden (ProcSubset=pid)."""
    return bool(swap_areas()) or read_text("/proc/swaps") is None


def swap() -> Fact:
    """Report the swap areas."""
    areas, purpose = swap_areas(), "pageable buffers can be swapped out (wired ones never are)"
    if areas:
        summary = ", ".join(f"{area.name} {format_size(area.size)}" for area in areas)
        return Fact("swap", Status.YES, [area._asdict() for area in areas], summary, purpose)
    file = "/swapfile"
    remedy = f"fallocate -l 1G {file} && chmod 600 {file} && mkswap {file} && swapon {file}  # as root"
    return Fact("swap", Status.NO, [], "none", purpose, remedy)
