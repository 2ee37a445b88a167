"""Where pages really lie, by /proc/PID/pagemap (proc_pid_pagemap(5)).

The kernel shows physical frame numbers to holders of CAP_SYS_ADMIN only; for everybody else they read 0, which is
reported here as hidden, never as an address.
"""

from iobmd.pagemap.entries import Page, PageCounts, counts, pages
from iobmd.pagemap.ownmemory import certain_bytes, has_content, huge_bytes, is_huge, own_ranges, resident_and_dirty
from iobmd.pagemap.runs import Run, runs

__all__ = [
    "Page",
    "PageCounts",
    "Run",
    "certain_bytes",
    "counts",
    "has_content",
    "huge_bytes",
    "is_huge",
    "own_ranges",
    "pages",
    "resident_and_dirty",
    "runs",
]
