"""`iobmd demo`: copy memory from another process into wired buffers, and verify the copies."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from iobmd import host, pagemap, procfs
from iobmd.api import allocate, copy
from iobmd.cli import EXIT_FAILED, EXIT_OK, table
from iobmd.cli.arguments import instead_of_wiring, size
from iobmd.cli.demo import core, purgeable, remote
from iobmd.cli.demo.client import GUARDED_PAGE, Client, Piece
from iobmd.cli.demo.compaction import ScatteredPages, collapse, compact, frames
from iobmd.cli.folding import show, terminal_width
from iobmd.constants import IOOptionBits
from iobmd.errors import IOReturnError
from iobmd.memory.mlock import Wiring
from iobmd.task.task import Task, kernel_task
from iobmd.units import HUGE_PAGE_SIZE, PAGE_SIZE, format_size, format_time, round_down

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_SIZE = 64 << 20
CONTIGUOUS = IOOptionBits.kIOMemoryPhysicallyContiguous
WIRED, PAGEABLE = IOOptionBits(0), IOOptionBits.kIOMemoryPageable


class Row(NamedTuple):
    """One copy, and what the kernel reports about its buffer. Sizes in bytes."""

    source: str
    size: int
    gigabytes_per_second: float | None
    """Of the copy. None for contiguous memory of one chunk, whose copy cannot be timed apart from the search."""
    search_seconds: float
    """How long the search for contiguous memory took, which is not part of the speed; 0 for other memory."""
    wiring: str
    resident: int
    """By pagemap."""
    locked: int
    """By smaps."""
    equal: bool
    """Whether the SHA-256 of the copy is the one that the client computed."""


def main(argv: Sequence[str]) -> int:
    """Run `iobmd demo`."""
    arguments = make_parser().parse_args(argv)
    big = arguments.size or _lockable(DEFAULT_SIZE)
    small = min(big, 4 << 20)
    sizes = {"anonymous": big, "THP": big, "memfd": big, "file": small, "read-only": small, "untouched": small}
    if _lockable(HUGE_PAGE_SIZE) == HUGE_PAGE_SIZE:
        sizes["hugetlb"] = HUGE_PAGE_SIZE
    _progress("starting a client with random data in its memory")
    with Client(**sizes, guarded=small) as client, instead_of_wiring("choose a smaller --size"):
        task = Task(client.pid)
        guarded = client.pieces.pop("guarded")
        _progress("copying memory from it")
        _copy(task, client.pieces["anonymous"], PAGEABLE)  # the first touch of a virtual machine's memory is slow
        rows = [_copy(task, piece, WIRED) for piece in client.pieces.values()]
        rows.append(_copy(task, client.pieces["anonymous"], PAGEABLE))
        _progress("searching for contiguous memory, for five seconds at most")
        contiguous = _copy_contiguous(task, client.pieces["THP"])
        refusal = _fail(task, guarded)
        allocated = remote.demonstrate(task, client.pieces["anonymous"])
        _progress("writing a core file of it")
        dumped = core.demonstrate(task, client.pieces["anonymous"])
    rows += [contiguous] if isinstance(contiguous, Row) else []
    _progress("compacting the memory of this host")
    compaction = _compact(arguments.control, min(big, 16 << 20))
    still = not compaction or compaction["pinned"] + compaction["collapse_pinned"] == 0
    _progress("purging memory")
    purged = purgeable.demonstrate(min(big, 16 << 20))
    _progress("")
    passed = all(row.equal for row in rows) and refusal is not None and still and purgeable.is_as_documented(purged)
    passed = passed and remote.is_as_documented(allocated) and core.is_as_documented(dumped)
    if arguments.json:
        document = {"version": 1, "pid": task.pid, "copies": [row._asdict() for row in rows], "refusal": refusal}
        document |= {"contiguous": getattr(contiguous, "size", contiguous), "compaction": compaction}
        document |= {"purgeable": purged, "remote": allocated, "core": dumped}
        print(json.dumps(document | {"passed": passed}, indent=2))
    else:
        _show(task, rows, refusal)
        if isinstance(contiguous, str):
            why = f"No contiguous copy: {contiguous}"
        else:
            why = (
                f"Contiguous memory: {format_size(contiguous.size)} found in "
                f"{format_time(contiguous.search_seconds)}, which is not part of its GB/s."
            )
        print()
        show(why, terminal_width())
        _show_compaction(compaction)
        purgeable.show(purged)
        remote.show(allocated)
        core.show(dumped, client.pieces["anonymous"])
    return EXIT_OK if passed else EXIT_FAILED


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `iobmd demo`."""
    parser = argparse.ArgumentParser(
        prog="iobmd demo",
        description="Copy memory of several kinds from another process into buffers of this one, and check with "
        "the kernel where the copies are located.",
    )
    parser.add_argument("--size", type=size, help="size of large pieces (default: 64M, or as much as may be locked)")
    parser.add_argument(
        "--control", type=size, default=1 << 30, help="span of the mlocked pages for the compaction (default: 1G)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _progress(step: str) -> None:
    """Show the current step on the last line of a terminal, where the next step replaces it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{step}{' …' if step else ''}", end="", file=sys.stderr, flush=True)


def _lockable(size: int) -> int:
    """Return `size`, or less if less may be locked."""
    limit = host.memlock_limit()
    if limit is None:
        return size
    return max(PAGE_SIZE, round_down(min(size, limit // 2), PAGE_SIZE))


def _copy_contiguous(task: Task, piece: Piece) -> Row | str:
    """Copy into contiguous memory; return the reason if it cannot be allocated."""
    try:
        return _copy(task, piece, CONTIGUOUS)
    except IOReturnError as error:
        return str(error)


def _copy(task: Task, piece: Piece, options: IOOptionBits) -> Row:
    started = time.perf_counter()
    begin, copied = started, 0  # contiguous memory is found, then filled: its copy is timed from the first chunk

    def progress(done: int) -> None:
        nonlocal begin, copied
        if not copied and options == CONTIGUOUS:
            begin, copied = time.perf_counter(), done

    with copy(
        task,
        piece.address,
        piece.size,
        wired=options != PAGEABLE,
        contiguous=options == CONTIGUOUS,
        progress=progress,
    ) as buffer:
        seconds = time.perf_counter() - begin
        address = buffer.getBytesNoCopy()
        return Row(
            piece.kind,
            piece.size,
            round((piece.size - copied) / seconds / 1e9, 2) if copied < piece.size else None,
            round(begin - started, 3),
            buffer.wiring.value + (", contiguous" if options == CONTIGUOUS else ""),
            pagemap.counts(kernel_task, address, piece.size).present * PAGE_SIZE,
            _locked(address, piece.size),
            hashlib.sha256(buffer).hexdigest() == piece.sha256,
        )


def _locked(address: int, length: int) -> int:
    """Return how many bytes of the mappings of a range are locked, at most `length`."""
    areas = ((area, counters) for area, counters in procfs.smaps() if area.start < address + length)
    return min(length, sum(counters["Locked"] for area, counters in areas if area.end > address))


def _fail(task: Task, guarded: Piece) -> str | None:
    """Copy memory with an unreadable page; return the error message, or None if it does not name that page."""
    try:
        copy(task, guarded.address, guarded.size).free()
    except IOReturnError as error:
        return str(error) if error.address == guarded.address + GUARDED_PAGE * PAGE_SIZE else None
    return None


def _compact(span: int, length: int) -> dict[str, int] | None:
    """Compact the host's memory; return how many pinned pages and pages of a control moved; None if not permitted."""
    may_compact = os.access("/proc/sys/vm/compact_memory", os.W_OK) and host.has_host_capability("CAP_SYS_ADMIN")
    if not may_compact or host.memlock_limit() is not None:
        return None
    with allocate(length) as ours:
        if ours.wiring is not Wiring.PINNED:
            return None
        control = ScatteredPages(span)
        before = frames(ours.getBytesNoCopy(), len(ours))
        compact()
        after = frames(ours.getBytesNoCopy(), len(ours))
        moved, of = control.moved()
        control.close()
        pinned = sum(old != new for old, new in zip(before, after, strict=True))
    found = {"mlocked": moved, "mlocked_of": of, "pinned": pinned, "pinned_of": len(before)}
    return found | {"collapse_mlocked": collapse(pin=False), "collapse_pinned": collapse(pin=True)}


def _show_compaction(found: dict[str, int] | None) -> None:
    if found is None:
        print()
        show("Not shown: what compaction moves (requires root, visible page frames and io_uring).", terminal_width())
        return
    pages = HUGE_PAGE_SIZE // PAGE_SIZE
    print(
        f"\nAfter one compaction of this host's memory:\n"
        f"  mlocked only: {found['mlocked']:,} of {found['mlocked_of']:,} pages moved\n"
        f"  pinned:       {found['pinned']:,} of {found['pinned_of']:,}\n"
        f"After small pages were collapsed into a huge page:\n"
        f"  mlocked only: {found['collapse_mlocked']:,} of {pages:,} pages moved\n"
        f"  pinned:       {found['collapse_pinned']:,} of {pages:,}\n"
        f"The old page frame of a page that moved may now hold other memory."
    )


def _show(task: Task, rows: list[Row], refusal: str | None) -> None:
    cells = [
        (
            row.source,
            format_size(row.size),
            "" if row.gigabytes_per_second is None else f"{row.gigabytes_per_second:.2f}",
            row.wiring,
            f"{row.resident / row.size:.0%}",
            f"{row.locked / row.size:.0%}",
            "equal" if row.equal else "DIFFERENT",
        )
        for row in rows
    ]
    columns = ("source", "size", "GB/s", "wiring", "resident (pagemap)", "locked (smaps)", "SHA-256")
    table.show(f"withCopy from process {task.pid} into buffers of this one", columns, cells, right=(1, 2, 4, 5))
    print("\nA copy that must fail, because one of its pages is not readable:")
    show(f"  {refusal or 'it did not fail with the expected error'}", terminal_width(), indent="")
