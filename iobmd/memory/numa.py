"""Allocation of memory on a requested NUMA node."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import re
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd._internal.arguments import check_integers
from iobmd._native import mman
from iobmd.errors import BadArgumentError, NoResourcesError
from iobmd.host import limits
from iobmd.units import PAGE_SIZE, format_size, pages

if TYPE_CHECKING:
    from collections.abc import Iterator

_NODES = Path("/sys/devices/system/node")
# A context variable, not a parameter of all functions that map memory, because it only affects where pages are
# allocated.
_wanted: contextvars.ContextVar[int | None] = contextvars.ContextVar("iobmd.memory.numa", default=None)


@contextlib.contextmanager
def on(node: int | None) -> Iterator[None]:
    """Allocate memory that is mapped inside the `with` block on a node; None: on any.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: the node has no memory; the message lists the nodes that have.
    """
    if node is not None:
        check_integers(node=node)
    if node is not None and node not in (have := with_memory()):
        message = f"node {node} has no memory; nodes with memory: {', '.join(map(str, have))}"
        raise BadArgumentError(message)
    token = _wanted.set(node)
    try:
        yield
    finally:
        _wanted.reset(token)


def with_memory() -> list[int]:
    """Return the nodes that have memory; node 0 if the kernel lists none."""
    try:
        listed = (_NODES / "has_memory").read_text().strip()
    except OSError:
        return [0]
    spans = [part.partition("-")[::2] for part in listed.split(",") if part]
    return [node for first, last in spans for node in range(int(first), int(last or first) + 1)]


def wanted() -> int | None:
    """Return the requested node; None: any."""
    return _wanted.get()


def place(address: int, size: int) -> None:
    """Apply the requested node to a range of this process that has no pages yet."""
    node = _wanted.get()
    if node is None:
        return
    try:
        mman.prefer_node(address, size, node)
    except OSError as error:
        if error.errno == errno.ENOSYS and node == 0:  # a kernel without NUMA: all memory is on node 0
            return
        raise limits.from_oserror(error, f"cannot request memory of node {node}") from None


def require_room(size: int) -> None:
    """Raise `kIOReturnNoResources` if the requested node lacks memory for `size` bytes, even without its page cache.

    This is for large memory, which takes long to populate before `require` can refuse it.
    """
    node = _wanted.get()
    if node is None:
        return
    counters = _counters(node)
    available = sum(counters.get(name, 0) for name in ("MemFree", "Active(file)", "Inactive(file)", "KReclaimable"))
    if counters and available < size:
        message = (
            f"node {node} has {format_size(available)} of memory available, but {format_size(size)} were requested"
        )
        raise NoResourcesError(message)


def require(address: int, size: int) -> None:
    """Raise `kIOReturnNoResources` unless every page of a range is present and on the requested node.

    The memory policy only prefers the node, because a strict binding would invoke the OOM killer if the node has no
    free pages.
    """
    node = _wanted.get()
    if node is None:
        return
    try:
        strays = mman.count_off_node(address, pages(size), PAGE_SIZE, node)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return
        raise limits.from_oserror(error, "cannot determine the node of memory") from None
    if strays:
        message = (
            f"{format_size(strays * PAGE_SIZE)} of {format_size(size)} came from other nodes: on node {node} "
            f"{format_size(_counters(node).get('MemFree', 0))} are free"
        )
        raise NoResourcesError(message)


def _counters(node: int) -> dict[str, int]:
    """Return the memory of a node by kind, in bytes; empty if the kernel does not show it."""
    try:
        text = (_NODES / f"node{node}/meminfo").read_text()
    except OSError:
        return {}
    return {name: int(size) << 10 for name, size in re.findall(r"(\S+): +(\d+) kB", text)}
