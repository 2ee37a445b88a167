"""The kernel resources that a worker holds, and those that remain when its work is done."""

from __future__ import annotations

import re
import threading
from collections import Counter
from typing import NamedTuple

from . import kernel

STACK = 1 << 20 | 64 << 10
"""Bytes of a thread's stack in workers: no other mapping has this size, and glibc keeps some stacks for reuse."""
ENVIRONMENT = {
    "PYTHONMALLOC": "malloc",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
}
"""Makes the interpreter allocate its objects in the heap, so that anonymous mappings belong to iobmd or are
stacks."""


class Footprint(NamedTuple):
    """The resources of this process at one moment."""

    anonymous: int
    """Bytes of anonymous mappings that are neither heap nor stacks."""
    named: Counter[str]
    descriptors: Counter[str]
    locked: int
    hugetlb: int
    threads: Counter[str]
    children: int

    @classmethod
    def now(cls) -> Footprint:
        """Return the resources of this process."""
        fields = kernel.status()
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        found = kernel.mappings()
        return cls(
            _anonymous(found),
            Counter(_generic(mapping.name) for mapping in found if mapping.name[:1] == "/"),
            Counter(_generic(entry.partition(" ")[2]) for entry in kernel.descriptors()),
            1024 * (kernel.kibibytes(fields, "VmLck") + kernel.kibibytes(fields, "VmPin")),
            kernel.kibibytes(fields, "HugetlbPages"),
            Counter(names.get(thread, "unknown to Python") for thread in kernel.threads()),
            len(kernel.children()),
        )

    def left(self, before: Footprint) -> dict[str, tuple[int, str]]:
        """Return the increases since `before`: for each leak in the report, the amount and a sentence."""
        found: dict[str, tuple[int, str]] = {}
        more = self.named - before.named
        grown = max(0, self.anonymous - before.anonymous)
        if more or grown:
            count = more.total() or 1
            found["leaked_mappings"] = count, f"{grown >> 10} KiB of anonymous memory, and {dict(more)}"
        if more := self.descriptors - before.descriptors:
            found["leaked_descriptors"] = more.total(), str(dict(more))
        if self.locked > before.locked:
            found["leaked_locked_bytes"] = self.locked - before.locked, f"{self.locked} bytes locked and pinned"
        if self.hugetlb > before.hugetlb:
            found["leaked_hugetlb_pages"] = self.hugetlb - before.hugetlb, f"{self.hugetlb} KiB"
        if more := self.threads - before.threads:
            found["leaked_threads"] = more.total(), str(dict(more))
        if self.children > before.children:
            found["leaked_processes"] = self.children - before.children, f"{self.children} children"
        return found


def _anonymous(mappings: list[kernel.Mapping]) -> int:
    total, guard = 0, 0
    for mapping in mappings:
        if mapping.name:
            guard = 0
            continue
        if guard and mapping.start == guard and mapping.size in (STACK, STACK - kernel.PAGE):
            total -= kernel.PAGE
        else:
            total += mapping.size
        is_guard = mapping.permissions == "---p" and mapping.size == kernel.PAGE
        guard = mapping.end if is_guard else 0
    return total


def _generic(name: str) -> str:
    """Return a name without the parts that differ between objects of the same kind."""
    return re.sub(r"\d+", "N", name)
