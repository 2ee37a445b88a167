"""Data of a whole process, which no sum over areas shows: threads, page tables, NUMA nodes, the kernel's sums."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, NamedTuple

from iobmd import procfs
from iobmd._internal.pidns import directory
from iobmd._native import maps as native
from iobmd.host.fact import read_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .look import Look


class ProcessFacts(NamedTuple):
    """Data of a whole process, which no sum over areas shows."""

    threads: int | None
    page_tables: int | None
    """Bytes of page tables."""
    pss: int | None
    """PSS as rounded by the kernel once; None if smaps is not read."""
    nodes: dict[int, int]
    """Resident bytes by NUMA node, if the host has several."""


def facts_of(look: Look) -> ProcessFacts:
    """Return the data of the process; None or nothing where it cannot be read."""
    pid = look.task.pid
    threads = tables = pss = None
    nodes: dict[int, int] = {}
    with contextlib.suppress(OSError):
        status = procfs.status(pid)
        threads = int(status["Threads"]) if "Threads" in status else None
        tables = int(status["VmPTE"].split()[0]) << 10 if "VmPTE" in status else None
    if look.details:
        with contextlib.suppress(OSError):
            counters = rollup(pid)
            pss = counters["Pss"] + counters["Private_Hugetlb"]
        if read_text("/sys/devices/system/node/has_memory") not in (None, "0"):
            with contextlib.suppress(OSError):
                nodes = _bytes_by_node(pid)
    return ProcessFacts(threads, tables, pss, nodes)


def rollup(pid: int | str = "self") -> dict[str, int]:
    """Return the counters of /proc/PID/smaps_rollup in bytes: the sums of smaps, rounded once and not for each area.

    The kernel walks all pages, and lets the process map memory between two areas. Raises OSError.
    """
    path = f"{directory(pid)}/smaps_rollup"
    try:
        return _rollup(path)
    except ProcessLookupError:  # the main thread may have exited before others
        other = procfs.memory_file(pid, "smaps_rollup")
        if other == path:
            raise
        return _rollup(other)


def _rollup(path: str) -> dict[str, int]:
    with open(path, "rb", buffering=0) as file:
        text = file.read(1 << 16)
    if not text:  # every process has an area
        raise ProcessLookupError(errno.ESRCH, "the memory no longer exists")
    ((_area, counters, _flags),) = native.parse_details(text)
    return counters


def _bytes_by_node(pid: int | str = "self") -> dict[int, int]:
    """Return the resident bytes of a process by NUMA node, from /proc/PID/numa_maps (numa(7)); as slow as smaps.

    Empty if the kernel has no NUMA. Raises OSError.
    """
    try:
        with open(procfs.memory_file(pid, "numa_maps"), "rb", buffering=0) as file:
            return sums_by_node(file)
    except FileNotFoundError:
        return {}


def sums_by_node(lines: Iterable[bytes]) -> dict[int, int]:
    """Return the bytes by node of lines of numa_maps."""
    found: dict[int, int] = {}
    for line in lines:
        page = 4 << 10
        pages = {}
        for word in line.split()[2:]:
            name, _, value = word.partition(b"=")
            if name == b"kernelpagesize_kB":
                page = int(value) << 10
            elif name[:1] == b"N" and name[1:].isdigit() and value.isdigit():
                pages[int(name[1:])] = int(value)
        for node, number in pages.items():
            found[node] = found.get(node, 0) + number * page
    return dict(sorted(found.items()))


def stack_pointers(pid: int | str = "self") -> list[int]:
    """Return the stack pointers of the threads of a process that sleep or wait, ascending.

    The kernel shows them in /proc/PID/task/TID/syscall (proc_pid_syscall(5)) to processes that may trace it, and only
    for threads that are not running. Threads that exit are left out; the list is empty if it may not be read.
    """
    found = []
    folder = f"{directory(pid)}/task"
    with contextlib.suppress(OSError):
        for tid in os.listdir(folder)[:_MOST_THREADS]:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f"{folder}/{tid}/syscall", "rb", buffering=0) as file:
                    fields = file.read().split()
                if len(fields) > 1:  # "running" otherwise
                    found.append(int(fields[-2], 16))
    return sorted(found)


_MOST_THREADS = 4096
"""Threads whose stack pointers are read: about 20 µs each."""
