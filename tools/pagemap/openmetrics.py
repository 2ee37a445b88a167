"""`--openmetrics`: gauges in the text format of Prometheus, for the textfile collector of its node_exporter.

The text is valid in the text format 0.0.4 and in OpenMetrics 1.0. It has no timestamps, which the collector refuses.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, NamedTuple

from iobmd.host import cgroup
from iobmd.printable import printable

from .look import Look
from .total import Total
from .usage import container_of, memory_cgroup, user_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Mapping

    from iobmd.pagemap.census import HostMemory

    from .host import Summary
    from .look import Hidden
    from .usage import Processes, Usage

Labels = dict[str, object]
_UNIT = re.compile(r"\.(service|scope|socket|mount|swap)$")


class Gauge(NamedTuple):
    """A metric with its samples."""

    name: str
    help: str
    samples: list[tuple[Labels, int]]


def run(arguments: argparse.Namespace) -> None:
    """Print the metrics of a process."""
    look = Look(arguments)
    for hidden in look.hidden:
        print(hidden, file=sys.stderr)  # not on stdout, which programs read
    total = Total()
    for area in look.until_gone(look.areas()):
        total.counted(area)
    look.require_task()
    pid = look.task.pid
    path = memory_cgroup(cgroup.membership(pid))
    write(process_gauges([(process_labels(pid, look.name, user_of(pid), path), total)]))


def write(gauges: Iterable[Gauge]) -> None:
    """Print metrics."""
    for name, text, samples in gauges:
        if not samples:
            continue
        print(f"# TYPE {name} gauge")
        if name.endswith("_bytes"):
            print(f"# UNIT {name} bytes")
        print(f"# HELP {name} {text}")
        for labels, value in samples:
            inside = ",".join(f'{label}="{_escaped(str(what))}"' for label, what in labels.items())
            print(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")
    print("# EOF")
    sys.stdout.flush()


def _escaped(text: str) -> str:
    # Programs and cgroups may have any bytes in their names, but the format is UTF-8.
    return printable(text).replace("\\", "\\\\").replace('"', '\\"')


def process_labels(pid: int, name: str, user: str, path: str) -> Labels:
    """Return the labels of a process: its pid, program, user, service, and memory cgroup."""
    return {"pid": pid, "process": name, "user": user, "service": service_of(path) or name, "cgroup": path or "/"}


def service_of(path: str) -> str:
    """Return the unit of systemd, or the container, to which a cgroup belongs; "" if it names none."""
    units = (part for part in reversed(path.split("/")) if _UNIT.search(part))
    return container_of(path) or next(units, "")


_OF_PROCESS: Mapping[str, tuple[str, str]] = {
    "size_bytes": ("size", "Addresses that are mapped."),
    "resident_bytes": ("resident", "Resident memory (RSS)."),
    "pss_bytes": ("pss", "Resident memory; shared pages count in proportion (PSS)."),
    "uss_bytes": ("uss", "Resident memory of this process only (USS)."),
    "anonymous_bytes": ("anonymous", "Anonymous resident memory."),
    "file_bytes": ("file", "Resident memory of files."),
    "shmem_bytes": ("shmem", "Resident shared memory: tmpfs, memfd, System V."),
    "huge_bytes": ("huge", "Resident memory that is mapped by huge pages."),
    "swapped_bytes": ("swapped", "Memory in swap."),
    "locked_bytes": ("locked", "Locked memory."),
    "lazy_free_bytes": ("lazy_free", "Memory that the kernel may free before it is written again."),
}


def process_gauges(rows: Iterable[tuple[Labels, Total]], name: str = "iobmd_process") -> Iterator[Gauge]:
    """Return the gauges of processes, each with its labels. A value that is unknown has no sample."""
    found = list(rows)
    for suffix, (attribute, text) in _OF_PROCESS.items():
        values = ((labels, getattr(total, attribute)) for labels, total in found)
        samples = [(labels, value) for labels, value in values if value is not None]
        yield Gauge(f"{name}_{suffix}", text, samples)


def write_processes(by: str | None, processes: Processes, rows: list[Usage]) -> None:
    """Print the metrics of many processes, or of their sums by user, name, cgroup or container."""
    for hidden in processes.hidden():
        print(hidden, file=sys.stderr)
    if by is None:
        labelled = ((process_labels(row.pid, row.name, row.user, row.cgroup), row.total) for row in rows)
        write(process_gauges(labelled))
        return
    sums: list[tuple[Labels, Total]] = []
    for row in rows:
        labels: Labels = {by: row.name}
        if by == "cgroup":
            labels["service"] = service_of(row.name)
        sums.append((labels, row.total))
    numbers = [(labels, total.processes) for labels, total in sums]
    write([Gauge("iobmd_group_processes", "Processes.", numbers), *process_gauges(sums, "iobmd_group")])


def write_host(counters: Summary, memory: HostMemory | None, hidden: list[Hidden]) -> None:
    """Print the metrics of the host."""
    for one in hidden:
        print(one, file=sys.stderr)
    write([*_of_counters(counters), *(_of_frames(memory) if memory else ())])


def _of_counters(counters: Summary) -> Iterator[Gauge]:
    kinds: list[tuple[Labels, int]] = [({"kind": kind}, held) for kind, held in counters.kinds.items()]
    yield Gauge("iobmd_host_counted_bytes", "Memory by kind, by the counters that every user may read.", kinds)
    listed: list[tuple[Labels, int]] = [
        ({"node": zone.node, "zone": zone.name}, zone.listed) for zone in counters.zones
    ]
    yield Gauge("iobmd_host_listed_bytes", "Free memory in the lists of processors.", listed)
    blocks: list[tuple[Labels, int]] = [
        ({"node": node, "zone": zone, "order": order}, number)
        for (node, zone), orders in counters.blocks.items()
        for order, number in enumerate(orders)
    ]
    yield Gauge("iobmd_host_free_blocks", "Free blocks of the allocator, of a page times two to the order.", blocks)


def _of_frames(memory: HostMemory) -> Iterator[Gauge]:
    kinds: list[tuple[Labels, int]] = []
    huge: list[tuple[Labels, int]] = []
    windows: list[tuple[Labels, int]] = []
    for zone in memory.zones:
        where: Labels = {"node": zone.node, "zone": zone.name}
        kinds += [({**where, "kind": kind}, held) for kind, held in zone.kinds.items()]
        huge += [({**where, "kind": kind}, held) for kind, held in zone.huge.items() if kind != "free"]
        windows += [
            ({**where, "size": size, "state": state}, number)
            for size, states in zone.windows.items()
            for state, number in states.items()
        ]
    yield Gauge("iobmd_host_memory_bytes", "Memory by kind, by the flags of page frames.", kinds)
    yield Gauge("iobmd_host_huge_bytes", "The part of it in huge pages.", huge)
    yield Gauge("iobmd_host_windows", "Aligned windows of physical memory by size and state.", windows)
    for name, size, text in (
        ("offline", memory.offline, "Memory in blocks that are offline."),
        ("longest_free_run", memory.longest_free.length, "The longest run of free memory."),
        ("after_compaction", memory.after_compaction, "The maximum length of a run that compaction can free."),
    ):
        yield Gauge(f"iobmd_host_{name}_bytes", text, [({}, size)])
