"""`iobmd alloc`: allocate memory as a driver would, and report its location."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from iobmd.api import allocate
from iobmd.cli import EXIT_OK, table
from iobmd.cli.arguments import duration, instead_of_wiring, size
from iobmd.cli.folding import show, terminal_width
from iobmd.cli.progress_bar import progress_of
from iobmd.errors import IOReturnError, NotPrivilegedError, NotReadyError
from iobmd.physical.policy import Names, Policy, applied
from iobmd.units import format_size, format_time

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iobmd.descriptors.buffer import IOBufferMemoryDescriptor

_NAMES = Names("--reserve", "--budget SIZE", "--seconds S")

SHOWN = 16
"""Segments shown in the table; --json has all."""


def main(argv: Sequence[str]) -> int:
    """Run `iobmd alloc`."""
    arguments = make_parser().parse_args(argv)
    begin = time.perf_counter()
    limits = Policy(arguments.reserve, arguments.budget, arguments.seconds, _NAMES)
    with applied(limits), instead_of_wiring("allocate less"), progress_of("alloc", arguments.size) as progress:
        buffer = allocate(
            arguments.size,
            contiguous=arguments.contiguous,
            alignment=arguments.align or 1,
            physical_mask=arguments.mask or 0,
            node=arguments.node,
            progress=progress,
        )
    seconds = time.perf_counter() - begin
    with buffer:
        found = _describe(buffer, seconds)
        if arguments.json:
            print(json.dumps(found, indent=2), flush=True)
        else:
            _show(found)
        if arguments.hold:
            time.sleep(arguments.hold)
            _verify(buffer)
    return EXIT_OK


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `iobmd alloc`."""
    parser = argparse.ArgumentParser(
        prog="iobmd alloc",
        description="Allocate wired memory, report its location, and free it.",
        epilog="Sizes and masks: decimal, 0x hexadecimal, or with a suffix k, M, G, T.",
    )
    parser.add_argument("size", type=size, help="bytes")
    parser.add_argument("--contiguous", action="store_true", help="physically contiguous")
    parser.add_argument("--align", type=size, metavar="A", help="alignment of the virtual and the physical address")
    parser.add_argument("--mask", type=size, metavar="M", help="only physical addresses within these bits")
    parser.add_argument("--node", type=int, metavar="N", help="only memory of this NUMA node")
    parser.add_argument(
        "--hold", type=duration, metavar="SECONDS", help="hold it for this time, then verify that no page moved"
    )
    parser.add_argument("--reserve", action="store_true", help="enlarge hugetlb pools temporarily (root)")
    parser.add_argument("--budget", type=size, metavar="SIZE", help="memory that the search may hold")
    parser.add_argument("--seconds", type=duration, metavar="S", help="time that the search may take (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _describe(buffer: IOBufferMemoryDescriptor, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {
        "version": 1,
        "size": len(buffer),
        "address": buffer.getBytesNoCopy(),
        "wiring": buffer.wiring.value,
        "seconds": round(seconds, 6),
    }
    try:
        layout = buffer.layout()
        segments = [{"address": segment.address, "length": segment.length} for segment in buffer.segments()]
        return found | {
            "hidden": None,
            "layout": layout._asdict() | {"contiguous": layout.contiguous},
            "segments": segments,
        }
    except IOReturnError as error:
        return found | {"hidden": error.strerror, "layout": None, "segments": []}


def _show(found: dict[str, Any]) -> None:
    print(
        f"{format_size(found['size'])} at {found['address']:#x}, {found['wiring']}, "
        f"in {format_time(found['seconds'])}",
        flush=True,
    )
    if found["hidden"]:
        show(f"physical addresses: {found['hidden']}", terminal_width())
        return
    segments, layout = found["segments"], found["layout"]
    shape = (
        "contiguous"
        if layout["contiguous"]
        else f"{layout['runs']} runs, the largest {format_size(layout['largest'])}"
    )
    rows = [(f"{one['address']:#x}", format_size(one["length"])) for one in segments[:SHOWN]]
    table.show(f"{shape}; {format_size(layout['huge'])} in huge pages", ("physical", "length"), rows, right=(0, 1))
    if len(segments) > SHOWN:
        print(f"… and {len(segments) - SHOWN} more (--json has all)", flush=True)


def _verify(buffer: IOBufferMemoryDescriptor) -> None:
    """Raise `kIOReturnVMError` if a page has moved."""
    try:
        buffer.verify()
    except (NotReadyError, NotPrivilegedError) as error:
        print(f"cannot be verified: {error}", file=sys.stderr)
    else:
        print("verified: no page has moved", file=sys.stderr)
