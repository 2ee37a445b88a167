"""Memory of a NUMA node that is asked for."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import re
from pathlib import Path
from typing import TYPE_CHECKING

from iobmd._native import mman
from iobmd.errors import BadArgumentError, NoResourcesError
from iobmd.host import limits
from iobmd.units import PAGE_SIZE, format_size, pages

if TYPE_CHECKING:
    from collections.abc import Iterator

_NODES = Path("/sys/devices/system/node")
# Not a parameter of everything that maps memory: it says where an allocation's pages come from, not what they are.
_wanted: contextvars.ContextVar[int | None] = contextvars.ContextVar("iobmd.memory.numa", default=None)


@contextlib.contextmanager
def on(node: int | None) -> Iterator[None]:
    """Have memory that is mapped inside of the `with` come from a node, None: from any.

    Raises
    ------
    IOReturnError
        `kIOReturnBadArgument`: it has no memory; it says which have.
    """
    if node is not None and node not in (have := with_memory()):
        message = f"node {node} has no memory; of this host have: {', '.join(map(str, have))}"
        raise BadArgumentError(message)
    token = _wanted.set(node)
    try:
        yield
    finally:
        _wanted.reset(token)


def with_memory() -> list[int]:
    """Return the nodes that have memory; the node 0 where the kernel knows no others."""
    try:
        listed = (_NODES / "has_memory").read_text().strip()
    except OSError:
        return [0]
    spans = [part.partition("-")[::2] for part in listed.split(",") if part]
    return [node for first, last in spans for node in range(int(first), int(last or first) + 1)]


def is_wanted() -> bool:
    """Say whether a node is wanted."""
    return _wanted.get() is not None


def place(address: int, size: int) -> None:
    """Have a range of this process, in which no page is there yet, come from the node that is wanted."""
    node = _wanted.get()
    if node is None:
        return
    try:
        mman.prefer_node(address, size, node)
    except OSError as error:
        if error.errno == errno.ENOSYS and node == 0:  # a kernel without NUMA: all memory is that of node 0
            return
        raise limits.from_oserror(error, f"cannot ask for memory of node {node}") from None


def require(address: int, size: int) -> None:
    """Raise `kIOReturnNoResources` unless every page of a range is there, and lies on the node that is wanted.

    The kernel is only asked to prefer a node: for want of pages of one that it is bound to, it would kill.
    """
    node = _wanted.get()
    if node is None:
        return
    try:
        strays = mman.count_off_node(address, pages(size), PAGE_SIZE, node)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return
        raise limits.from_oserror(error, "cannot see on which node memory lies") from None
    if strays:
        message = (
            f"{format_size(strays * PAGE_SIZE)} of {format_size(size)} came from other nodes: of the node {node} "
            f"{format_size(_free(node))} are free"
        )
        raise NoResourcesError(message)


def _free(node: int) -> int:
    found = re.search(r"MemFree: +(\d+) kB", (_NODES / f"node{node}/meminfo").read_text())
    return int(found[1]) << 10 if found else 0
