"""`iobmd copy`: copy a range of a process's memory, all of it or nothing."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from iobmd import procfs
from iobmd._internal.atomic_file import replacing
from iobmd.api import copy
from iobmd.cli import EXIT_OK
from iobmd.cli.arguments import STANDARD_OUTPUT, duration, instead_of_wiring, output, size
from iobmd.cli.folding import show, terminal_width
from iobmd.cli.progress_bar import progress_of
from iobmd.cli.signals import interruptible
from iobmd.errors import BadArgumentError, VMError
from iobmd.task import diagnosis
from iobmd.task.job import TIMEOUT
from iobmd.task.task import Task
from iobmd.units import format_size, format_time, parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iobmd.descriptors.buffer import IOBufferMemoryDescriptor


def main(argv: Sequence[str]) -> int:
    """Run `iobmd copy`."""
    arguments = make_parser().parse_args(argv)
    with contextlib.nullcontext() if arguments.freeze else interruptible():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    task = Task(arguments.pid)
    address, length = _range(task, arguments.address, arguments.size)
    begin = time.perf_counter()
    with progress_of("copy", length) as progress, instead_of_wiring("use --pageable"):
        buffer = copy(
            task,
            address,
            length,
            freeze=arguments.freeze,
            unreadable=arguments.unreadable,
            timeout=arguments.timeout,
            progress=progress,
            wired=not arguments.pageable,
        )
    seconds = time.perf_counter() - begin
    with buffer:
        summary: dict[str, object] = {
            "version": 1,
            "pid": task.pid,
            "address": address,
            "size": length,
            "seconds": round(seconds, 6),
            "gigabytes_per_second": round(length / seconds / 1e9, 3),
            "wiring": buffer.wiring.value,
            "sha256": hashlib.sha256(buffer).hexdigest(),
            "holes": buffer.holes,
            "output": arguments.output,
        }
        if arguments.freeze:
            summary["source_stopped_ms"] = round(buffer.source_stopped_ns / 1e6, 3)
        if arguments.output:
            _write(buffer, arguments.output)
    stream = sys.stderr if arguments.output == STANDARD_OUTPUT else sys.stdout
    _report(summary, buffer.holes, as_json=arguments.json, stream=stream)
    return EXIT_OK


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `iobmd copy`."""
    parser = argparse.ArgumentParser(
        prog="iobmd copy",
        description="Copy a range of a process's memory into a buffer, and optionally to a file.",
        epilog="Sizes and addresses: decimal, 0x hexadecimal, or with a suffix k, M, G, T.",
    )
    parser.add_argument("pid", type=int, help="the process")
    parser.add_argument(
        "address",
        help="an address, a range ADDRESS-END, or a mapping: [heap], libc.so.6, or its range as in /proc/PID/maps",
    )
    parser.add_argument("size", type=size, nargs="?", help="bytes; optional with a range or a mapping")
    parser.add_argument(
        "-o", "--output", type=output, metavar="FILE", help="write the bytes to FILE (-: standard output)"
    )
    parser.add_argument(
        "--freeze", action="store_true", help="copy the bytes as of one moment; the process is stopped briefly"
    )
    parser.add_argument(
        "--unreadable",
        choices=("raise", "zero"),
        default="raise",
        help="what to do about bytes that cannot be read: fail (default), or write zeros",
    )
    parser.add_argument(
        "--timeout",
        type=duration,
        metavar="SECONDS",
        help="how long to wait for a page that another program must supply, and for the lock of the task's address "
        f"space; a limit makes copies slower (default: {TIMEOUT:g}, only for waits whose limit costs no time)",
    )
    wiring = parser.add_mutually_exclusive_group()
    wiring.add_argument("--wired", action="store_true", help="into wired memory (default)")
    wiring.add_argument("--pageable", action="store_true", help="into pageable memory, not limited by RLIMIT_MEMLOCK")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON document")
    return parser


def _range(task: Task, text: str, length: int | None) -> tuple[int, int]:
    """Return the address and size that the arguments specify."""
    if (bounds := _find(task, text) or _numbers(text)) is None:
        raise VMError(f"task {task.pid} has no readable mapping {text!r}: see /proc/{task.pid}/maps")
    start, end = bounds
    if end is None and length is None:
        raise BadArgumentError(f"the size at {text} is missing: add SIZE or -END")
    if end is not None and length is not None and length > end - start:
        raise BadArgumentError(f"SIZE is {length} bytes, but {text} has only {end - start}")
    return start, length or (end or 0) - start


def _numbers(text: str) -> tuple[int, int | None] | None:
    """Read ADDRESS or ADDRESS-END."""
    first, dash, last = text.partition("-")
    try:
        return parse_size(first), parse_size(last) if dash else None
    except ValueError:
        return None


def _find(task: Task, name: str) -> tuple[int, int] | None:
    """Return the first readable range mapped as `name`: a path, a file name, [heap], or a range of /proc/PID/maps."""
    found: tuple[int, int] | None = None
    try:
        for area in procfs.maps(task.pid):
            if f"{area.start:08x}-{area.end:08x}" == name:
                return area.start, area.end
            if name not in (area.name, Path(area.name).name) or not name or "r" not in area.perms:
                continue
            if found and found[1] != area.start:
                break
            found = (found[0] if found else area.start, area.end)
    except PermissionError as error:
        raise diagnosis.refused(task.pid, error.errno or 0, "maps") from None
    except OSError:
        raise diagnosis.without_memory(task.pid) from None
    return found


def _write(buffer: IOBufferMemoryDescriptor, name: str) -> None:
    """Write the whole buffer, or leave an existing file unchanged."""
    path = Path(name)
    if name == STANDARD_OUTPUT:
        sys.stdout.buffer.write(buffer)
        sys.stdout.buffer.flush()
    else:
        with replacing(path, 0o600) as file:  # only the caller may read another process's memory
            file.write(buffer)


def _report(summary: dict[str, object], holes: Sequence[tuple[int, int]], *, as_json: bool, stream: TextIO) -> None:
    if as_json:
        print(json.dumps(summary, indent=2), file=stream)
        return
    length = int(str(summary["size"]))
    rounded = f" ({format_size(length)})" if length >= 1 << 10 else ""
    # The time of a small copy is that of its preparation, not of the transfer.
    speed = f", {summary['gigabytes_per_second']} GB/s" if length >= 1 << 20 else ""
    show(
        f"{length} bytes{rounded} from {int(str(summary['address'])):#x} of process {summary['pid']} "
        f"into {summary['wiring']} memory in {format_time(float(str(summary['seconds'])))}{speed}",
        terminal_width(stream),
        file=stream,
    )
    if "source_stopped_ms" in summary:
        stopped = format_time(float(str(summary["source_stopped_ms"])) / 1e3)
        print(f"the process was stopped for {stopped}", file=stream)
    if holes:
        count, lost = len(holes), sum(size for _offset, size in holes)
        print(f"{lost} bytes in {count} {'range' if count == 1 else 'ranges'} could not be read", file=stream)
    print(f"SHA-256 {summary['sha256']}", file=stream)
    if summary["output"] not in (None, STANDARD_OUTPUT):
        print(f"written to {summary['output']}", file=stream)
