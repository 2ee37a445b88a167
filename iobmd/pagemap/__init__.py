"""The positions of pages in physical memory, from /proc/PID/pagemap (proc_pid_pagemap(5)).

The kernel shows physical frame numbers only to holders of CAP_SYS_ADMIN. Other users read 0, which is reported as
hidden, never as an address.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from iobmd.pagemap.file import Page, PageCounts, counts, pages
from iobmd.pagemap.self import huge_bytes, is_huge

if TYPE_CHECKING:
    from iobmd.pagemap.area import Area, areas
    from iobmd.pagemap.census import FrameRun, HostMemory, LonelyPage, MapRow, ZoneMemory, host_memory
    from iobmd.pagemap.change import Change, Kind, changes
    from iobmd.pagemap.frame import DescribedRun, FrameFacts, FrameMapping, Frames, described, users
    from iobmd.pagemap.page_cache import FileCache, file_cache
    from iobmd.pagemap.sampler import heat
    from iobmd.pagemap.sampling import Heat, Method, Part, Sample, Unseen
    from iobmd.pagemap.segment import Segment, segments
    from iobmd.pagemap.snapshot import Header, Snapshot, save
    from iobmd.pagemap.span import Run, Span, runs, spans

_LATER = {
    "area": ("Area", "areas"),
    "census": ("FrameRun", "HostMemory", "LonelyPage", "MapRow", "ZoneMemory", "host_memory"),
    "change": ("Change", "Kind", "changes"),
    "page_cache": ("FileCache", "file_cache"),
    "frame": ("DescribedRun", "FrameFacts", "Frames", "FrameMapping", "described", "users"),
    "sampler": ("heat",),
    "sampling": ("Heat", "Method", "Part", "Sample", "Unseen"),
    "segment": ("Segment", "segments"),
    "snapshot": ("Header", "Snapshot", "save"),
    "span": ("Run", "Span", "runs", "spans"),
}
"""Names by module. A module is loaded when one of its names is used; allocating memory needs none of them."""


def __getattr__(name: str) -> object:
    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the documented names."""
    return sorted(__all__)


__all__ = [
    "Area",
    "Change",
    "DescribedRun",
    "FileCache",
    "FrameFacts",
    "FrameRun",
    "Frames",
    "Header",
    "Heat",
    "HostMemory",
    "Kind",
    "LonelyPage",
    "MapRow",
    "Method",
    "Page",
    "PageCounts",
    "Part",
    "Run",
    "Sample",
    "Segment",
    "Snapshot",
    "Span",
    "Unseen",
    "FrameMapping",
    "ZoneMemory",
    "areas",
    "changes",
    "counts",
    "described",
    "file_cache",
    "heat",
    "host_memory",
    "huge_bytes",
    "is_huge",
    "pages",
    "runs",
    "save",
    "segments",
    "spans",
    "users",
]
