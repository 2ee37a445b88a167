"""`--heat`: which memory of a process is used, as a picture of time and addresses, and the working set."""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import partial
from typing import TYPE_CHECKING

from iobmd.cli.folding import folded, terminal_width
from iobmd.pagemap.sampler import open_sampler, tracks_accesses
from iobmd.pagemap.sampling import SHORTEST, Heat, Method, check_interval, sampled
from iobmd.remote import userfaultfd
from iobmd.units import format_count, format_size, format_time

from . import picture
from .document import VERSION, write_list
from .heat_image import HeatImage
from .heatmap import draw
from .look import Look

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from iobmd.procfs import VMA

INTERVALS = 60
"""Maximum number of intervals by default: a terminal of 80 columns shows half of them."""
_PERCENTILES = (10, 50, 90, 100)
_LINES = 40
"""Lines of the output in a file or a pipe."""
_LEAST_ROWS, _AROUND = 6, 5

_DETECTION = {
    Method.ACCESSED: "reads and writes of single pages (userfaultfd, read-write protection)",
    Method.WRITTEN: "writes to single pages, not reads (userfaultfd, write protection)",
    Method.DAMON: "reads and writes of regions, estimated from samples of single pages (DAMON)",
    Method.REFERENCED: "referenced bits of whole areas (clear_refs, smaps)",
}
_COSTS = {
    Method.ACCESSED: "the first use of a page in an interval cost the process a page fault",
    Method.WRITTEN: "the first write to a page in an interval cost the process a page fault",
    Method.DAMON: "the kernel checked a page of each region 20 times per interval",
    Method.REFERENCED: "clearing the bits affects which memory the kernel considers inactive",
}
_CAVEATS = {
    Method.REFERENCED: "pages whose translation stays in the processor's cache (TLB), and which pages of an area "
    "were used (--method written: writes, by page)",
    Method.WRITTEN: "memory that is only read",
    Method.DAMON: "differences within a region, and pages whose translation stays in the processor's cache (TLB)",
}


def run(arguments: argparse.Namespace) -> None:
    """Sample, and print the picture or the document."""
    look = Look(arguments)
    image = picture.format_of(arguments)
    method = Method(arguments.method) if arguments.method else _best()
    tracked = method in (Method.ACCESSED, Method.WRITTEN)
    intervals = arguments.count or max(1, min(INTERVALS, int(arguments.heat / (2 * SHORTEST))))
    interval = check_interval(arguments.heat, intervals)
    tracker = userfaultfd.open_in(look.task) if tracked else None

    def chooses(vma: VMA) -> bool:
        return look.may_choose(vma, vma.end - vma.start)

    sampler = open_sampler(look.where, method, interval, tracker, chooses)
    heat = sampled(sampler, look.where, arguments.heat, intervals, progress=_progress(arguments.heat))
    if arguments.json:
        _write(look, heat)
    elif image:
        kind, path = image
        drawing = HeatImage(look.title, heat, [*summary(look, heat)][1:], [*remarks(heat)])
        picture.save(path, look.title, partial(picture.write, kind, drawing))
    else:
        _print(look, heat)
    if heat.has_ended:
        print(f"{look.title} has exited", file=sys.stderr)


def _best() -> Method:
    return Method.ACCESSED if tracks_accesses() else Method.REFERENCED


def _progress(seconds: float) -> Callable[[float], None] | None:
    """Return a function that shows the progress on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        return None

    def progress(elapsed: float) -> None:
        left = f"{elapsed:.0f} of {seconds:.0f} s"
        ending = "\r\x1b[K" if elapsed >= seconds else f"\r{left} (Ctrl-C ends it) "
        print(ending, end="", file=sys.stderr, flush=True)

    return progress


def _print(look: Look, heat: Heat) -> None:
    width = terminal_width()
    above, below = ([folded(line, width) for line in lines] for lines in (summary(look, heat), remarks(heat)))
    print(*above, sep="\n")
    if heat.resident:
        columns, lines = shutil.get_terminal_size((100, _LINES))
        written = sum(line.count("\n") + 1 for line in above + below)
        print()
        draw(heat, columns, max(_LEAST_ROWS, (lines if width else _LINES) - written - _AROUND))
        print()
    print(*below, sep="\n")


def summary(look: Look, heat: Heat) -> Iterator[str]:
    """Iterate over the lines above the picture."""
    last = heat.samples[-1]
    each = f"{format_count(len(heat.samples), 'interval')} of {format_time(last.time / len(heat.samples))}"
    yield f"{look.title}: {format_time(last.time)}, {each}"
    yield f"method {heat.method}: {_DETECTION[heat.method]}"
    verb = "written" if heat.method == Method.WRITTEN else "used"
    ever, resident = min(heat.used_ever().used, heat.resident), heat.resident
    if heat.is_exact:
        found = heat.by_frequency()
        never, always = found.get(0, 0), found.get(len(heat.samples), 0)
        split = f"{format_size(always)} {verb} in every interval, {format_size(resident - never - always)} in some"
        yield f"of {format_size(resident)} resident: {split}, {_share(never, resident)} never"
    else:
        unused = _share(resident - ever, resident)
        yield f"of {format_size(resident)} resident: at least {format_size(ever)} {verb}, at most {unused} never"
    sizes = ", ".join(
        f"{'largest' if percent == 100 else 'median' if percent == 50 else f'{percent} %'} "
        f"{format_size(heat.working_set(percent))}"
        for percent in _PERCENTILES
    )
    yield f"{verb} per interval: {sizes}"


def _share(part: int, whole: int) -> str:
    return f"{format_size(part)} ({part * 100 // whole if whole else 0} %)"


def remarks(heat: Heat) -> Iterator[str]:
    """Iterate over the lines below the picture: what is not seen, and what the sampling cost."""
    for unseen in heat.unseen:
        size = "" if unseen.size is None else f"{format_size(unseen.size)} of "
        yield f"not seen: {size}{unseen.what}"
    if heat.method in _CAVEATS:
        yield f"not seen: {_CAVEATS[heat.method]}"
    took = sum(sample.took for sample in heat.samples)
    faults = format_count(heat.page_faults, "page fault")
    yield f"cost: {format_time(took)} of reading; {faults} of the process; {_COSTS[heat.method]}"


def _write(look: Look, heat: Heat) -> None:
    """Print a JSON document."""
    ever = heat.used_ever()
    head = {
        "version": VERSION,
        "pid": look.task.pid,
        "name": look.name,
        "time": round(look.time),
        "kernel": os.uname().release,
        "method": heat.method,
        "resolution_bytes": heat.resolution,
        "resident_bytes": heat.resident,
        "used_bytes": ever.used,
        "used_is_lower_bound": not heat.is_exact,
        "working_set_bytes": {str(percent): heat.working_set(percent) for percent in (0, *_PERCENTILES)},
        "not_seen": [{"what": unseen.what, "bytes": unseen.size} for unseen in heat.unseen],
        "page_faults": heat.page_faults,
        "has_exited": heat.has_ended,
        "intervals": [
            {"time": sample.time, "seconds": sample.seconds, "took": sample.took, "used_bytes": sample.used}
            for sample in heat.samples
        ],
    }
    print(json.dumps(head)[:-1], end=',\n"areas": [')
    write_list(
        {
            "start": vma.start,
            "end": vma.end,
            "name": vma.name,
            "resident_bytes": resident.used,
            "used_bytes": ever.used_in(vma.start, vma.end),
            "used_bytes_per_interval": [sample.used_in(vma.start, vma.end) for sample in heat.samples],
        }
        for vma, resident in heat.parts
    )
    print('],\n"used_ranges": ', end="")
    if heat.is_exact:
        print("[", end="")
        write_list({"start": start, "end": end, "intervals": count} for start, end, count in heat.counted())
        print("]}")
    else:
        print("null}")
