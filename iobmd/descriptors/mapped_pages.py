"""The pages that a map shows: those of the memory, or those of a copy (kIOMemoryMapCopyOnWrite)."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from iobmd.errors import NotReadyError, UnsupportedError
from iobmd.host import headroom
from iobmd.memory.populate import populate
from iobmd.memory.shmem import SharedObject
from iobmd.remote.trust import is_trusted
from iobmd.units import PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iobmd.descriptors.mapping_cache import MapRequest
    from iobmd.descriptors.ownership import MemoryOwner
    from iobmd.memory.shmem import FileExtent
    from iobmd.task.task import Task


class Pages(NamedTuple):
    """Pages to map."""

    extents: list[FileExtent]
    stopped_ns: int = 0
    """Upper bound of the time for which another task was stopped while they were copied."""


@contextlib.contextmanager
def pages(owner: MemoryOwner, request: MapRequest, task: Task) -> Iterator[Pages]:
    """Yield the pages of a request to map in a task; they may be mapped inside the `with` block.

    A copy is made at once. The kernel offers no other way to preserve bytes that every process with a mapping or a
    descriptor of the object may change: a private mapping (MAP_PRIVATE) shows the later bytes of all pages that were
    not written through it, and write protection (userfaultfd(2)) applies to one mapping. The copy is an object that
    nothing else maps, so that guards, fixed addresses and other tasks are as for all maps.
    """
    backing = owner.require_backing()
    if any(origin.purge_control and origin.purge_control.denied for origin in owner.origins()):
        raise NotReadyError(
            "accesses to this volatile memory fault (kIOMemoryPurgeableFaultOnAccess): make it non-volatile first"
        )
    if not request.copies:
        yield Pages(backing.file_extents(request.offset, request.length))
        return
    if backing.has_guard_pages(request.offset, request.length):
        raise UnsupportedError("memory with guard pages cannot be copied: map the parts between them copy-on-write")
    headroom.require(
        request.size, swappable=True, absent=lambda: min(request.size, backing.page_counts()[0] * PAGE_SIZE)
    )
    copy = SharedObject.create(request.size, sealed=not task.is_current and not is_trusted(task))
    try:
        mapping = copy.map()
        try:
            in_page = request.offset - request.first
            stopped = backing.copy_to(request.offset, request.length, mapping.address + in_page)
            if request.prefaults:
                populate(mapping.address, mapping.size)
        finally:
            mapping.close()
        yield Pages(copy.cut(0, copy.size), stopped)
    finally:
        copy.close()
