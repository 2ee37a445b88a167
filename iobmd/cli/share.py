"""`iobmd share`: map memory into another process for as long as the command runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import sys
import time
from typing import TYPE_CHECKING, Any

from iobmd.api import allocate
from iobmd.cli import EXIT_OK
from iobmd.cli.arguments import duration, instead_of_wiring, size
from iobmd.cli.folding import show, terminal_width
from iobmd.cli.signals import terminable
from iobmd.constants import IOMapOptions
from iobmd.errors import NotPrivilegedError, NotReadyError
from iobmd.task.task import Task
from iobmd.units import PAGE_SIZE, format_size, format_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iobmd.descriptors.buffer import IOBufferMemoryDescriptor
    from iobmd.descriptors.memory_map import IOMemoryMap


def main(argv: Sequence[str]) -> int:
    """Run `iobmd share`."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if (arguments.at or 0) % PAGE_SIZE:
        parser.error(f"--at: {arguments.at:#x} is not a multiple of the page size, {PAGE_SIZE:#x}")
    task = Task(arguments.pid)
    options = IOMapOptions.kIOMapPrefault
    options |= IOMapOptions(0) if arguments.at else IOMapOptions.kIOMapAnywhere
    options |= IOMapOptions.kIOMapReadOnly if arguments.read_only else IOMapOptions(0)
    begin = time.perf_counter()
    with (
        terminable(),
        contextlib.suppress(KeyboardInterrupt),
        instead_of_wiring("use --pageable"),
        allocate(
            arguments.size, shared=True, wired=not arguments.pageable, contiguous=arguments.contiguous
        ) as buffer,
        buffer.createMappingInTask(task, arguments.at or 0, options) as there,
    ):
        found = _describe(buffer, there, time.perf_counter() - begin)
        if arguments.json:
            print(json.dumps(found, indent=2), flush=True)
        else:
            _show(found)
        _hold(task, arguments.hold)
    return EXIT_OK


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `iobmd share`."""
    parser = argparse.ArgumentParser(
        prog="iobmd share",
        description="Map zeroed memory into this and another process, until the command is interrupted.",
        epilog="Sizes and addresses: decimal, 0x hexadecimal, or with a suffix k, M, G, T.",
    )
    parser.add_argument("pid", type=int, help="the process; one of its threads is stopped briefly")
    parser.add_argument("size", type=size, help="bytes")
    parser.add_argument("--at", type=size, metavar="ADDRESS", help="address in the process (default: any)")
    parser.add_argument("--read-only", action="store_true", help="the process may not write to it")
    parser.add_argument("--contiguous", action="store_true", help="physically contiguous")
    parser.add_argument("--pageable", action="store_true", help="not wired, not limited by RLIMIT_MEMLOCK")
    parser.add_argument("--hold", type=duration, metavar="SECONDS", help="exit after this time")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _describe(buffer: IOBufferMemoryDescriptor, there: IOMemoryMap, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {
        "version": 1,
        "pid": there.getAddressTask().pid,
        "size": len(buffer),
        "address": there.getAddress(),
        "address_here": buffer.getBytesNoCopy(),
        "wiring": buffer.wiring.value,
        "stopped_us": round(there.task_stopped_ns / 1e3, 1),
        "seconds": round(seconds, 6),
    }
    try:
        found["segments"] = [{"physical": address, "length": length} for address, length in buffer.segments()]
    except (NotPrivilegedError, NotReadyError) as error:
        found["segments"], found["hidden"] = None, str(error)
    return found


def _show(found: dict[str, Any]) -> None:
    width = terminal_width()
    show(
        f"{format_size(found['size'])} at {found['address']:#x} of process {found['pid']} and at "
        f"{found['address_here']:#x} here, {found['wiring']}",
        width,
    )
    if found["segments"]:
        first, more = found["segments"][0], len(found["segments"]) - 1
        rest = f", and {more} more" if more else ", all of it"
        show(f"physical: {first['physical']:#x} + {format_size(first['length'])}{rest}", width)
    print(f"a thread of the process was stopped for {format_time(found['stopped_us'] / 1e6)}", flush=True)


def _hold(task: Task, seconds: float | None) -> None:
    """Wait until an interrupt, the exit of the process, or the end of the time."""
    if seconds is None:
        print("press Ctrl-C to unmap it", file=sys.stderr, flush=True)
    end = None if seconds is None else time.monotonic() + seconds
    poll = select.poll()
    if task.pidfd >= 0:
        poll.register(task.pidfd, select.POLLIN)
    while task.alive:
        left = 1.0 if end is None else end - time.monotonic()
        if left <= 0:
            return
        poll.poll(min(left, 1.0) * 1e3)
    print(f"process {task.pid} has exited", file=sys.stderr, flush=True)
