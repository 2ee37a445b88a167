"""`--host`: the physical memory of the host, drawn in the terminal, and the obstacles to contiguous memory."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from iobmd.cli.folding import show, terminal_width
from iobmd.errors import NotPrivilegedError
from iobmd.host import hugetlb_pools, zoneinfo
from iobmd.pagemap.census import HostMemory, host_memory, kinds_between
from iobmd.printable import printable
from iobmd.units import PAGE_SIZE, format_count, format_size, format_time

from .host_map import KINDS, draw, map_shape
from .look import Hidden
from .progress import show_progress
from .table import shortened

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from iobmd.host.zoneinfo import Zone

VERSION = 1
WINDOWS = (2 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30)
"""Sizes of windows in the text; JSON has all."""
UNMOVABLE = ("hugetlb", "slab", "page_tables", "kernel", "reserved", "offline", "poisoned")
_WIDTH = 100
"""Columns of the output in a file or a pipe."""


class Summary(NamedTuple):
    """What /proc/zoneinfo, /proc/buddyinfo and /proc/meminfo report to every user."""

    zones: list[Zone]
    blocks: dict[tuple[int, str], list[int]]
    kinds: dict[str, int]
    """Memory by kind, in bytes; ``kernel`` is the rest, with reserved memory."""


def run(arguments: argparse.Namespace) -> None:
    """Print the memory of the host."""
    if arguments.openmetrics:
        from .openmetrics import write_host  # noqa: PLC0415 (each format when it is needed)

        write_host(*read())
    elif arguments.json:
        print(json.dumps(document(*read())))
    elif arguments.csv:
        _write_rows(*read())
    else:
        _Report(arguments.host).show()


def read(rows: int = 0, cells: int = 64) -> tuple[Summary, HostMemory | None, list[Hidden]]:
    """Return the summary, the memory by frames (None if they are hidden), and what is hidden."""
    try:
        with show_progress("page frames") as progress:
            memory = host_memory(rows=rows, cells=cells, progress=progress)
    except NotPrivilegedError:
        what = "the map, huge pages, unmovable pages, and contiguous memory of more than a free block"
        return summary(), None, [Hidden(what, "/proc/kpageflags requires root", "run as root")]
    return summary(), memory, []


def summary() -> Summary:
    """Read the counters of the host."""
    zones = zoneinfo.zones()
    counters: Counter[str] = Counter()
    for zone in zones:
        counters.update(zone.counters)
    pages = {
        "free": counters["nr_free_pages"],
        "anonymous": counters["nr_anon_pages"],
        "file": counters["nr_file_pages"] - counters["nr_shmem"],
        "shared": counters["nr_shmem"],
        "slab": counters["nr_slab_reclaimable"] + counters["nr_slab_unreclaimable"],
        "page_tables": counters["nr_page_table_pages"],
    }
    kinds = {kind: number * PAGE_SIZE for kind, number in pages.items()}
    kinds["hugetlb"] = sum(pool.size * pool.total for pool in hugetlb_pools())
    kinds["uninitialized"] = zoneinfo.uninitialized(zones)
    kinds["kernel"] = max(0, sum(zone.present for zone in zones) - sum(kinds.values()))
    return Summary(zones, zoneinfo.free_blocks(), kinds)


class _Report:
    """The text."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.width = terminal_width()
        self.columns = (self.width or _WIDTH) - 1

    def show(self) -> None:
        """Print it."""
        begin = time.perf_counter()
        self.summary, memory, hidden = read(*map_shape(self.columns))
        took = time.perf_counter() - begin
        present = sum(zone.present for zone in self.summary.zones)
        self._say(f"{os.uname().nodename}, Linux {os.uname().release}, {format_size(present)} of memory")
        for one in hidden:
            self._say(str(one))
        if memory is None:
            draw(self.summary.kinds, {}, [], 0, self.columns)
            self._show_blocks()
            return
        kinds = memory.kinds
        # The counters know how many pages these are, although their flags do not differ from those of the kernel's.
        kinds["listed"] = min(kinds["kernel"], sum(zone.listed for zone in self.summary.zones))
        kinds["kernel"] -= kinds["listed"]
        draw(kinds, memory.huge, memory.rows, memory.cell, self.columns)
        self._show_zones(memory)
        self._show_runs(memory)
        self._show_windows(memory)
        self._show_lonely(memory)
        self._show_longest(memory)
        if later := kinds["uninitialized"]:
            self._say(
                f"{format_size(later)} more are free, but not initialized: the kernel defers that until it needs the "
                "memory. Contiguous memory may be available there that is not counted above"
            )
        self._say(
            f"{format_count(present // PAGE_SIZE, 'frame')} read in {format_time(took)}; processes changed some of "
            "them during that time"
        )

    def _say(self, line: str) -> None:
        show(line, self.width, "  ")

    def _show_zones(self, memory: HostMemory) -> None:
        print(f"\n{'node zone':13}{'memory':>10}{'free':>10}", end="")
        print(f"{'unmovable':>11}{'huge pages':>12}" if self.columns >= 56 else "")
        for zone in memory.zones:
            print(f"{zone.node:>4} {zone.name:8}", end="")
            print(f"{format_size(sum(zone.kinds.values())):>10}{format_size(zone.kinds['free']):>10}", end="")
            more = sum(zone.kinds[kind] for kind in UNMOVABLE), sum(zone.huge.values())
            print(f"{format_size(more[0]):>11}{format_size(more[1]):>12}" if self.columns >= 56 else "")

    def _show_runs(self, memory: HostMemory) -> None:
        grouped: dict[int, tuple[int, int]] = {}
        for length, (number, held) in memory.free_runs.items():
            group = 1 << (length.bit_length() - 1) // 2 * 2  # by four
            before = grouped.get(group, (0, 0))
            grouped[group] = before[0] + number, before[1] + held
        print("\nfree runs of        number     memory")
        self._bars((f"{_short(low)} to {_short(low * 4)}", *grouped[low]) for low in sorted(grouped))

    def _show_blocks(self) -> None:
        """Print the free blocks of the allocator, which every user may see."""
        print("\nfree blocks of      number     memory")
        orders = max(map(len, self.summary.blocks.values()), default=0)
        sums = [sum(block[order] for block in self.summary.blocks.values()) for order in range(orders)]
        self._bars(
            (format_size(PAGE_SIZE << order), number, number * PAGE_SIZE << order)
            for order, number in enumerate(sums)
        )
        largest = max((order for order, number in enumerate(sums) if number), default=None)
        if largest is not None:
            self._say(f"the largest free block: {format_size(PAGE_SIZE << largest)} (adjacent ones are not shown)")

    def _bars(self, lines: Iterator[tuple[str, int, int]]) -> None:
        found = list(lines)
        most = max((held for _name, _number, held in found), default=0) or 1
        room = min(50, self.columns - 39)
        for name, number, held in found:
            bar = "#" * round(held * room / most) if room > 4 else ""
            print(f"{name:16}{number:>10,}{format_size(held):>11}  {bar}".rstrip())

    def _show_windows(self, memory: HostMemory) -> None:
        """Print how many aligned windows of each size are free, can be freed, or are obstructed."""
        states = {"free": "free", "movable": "movable"}
        if self.columns >= 62:
            states |= {"huge": "huge pages", "one_short": "1 page short"}
        states["unmovable"] = "unmovable"
        print("\naligned   " + "".join(f"{heading:>{len(heading) + 2}}" for heading in states.values()))
        for size in WINDOWS:
            if counts := memory.windows.get(size):
                cells = (f"{counts[state]:>{len(heading) + 2},}" for state, heading in states.items())
                print(f"{format_size(size):10}{''.join(cells)}")
        self._say("movable: free after compaction; huge pages: after they are split or freed")

    def _show_lonely(self, memory: HostMemory) -> None:
        """Print the owners of pages that are alone in a block."""
        number = memory.windows.get(memory.block, {}).get("one_short", 0)
        if not number:
            return
        blocks = format_count(number, f"{format_size(memory.block)} block")
        print()
        self._say(f"{blocks} one unmovable page short of being free or movable; the owners of the pages:")
        owners = Counter((page.kind, page.cgroup) for page in memory.lonely)
        example = {(page.kind, page.cgroup): page.physical for page in memory.lonely}
        for owner, pages in owners.most_common(_OWNERS):
            kind, cgroup = owner
            name = KINDS[kind].word
            start = f"{pages:>7,}  {name:11}  frame {example[owner] // PAGE_SIZE:#x}  "
            if self.columns - len(start) < _PATH:  # the path has its own line
                print(start.rstrip())
                start = " " * _INDENT
            if cgroup or start.strip():
                print((start + shortened(printable(cgroup or ""), self.columns - len(start))).rstrip())
        if rest := sum(owners.values()) - sum(pages for _owner, pages in owners.most_common(_OWNERS)):
            print(f"{rest:>7,}  others (--json lists them)")
        if listed := sum(zone.listed for zone in self.summary.zones):
            self._say(
                f"some of these are free: the kernel keeps {format_size(listed)} of free pages in lists of each "
                "processor, which look like its other memory until it is compacted"
            )

    def _show_longest(self, memory: HostMemory) -> None:
        free, movable = memory.longest_free, memory.longest_movable
        print()
        self._say(f"longest free run: {format_size(free.length)} at {free.physical:#x}")
        self._say(
            f"after compaction at most {format_size(memory.after_compaction)}, at {movable.physical:#x} "
            "(as root: echo 1 > /proc/sys/vm/compact_memory); pinned pages look movable, but are not"
        )
        wanted = self.size or next((size for size, states in memory.windows.items() if not states["free"]), 0)
        if wanted and not memory.windows.get(wanted, {}).get("free") and wanted in memory.closest:
            self._explain(memory, wanted)
        elif self.size:
            self._say(f"{format_size(wanted)} are available: {_where_free(memory, wanted)}")

    def _explain(self, memory: HostMemory, size: int) -> None:
        """Print the obstacles to contiguous memory of a size."""
        at = memory.closest[size]
        kinds = kinds_between(at, size)
        there = ", ".join(f"{format_size(held)} {KINDS[kind].word}" for kind, held in kinds.items() if held)
        self._say(f"no {format_size(size)} are free; the best candidate, at {at:#x}, contains {there}")
        states = memory.windows[size]
        if states["movable"] and memory.kinds["free"] >= size:
            self._say("compaction can free it, because everything in it is movable")
        elif not states["movable"] and not states["huge"]:
            self._say("no compaction can free it: every candidate contains unmovable memory. Reserve it at boot")


def _where_free(memory: HostMemory, size: int) -> str:
    """Return the number of free windows of a size, and how many are in zones that allocations reach last."""
    free: Counter[str] = Counter()
    for zone in memory.zones:
        free[zone.name] += zone.windows.get(size, {}).get("free", 0)
    found = f"{format_count(free.total(), 'aligned window')} of that size"
    # The kernel allocates from the highest zone that has free memory (mm/page_alloc.c).
    low = [name for name, number in free.items() if number and name.startswith("DMA")]
    if not low or len(low) == len(free):  # a host may have no other zone
        return found
    number = sum(free[name] for name in low)
    part = "all" if number == free.total() else f"{number:,} of them"
    where = f"zones {' and '.join(low)}" if len(low) > 1 else f"zone {low[0]}"
    return f"{found}, {part} in {where}, from which the kernel allocates last"


_OWNERS = 6
"""Owners of pages that the text lists."""
_PATH, _INDENT = 12, 9
"""Columns for the path of a cgroup, and those in front of it if it has its own line."""


def _short(size: int) -> str:
    return format_size(size).replace("iB", "").replace(" ", "")


def document(counters: Summary, memory: HostMemory | None, hidden: list[Hidden]) -> dict[str, Any]:
    """Return the memory as data: sizes in bytes, null if hidden."""
    head: dict[str, Any] = {
        "version": VERSION,
        "time": round(time.time()),
        "kernel": os.uname().release,
        "page_bytes": PAGE_SIZE,
        "hidden": [one._asdict() for one in hidden],
        "counters": {
            "kinds": counters.kinds,
            "zones": [
                {name: value for name, value in zone._asdict().items() if name != "counters"}
                for zone in counters.zones
            ],
            "free_blocks": [
                {"node": node, "zone": name, "orders": orders} for (node, name), orders in counters.blocks.items()
            ],
        },
    }
    if memory is None:
        return head | {"frames": None}
    found = memory._asdict()
    found |= {"zones": [zone._asdict() for zone in memory.zones], "lonely": [p._asdict() for p in memory.lonely]}
    found |= {name: getattr(memory, name)._asdict() for name in ("longest_free", "longest_movable")}
    found |= {name: getattr(memory, name) for name in ("kinds", "huge", "windows", "free_runs", "after_compaction")}
    del found["rows"], found["cell"]
    return head | {"frames": found}


def _write_rows(counters: Summary, memory: HostMemory | None, hidden: list[Hidden]) -> None:
    for one in hidden:
        print(one, file=sys.stderr)  # not on stdout, which programs read
    lines = csv.writer(sys.stdout, lineterminator="\n")
    lines.writerow(("node", "zone", "kind", "bytes", "huge_bytes"))
    if memory is None:
        lines.writerows(("", "", kind, held, "") for kind, held in counters.kinds.items())
        return
    for zone in memory.zones:
        for kind, held in zone.kinds.items():
            lines.writerow((zone.node, zone.name, kind, held, zone.huge[kind]))
    if memory.offline:
        lines.writerow(("", "", "offline", memory.offline, 0))
